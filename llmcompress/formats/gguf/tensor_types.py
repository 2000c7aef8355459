"""GGUF tensor types that hold expressions value for value.

A grid of ours fits a simple type if its integers are in the type's range, its scale is a float16 number and no block
lies across two of its groups. It fits a K type if, besides, the scales of each superblock are small multiples of
one number d: their greatest common divisor is taken for it. Where a type has one more integer on one side of 0, a group
that needs it on the other side has its signs and that of its scale turned. Symmetric grids of an even number of levels
are centred between two codes: the odd integers, at half the scale.

An offset for each group of columns is a low-rank term before the grid, whose right factor says by ones and zeros which
columns are in which group. Floats lie one by one. Shapes: O out, I in, N blocks of a row, G groups of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from torch import Tensor

from llmcompress.formats.engine_files import UnfitError
from llmcompress.formats.gguf import blocks
from llmcompress.formats.gguf.blocks import IQ4, Blocks
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.nodes import Dense, Grid, LowRank, Minifloat, Sum, Superblocks, Weight, Zero
from llmcompress.weight.superblocks import LAYOUTS, SUPERBLOCK

FLOAT_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16"}  # all others become F32
SMALLEST = 2.0**-24  # of which all float16 numbers are multiples


@dataclass(frozen=True)
class TensorType:
    """One type of GGUF. `integers`: the values of k, empty for floats; `pack`: returns the bytes of blocks.

    `multiples`: the values of n, empty for one scale a block. `offsets`: the values of j, empty for no offset, None for
    a float16 offset.
    """

    name: str
    block: int  # columns
    block_bytes: int
    integers: range | tuple[int, ...] = ()
    pack: Callable[[Blocks], Tensor] | None = None
    group: int = 0  # columns that share n and j
    multiples: range = range(0)
    offsets: range | None = range(0)

    def holds(self, low: int, high: int, only_odd: bool) -> bool:
        """True if k may be every integer from `low` to `high`, or every odd one."""
        allowed = self.integers
        every = not isinstance(allowed, range) or allowed.step == 1
        return bool(allowed) and min(allowed) <= low and high <= max(allowed) and (only_odd or every)

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a row of `width` columns."""
        return width // self.block * self.block_bytes


SIX_BITS, SIGNED = range(64), range(-32, 32)
QUANTIZED = (  # smallest first; of two as small, the one that llama.cpp computes with faster
    TensorType("Q1_0", 128, 18, range(-1, 2, 2), blocks.q1_0),
    TensorType("TQ1_0", 256, 54, range(-1, 2), blocks.tq1_0),
    TensorType("Q2_K", 256, 84, range(4), blocks.q2_k, 16, range(16), range(16)),
    TensorType("Q3_K", 256, 110, range(-4, 4), blocks.q3_k, 16, SIGNED),
    TensorType("IQ4_XS", 256, 136, IQ4, blocks.iq4_xs, 32, SIGNED),
    TensorType("Q4_0", 32, 18, range(-8, 8), blocks.q4_0),
    TensorType("Q4_K", 256, 144, range(16), blocks.q4_k, 32, SIX_BITS, SIX_BITS),
    TensorType("IQ4_NL", 32, 18, IQ4, blocks.iq4_nl),
    TensorType("Q4_1", 32, 20, range(16), blocks.q4_1, offsets=None),
    TensorType("Q5_0", 32, 22, range(-16, 16), blocks.q5_0),
    TensorType("Q5_K", 256, 176, range(32), blocks.q5_k, 32, SIX_BITS, SIX_BITS),
    TensorType("Q5_1", 32, 24, range(32), blocks.q5_1, offsets=None),
    TensorType("Q6_K", 256, 210, range(-32, 32), blocks.q6_k, 16, range(-128, 128)),
    TensorType("Q8_0", 32, 34, range(-128, 128), blocks.q8_0),
)
ROUNDABLE = {kind.name: kind for kind in QUANTIZED if kind.name in ("Q4_0", "Q5_0", "Q8_0")}  # see `round_to_type`
MXFP4 = TensorType("MXFP4", 32, 17)
FLOATS = {name: TensorType(name, 1, size) for name, size in (("BF16", 2), ("F16", 2), ("F32", 4))}


