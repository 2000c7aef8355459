"""A compressed checkpoint on disk: opened one layer at a time, decoded as it is read, and checked once written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from glob import escape
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import InputError, RecipeError, list_names
from llmcompress.models.dense.companions import read_generation_config
from llmcompress.models.dense.config import (
    MODEL,
    check_entries,
    load_config,
    model_code,
    needs_code,
    packing_entry,
    public_entries,
)
from llmcompress.models.dense.headers import read_headers
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.dense.skeleton import dense_skeleton, folder_skeleton, transposed_linears
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.checkpoint import PART, check_manifest, manifest
from llmcompress.models.files.file_names import MANIFEST
from llmcompress.models.files.identity import check_binding, tokenizer_files
from llmcompress.models.files.integrity import DIGESTS, MENDING, digest, files_beyond, read_digests, weight_files
from llmcompress.models.files.reading import check_folder, open_tensors, read_json
from llmcompress.models.files.tensor_files import shards
from llmcompress.models.transformers.hf_quantizer import NAME, LLMCompressConfig, LLMCompressQuantizer
from llmcompress.models.transformers.resize import resize
from llmcompress.runtime.progress import count_each
from llmcompress.weight.algebra import add_to_base, truncate_low_rank
from llmcompress.weight.encoding import decode
from llmcompress.weight.expression import dense
from llmcompress.weight.layout import PayloadPiece, pieces
from llmcompress.weight.modules import LIKE
from llmcompress.weight.nodes import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CompressedCheckpoint:
    """A compressed checkpoint on disk.

    layouts: of each compressed module; tied: of each matrix that several linears have in common; stored_layouts: of
    both; whole: the same without a `rank`. ties: the name of that matrix for each such linear. sizes: `[out, in]` of
    dense linears whose size the rest of config.json does not give. files: of each tensor; digests: the entry of each
    file's header.

    With a `rank`, each weight has at most so many components of its low-rank terms; of a file of several sizes the
    smallest that has them is read, and no other file. Layouts are those of that size.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False, rank: int | None = None) -> None:
        check_kind(folder)
        beyond = files_beyond(folder, rank)
        is_checked = check_manifest(folder, beyond)
        model_code(folder, trust_remote_code)  # raises unless it is trusted
        self.folder, self.trust_remote_code, self.rank = folder, trust_remote_code, rank
        entries = read_json(folder / MODEL)
        check_entries(entries, str(folder / MODEL))
        self.config = public_entries(entries, needs_code(folder, MODEL))
        quantization = LLMCompressConfig(**self.config.pop("quantization_config") | {"rank": rank})
        self.levels, self.ties = quantization.levels(), quantization.ties
        self.stored_layouts = self.levels[-1]
        self.whole = self.stored_layouts if rank is None else quantization.tables()[None]
        if rank is not None and self.ties:
            raise RecipeError(
                f"{folder} has matrices in common, whose terms are not taken apart; take it whole, or an untied model"
            )
        self.tied = {name: self.stored_layouts[name] for name in dict.fromkeys(self.ties.values())}
        self.layouts = {name: layout for name, layout in self.stored_layouts.items() if name not in self.tied}
        self.sizes = quantization.sizes
        self.files: dict[str, Path] = {}
        self.digests: dict[str, str] = {}
        for path in (path for path in weight_files(folder) if path.name not in beyond):
            with open_tensors(path, MENDING) as file:
                self.files.update(dict.fromkeys(file.keys(), path))
                self.digests[path.name] = (file.metadata() or {}).get(DIGESTS, "")
        self.paths = set(self.files.values())
        if not is_checked:
            check_binding(sorted(self.paths))
        if lacking := [name for name in self.stored_layouts if not self._pieces(name).keys() <= self.files.keys()]:
            raise InputError(f"{folder} lacks the weights of {list_names(lacking)}; {MENDING}")
        self._files, parts = self.files, {name for layer in self.stored_layouts for name in self._pieces(layer)}
        self.files = {name: path for name, path in self.files.items() if name not in parts or name.endswith(".weight")}

    def _pieces(self, layer: str) -> dict[str, PayloadPiece]:
        """Return the pieces of a module's payload by the names of their tensors."""
        levels = [table[layer] for table in self.levels]
        return {f"{layer}.{piece.name}": piece for piece in pieces(levels)}

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The dense model, parameters on meta, for its names and shapes alone; built once, and changed by no reader."""
        return folder_skeleton(self.folder, trust_remote_code=self.trust_remote_code)

    @property
    def bytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def dense_bytes(self) -> int:
        """Upper bound of the size in bytes with all matrices in bfloat16."""
        return 2 * sum(layout.size[0] * layout.size[1] for layout in self.layouts.values()) + self.bytes

    def read(self, name: str) -> Tensor:
        """Return one stored tensor, or a whole payload. Raises InputError if its file is damaged."""
        layer = name.removesuffix(".weight")
        parts = self._pieces(layer) if name != layer and layer in self.stored_layouts else {}
        tensors: list[Tensor] = []
        for part in parts or [name]:
            with open_tensors(path := self._files[part], MENDING) as file:
                tensors.append(file.get_tensor(part))
                written = read_digests(path, file.metadata())
            if digest(tensors[-1], parts[part].layout.text if parts else "") != written.get(part):
                raise InputError(f"{path}: {part} is not as it was written, so the file is damaged; {MENDING}")
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def read_plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the stored tensors `names`, without an embedding's `LIKE`, which no other engine knows."""
        return {name: self.read(name) for name in names if not name.endswith(f".{LIKE}")}

    def expression(self, layer: str) -> Weight:
        """Return the compressed weight of one module. Raises InputError for a payload that its layout cannot read."""
        own = self._decoded(layer)
        own = own if self.rank is None else truncate_low_rank(own, self.rank)
        return add_to_base(self._decoded(self.ties[layer]), own) if layer in self.ties else own

    def _decoded(self, layer: str) -> Weight:
        layout, payload = self.stored_layouts[layer], self.read(f"{layer}.weight")
        try:
            layout.check(payload)
        except ValueError as error:
            raise InputError(
                f"{self.folder} holds a payload of {layer} that is damaged ({error}); {MENDING}"
            ) from error
        return decode(layout.header, layout.views(payload))

    def parts(self, apart: Iterable[str] = ()) -> Iterator[tuple[list[str], list[str]]]:
        """Yield compressed modules and names of other tensors, at most PART bytes in bfloat16 at a time.

        All of a module in `apart` comes at once. A matrix that several linears have in common is left out, since it is
        in the `expression` of each.
        """
        layers, tied = {f"{layer}.weight": layer for layer in self.layouts}, {f"{name}.weight" for name in self.tied}
        sizes = {}
        files = [(name, path) for name, path in self.files.items() if name not in tied]
        for name, path in sorted(files, key=lambda file: (file[1], _natural(file[0]))):
            with open_tensors(path, MENDING) as file:
                values = prod(file.get_slice(name).get_shape())
            sizes[name] = 2 * (prod(self.layouts[layers[name]].size) if name in layers else values)
        groups = [[name for name in sizes if name.startswith(f"{module}.")] for module in apart]
        inside = {name for names in groups for name in names}
        groups += shards({name: size for name, size in sizes.items() if name not in inside}, PART)
        for names in count_each(groups, "part read"):
            yield [layers[name] for name in names if name in layers], [name for name in names if name not in layers]


