"""Trellis-coded tiles as ExLlamaV3 stores them (EXL3; QTIP, arXiv 2406.11235), for its fast kernels on NVIDIA's GPUs.

Minimises tr(E H E^T) greedily, 16 inputs at a time: their tiles become the nearest ones, and later inputs make up for
the error (block LDLQ of QuIP#, arXiv 2402.04396). Inputs and outputs are turned first, 128 at a time, with random
signs, so that weights look Gaussian. Stores `Tiles`: `bits` a weight, and a float16 factor an input and an output.
`llmcompress export --to exl3` writes them for ExLlamaV3 as they are. Needs widths and heights that 128 divides.

Differs from ExLlamaV3: factors are the spread of each row, and of each block of inputs; those of outputs are fitted
by least squares at the end. A search has 65,536 states, so it takes 16 times as long as `trellis`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.kernels.column_block import ColumnBlock, Numbers, whole_weights
from llmcompress.methods.layer import Layer, StepConfig, base_target, join, method, term_beside_dense, with_base
from llmcompress.methods.moments import Moments
from llmcompress.methods.solvers.block_search import choose_columns
from llmcompress.methods.solvers.hessian import feedback_factor, metric
from llmcompress.runtime.seeding import generator
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Dense, Tiles, Weight, shape
from llmcompress.weight.tiles import BLOCK, MEMORY, SIDE, STEPS, from_tiles, numbers, states, to_tiles, turn_blocks
from llmcompress.weight.trellis import Trellis

SPREAD = {1: 1.1, 2: 1.0}  # of what is searched, best on a Gaussian; that of the numbers is 1
WIDE_SPREAD = 0.95  # from 3 bits on
MOST_BITS = 6
ERRORS = (0.274, 0.0689, 0.0175, 0.00454, 0.00117, 0.00033)  # by bits: squared, of a search of a Gaussian of spread 1


class EXL3(StepConfig):
    """Arguments of `exl3`."""

    method: Literal["exl3"] = "exl3"
    bits: int = Field(2, ge=1, le=MOST_BITS, description="a weight")
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")
    examples = ({}, {"bits": 4})
    is_slow = True

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        term = term_beside_dense(approx, "a matrix of tiles")
        rows, width = shape(approx)
        if rows % BLOCK or width % BLOCK:
            raise RecipeError(
                f"EXL3 needs sides that {BLOCK} divides, and it is {rows} x {width}; leave it dense, or use trellis"
            )
        codes = torch.empty(width // SIDE, rows // SIDE, STEPS, dtype=torch.uint8, device="meta")
        inputs, outputs = (torch.empty(size, dtype=torch.float16, device="meta") for size in (width, rows))
        return join(Tiles(codes, inputs, outputs, self.bits), term)

    def rough(self) -> StepConfig:
        """Without the search; see `StepConfig.rough`."""
        return NoisyTiles(bits=self.bits, damping=self.damping)


class NoisyTiles(EXL3):
    """`exl3` as prices try it: numbers as far from the wanted ones as a search leaves them, without codes."""

    is_slow = False


@method("exl3", EXL3, needs={"outer"}, data_free=True)
def exl3(layer: Layer, config: EXL3) -> Layer:
    """Quantize the base to tiles, with error feedback, and fit the factors of outputs."""
    config.sketch(layer.approx)
    if layer.rotation is not None:
        raise RecipeError("EXL3 has a rotation of its own; drop the step that rotates")
    target = base_target(layer)
    random = generator("exl3", layer.seed)
    rows = _random_factors(target.square().mean(1), random)
    even = target / rows.float()[:, None]
    blocks = even.square().reshape(len(even), -1, BLOCK).mean((0, 2)).repeat_interleave(BLOCK)
    spread = SPREAD.get(config.bits, WIDE_SPREAD)
    columns = _random_factors(blocks / spread**2, random)
    turned_weight = turn_blocks(turn_blocks((even / columns.float()).T.contiguous()).T.contiguous()).T  # [in, out]
    factor, notes = feedback_factor(_turn_moments(layer.inputs, columns), config.damping)
    wanted, hessian = turned_weight.contiguous(), metric(layer.inputs, target, config.damping)
    if isinstance(config, NoisyTiles):
        stored = feed_back(wanted, factor, partial(_add_errors, ERRORS[config.bits - 1], random))
        values = turn_blocks(turn_blocks(stored).T.contiguous()) * columns.float() * rows.float()[:, None]
        return with_base(layer, Dense(values * _gains(values, target, hessian)[:, None]), notes)
    found = Tiles(tiles_with_feedback(wanted, factor, config.bits), columns, rows, config.bits)
    limit = torch.finfo(torch.float16).max
    outputs = (rows.float() * _gains(dense(found), target, hessian)).clamp(-limit, limit).half()
    return with_base(layer, replace(found, outputs=outputs), notes)


def tiles_with_feedback(weight: Tensor, factor: Tensor | None, bits: int) -> Tensor:
    """Return codes for `weight [in, out]`, one row of tiles after the other, with feedback between them."""
    chosen: list[Tensor] = []

    def store(wanted: Tensor) -> Tensor:
        chosen.append(nearest_tiles(to_tiles(wanted), bits))
        return from_tiles(numbers().to(wanted.device)[states(chosen[-1], bits)])

    feed_back(weight, factor, store)
    return torch.cat(chosen)


def feed_back(weight: Tensor, factor: Tensor | None, store: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `weight [in, out]` as `store` holds it, 16 inputs at a time, with feedback between them.

    `factor` is U with inverse(H) = U^T U: an error e of 16 inputs moves later ones by inverse(U_bb) U_b,later e.
    """
    current = weight.clone()
    for start in range(0, len(current), SIDE):
        part, later = slice(start, start + SIDE), slice(start + SIDE, None)
        stored = store(current[part])
        if factor is not None:
            shares = torch.linalg.solve_triangular(factor[part, part], factor[part, later], upper=True)
            current[later] -= shares.T @ (current[part] - stored)
        current[part] = stored
    return current


