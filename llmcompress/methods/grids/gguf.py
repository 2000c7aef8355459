"""GPTQ (arXiv 2210.17323) onto the types of llama.cpp's GGUF files, so that the export keeps every value.

Minimises tr(E H E^T) greedily, as `gptq` does, but the grid of a group is one that a GGUF type has: integers that reach
one further on one side, scales that are small multiples of a number of their superblock, offsets beside them, or the 16
numbers of the IQ4 types. llama.cpp's own quantizer rounds each weight for itself.

In the types IQ1, IQ2 and IQ3 eight or four columns are an entry of a table, under signs or a shift. The nearest one is
searched in the metric of the inverse Hessian's block, for each multiple that their scale may be, and their errors are
fed back together. They need the package `gguf`, which has the tables. TQ1_0 has the integers -1, 0 and 1; TQ2_0 has 2
besides, which llama.cpp computes with, though its own quantizer leaves it out.

Stores `Superblocks`, the bytes of the GGUF file, for IQ1, IQ2, IQ3 and TQ2_0, and a Grid for the others; Q4_1, Q5_1,
Q2_K, Q4_K and Q5_K a low-rank term before it, whose right factor says which columns are in which group: the offsets.
Scales of grids are stored as float16 numbers and the numbers of IQ4 types as integers of 8 bits, so a checkpoint can be
larger than the GGUF file it becomes. The K, TQ and IQ types but IQ4_NL have superblocks of 256 columns; where these do
not fill a matrix, the type is used that llama.cpp's quantizer takes instead; the export counts the types.

In the superblocks of K types scales are small multiples n of one number d, and offsets small multiples of one
number e: d and e are chosen where the superblock starts, n and the offset's multiple where the group starts, each on
weights that carry all feedback so far. d has so few significant bits that every n d is a float16 number.
"""

# O out, C columns of a group, S scales tried

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.methods.layer import Layer, StepConfig, base_and_term, base_target, join, method, with_base
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.grid import IQ4, float16_scale
from llmcompress.methods.solvers.hessian import channel_energy, feedback_factor
from llmcompress.methods.solvers.superblocks import InSuperblocks, inverse
from llmcompress.weight.nodes import Dense, Grid, LowRank, Sum, Superblocks, Weight, shape
from llmcompress.weight.superblocks import (
    LAYOUTS,
    SUPERBLOCK,
    SuperblockForm,
    SuperblockNumbers,
    pack_superblocks,
    superblock_table,
)

Grids = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
Type = Literal[Grids, "TQ1_0", SuperblockForm]
# Shares of the scale whose range just covers a group, from more than that (another code for the largest) to half.
SHARES = (1.15, 1.07, 1.0, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68, 0.6, 0.52)
ROUNDS = 2  # of codes for a scale, and the scale for those codes
SMALLEST = 2.0**-24  # positive float16 number


@dataclass(frozen=True)
class BlockForm:
    """A format. `integers`: the allowed k, in order. `multiples`: the largest n, 0 for float16 scales.

    `offsets`: the largest multiple of e that is subtracted from a group, 0 for float16 offsets, None for no offsets;
    scales may then be negative, as the integers reach further on one side.
    """

    integers: tuple[int, ...]
    group: int
    multiples: int = 0
    offsets: int | None = None

    @property
    def span(self) -> int:
        """Number of columns that are fitted together."""
        return SUPERBLOCK if self.multiples else self.group

    @property
    def levels(self) -> int:
        """Number of levels of a grid that has all these integers."""
        return self.integers[-1] - self.integers[0] + 1

    def nearest(self, scaled: Tensor) -> Tensor:
        """Return the nearest allowed integers."""
        if self.levels == len(self.integers):
            return scaled.round().clamp_(self.integers[0], self.integers[-1])
        first, last = 2 * self.integers[0], 2 * self.integers[-1]  # what is nearest changes at multiples of 1/2
        halves = (2 * scaled).floor_().clamp_(first, last).long() - first
        return _nearest_of_halves(self.integers).to(scaled)[halves]


@cache
def _nearest_of_halves(integers: tuple[int, ...]) -> Tensor:
    """Return the integer nearest to the numbers from h / 2 up to (h + 1) / 2, for every h in their range."""
    middles = torch.arange(2 * integers[0], 2 * integers[-1] + 1) / 2 + 0.25
    table = torch.tensor(integers, dtype=torch.float32)
    return table[(middles[:, None] - table).abs().argmin(1)]


