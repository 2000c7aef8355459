"""A model of linears as large as its weights are: by its config, or by sizes of their own beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmcompress.models.dense.config import packing_entry
from llmcompress.models.dense.headers import Header
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.skeleton import outline

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# A dense model whose blocks have widths of their own has them in the `quantization_config` that lets llmcompress help
# transformers to load it: other entries of a config have no place for them. It names no compressed matrix.


def own_sizes(entries: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the `[out, in]` by linear in a config.json of such a model, empty for any other. Raises InputError."""
    packing = entries.get("quantization_config")
    if not isinstance(packing, dict) or packing.get("layers") or not packing.get("sizes"):
        return {}
    from llmcompress.models.transformers.hf_quantizer import NAME, LLMCompressConfig

    return LLMCompressConfig(**packing).sizes if packing.get("quant_method") == NAME else {}


def is_dense(entries: Mapping[str, Any]) -> bool:
    """True if the entries of a config.json name no compressed matrix."""
    return not packing_entry(entries) or bool(own_sizes(entries))


def sized_outline(
    config: PreTrainedConfig, place: Place, stored: Mapping[str, Header], sizes: Mapping[str, Sequence[int]]
) -> PreTrainedModel:
    """Return the model that a config describes, on meta, with linears of these `sizes`; raises as `outline` does."""
    disk = sum(path.stat().st_size for path in {header.file for header in stored.values()})
    return with_sizes(outline(config, place.folder, len(stored), disk, place.trust_remote_code), sizes)


def with_sizes(model: PreTrainedModel, sizes: Mapping[str, Sequence[int]]) -> PreTrainedModel:
    """Return a model on meta with its linears resized. Raises InputError for sizes that do not fit each other."""
    if sizes:
        from llmcompress.models.transformers.resize import resize

        resize(model, sizes)
    return model
