"""A compressed checkpoint opened for export, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llmcompress.models.checkpoint import check_manifest, read_json
from llmcompress.models.hf_quantizer import LLMCompressConfig
from llmcompress.models.integrity import DIGESTS, weight_files
from llmcompress.models.kind import check_kind
from llmcompress.models.public_entries import public_entries
from llmcompress.weight.encoding import decode
from llmcompress.weight.modules import LIKE, Layout
from llmcompress.weight.nodes import Weight


class Opened:
    """A compressed checkpoint on disk.

    `layouts` has one entry for each compressed module, `sizes` the `[out, in]` of dense linears that config.json
    does not tell otherwise. `files` maps each tensor to its file, `digests` each file to the digests in its header.
    """

    def __init__(self, folder: Path) -> None:
        check_kind(folder)
        check_manifest(folder)
        self.folder = folder
        self.config = public_entries(read_json(folder / "config.json"))
        entries = self.config.pop("quantization_config")
        quantization = LLMCompressConfig(**entries)
        self.layouts: dict[str, Layout] = quantization.table()
        self.sizes = quantization.sizes
        self.files: dict[str, Path] = {}
        self.digests: dict[str, str] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                self.files.update(dict.fromkeys(file.keys(), path))
                self.digests[path.name] = (file.metadata() or {}).get(DIGESTS, "")

    @property
    def bytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    @property
    def dense_bytes(self) -> int:
        """Upper bound of the size in bytes if all matrices were bfloat16."""
        return 2 * sum(layout.size[0] * layout.size[1] for layout in self.layouts.values()) + self.bytes

    def read(self, name: str) -> Tensor:
        """Return one stored tensor."""
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def read_plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the stored tensors `names`, without an embedding's `LIKE`, which no other engine knows."""
        return {name: self.read(name) for name in names if not name.endswith(f".{LIKE}")}

    def expression(self, layer: str) -> Weight:
        """Return the compressed weight of one module."""
        layout = self.layouts[layer]
        return decode(layout.header, layout.views(self.read(f"{layer}.weight")))

    def parts(self) -> Iterator[tuple[list[str], list[str]]]:
        """Yield the compressed modules of each file, and the names of its other tensors."""
        layers = {f"{layer}.weight": layer for layer in self.layouts}
        for path in sorted(set(self.files.values())):
            names = [name for name, place in self.files.items() if place == path]
            yield [layers[name] for name in names if name in layers], [name for name in names if name not in layers]


def rounded(value: Tensor) -> tuple[Tensor, float]:
    """Return a matrix in bfloat16, and its relative error."""
    stored = value.to(torch.bfloat16)
    return stored, float((stored.float() - value).norm() / value.norm().clamp_min(1e-30))