def type_called(name: str) -> TensorType:
    """Return a quantized type by its name, which must be known."""
    layouts = {str(form): layout for form, layout in LAYOUTS.items()}
    if name in layouts:
        return TensorType(name, SUPERBLOCK, layouts[name].bytes)
    return next(kind for kind in QUANTIZED if kind.name == name)


def exact_type(w: Weight) -> TensorType:
    """Return the smallest type that holds `w` value for value. Raises UnfitError where there is none."""
    match w:
        case Dense(values):
            return FLOATS[FLOAT_TYPES.get(values.dtype, "F32")]
        case Zero():
            return FLOATS["BF16"]
        case Superblocks(form=form):
            return type_called(form)
        case Minifloat(scale=scale, tensor_scale=None, form="e2m1", scales="e8m0", group_size=32):
            if w.codes.shape[1] % MXFP4.block or int(scale.max()) == 255:
                raise UnfitError(f"{describe(w)} does not fill blocks of 32 columns")
            return MXFP4
        case Grid() | Sum((LowRank(), Grid())):
            grid = to_scaled_integers(w)
            smallest = next((kind for kind in QUANTIZED if grid.blocks(kind) is not None), None)
            if smallest is None:
                raise UnfitError(f"{describe(w)} {grid.obstacle()}")
            return smallest
        case _:
            raise UnfitError(f"{describe(w)} is no single grid")


def presumed_type(w: Weight) -> TensorType:
    """Return the type that a matrix will have, from an expression without values, as in a plan.

    Its codes are taken to fill their range, its scales to have nothing in common. Raises UnfitError where no type holds
    it.
    """
    match w:
        case Minifloat():
            return MXFP4  # the only one, see `runtime_formats.llama_cpp_obstacle`
        case Grid():
            return exact_type(_stand_in(w))
        case Sum((LowRank(), Grid() as grid)):
            return exact_type(_stand_in(grid))
        case _:
            return exact_type(w)


def _stand_in(w: Grid) -> Grid:
    """Return two rows of a grid with values: their zero points are the first code and the last."""
    last, width, groups = w.levels - 1, w.codes.shape[1], w.scale.shape[1]
    place = torch.arange(width) % min(w.group_size, width)
    codes = torch.where(place == 1, last, place % w.levels).expand(2, -1)
    scale = (1 + torch.arange(groups) * 37 % 1024 / 1024).half().expand(2, -1)
    zero = None if w.zero is None else torch.tensor([[0], [last]]).expand(-1, w.zero.shape[1]).to(torch.uint8)
    return replace(w, codes=codes.to(torch.uint8), scale=scale, zero=zero)


def common_type(reads: Sequence[Callable[[], Weight]]) -> TensorType:
    """Return the smallest type that holds all these weights value for value. Raises UnfitError where there is none."""
    kinds = {exact_type(read()).name for read in reads}
    if len(kinds) == 1:
        return exact_type(reads[0]())
    grids = kinds <= {kind.name for kind in QUANTIZED}
    for kind in QUANTIZED if grids else ():
        if all(to_scaled_integers(read()).blocks(kind) is not None for read in reads):
            return kind
    raise UnfitError(f"the experts need several types, {' and '.join(sorted(kinds))}")