def _add_errors(share: float, random: torch.Generator, wanted: Tensor) -> Tensor:
    """Return numbers whose squared error is a share of that of the wanted ones, as rate and distortion go."""
    energy = float(wanted.square().mean())
    noise = torch.randn(wanted.shape, dtype=torch.float32, generator=random).to(wanted)
    return (1 - share) * wanted + (share * (1 - share) * energy) ** 0.5 * noise


def nearest_tiles(wanted: Tensor, bits: int) -> Tensor:
    """Return the codes, uint8 `[..., 256]`, of the tiles nearest to `wanted`, float32 alike, step by step.

    All tiles are searched at once, each a ring of its own; with 2^16 states a tile takes a core some 5 ms.
    """
    table, steps = _numbers(bits, wanted.device), wanted.reshape(1, -1).clone()
    ones = torch.ones(wanted.numel(), device=wanted.device)
    edges = tuple(range(0, wanted.numel() + 1, STEPS))
    ends = torch.empty(2, len(edges) - 1, dtype=torch.int32, device=wanted.device)
    block = ColumnBlock(steps, whole_weights(ones, table.trellis), ones, edges, ends)
    codes = choose_columns(block, table)[0] & ((1 << bits) - 1)
    return codes.to(torch.uint8).reshape(wanted.shape)


@lru_cache(maxsize=MOST_BITS)
def _numbers(bits: int, device: torch.device) -> Numbers:
    return Numbers.on(device, Trellis(bits, 1, MEMORY, ring=True), numbers()[:, None])


def _random_factors(energy: Tensor, random: torch.Generator) -> Tensor:
    """Return float16 factors of random sign, the roots of `energy`; 1 where there is none."""
    size = torch.where(energy > 0, energy, 1.0).sqrt().clamp(2.0**-14, torch.finfo(torch.float16).max)
    signs = torch.rand(len(size), dtype=torch.float32, generator=random) < 0.5
    return torch.where(signs.to(size.device), size, -size).half()


def _turn_moments(moments: Moments, columns: Tensor) -> Moments:
    """Return the moments of the inputs of tiles: times the factors, then turned."""
    if moments.outer is None:
        return moments
    half = turn_blocks(moments.outer * columns.float())
    return Moments(moments.tokens, outer=turn_blocks((half.T * columns.float()).contiguous()))


def _gains(values: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Return the least-squares factor of each row."""
    seen = values @ hessian
    energy = (seen * values).sum(1)
    return torch.where(energy > 0, (seen * target).sum(1) / energy.clamp_min(1e-30), 1.0)
