"""A compressed checkpoint as a dense model on disk: a weight is decoded when it is read, so memory holds one block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from llmcompress.models.dense.headers import read_headers
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.dense.remote_code import load_config
from llmcompress.models.dense.skeleton import described, transposed_linears
from llmcompress.models.files.compressed import Opened
from llmcompress.models.transformers.hf_quantizer import resize
from llmcompress.weight.expression import dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class DecodedSource(DenseModel):
    """A compressed model whose tensors are decoded, in float32, as they are read. `transposed`: the module paths of
    linears that the model stores as `[in, out]`."""

    checkpoint: Opened = field(kw_only=True)
    transposed: frozenset[str] = field(kw_only=True)

    def read(self, name: str) -> Tensor:
        """Return the tensor `name`: decoded if it is compressed, else as it is stored. Raises InputError for damage."""
        stored = self.tied.get(name, name)
        layer = stored.removesuffix(".weight")
        if stored == layer or layer not in self.checkpoint.layouts:
            return self.checkpoint.read(stored)
        value = dense(self.checkpoint.expression(layer))
        return value.T.contiguous() if layer in self.transposed else value

    def skeleton(self) -> PreTrainedModel:
        """Return a new model in eval mode, with parameters on meta, its linears of the sizes that are stored."""
        model = described(self.folder, trust_remote_code=self.trust_remote_code)
        sizes = {name: list(layout.size) for name, layout in self.checkpoint.layouts.items()}
        resize(model, self.checkpoint.sizes | sizes)
        return model


def decoded_source(place: Place) -> DecodedSource:
    """Return the compressed model at `place`. Raises InputError for a folder that is damaged or holds no such model."""
    checkpoint = Opened(place.folder, place.trust_remote_code)
    skeleton = described(place.folder, trust_remote_code=place.trust_remote_code)
    config = load_config(place.folder, place.trust_remote_code)
    vars(config).pop("quantization_config", None)
    stored = checkpoint.files
    ties = (getattr(skeleton, "all_tied_weights_keys", None) or {}).items()
    return DecodedSource(
        place.name,
        place.folder,
        None,
        config,
        read_headers(place.folder),
        {alias: origin for alias, origin in ties if alias not in stored and origin in stored},
        trust_remote_code=place.trust_remote_code,
        checkpoint=checkpoint,
        transposed=frozenset(transposed_linears(place.folder, place.trust_remote_code)),
    )