def round_to_type(values: Tensor, kind: TensorType) -> Grid:
    """Round `values [O, I]` to a simple type without offsets: the largest of each block to its last integer.

    Raises UnfitError for a width that blocks do not fill, or numbers beyond float16.
    """
    if values.shape[1] % kind.block:
        raise UnfitError(f"a width of {values.shape[1]} is not filled by blocks of {kind.block} columns")
    last = -min(kind.integers)
    each = values.float().unflatten(1, (-1, kind.block))
    largest = each.gather(2, each.abs().argmax(2, keepdim=True))
    d = (largest.abs() / last).half()
    if not bool(d.isfinite().all()):
        raise UnfitError(f"{kind.name} has no scale for {float(largest.abs().max()):g}")
    turned = largest > 0  # the last integer is below 0
    zero = torch.where(turned, last - 1, last)
    k = torch.where(d > 0, each / d.float(), 0.0).round()
    codes = (k + zero).clamp_(0, 2 * last - 1).flatten(1)
    return Grid(codes.to(torch.uint8), d[..., 0], zero[..., 0].to(torch.uint8), 2 * last, kind.block)


def pack_tensor(w: Weight, kind: TensorType) -> Tensor:
    """Return the bytes of `w` in its type `kind`: uint8 `[O, bytes of a row]`, `[bytes]` of a vector."""
    if isinstance(w, Superblocks):
        return w.codes
    if isinstance(w, Minifloat) and kind is MXFP4:
        return blocks.mxfp4(w.codes.unflatten(1, (-1, kind.block)), w.scale[..., None]).flatten(1)
    filled = to_scaled_integers(w).blocks(kind) if kind.pack else None
    if kind.pack is None or filled is None:
        dtype = {name: dtype for dtype, name in FLOAT_TYPES.items()}.get(kind.name, torch.float32)
        values = w.values if isinstance(w, Dense) else dense(w)
        return values.to(dtype).contiguous().view(torch.uint8)
    return kind.pack(filled).flatten(1)


