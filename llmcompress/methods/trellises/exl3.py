"""Trellis-coded tiles as ExLlamaV3 stores them (EXL3; QTIP, arXiv 2406.11235), for its fast kernels on NVIDIA's GPUs.

Minimises tr(E H E^T) greedily, 16 inputs at a time: their tiles become the nearest ones, and later inputs make up for
the error (block LDLQ of QuIP#, arXiv 2402.04396). Inputs and outputs are turned first, 128 at a time, with random
signs, so that weights look Gaussian. Stores `Tiles`: `bits` a weight, and a float16 factor an input and an output.
`llmcompress export --to exl3` writes them for ExLlamaV3 as they are. Needs widths and heights that 128 divides.

Differs from ExLlamaV3: factors are the spread of each row, and of each block of inputs; those of outputs are fitted
by least squares at the end. A search has 65,536 states, so it takes 16 times as long as `trellis`.
"""

from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.kernels.column_block import ColumnBlock, Numbers, whole_weights
from llmcompress.methods.layer import Layer, StepConfig, base_target, method, term_beside_dense, with_base
from llmcompress.methods.moments import Moments
from llmcompress.methods.solvers.block_search import choose_columns
from llmcompress.methods.solvers.hessian import feedback_factor, metric
from llmcompress.runtime.seeding import generator
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Tiles, Weight, shape
from llmcompress.weight.tiles import BLOCK, MEMORY, SIDE, STEPS, from_tiles, numbers, states, to_tiles, turn_blocks
from llmcompress.weight.trellis import Trellis

SPREAD = {1: 1.1, 2: 1.0}  # of what is searched, best on a Gaussian; that of the numbers is 1
WIDE_SPREAD = 0.95  # from 3 bits on
MOST_BITS = 6


class EXL3(StepConfig):
    """Arguments of `exl3`."""

    method: Literal["exl3"] = "exl3"
    bits: int = Field(2, ge=1, le=MOST_BITS, description="a weight")
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")
    examples = ({}, {"bits": 4})

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        term_beside_dense(approx, "a matrix of tiles")
        rows, width = shape(approx)
        if rows % BLOCK or width % BLOCK:
            raise RecipeError(f"EXL3 needs sides that {BLOCK} divides, and it is {rows} x {width}; use trellis for it")
        codes = torch.empty(width // SIDE, rows // SIDE, STEPS, dtype=torch.uint8, device="meta")
        inputs, outputs = (torch.empty(size, dtype=torch.float16, device="meta") for size in (width, rows))
        return Tiles(codes, inputs, outputs, self.bits)


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
    codes = tiles_with_feedback(turned_weight.contiguous(), factor, config.bits)
    found = Tiles(codes, columns, rows, config.bits)
    return with_base(layer, _fit_outputs(found, target, metric(layer.inputs, target, config.damping)), notes)


def tiles_with_feedback(weight: Tensor, factor: Tensor | None, bits: int) -> Tensor:
    """Return codes for `weight [in, out]`, one row of tiles after the other, with feedback between them.

    `factor` is U with inverse(H) = U^T U: an error e of 16 inputs moves later ones by inverse(U_bb) U_b,later e.
    """
    current = weight.clone()
    chosen = []
    for start in range(0, len(current), SIDE):
        part, later = slice(start, start + SIDE), slice(start + SIDE, None)
        codes = nearest_tiles(to_tiles(current[part]), bits)
        chosen.append(codes)
        if factor is not None:
            error = current[part] - from_tiles(numbers().to(codes.device)[states(codes, bits)])
            shares = torch.linalg.solve_triangular(factor[part, part], factor[part, later], upper=True)
            current[later] -= shares.T @ error
    return torch.cat(chosen)


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
    signs = torch.rand(len(size), generator=random) < 0.5
    return torch.where(signs.to(size.device), size, -size).half()


def _turn_moments(moments: Moments, columns: Tensor) -> Moments:
    """Return the moments of the inputs of tiles: times the factors, then turned."""
    if moments.outer is None:
        return moments
    half = turn_blocks(moments.outer * columns.float())
    return Moments(moments.tokens, outer=turn_blocks((half.T * columns.float()).contiguous()))


def _fit_outputs(w: Tiles, target: Tensor, hessian: Tensor) -> Tiles:
    """Return tiles with least-squares factors of the outputs."""
    values = dense(w)
    seen = values @ hessian
    energy = (seen * values).sum(1)
    gain = torch.where(energy > 0, (seen * target).sum(1) / energy.clamp_min(1e-30), 1.0)
    limit = torch.finfo(torch.float16).max
    return Tiles(w.codes, w.inputs, (w.outputs.float() * gain).clamp(-limit, limit).half(), w.bits)
