"""The walk over a dense model's blocks whose changes are judged by their outputs on held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from llmcompress.calibration.blocks import TOKENS_PER_BATCH, BlockForward, RowBatch, drop, in_batches, load
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import Block, Execution, Progress, walk
from llmcompress.data.calibration import CalibrationTokens, calibration_tokens
from llmcompress.errors import RecipeError
from llmcompress.models.dense.config import context_length
from llmcompress.models.dense.families import Architecture
from llmcompress.models.dense.load import load_writer
from llmcompress.models.dense.model import DenseModel
from llmcompress.recipe.calibration import Calibration

LENGTH = 512  # of a sequence


def judged_calibration(source: DenseModel, text: str, samples: int, one_in: int) -> Calibration:
    """Return the calibration that holds out one in `one_in` samples. Raises RecipeError for fewer than two samples."""
    if samples < 2:
        raise RecipeError(f"{samples} samples of text leave none to judge on; ask for at least 2")
    length = min(LENGTH, context_length(source.config) or LENGTH)
    return Calibration(dataset=text, samples=samples, length=length, held_out=max(1, samples // one_in))


def read_tokens(source: DenseModel, calibration: Calibration) -> CalibrationTokens:
    """Return the tokens of a calibration. Raises InputError for a text that cannot serve, and as `load_writer` does."""
    return calibration_tokens(calibration, source.tokenizer(), partial(load_writer, source), source.config)


@dataclass(frozen=True, eq=False)
class Visit:
    """A block, loaded in float32, while the walk stands at it. `run`: the block on its inputs, in `batches`."""

    block: Block
    run: BlockForward
    batches: list[RowBatch]

    @property
    def calibrating(self) -> list[RowBatch]:
        """Batches of the text to choose by."""
        return [batch for batch in self.batches if not batch.held_out]

    @property
    def judging(self) -> list[RowBatch]:
        """Batches of the held-out text."""
        return [batch for batch in self.batches if batch.held_out]

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Return the block's outputs on each batch of held-out text, `[sequences, length, width]`."""
        return [self.run(self.block.hidden[batch.rows], batch.rows) for batch in self.judging]

    @torch.no_grad()
    def damage(self, before: Sequence[Tensor], module: nn.Module | None = None) -> float:
        """Return the mean over held-out tokens of the outputs' squared change, relative to their squared size `before`.

        So tokens with huge hidden states count like others. `module`: another block in the place of this one.
        """
        run = self.run if module is None else replace(self.run, module=module)
        total, count = 0.0, 0
        for batch, old in zip(self.judging, before, strict=True):
            change = run(self.block.hidden[batch.rows], batch.rows) - old
            shares = change.double().square().sum(-1) / old.double().square().sum(-1).clamp_min(1e-30)
            total, count = total + float(shares.sum()), count + shares.numel()
        return total / count

    def damage_by(self, changed: DenseModel, skeleton: nn.Module) -> float:
        """Return the `damage` of the block that a `changed` model has instead; `skeleton`: that model, on meta."""
        module, before = skeleton.get_submodule(self.run.path), self.outputs()
        load(module, self.run.path, changed, self.block.hidden.device)
        try:
            return self.damage(before, module)
        finally:
            drop(module)


@dataclass(frozen=True, eq=False)
class JudgedWalk:
    """A dense model, with the tokens to choose by and to judge on. `progress`: as of `walk`."""

    source: DenseModel
    arch: Architecture
    tokens: CalibrationTokens
    device: torch.device
    progress: Progress | None = None

    def visits(
        self,
        needs: Mapping[str, frozenset[str]] = MappingProxyType({}),
        prefix: Literal["compressed", "dense"] = "compressed",
    ) -> Iterator[Visit]:
        """Yield the blocks in depth order; `needs` and `prefix`: as of `walk`."""
        sequences, held_out = self.tokens.sequences, self.tokens.held_out
        size = max(1, TOKENS_PER_BATCH // sequences.shape[1])
        batches = in_batches(len(sequences), held_out, size)
        statistics = Statistics(needs, prefix=prefix)
        execution = Execution(self.device, batch_size=size, progress=self.progress)
        for block in walk(self.source, self.arch, sequences, statistics, execution, held_out=held_out):
            if block.run is not None:
                yield Visit(block, block.run, batches)
