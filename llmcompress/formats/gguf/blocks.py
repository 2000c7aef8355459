"""Bytes of GGUF's blocks: how each quantized type lays integers, scales and offsets one after the other.

A weight is k d, or k d - m. Simple types have one d (and m) for each block of columns. In the K types 256 columns are a
superblock: their groups of 16 or 32 columns have scales n d and offsets j e, n and j integers of 4 to 8 bits, d and e
of the superblock. Shapes: O out, N blocks of a row, C columns of a block, G groups of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # values of k in IQ4_NL, IQ4_XS


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks. `k` int16 `[O, N, C]`; `d` float16 `[O, N, 1]`, of which `n` `[O, N, G]` are multiples;
    `e` and `j` likewise for the offsets that are taken away. `offset`: of simple types, float16, added."""

    k: Tensor
    d: Tensor
    n: Tensor | None = None
    e: Tensor | None = None
    j: Tensor | None = None
    offset: Tensor | None = None


def half_bytes(numbers: Tensor) -> Tensor:
    """Return numbers `[O, N, 1]` as float16, in bytes `[O, N, 2]`."""
    return numbers.half().contiguous().view(torch.uint8)


def pack_bits(selected: Tensor) -> Tensor:
    """Return bools `[O, N, C]` as bytes `[O, N, C / 8]`, the first column lowest."""
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    return (selected.unflatten(2, (-1, 8)) * powers).sum(3, dtype=torch.uint8)


def pack_codes(codes: Tensor, columns: int, width: int) -> Tensor:
    """Return codes of `width` bits as bytes: each holds columns c, c + `columns`, ... of its part, the first lowest."""
    each = 8 // width
    parts = codes.to(torch.uint8).unflatten(2, (-1, each, columns))
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
    return (parts << shifts).sum(3, dtype=torch.uint8).flatten(2)


# --- simple types ---------------------------------------------------------------------------------------------------


def q1_0(w: Blocks) -> Tensor:
    """A bit each, set for +1."""
    return torch.cat([half_bytes(w.d), pack_bits(w.k > 0)], 2)