FORMS: dict[Type, BlockForm] = {  # of types without a table of vectors
    "Q4_0": BlockForm(tuple(range(-8, 8)), 32),
    "Q4_1": BlockForm(tuple(range(16)), 32, offsets=0),
    "Q5_0": BlockForm(tuple(range(-16, 16)), 32),
    "Q5_1": BlockForm(tuple(range(32)), 32, offsets=0),
    "Q8_0": BlockForm(tuple(range(-128, 128)), 32),
    "IQ4_NL": BlockForm(IQ4, 32),
    "Q2_K": BlockForm(tuple(range(4)), 16, 15, 15),
    "Q3_K": BlockForm(tuple(range(-4, 4)), 16, 31),
    "Q4_K": BlockForm(tuple(range(16)), 32, 63, 63),
    "Q5_K": BlockForm(tuple(range(32)), 32, 63, 63),
    "Q6_K": BlockForm(tuple(range(-32, 32)), 16, 127),
    "IQ4_XS": BlockForm(IQ4, 32, 31),
    "TQ1_0": BlockForm((-1, 0, 1), SUPERBLOCK),
    "TQ2_0": BlockForm((-1, 0, 1, 2), SUPERBLOCK),
}
INSTEAD: dict[Type, Type] = {  # of a type with superblocks, in matrices that these do not fill
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    **dict.fromkeys(LAYOUTS.keys() - {"TQ2_0"}, "IQ4_NL"),
}


class GGUF(StepConfig):
    """Arguments of `gguf`."""

    method: Literal["gguf"] = "gguf"
    type: Type = Field("Q4_0", description="a tensor type of GGUF")
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")
    is_slow = True
    examples = ({}, {"type": "Q4_1"}, {"type": "IQ4_NL"}, {"type": "Q8_0"}, {"type": "Q5_K"})

    @property
    def rowwise(self) -> bool:
        """See `StepConfig.rowwise`."""
        form = FORMS.get(self.type)
        return form is None or form.offsets is None  # a low-rank term has a factor of the whole matrix

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        base, term = base_and_term(approx)
        kind = fitting(self.type, shape(base)[1])
        form = superblock_form(kind)
        return join(superblock_sketch(shape(base), form) if form else in_blocks_sketch(shape(base), FORMS[kind]), term)

    def substitute(self, width: int) -> str | None:
        """See `StepConfig.substitute`."""
        kind = fitting(self.type, width)
        if kind == self.type:
            return None
        return (
            f"superblocks of {SUPERBLOCK} columns do not fill its width {width}, so it becomes {kind}, not {self.type}"
        )


def fitting(kind: Type, width: int) -> Type:
    """Return the type, or its substitute in matrices of that width."""
    return INSTEAD[kind] if kind in INSTEAD and width % SUPERBLOCK else kind


def can_learn(kind: Type, rates: Collection[str]) -> bool:
    """True if a type holds what training at these rates leaves: not where scales are multiples of a number, offsets are
    a factor of zeros and ones, or integers have gaps."""
    form = FORMS.get(kind)
    if form is None or superblock_form(kind):  # which do not train
        return True
    fixed = {"scales"} if form.multiples else set()
    fixed |= set() if form.offsets is None else {"scales", "factors", "codes"}
    fixed |= set() if form.levels == len(form.integers) else {"codes"}
    return not fixed & set(rates)


def superblock_form(kind: Type) -> SuperblockForm | None:
    """Return the form of `Superblocks` that a type is; None for a grid."""
    return next((form for form in LAYOUTS if form == kind), None)


@method("gguf", GGUF, needs={"outer"}, data_free=True)
def gguf(layer: Layer, config: GGUF) -> Layer:
    """Quantize the base with error feedback; without calibration, without feedback."""
    target = base_target(layer)
    kind = fitting(config.type, target.shape[1])
    factor, notes = feedback_factor(layer.inputs, config.damping)
    form = superblock_form(kind)
    if form and kind not in FORMS:
        return with_base(layer, feedback(target, factor, InSuperblocks(form, factor, target.device)), notes)
    importance = None if factor is None else channel_energy(layer.inputs).float()
    found = feedback(target, factor, InBlocks(FORMS[kind], importance))
    return with_base(layer, to_tq2_0(found) if form else found, notes)


@dataclass
class BlockScales:
    """Scales and offsets of a matrix, one for each group or superblock."""

    scales: list[Tensor] = field(default_factory=list)  # float32 [O, 1], negative where the signs of k are turned
    offsets: list[Tensor] = field(default_factory=list)  # float32 [O, 1], not positive: taken away
    steps: list[Tensor] = field(default_factory=list)  # e, float32 [O, 1]


