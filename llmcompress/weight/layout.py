"""Compressed weights as modules hold them and checkpoints store them: a layout, and one payload of bytes."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmcompress.weight.algebra import split_components, term_ends, truncate_low_rank
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
PART = "part_"  # how names of pieces begin that smaller sizes do not have
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
        inputs = InputFormat(**entry["inputs"]) if entry.get("inputs") else None
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


class PayloadPiece(NamedTuple):
    """The bytes of a payload that a size has beyond the size below, stored as a tensor of their own.

    name: of the tensor, behind that of its module. layout: of the size.
    """

    name: str
    layout: Layout
    start: int
    stop: int

    def floats(self) -> tuple[tuple[torch.dtype, int, int], ...]:
        """Return the places of numbers in the piece, as `Layout.places` does."""
        places = self.layout.places().values()
        own = [(dtype, first - self.start, last - self.start) for dtype, first, last in places if first >= self.start]
        return tuple(place for place in own if place[0].is_floating_point)


def pieces(levels: Sequence[Layout]) -> list[PayloadPiece]:
    """Return the pieces of a payload that begins with those of smaller sizes; `levels`: the smallest size first."""
    parts: list[PayloadPiece] = []
    for number, layout in enumerate(levels):
        start, stop = parts[-1].stop if parts else 0, layout.bytes()
        if stop > start or not parts:
            parts.append(PayloadPiece(f"{PART}{number}" if parts else "weight", layout, start, stop))
    return parts


def piece_level(name: str) -> int:
    """Return the number of the smallest size that a stored tensor belongs to, 0 for most."""
    number = name.rpartition(f".{PART}")[2]
    return int(number) if number != name and number.isdecimal() else 0


def payload_texts(levels: Mapping[str, Layout | Sequence[Layout]]) -> dict[str, str]:
    """Return the layouts of compressed modules as text, by the names of their payloads, for the digests of a file.

    Of a module with several sizes, `levels` has their layouts, the smallest first.
    """
    sizes = {name: [each] if isinstance(each, Layout) else each for name, each in levels.items()}
    return {f"{name}.{piece.name}": piece.layout.text for name, each in sizes.items() for piece in pieces(each)}


def pack_weight(w: Weight, inputs: InputFormat | None = None) -> PackedWeight:
    """Encode an expression, of a module whose inputs are rounded to a format."""
    return _pack(shape(w), *encode(w), inputs)


def pack_nested(w: Weight, ranks: Sequence[int], inputs: InputFormat | None = None) -> list[PackedWeight]:
    """Encode an expression at each of `ranks`, in ascending order, and whole; `inputs`: see `pack_weight`.

    The payload of a size begins with that of the size before: tensors of terms lie behind all others, in their order.
    """
    whole = split_components(w, ranks)
    ends, paths = list(term_ends(whole)), encode(whole)[1]
    sizes = (max((end for place, end in ends if path.startswith(place)), default=0) for path in paths)
    levels = [bisect_left(ranks, size) for size in sizes]
    packed = []
    for number, rank in enumerate((*ranks, None)):
        header, tensors = encode(whole if rank is None else truncate_low_rank(whole, rank))
        kept = [level for level in levels if level <= number]
        order = sorted(zip(kept, tensors, strict=True), key=itemgetter(0))
        packed.append(_pack(shape(whole), header, {path: tensors[path] for _, path in order}, inputs))
    return packed


def _pack(
    size: tuple[int, int], header: dict[str, Any], tensors: Mapping[str, Tensor], inputs: InputFormat | None
) -> PackedWeight:
    listed = {path: (NAMES[tensor.dtype], tensor.numel()) for path, tensor in tensors.items()}
    layout = Layout(size, header, listed, inputs)
    device = next(iter(tensors.values())).device if tensors else None
    payload = torch.zeros(layout.bytes(), dtype=torch.uint8, device=device)
    for path, (_, start, stop) in layout.places().items():
        payload[start:stop] = tensors[path].view(torch.uint8)
    return PackedWeight(layout, payload)
