"""GGUF tensor types that hold expressions value for value, and the order of their bytes.

A quantized type cuts a row into blocks of columns: small integers k and one float16 number d, together the values k d.
A grid of ours fits where its own integers are in the type's range, its scale is a float16 number and no block lies
across two of its groups. Symmetric grids of an even number of levels are centred between two codes: the odd integers,
at half the scale. Floats lie one by one. Shapes: O out, I in, N blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.weight.expression import dense, describe
from llmcompress.weight.nodes import Dense, Grid, Weight, Zero

FLOAT_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16"}  # all others become F32


class Inexact(Exception):
    """No tensor type holds an expression exactly; the message says why, in a few words."""


@dataclass(frozen=True)
class TensorType:
    """One type of GGUF. `integers`: what k may be, None for floats; `pack`: k `[O, N, block]` to their bytes."""

    name: str
    block: int  # columns
    block_bytes: int
    integers: range | None = None
    pack: Callable[[Tensor], Tensor] | None = None
    scale_first: bool = True  # false: d stands behind the integers

    def holds(self, low: int, high: int, only_odd: bool) -> bool:
        """True if k may be every integer from `low` to `high`, or every odd one."""
        allowed = self.integers or range(0)
        return low in allowed and high in allowed and (only_odd or allowed.step == 1)

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a row of `width` columns."""
        return width // self.block * self.block_bytes


# --- bytes of integers ----------------------------------------------------------------------------------------------


def _signs(k: Tensor) -> Tensor:
    """A bit each, the first column lowest; set for +1."""
    return _bits(k > 0)


def _ternary(k: Tensor) -> Tensor:
    """Two bits each: a byte holds columns c, c + 32, c + 64, c + 96 of its half block, the first lowest."""
    quarters = (k + 1).to(torch.uint8).unflatten(2, (2, 4, 32))
    return (quarters << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]).sum(3, dtype=torch.uint8).flatten(2)


def _nibbles(k: Tensor) -> Tensor:
    """Four bits each: a byte holds columns c and c + 16, the first lowest."""
    low, high = (k + 8).to(torch.uint8).chunk(2, dim=2)
    return low | (high << 4)


def _five_bits(k: Tensor) -> Tensor:
    """The fifth bits, the first column lowest, then the other four as nibbles."""
    codes = (k + 16).to(torch.uint8)
    low, high = (codes & 15).chunk(2, dim=2)
    return torch.cat([_bits(codes > 15), low | (high << 4)], 2)


def _bytes(k: Tensor) -> Tensor:
    return k.to(torch.int8).view(torch.uint8)


def _bits(selected: Tensor) -> Tensor:
    """Bool `[O, N, C]` to bytes `[O, N, C / 8]`, lowest bit first."""
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    return (selected.unflatten(2, (-1, 8)) * powers).sum(3, dtype=torch.uint8)


QUANTIZED = (  # smallest first
    TensorType("Q1_0", 128, 18, range(-1, 2, 2), _signs),
    TensorType("TQ2_0", 256, 66, range(-1, 2), _ternary, scale_first=False),
    TensorType("Q4_0", 32, 18, range(-8, 8), _nibbles),
    TensorType("Q5_0", 32, 22, range(-16, 16), _five_bits),
    TensorType("Q8_0", 32, 34, range(-128, 128), _bytes),
)
FLOATS = {name: TensorType(name, 1, size) for name, size in (("BF16", 2), ("F16", 2), ("F32", 4))}


# --- grids ----------------------------------------------------------------------------------------------------------


def exact_type(w: Weight) -> TensorType:
    """Return the smallest type that holds `w` value for value. Raises Inexact where there is none."""
    match w:
        case Dense(values):
            return FLOATS[FLOAT_TYPES.get(values.dtype, "F32")]
        case Zero():
            return FLOATS["BF16"]
        case Grid():
            return _grid_type(w)
        case _:
            raise Inexact(f"{describe(w)} is no single grid")


def _grid_type(w: Grid) -> TensorType:
    k, scale = _integers(w)
    if not bool((scale.half().float() == scale).all()):
        raise Inexact(f"{describe(w)} has scales that float16 cannot hold once they are halved")
    low, high = int(k.min()), int(k.max())
    only_odd = bool((k % 2 != 0).all())
    fitting = [found for found in QUANTIZED if found.holds(low, high, only_odd)]
    if not fitting:
        raise Inexact(f"{describe(w)} has integers from {low} to {high}, more than the 8 bits of Q8_0")
    width, group = k.shape[1], w.group_size if scale.shape[1] > 1 else k.shape[1]
    for found in fitting:
        if width % found.block == 0 and group % found.block == 0:
            return found
    raise Inexact(f"{describe(w)} of width {width} does not fill blocks of 32 columns with one scale each")


def _integers(w: Grid) -> tuple[Tensor, Tensor]:
    """`dense(w)` as integers k, int16 `[O, I]`, and the numbers they are times, float32 `[O or 1, groups]`."""
    codes, scale = w.codes.to(torch.int16), w.scale.float()
    if w.zero is not None:
        zero = w.zero.to(torch.int16)
        spread = zero if zero.shape[1] == 1 else zero.repeat_interleave(w.group_size, 1)[:, : codes.shape[1]]
        return codes - spread, scale
    if w.levels % 2:
        return codes - w.levels // 2, scale
    return 2 * codes - (w.levels - 1), scale / 2


def packed(w: Weight, kind: TensorType) -> Tensor:
    """Return the bytes of `w` as its type `kind` lays them: uint8 `[O, bytes of a row]`, `[bytes]` of a vector."""
    if kind.pack is None or not isinstance(w, Grid):
        dtype = {name: dtype for dtype, name in FLOAT_TYPES.items()}.get(kind.name, torch.float32)
        values = w.values if isinstance(w, Dense) else dense(w)
        return values.to(dtype).contiguous().view(torch.uint8)
    k, scale = _integers(w)
    blocks = k.unflatten(1, (-1, kind.block))
    group = w.group_size // kind.block if scale.shape[1] > 1 else blocks.shape[1]
    d = scale.half().repeat_interleave(group, 1)[:, : blocks.shape[1]].expand(len(k), -1)
    parts = [d[..., None].contiguous().view(torch.uint8), kind.pack(blocks)]
    return torch.cat(parts if kind.scale_first else parts[::-1], 2).flatten(1)
