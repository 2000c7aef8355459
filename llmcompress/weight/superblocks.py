"""Superblocks of 256 columns as llama.cpp lays them in its types IQ1, IQ2, IQ3 and TQ2_0: numbers to bytes, and back.

Columns are `d (2 n + 1) / divisor` times a vector of a table: d float16 of the superblock, n a few bits of a group. In
IQ2 and IQ3 types each column has a sign besides; where eight columns have 7 bits for theirs, an even number of them is
negative. In IQ1 types a bit says whether 1/8 is added to the numbers of its columns, or taken away. The tables are
those that the package `gguf` has. Shapes: O out, N superblocks of a row, G groups of a superblock.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.weight.constants import constant

SuperblockForm = Literal["IQ1_S", "IQ1_M", "TQ2_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
SUPERBLOCK = 256  # columns of a superblock
OCTET = 8  # columns whose signs lie together
SHIFT = 0.125  # of the numbers of IQ1 types
PART = 1 << 21  # weights that are decoded at a time
# Bits of a number, the place of its first one, then the count of such numbers and their distance, the outermost first
Piece = tuple[int, int, *tuple[tuple[int, int], ...]]
Field = tuple[Piece, ...]  # the lowest bits first


@dataclass(frozen=True)
class SuperblockLayout:
    """Places of the bits of a superblock. `length`: columns of an entry; `group`: columns that share n."""

    bytes: int
    length: int
    group: int
    divisor: int
    d: Field
    n: Field
    places: Field  # of entries in the table
    signs: Field = ()

    @property
    def is_signed(self) -> bool:
        """True if each column has a sign."""
        return bool(self.signs) and self.signs[0][0] > 1

    @property
    def is_even(self) -> bool:
        """True if of eight signs an even number is negative."""
        return self.is_signed and self.signs[0][0] == OCTET - 1

    @property
    def largest(self) -> int:
        """The largest 2 n + 1."""
        return (2 << self.n[0][0]) - 1 if self.n else 1


FIRST = ((16, 0),)
LAYOUTS: dict[SuperblockForm, SuperblockLayout] = {
    "IQ1_S": SuperblockLayout(
        50, 8, 32, 1, FIRST, ((3, 284, (8, 16)),), ((8, 16, (32, 8)), (3, 272, (8, 16), (4, 3))), ((1, 287, (8, 16)),)
    ),
    "IQ1_M": SuperblockLayout(
        *(56, 8, 16, 1, tuple((4, 396 + 16 * nibble) for nibble in range(4))),
        *(((3, 384, (4, 16), (4, 3)),), ((8, 0, (32, 8)), (3, 256, (32, 4))), ((1, 259, (32, 4)),)),
    ),
    "TQ2_0": SuperblockLayout(66, 1, 256, 1, ((16, 512),), (), ((2, 0, (2, 256), (4, 2), (32, 8)),)),
    "IQ2_XXS": SuperblockLayout(
        66, 8, 32, 8, FIRST, ((4, 76, (8, 64)),), ((8, 16, (8, 64), (4, 8)),), ((7, 48, (8, 64), (4, 7)),)
    ),
    "IQ2_XS": SuperblockLayout(74, 8, 16, 8, FIRST, ((4, 528, (16, 4)),), ((9, 16, (32, 16)),), ((7, 25, (32, 16)),)),
    "IQ2_S": SuperblockLayout(
        82, 8, 16, 8, FIRST, ((4, 592, (16, 4)),), ((8, 16, (32, 8)), (2, 528, (32, 2))), ((8, 272, (32, 8)),)
    ),
    "IQ3_XXS": SuperblockLayout(
        98, 4, 32, 4, FIRST, ((4, 556, (8, 32)),), ((8, 16, (64, 8)),), ((7, 528, (8, 32), (4, 7)),)
    ),
    "IQ3_S": SuperblockLayout(
        110, 4, 32, 1, FIRST, ((4, 848, (8, 4)),), ((8, 16, (64, 8)), (1, 528, (64, 1))), ((8, 592, (32, 8)),)
    ),
}


@dataclass(frozen=True)
class SuperblockNumbers:
    """Numbers that superblocks hold: d float16 `[O, N, 1]`, the others int32.

    `n [O, N, G]`; `places [O, N, entries]` in the table; `signs [O, N, 32]`: masks of eight columns, the first column
    in the lowest bit. IQ1 types have a bit for each equal share of the columns.
    """

    d: Tensor
    n: Tensor
    places: Tensor
    signs: Tensor


def pack_superblocks(numbers: SuperblockNumbers, form: SuperblockForm) -> Tensor:
    """Return the bytes, uint8 `[O, N * bytes]`."""
    d = numbers.d.view(torch.int16).int()
    bits = d.new_zeros(*d.shape[:2], 8 * LAYOUTS[form].bytes, dtype=torch.uint8)
    for field, at in zip((d, numbers.n, numbers.places, numbers.signs), _bits_of(form), strict=True):
        shifts = torch.arange(at.shape[1], device=d.device, dtype=torch.int32)
        bits[:, :, at.to(d.device)] = ((field.int()[..., None] >> shifts) & 1).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=d.device)
    return (bits.unflatten(2, (-1, 8)) << places).sum(3, dtype=torch.uint8).flatten(1)


def unpack_superblocks(codes: Tensor, form: SuperblockForm) -> SuperblockNumbers:
    """Return the numbers in bytes `[O, N * bytes]`."""
    octets = codes.unflatten(1, (-1, LAYOUTS[form].bytes))
    bits = ((octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=codes.device)) & 1).flatten(2)
    fields = []
    for at in _bits_of(form):
        shifts = torch.arange(at.shape[1], device=codes.device, dtype=torch.int32)
        fields.append((bits[:, :, at.to(codes.device)].int() << shifts).sum(3, dtype=torch.int32))
    d, n, places, signs = fields
    return SuperblockNumbers(d.to(torch.int16).view(torch.float16), n, places, signs)


def superblock_matrix(codes: Tensor, form: SuperblockForm) -> Tensor:
    """Decode bytes, uint8 `[out, superblocks * bytes]`, to float32 `[out, in]`."""
    rows = max(1, PART * LAYOUTS[form].bytes // (SUPERBLOCK * codes.shape[1]))
    return torch.cat([_decode(unpack_superblocks(part, form), form) for part in codes.split(rows)])


def _decode(numbers: SuperblockNumbers, form: SuperblockForm) -> Tensor:
    layout, device = LAYOUTS[form], numbers.d.device
    values = superblock_table(form).to(device)[numbers.places.long()].flatten(2)
    if layout.is_signed:
        signs = with_parity(numbers.signs) if layout.is_even else numbers.signs
        values *= to_signs(signs)
    elif layout.signs:
        values += (SHIFT - 2 * SHIFT * numbers.signs).repeat_interleave(SUPERBLOCK // numbers.signs.shape[2], 2)
    return values.flatten(1) * column_scales(numbers, form)


def column_scales(numbers: SuperblockNumbers, form: SuperblockForm) -> Tensor:
    """Return the factor of each number, float32 `[out, in]`."""
    layout, d = LAYOUTS[form], numbers.d.float()
    scales = d * (2 * numbers.n + 1) / layout.divisor if layout.n else d
    return scales.repeat_interleave(layout.group, 2).flatten(1)


def to_signs(masks: Tensor) -> Tensor:
    """Return masks of eight signs, int32 `[..., M]`, as float32 `[..., 8 M]`: -1 for a bit that is set, else 1."""
    bits = (masks[..., None] >> torch.arange(OCTET, device=masks.device, dtype=torch.int32)) & 1
    return (1 - 2 * bits).flatten(-2).float()


def with_parity(masks: Tensor) -> Tensor:
    """Return masks of seven signs with the eighth, which makes the number of set bits even."""
    folded = masks ^ (masks >> 4)
    folded = folded ^ (folded >> 2)
    return masks | (((folded ^ (folded >> 1)) & 1) << 7)


@constant
def _bits_of(form: SuperblockForm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the places of the bits of d, n, the places in the table and the signs, int64 `[count, bits]` each."""
    layout = LAYOUTS[form]
    return _places(layout.d), _places(layout.n), _places(layout.places), _places(layout.signs)


def _places(field: Field) -> Tensor:
    parts = [torch.zeros(0, 0, dtype=torch.int64)] if not field else []
    for bits, first, *like_it in field:
        starts = torch.tensor([first])
        for count, distance in like_it:
            starts = (starts[:, None] + distance * torch.arange(count)).flatten()
        parts.append(starts[:, None] + torch.arange(bits))
    return torch.cat(parts, 1)


@constant
def superblock_table(form: SuperblockForm) -> Tensor:
    """Return the entries, float32 `[entries, length]`. Raises RecipeError without the package that has them."""
    if form == "TQ2_0":  # of its two bits llama.cpp's own quantizer uses three numbers, its arithmetic has all four
        return torch.arange(-1.0, 3.0, dtype=torch.float32)[:, None]
    if find_spec("gguf") is None:
        raise RecipeError(f'the table of {form} is in the package gguf; run pip install "llmcompress[export]"')
    from gguf import quants

    kind = getattr(quants, form)
    kind.init_grid()
    return torch.from_numpy(kind.grid.copy()).reshape(kind.grid_shape)