def tq1_0(w: Blocks) -> Tensor:
    """Five digits of base 3 a byte, as the byte's share of 1 so that they come out by multiplying; d last."""
    digits = w.k + 1
    parts = [digits[..., :160].unflatten(2, (5, 32)), digits[..., 160:240].unflatten(2, (5, 16))]
    last = digits[..., 240:].unflatten(2, (4, 4))
    parts.append(torch.cat([last, torch.zeros_like(last[:, :, :1])], 2))
    powers = 3 ** torch.arange(4, -1, -1)[:, None]
    numbers = torch.cat([(part.to(torch.int32) * powers).sum(2) for part in parts], 2)
    return torch.cat([((numbers * 256 + 242) // 243).to(torch.uint8), half_bytes(w.d)], 2)


def q4_0(w: Blocks) -> Tensor:
    """Four bits each."""
    return torch.cat([half_bytes(w.d), pack_codes(w.k + 8, 16, 4)], 2)


def q4_1(w: Blocks) -> Tensor:
    """Four bits each, after d and the offset."""
    return torch.cat([half_bytes(w.d), _offset(w), pack_codes(w.k, 16, 4)], 2)


def q5_0(w: Blocks) -> Tensor:
    """The fifth bits, then the other four."""
    codes = w.k + 16
    return torch.cat([half_bytes(w.d), pack_bits(codes > 15), pack_codes(codes & 15, 16, 4)], 2)


def q5_1(w: Blocks) -> Tensor:
    """As Q5_0, after d and the offset."""
    return torch.cat([half_bytes(w.d), _offset(w), pack_bits(w.k > 15), pack_codes(w.k & 15, 16, 4)], 2)


def q8_0(w: Blocks) -> Tensor:
    """A byte each."""
    return torch.cat([half_bytes(w.d), w.k.to(torch.int8).view(torch.uint8)], 2)


def iq4_nl(w: Blocks) -> Tensor:
    """Four bits each, places in the table `IQ4`."""
    return torch.cat([half_bytes(w.d), pack_codes(_places(w.k), 16, 4)], 2)


def mxfp4(codes: Tensor, exponents: Tensor) -> Tensor:
    """A block's power of two, then its e2m1 codes `[O, N, C]` in four bits each."""
    return torch.cat([exponents, pack_codes(codes, 16, 4)], 2)


# --- K types --------------------------------------------------------------------------------------------------------


def q2_k(w: Blocks) -> Tensor:
    """Scales and offsets in four bits each, then the codes in two."""
    return torch.cat([(_n(w) | (_j(w) << 4)).to(torch.uint8), pack_codes(w.k, 32, 2), half_bytes(w.d), _e(w)], 2)


def q3_k(w: Blocks) -> Tensor:
    """Third bits, the other two, scales in six bits each, d."""
    codes, n = w.k + 4, _n(w) + 32
    low, high = n & 15, n >> 4
    scales = [low[..., :8] | (low[..., 8:] << 4)]
    scales.append(pack_codes(high, 4, 2))
    parts = [pack_codes(codes > 3, 32, 1), pack_codes(codes & 3, 32, 2), torch.cat(scales, 2).to(torch.uint8)]
    return torch.cat([*parts, half_bytes(w.d)], 2)


def q4_k(w: Blocks) -> Tensor:
    """The head with scales and offsets, then the codes in four bits each."""
    return torch.cat([_head(w), pack_codes(w.k, 32, 4)], 2)


def q5_k(w: Blocks) -> Tensor:
    """As Q4_K, the fifth bits before the other four."""
    return torch.cat([_head(w), pack_codes(w.k >> 4, 32, 1), pack_codes(w.k & 15, 32, 4)], 2)


def q6_k(w: Blocks) -> Tensor:
    """The lower four bits, the upper two, scales in a byte each, d."""
    codes = (w.k + 32).unflatten(2, (2, 128))
    low = (codes & 15).flatten(2).unflatten(2, (2, 2, 64)).transpose(3, 4).flatten(2)  # pairs of columns 64 apart
    low = (low[..., 0::2] | (low[..., 1::2] << 4)).to(torch.uint8)
    n = _n(w).to(torch.int8).view(torch.uint8)
    return torch.cat([low, pack_codes((codes >> 4).flatten(2), 32, 2), n, half_bytes(w.d)], 2)


def iq4_xs(w: Blocks) -> Tensor:
    """d, the upper two bits of the scales, the lower four, then places in the table `IQ4`."""
    n = _n(w) + 32
    high = (n.to(torch.int32) >> 4 << torch.arange(0, 16, 2, dtype=torch.int32)).sum(2, keepdim=True)
    upper = torch.cat([high & 255, high >> 8], 2).to(torch.uint8)
    lower = ((n & 15)[..., 0::2] | ((n & 15)[..., 1::2] << 4)).to(torch.uint8)
    return torch.cat([half_bytes(w.d), upper, lower, pack_codes(_places(w.k), 16, 4)], 2)


def _head(w: Blocks) -> Tensor:
    """d, e, and eight scales and offsets in six bits each: the upper two bits of the last four lie with the first."""
    n, j = _n(w), _j(w)
    (first, last), (first_j, last_j) = n.chunk(2, 2), j.chunk(2, 2)
    parts = [first | (last >> 4 << 6), first_j | (last_j >> 4 << 6), (last & 15) | ((last_j & 15) << 4)]
    return torch.cat([half_bytes(w.d), _e(w), torch.cat(parts, 2).to(torch.uint8)], 2)


def _places(k: Tensor) -> Tensor:
    return torch.searchsorted(torch.tensor(IQ4), k.long().contiguous())


def _offset(w: Blocks) -> Tensor:
    return half_bytes(_require(w.offset))


def _n(w: Blocks) -> Tensor:
    return _require(w.n)


def _e(w: Blocks) -> Tensor:
    return half_bytes(_require(w.e))


def _j(w: Blocks) -> Tensor:
    return _require(w.j)


def _require(part: Tensor | None) -> Tensor:
    if part is None:
        raise TypeError("blocks of this type have scales of groups, or offsets, and these have none")
    return part
