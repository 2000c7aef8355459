"""Compressed weights as modules hold them and checkpoints store them: a layout, and one payload of bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmcompress.weight.encoding import encode
from llmcompress.weight.inputs import InputFormat
from llmcompress.weight.nodes import Weight, shape
from llmcompress.weight.schema import check

DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # bytes: every tensor in a payload starts at a multiple, whatever its dtype


@dataclass(frozen=True)
class Layout:
    """The description of a compressed module in a checkpoint, from which it is built before its payload is read.

    `inputs`: what its inputs are rounded to; None: they stay as they are.
    """

    size: tuple[int, int]  # (out, in)
    header: dict[str, Any]  # of `encoding.encode`
    tensors: dict[str, tuple[str, int]]  # path in the expression -> (dtype, elements), as they lie in the payload
    inputs: InputFormat | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the entry for a checkpoint's config."""
        tensors = [[path, dtype, count] for path, (dtype, count) in self.tensors.items()]  # in order, unlike an object
        inputs = {} if self.inputs is None else {"inputs": self.inputs.to_json()}
        return {"size": list(self.size), "header": self.header, "tensors": tensors} | inputs

    @staticmethod
    def from_json(entry: Any) -> Layout:
        """Invert `to_json`. Raises ValueError for an entry that describes no weight."""
        check(entry)
        out, width = entry["size"]
        tensors = {path: (dtype, count) for path, dtype, count in entry["tensors"]}
        inputs = InputFormat(**entry["inputs"]) if "inputs" in entry else None
        return Layout((out, width), entry["header"], tensors, inputs)

    def check(self, payload: Tensor) -> None:
        """Raise ValueError unless a payload can be decoded by this layout."""
        if payload.dtype != torch.uint8 or list(payload.shape) != [self.bytes()]:
            raise ValueError(f"{payload.dtype} {list(payload.shape)} is no payload of {self.bytes()} bytes")
        check(self.to_json(), self.views(payload))

    @cached_property
    def text(self) -> str:
        """The layout in one line, for the digest of its payload."""
        return json.dumps(self.to_json(), sort_keys=True)

    @property
    def is_zero(self) -> bool:
        """True if the weight is zero, so that nothing is stored."""
        return bool(self.header["node"] == "zero")

    def places(self) -> dict[str, tuple[torch.dtype, int, int]]:
        """Return where each tensor lies in the payload: (dtype, first byte, the byte after its last)."""
        places = {}
        stop = 0
        for path, (name, count) in self.tensors.items():
            dtype, start = DTYPES[name], _align(stop)
            stop = start + count * dtype.itemsize
            places[path] = (dtype, start, stop)
        return places

    def views(self, payload: Tensor) -> dict[str, Tensor]:
        """Return the tensors in a payload, uint8 `[bytes]`, without copying."""
        return {path: payload[start:stop].view(dtype) for path, (dtype, start, stop) in self.places().items()}

    def bytes(self) -> int:
        """Return the size of the payload in bytes."""
        return _align(max((stop for _, _, stop in self.places().values()), default=0))


def _align(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class PackedWeight(NamedTuple):
    """A compressed weight as modules hold it and checkpoints store it: its layout, and the payload, uint8 `[bytes]`."""

    layout: Layout
    payload: Tensor

    def views(self) -> dict[str, Tensor]:
        """Return the tensors in the payload, by their paths in the expression."""
        return self.layout.views(self.payload)


def payload_texts(layouts: Mapping[str, Layout]) -> dict[str, str]:
    """Return the layouts of compressed modules as text, by the names of their payloads, for the digests of a file."""
    return {f"{name}.weight": layout.text for name, layout in layouts.items()}


def pack_weight(w: Weight, inputs: InputFormat | None = None) -> PackedWeight:
    """Encode an expression, of a module whose inputs are rounded to a format."""
    header, tensors = encode(w)
    listed = {path: (NAMES[tensor.dtype], tensor.numel()) for path, tensor in tensors.items()}
    layout = Layout(shape(w), header, listed, inputs)
    device = next(iter(tensors.values())).device if tensors else None
    payload = torch.zeros(layout.bytes(), dtype=torch.uint8, device=device)
    for path, (_, start, stop) in layout.places().items():
        payload[start:stop] = tensors[path].view(torch.uint8)
    return PackedWeight(layout, payload)
