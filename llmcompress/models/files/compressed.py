"""A compressed checkpoint opened for export, one layer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmcompress.errors import InputError, list_names
from llmcompress.models.dense.remote_code import MODEL, model_code, needs_code
from llmcompress.models.dense.skeleton import check_numbers
from llmcompress.models.files.checkpoint import PART, check_manifest, read_json
from llmcompress.models.files.config_for_publishing import public_entries
from llmcompress.models.files.files import open_tensors
from llmcompress.models.files.integrity import DIGESTS, MENDING, weight_files
from llmcompress.models.files.kind import check_kind
from llmcompress.models.files.shard_writer import shards
from llmcompress.models.transformers.hf_quantizer import LLMCompressConfig
from llmcompress.weight.encoding import decode
from llmcompress.weight.modules import LIKE
from llmcompress.weight.nodes import Weight
from llmcompress.weight.sums import add_to_base


class Opened:
    """A compressed checkpoint on disk.

    `layouts` has one entry for each compressed module, `tied` one for each matrix that several linears have in common,
    `stored_layouts` both; `ties` has the name of that matrix for each such linear. `sizes` has the `[out, in]` of dense
    linears that config.json does not tell otherwise. `files` maps each tensor to its file, `digests` each file to the
    digests in its header.
    `trust_remote_code`: as in `locate.Place`.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        check_kind(folder)
        check_manifest(folder)
        model_code(folder, trust_remote_code)  # raises unless it is trusted
        self.folder, self.trust_remote_code = folder, trust_remote_code
        self.config = public_entries(read_json(folder / MODEL), needs_code(folder, MODEL))
        check_numbers(self.config.get, str(folder / "config.json"))
        entries = self.config.pop("quantization_config")
        quantization = LLMCompressConfig(**entries)
        self.stored_layouts, self.ties = quantization.table(), quantization.ties
        self.tied = {name: self.stored_layouts[name] for name in dict.fromkeys(self.ties.values())}
        self.layouts = {name: layout for name, layout in self.stored_layouts.items() if name not in self.tied}
        self.sizes = quantization.sizes
        self.files: dict[str, Path] = {}
        self.digests: dict[str, str] = {}
        for path in weight_files(folder):
            with _opened(path) as file:
                self.files.update(dict.fromkeys(file.keys(), path))
                self.digests[path.name] = (file.metadata() or {}).get(DIGESTS, "")
        if lacking := [name for name in self.stored_layouts if f"{name}.weight" not in self.files]:
            raise InputError(f"{folder} lacks the weights of {list_names(lacking)}; {MENDING}")

    @property
    def bytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    @property
    def dense_bytes(self) -> int:
        """Upper bound of the size in bytes if all matrices were bfloat16."""
        return 2 * sum(layout.size[0] * layout.size[1] for layout in self.layouts.values()) + self.bytes

    def read(self, name: str) -> Tensor:
        """Return one stored tensor. Raises InputError if its file is damaged."""
        with _opened(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def read_plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the stored tensors `names`, without an embedding's `LIKE`, which no other engine knows."""
        return {name: self.read(name) for name in names if not name.endswith(f".{LIKE}")}

    def expression(self, layer: str) -> Weight:
        """Return the compressed weight of one module. Raises InputError for a payload that its layout cannot read."""
        own = self._decoded(layer)
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
        """Yield compressed modules and names of other tensors, as many at a time as take PART bytes in bfloat16.

        All that is in one of the modules `apart` comes at once, whatever it takes. A matrix that several linears have
        in common is not yielded, since each of these has it in its `expression`.
        """
        layers, tied = {f"{layer}.weight": layer for layer in self.layouts}, {f"{name}.weight" for name in self.tied}
        sizes = {}
        there = [found for found in self.files.items() if found[0] not in tied]
        for name, path in sorted(there, key=lambda found: (found[1], _natural(found[0]))):
            with _opened(path) as file:
                values = prod(file.get_slice(name).get_shape())
            sizes[name] = 2 * (prod(self.layouts[layers[name]].size) if name in layers else values)
        groups = [[name for name in sizes if name.startswith(f"{module}.")] for module in apart]
        inside = {name for names in groups for name in names}
        groups += shards({name: size for name, size in sizes.items() if name not in inside}, PART)
        for names in groups:
            yield [layers[name] for name in names if name in layers], [name for name in names if name not in layers]


def _natural(name: str) -> list[str | int]:
    """Return a key by which block 2 comes before block 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a weight file. Raises InputError for one that is damaged."""
    try:
        with open_tensors(path) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({' '.join(str(error).split())}); {MENDING}") from error


def rounded(value: Tensor) -> tuple[Tensor, float]:
    """Return a matrix in bfloat16, and its relative error."""
    stored = value.to(torch.bfloat16)
    return stored, float((stored.float() - value).norm() / value.norm().clamp_min(1e-30))