class InBlocks:
    """A `Projection` to the values of a format; `importance [in]` weights columns in the fit."""

    def __init__(self, form: BlockForm, importance: Tensor | None = None) -> None:
        self.form, self.importance = form, importance
        self.strides: tuple[int, ...] = (form.span, form.group)
        self.fitted = BlockScales()
        self.unit = self.step = torch.zeros(0, 1)  # d and e of the superblock

    def begin(self, column: int, current: Tensor) -> None:
        """Fit the superblock and the group that start at `column`."""
        form = self.form
        if form.multiples and column % SUPERBLOCK == 0:
            self._start(column, current)
        if column % form.group == 0:
            scale, offset = self._fit(column, current, exact=True)
            self.fitted.scales.append(scale)
            self.fitted.offsets.append(offset)

    def _start(self, column: int, current: Tensor) -> None:
        """Choose d and e whose largest multiples are the largest scale and offset of the superblock's groups."""
        stop = min(column + SUPERBLOCK, len(current))
        found = [self._fit(start, current, exact=False) for start in range(column, stop, self.form.group)]
        scales, offsets = (torch.cat(part, 1) for part in zip(*found, strict=True))
        self.unit = few_bits(scales.abs().amax(1, keepdim=True) / self.form.multiples, self.form.multiples)
        if self.form.offsets:
            self.step = float16_scale(-offsets.amin(1, keepdim=True) / self.form.offsets).float()
            self.fitted.steps.append(self.step)

    def _fit(self, start: int, current: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
        """Return scale and offset `[O, 1]` of the least squared error among those tried; if `exact`, as stored."""
        columns = slice(start, start + self.form.group)
        values = current[columns].T
        weights = torch.ones_like(values[:1]) if self.importance is None else self.importance[columns][None]
        tried = self._first_guesses(values)
        for _ in range(ROUNDS):
            found = self._round(*tried) if exact else tried
            codes = self.form.nearest((values - found[1]) * inverse(found[0]))
            tried = self._least_squares(values, weights, codes)
        last = self._round(*tried) if exact else tried
        scales, offsets = (torch.cat(parts) for parts in zip(found, last, strict=True))
        codes = self.form.nearest((values - offsets) * inverse(scales))
        errors = (codes.mul_(scales).add_(offsets).sub_(values).square_() * weights).sum(2)
        best = errors.argmin(0)[None, :, None]
        return scales.gather(0, best)[0], offsets.gather(0, best)[0]

    def _first_guesses(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first scales and offsets `[S, O, 1]` for `values [O, C]`."""
        shares = values.new_tensor(SHARES)[:, None, None]
        first, last = self.form.integers[0], self.form.integers[-1]
        if self.form.offsets is None:
            covering = values.abs().amax(1, keepdim=True) / max(-first, last) * shares
            return torch.cat([covering, -covering]), covering.new_zeros(2 * len(SHARES), len(values), 1)
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        if self.form.offsets:
            low = low.clamp_max(0)
        share = shares.clamp_max(1)
        return (high - low).clamp_min(0) * share / last, (low + high) / 2 - (high - low) / 2 * share

    def _least_squares(self, values: Tensor, weights: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best scales and offsets `[S, O, 1]` for codes `[S, O, C]`, in closed form."""

        def mean(numbers: Tensor) -> Tensor:
            return (numbers * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)

        if self.form.offsets is None:
            scales = mean(codes * values) / mean(codes * codes).clamp_min(1e-30)
            return scales, torch.zeros_like(scales)
        middle, centre = mean(values), mean(codes)
        spread = mean((codes - centre).square())
        scales = (mean((codes - centre) * (values - middle)) / spread.clamp_min(1e-30)).clamp_min(0)
        return scales, middle - scales * centre

    def _round(self, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest scales and offsets of the format."""
        form = self.form
        if form.multiples:
            scales = (scales * inverse(self.unit)).round_().clamp_(-form.multiples, form.multiples) * self.unit
        else:
            scales = float16_scale(scales).float()
        if form.offsets:
            offsets = -(-offsets * inverse(self.step)).round_().clamp_(0, form.offsets) * self.step
        elif form.offsets == 0:
            offsets = float16_scale(offsets).float()
        return scales, offsets

    def project(self, column: int, values: Tensor) -> Tensor:
        """Return the nearest values `[O]` of the group."""
        scale, offset = self.fitted.scales[-1][:, 0], self.fitted.offsets[-1][:, 0]
        return self.form.nearest((values - offset) * inverse(scale)) * scale + offset

    def weight(self, values: Tensor) -> Weight:
        """Return a `Grid`; with offsets, their low-rank term before it."""
        form, width = self.form, values.shape[1]
        scale, offset = torch.cat(self.fitted.scales, 1), torch.cat(self.fitted.offsets, 1)
        steps, shifts = (each.repeat_interleave(form.group, 1)[:, :width] for each in (scale, offset))
        k = form.nearest((values - shifts) * inverse(steps))
        k = torch.where(steps < 0, -k, k)
        zero = torch.where(scale < 0, form.integers[-1], -form.integers[0])
        codes = k + zero.repeat_interleave(form.group, 1)[:, :width]
        grid = Grid(codes.to(torch.uint8), scale.abs().half(), zero.to(torch.uint8), form.levels, form.group)
        if form.offsets is None:
            return grid
        left: Weight = Dense(offset.half())
        if form.offsets:
            step = torch.cat(self.fitted.steps, 1)
            groups = SUPERBLOCK // form.group
            each = step.repeat_interleave(groups, 1)[:, : scale.shape[1]]
            multiples = form.offsets - (-offset * inverse(each)).round()
            last = torch.full_like(step, form.offsets).to(torch.uint8)
            left = Grid(multiples.to(torch.uint8), step.half(), last, form.offsets + 1, groups)
        return Sum((LowRank(left, members(width, form.group, values.device)), grid))


def members(width: int, group: int, device: torch.device) -> Grid:
    """Return the matrix `[groups, width]` that is 1 where a column is in a group, else 0."""
    groups = torch.arange(width, device=device) // group
    inside = groups == torch.arange(-(-width // group), device=device)[:, None]
    one = torch.ones(1, 1, device=device)
    return Grid(inside.to(torch.uint8), one.half(), (0 * one).to(torch.uint8), 2, width)


def in_blocks_sketch(size: tuple[int, int], form: BlockForm) -> Weight:
    """Return the expression of `InBlocks` for a matrix of that size, without values."""
    rows, width = size
    groups = -(-width // form.group)

    def numbers(count: int, width: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(count, width, dtype=dtype, device="meta")

    def half(width: int) -> Tensor:
        return numbers(rows, width, torch.float16)

    grid = Grid(numbers(rows, width), half(groups), numbers(rows, groups), form.levels, form.group)
    if form.offsets is None:
        return grid
    one = torch.empty(1, 1, dtype=torch.float16, device="meta")
    right = Grid(numbers(groups, width), one, numbers(1, 1), 2, width)
    left: Weight = Dense(half(groups))
    if form.offsets:
        blocks, each = -(-width // SUPERBLOCK), SUPERBLOCK // form.group
        left = Grid(numbers(rows, groups), half(blocks), numbers(rows, blocks), form.offsets + 1, each)
    return Sum((LowRank(left, right), grid))


def superblock_sketch(size: tuple[int, int], form: SuperblockForm) -> Superblocks:
    """Return superblocks without values. Raises RecipeError where the package that has their table is missing."""
    superblock_table(form)
    width = size[1] // SUPERBLOCK * LAYOUTS[form].bytes
    return Superblocks(torch.empty(size[0], width, dtype=torch.uint8, device="meta"), form)


def to_tq2_0(w: Weight) -> Superblocks:
    """Return a grid of the form of TQ2_0 in its bytes; scales are negative where the grid has its signs turned."""
    if not isinstance(w, Grid) or w.zero is None:
        raise TypeError("superblocks of TQ2_0 are grids with a zero point")
    turned = (w.zero != 1)[..., None]
    codes, scale = w.codes.unflatten(1, (-1, SUPERBLOCK)), w.scale[..., None]
    places, none = torch.where(turned, 3 - codes, codes), codes[..., :0]
    numbers = SuperblockNumbers(torch.where(turned, -scale, scale), none, places, none)
    return Superblocks(pack_superblocks(numbers, "TQ2_0"), "TQ2_0")


def few_bits(numbers: Tensor, largest: int) -> Tensor:
    """Return the least numbers, not below these, whose multiples up to `largest` are float16 numbers too."""
    bits = 11 - largest.bit_length()
    _, exponent = torch.frexp(numbers)
    unit = torch.ldexp(torch.ones_like(numbers), exponent - bits).clamp_min(SMALLEST)
    return (numbers / unit).ceil() * unit
