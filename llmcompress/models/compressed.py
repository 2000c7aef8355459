"""A checkpoint of ours opened for export: one layer at a time, whatever files its tensors lie in."""

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
from llmcompress.weight.encoding import decode
from llmcompress.weight.modules import LIKE, Layout
from llmcompress.weight.nodes import Weight


class Opened:
    """A compressed checkpoint on disk. `layouts`: of its compressed modules; `sizes`: of dense linears that the
    rest of the config does not tell; `files`: where each tensor lies; `digests`: of the tensors of each file, as
    its header has them."""

    def __init__(self, folder: Path) -> None:
        check_kind(folder)
        check_manifest(folder)
        self.folder = folder
        self.config = read_json(folder / "config.json")
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
        """Of the weight files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    @property
    def dense_bytes(self) -> int:
        """What the weights take at most, were all matrices bfloat16."""
        return 2 * sum(layout.size[0] * layout.size[1] for layout in self.layouts.values()) + self.bytes

    def read(self, name: str) -> Tensor:
        """One stored tensor."""
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def read_plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Of the stored tensors `names`, those that other engines know too: an embedding's `LIKE` is ours alone."""
        return {name: self.read(name) for name in names if not name.endswith(f".{LIKE}")}

    def expression(self, layer: str) -> Weight:
        """The compressed weight of one module."""
        layout = self.layouts[layer]
        return decode(layout.header, layout.views(self.read(f"{layer}.weight")))

    def parts(self) -> Iterator[tuple[list[str], list[str]]]:
        """File by file: the compressed modules in it, and the names of its other tensors."""
        layers = {f"{layer}.weight": layer for layer in self.layouts}
        for path in sorted(set(self.files.values())):
            names = [name for name, place in self.files.items() if place == path]
            yield [layers[name] for name in names if name in layers], [name for name in names if name not in layers]


def rounded(value: Tensor) -> tuple[Tensor, float]:
    """A matrix in bfloat16, and how far it moved as a share of its size."""
    stored = value.to(torch.bfloat16)
    return stored, float((stored.float() - value).norm() / value.norm().clamp_min(1e-30))