# --- grids ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaledIntegers:
    """A matrix k s + t: int16 k `[O, I]`, float32 scales s and offsets t `[O, groups]` of `size` columns.

    `offset_steps`: j and e of offsets that are -j e, where they are stored so, e for several groups each.
    """

    k: Tensor
    scale: Tensor
    size: int
    offset: Tensor | None = None
    offset_steps: tuple[Tensor, Tensor] | None = None

    @cached_property
    def ends(self) -> tuple[int, int, bool]:
        """The least and the largest k, and True if all are odd."""
        return int(self.k.min()), int(self.k.max()), bool((self.k % 2 != 0).all())

    def blocks(self, kind: TensorType) -> Blocks | None:
        """Return the matrix in blocks of a type; None where the type does not hold it."""
        width, group = self.k.shape[1], kind.group or kind.block
        low, high, odd = self.ends
        may_turn = kind.offsets is not None and not kind.offsets
        straight = kind.holds(low, high, odd)
        fits = straight or (may_turn and kind.holds(-high, -low, odd)) or (may_turn and kind.holds(-high, -1, odd))
        if not fits or width % kind.block or self.size % group:
            return None
        k = self.k.unflatten(1, (-1, group))  # [O, groups of the type, group]
        each = k.shape[1] // self.scale.shape[1] if self.size >= width else self.size // group
        scale = self.scale.repeat_interleave(each, 1)[:, : k.shape[1]].expand(len(k), -1)
        if may_turn and not straight:
            sign = torch.where(_among(k, kind.integers).all(2), 1, -1).to(torch.int16)
            k, scale = k * sign[..., None], scale * sign
        if not bool(_among(k, kind.integers).all()):
            return None
        return self._fit_scales(kind, k.reshape(len(k), -1, kind.block), scale.unflatten(1, (-1, kind.block // group)))

    def _fit_scales(self, kind: TensorType, k: Tensor, scale: Tensor) -> Blocks | None:
        """Return blocks with these integers `[O, N, block]` and scales `[O, N, G]`; None for other scales."""
        if not bool((scale.half().float() == scale).all()):
            return None
        if (self.offset is None) != (kind.offsets is not None and not kind.offsets):
            return None
        if not kind.multiples:
            if kind.offsets is not None:
                return Blocks(k, scale.half())
            offset = self._by_block(self.offset, k.shape[1], 1)
            exact = offset is not None and bool((offset.half().float() == offset).all())
            return Blocks(k, scale.half(), offset=offset) if exact else None
        d, n = common_divisor(scale)
        if int(n.min()) not in kind.multiples or int(n.max()) not in kind.multiples:
            return None
        if not kind.offsets:
            return Blocks(k, d, n)
        if self.offset_steps is None:
            return None
        j = self._by_block(self.offset_steps[0], k.shape[1], scale.shape[2])
        e = self._by_block(self.offset_steps[1], k.shape[1], 1)
        if j is None or e is None or int(j.min()) not in kind.offsets or int(j.max()) not in kind.offsets:
            return None
        return Blocks(k, d, n, e, j)

    @staticmethod
    def _by_block(numbers: Tensor | None, count: int, groups: int) -> Tensor | None:
        """Return `[O, N * G]` as `[O, N, G]`; None for another number of columns."""
        if numbers is None or numbers.shape[1] != count * groups:
            return None
        return numbers.unflatten(1, (count, groups))

    def obstacle(self) -> str:
        """Return the reason why no type holds the matrix, as the end of a sentence."""
        if not bool((self.scale.half().float() == self.scale).all()):
            return "has scales that float16 cannot hold once they are halved"
        low, high, odd = self.ends
        if low < -128 or high > 127:
            narrow = ", and fits when it is compressed with narrow_range: true" if odd else ""
            return f"has integers from {low} to {high}, more than the 8 bits of Q8_0{narrow}"
        if self.offset is not None:
            return "has an offset for each group, which only types with as many columns in a group have"
        return f"of width {self.k.shape[1]} does not fill blocks of 32 columns with one scale each"


def _among(k: Tensor, allowed: range | tuple[int, ...]) -> Tensor:
    """Return true where an integer is allowed; a range allows all between its ends."""
    if isinstance(allowed, range):
        return (k >= min(allowed)) & (k <= max(allowed))
    return torch.isin(k, torch.tensor(allowed, dtype=k.dtype))


def to_scaled_integers(w: Weight) -> ScaledIntegers:
    """Return a grid with or without offsets as integers and scales. Raises UnfitError for another low-rank term."""
    match w:
        case Grid(scale=scale):
            size = w.group_size if scale.shape[1] > 1 else w.codes.shape[1]
            return ScaledIntegers(*_integers(w), size)
        case Sum((LowRank(left, Grid() as right), Grid() as grid)) if _tells_groups(right, grid):
            steps = None
            if isinstance(left, Grid):
                k, e = _integers(left)
                steps = -k, e.expand(len(k), -1)
            return replace(to_scaled_integers(grid), offset=dense(left), offset_steps=steps)
    raise UnfitError(f"{describe(w)} is no single grid")


def _tells_groups(right: Grid, grid: Grid) -> bool:
    """True if `right [groups, in]` is 1 where a column is in a group of `grid`, else 0."""
    groups = torch.arange(grid.codes.shape[1]) // grid.group_size
    expected = groups[None] == torch.arange(len(right.codes))[:, None]
    return right.codes.shape == expected.shape and bool((dense(right) == expected).all())


def common_divisor(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest d, float16 `[O, N, 1]`, and n, int64 `[O, N, G]`, with `scale = n d`."""
    numbers = (scale.double() / SMALLEST).round().long()
    common = reduce(torch.gcd, numbers.abs().unbind(2))[..., None]
    return (common.double() * SMALLEST).half(), numbers // common.clamp_min(1)


def _integers(w: Grid) -> tuple[Tensor, Tensor]:
    """Return `dense(w)` as integers k, int16 `[O, I]`, and their scales, float32 `[O or 1, groups]`."""
    codes, scale = w.codes.to(torch.int16), w.scale.float()
    if w.zero is not None:
        zero = w.zero.to(torch.int16)
        spread = zero if zero.shape[1] == 1 else zero.repeat_interleave(w.group_size, 1)[:, : codes.shape[1]]
        return codes - spread, scale
    if w.levels % 2:
        return codes - w.levels // 2, scale
    return 2 * codes - (w.levels - 1), scale / 2