def _natural(name: str) -> list[str | int]:
    """Return a key by which block 2 comes before block 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def round_to_bfloat16(value: Tensor) -> tuple[Tensor, float]:
    """Return a matrix in bfloat16, and its relative error."""
    stored = value.to(torch.bfloat16)
    return stored, float((stored.float() - value).norm() / value.norm().clamp_min(1e-30))


def check_kind(folder: Path) -> None:
    """Raise InputError for a folder without a checkpoint of llmcompress."""
    if (kind := stored_by(folder)) != NAME:
        held = f"a model stored by {str(kind)[:50]}" if kind else "no model compressed by llmcompress"
        raise InputError(f"{folder} holds {held}; give the folder that compress wrote without --for")


def stored_by(folder: Path) -> Any:
    """Return the name of the library that stored the weights in a folder, as config.json has it; None for plain ones.

    Raises InputError for a folder without a config.json.
    """
    check_folder(folder)
    packing = packing_entry(read_json(folder / MODEL, "give a compressed checkpoint"))
    return packing.get("quant_method") if isinstance(packing, dict) else None


def locate_size(model: str | Path, rank: int, trust_remote_code: bool = False) -> Place:
    """Return the place of a compressed model; of one on the Hub, only what `rank` components need is downloaded.

    Raises InputError as `locate` and `check_kind` do.
    """

    def names(folder: Path) -> list[str]:
        check_kind(folder)
        return sorted(map(escape, {MANIFEST, *(manifest(folder) or {})} - files_beyond(folder, rank)))

    return locate(model, trust_remote_code=trust_remote_code, names=names)


@dataclass(frozen=True, eq=False)
class DecodedSource(DenseModel):
    """A compressed model whose tensors are decoded, in float32, as they are read. Its linears round inputs as stored.

    transposed: the module paths of linears that the model stores as `[in, out]`.
    """

    checkpoint: CompressedCheckpoint = field(kw_only=True)
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
        model = folder_skeleton(self.folder, trust_remote_code=self.trust_remote_code)
        sizes = {name: list(layout.size) for name, layout in self.checkpoint.layouts.items()}
        resize(model, self.checkpoint.sizes | sizes)
        for name, layout in self.checkpoint.layouts.items():
            if layout.inputs is not None:
                layout.inputs.round_before(model.get_submodule(name))
        return model


def decoded_source(place: Place) -> DecodedSource:
    """Return the compressed model at `place`. Raises InputError for a folder that is damaged or holds no such model."""
    checkpoint = CompressedCheckpoint(place.folder, place.trust_remote_code)
    skeleton = folder_skeleton(place.folder, trust_remote_code=place.trust_remote_code)
    config = load_config(place.folder, place.trust_remote_code)
    vars(config).pop("quantization_config", None)
    stored = checkpoint.files
    ties = (getattr(skeleton, "all_tied_weights_keys", None) or {}).items()
    return DecodedSource(
        place.name,
        place.folder,
        None,
        config,
        {name: header for name, header in read_headers(place.folder).items() if name in stored},
        {alias: origin for alias, origin in ties if alias not in stored and origin in stored},
        trust_remote_code=place.trust_remote_code,
        checkpoint=checkpoint,
        transposed=frozenset(transposed_linears(skeleton)),
    )


def check_written(folder: Path, trust_remote_code: bool = False) -> None:
    """Raise InputError unless transformers will load the compressed checkpoint in `folder`, and the files beside it.

    Every tensor is read and checked as a load does, one at a time, so no model has to fit into memory.
    """
    config = load_config(folder, trust_remote_code)
    quantizer = LLMCompressQuantizer(LLMCompressConfig(**config.quantization_config))
    model = dense_skeleton(config, folder, trust_remote_code=trust_remote_code)
    quantizer.preprocess_model(model, checkpoint_files=[str(path) for path in weight_files(folder)])
    if tokenizer_files(folder):
        load_tokenizer(folder, trust_remote_code)
    read_generation_config(folder)
