"""Sums of products over tokens, `A^T B` of bfloat16 inputs, in float32: second moments.

torch rounds the product of bfloat16 matrices to bfloat16, and a rounded second moment is not positive definite. In
float32 it takes twice the time on AMD's processors from Zen 4 on. They multiply and add pairs of tokens by one
instruction: inputs are packed in panels of 64 columns, with the numbers of two tokens side by side, and the sums of two
panels' columns stay in registers over 256 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from llvmlite import binding
from torch import Tensor

from llmcompress.kernels.cpu import build
from llmcompress.kernels.cpu.calls import Argument, KernelFunction, Values, launch
from llmcompress.kernels.cpu.emit import FLOATS, I32, I64, INTEGERS, LANES, BFloat16, Value, vector
from llmcompress.kernels.cpu.instruction_sets import host_tier
from llmcompress.runtime.precision import pairs_are_fast

PANEL = 64  # columns
ROWS = 4  # of sums in registers, each as wide as a panel
PAIRS = 128  # of tokens, whose panels fit the first cache
PAIR = 4  # bytes


@dataclass(frozen=True)
class Gram:
    """The kernel: adds the products of one panel of `CODES` and one of `X` to a square of `Y`, for each of `TABLE`,
    int32 `[squares, 2]`. Panels have `COLUMNS` pairs of tokens, rows of `Y` have `ROWS` numbers."""

    def write(self, f: KernelFunction) -> None:
        """Write `kernel(arguments, first square, last square)`."""
        pairs, squares = f.size(Argument.COLUMNS), f.pointer(Argument.TABLE)
        with f.loop(f.first, f.last) as square:
            rows, columns = (f.load(squares, I32, square * 8 + 4 * side).wider(I64) for side in range(2))
            a = f.behind(f.pointer(Argument.CODES), rows * pairs * (PANEL * PAIR))
            b = f.behind(f.pointer(Argument.X), columns * pairs * (PANEL * PAIR))
            with f.loop(0, pairs, PAIRS) as first:
                stop = (first + PAIRS).least(pairs)
                with f.loop(0, PANEL, ROWS) as row:
                    place = ((rows * PANEL + row) * f.size(Argument.ROWS) + columns * PANEL) * 4
                    _add_panel(f, f.behind(a, row * PAIR), b, (first, stop), f.behind(f.pointer(Argument.Y), place))


def _add_panel(f: KernelFunction, a: Value, b: Value, pairs: tuple[Value, Value], y: Value) -> None:
    """Add the products of `ROWS` columns at `a` with all of the panel at `b` to rows at `y`."""
    width = f.size(Argument.ROWS) * 4
    places = list(product(range(ROWS), range(PANEL // LANES)))
    at = {(row, part): f.behind(y, width * row + 4 * LANES * part) for row, part in places}
    sums = {place: f.variable(f.constant(FLOATS, 0.0)) for place in places}  # not of all tokens: roundings would add up
    with f.loop(*pairs) as pair:
        here = pair * (PANEL * PAIR)
        right = [f.load(b, INTEGERS, here + PAIR * LANES * part) for part in range(PANEL // LANES)]
        left = [f.load(a, I32, here + PAIR * row).splat(LANES) for row in range(ROWS)]
        two = vector(BFloat16(), 2 * LANES)
        for row, part in places:
            factors = left[row].as_type(two), right[part].as_type(two)
            total = sums[row, part]
            total.set(f.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total.get(), *factors))
    for place in places:
        f.store(f.load(at[place], FLOATS) + sums[place].get(), at[place])


def supports_width(width: int) -> bool:
    """True if inputs of so many columns are whole panels, and this machine has the instruction and is fast with it."""
    return width % PANEL == 0 and pairs_are_fast() and _has_pairs()


@lru_cache(maxsize=1)
def _has_pairs() -> bool:
    return host_tier().fused and bool(binding.get_host_cpu_features().get("avx512bf16"))


def add_gram(total: Tensor, x: Tensor, left: Tensor | None = None) -> None:
    """Add `left^T x` to `total`, float32 `[in, in]`; without `left`, `x^T x`, and nothing below its panels' diagonal.

    `x`, `left` `[tokens, in]` of bfloat16, whole panels.
    """
    panels = x.shape[1] // PANEL
    right = pack_panels(x)
    other = right if left is None else pack_panels(left)
    every = x.new_ones(panels, panels)
    squares = (every.triu() if left is None else every).nonzero().int().contiguous()
    values = Values()
    values[Argument.CODES], values[Argument.X] = other.data_ptr(), right.data_ptr()
    values[Argument.TABLE], values[Argument.Y] = squares.data_ptr(), total.data_ptr()
    values[Argument.COLUMNS], values[Argument.ROWS] = right.shape[1], total.shape[1]
    launch(build.load_kernel(Gram()), values, len(squares), len(squares) * right[0].numel())


def pack_panels(x: Tensor) -> Tensor:
    """Return `x [tokens, in]` as `[panels, pairs, PANEL, 2]`; the last of an odd number of tokens is beside zeros."""
    tokens, width = x.shape
    if tokens % 2:
        x = torch.cat([x, x.new_zeros(1, width)])
    return x.reshape(-1, 2, width // PANEL, PANEL).permute(2, 0, 3, 1).contiguous()
