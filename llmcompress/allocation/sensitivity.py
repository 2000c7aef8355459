"""Damage to the model's predictions when one of its matrices changes: KL, measured by forward passes alone.

The dense model passes block by block, and beside it, from its own block on, each change to it: on average half a
forward. ECoFLaP (arXiv 2310.02998) perturbs all layers alike, by noise; here each is perturbed by an error that
compressing it makes. Memory holds the hidden states of the probing tokens for each change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from llmcompress.calibration.streaming import StreamedModel, from_disk, run_block
from llmcompress.calibration.walk import Block
from llmcompress.compression.time_estimate import EXPERT
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.evaluation.distance import kl_divergence
from llmcompress.evaluation.logits import OnDisk, window_logits
from llmcompress.evaluation.perplexity import chunks_of_parts, predicted_tokens
from llmcompress.models.dense.families import Architecture
from llmcompress.models.dense.model import DenseModel
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.phases import phase
from llmcompress.runtime.progress import count_steps

WINDOW = 128  # tokens
# See the log, "how many tokens to probe with"; 84 GFLOP a layer on SmolLM2-135M, a third of it for the logits.
WINDOWS = 4
AT_ONCE = 2  # windows whose logits are in memory together
Logits: TypeAlias = Iterator[tuple[Tensor, Iterator[Tensor]]]


class DensePredictions:
    """The dense model's predictions on `windows`, int64 `[windows, length]`, at every token but each window's last.

    `logits`, here and below: of a few windows at a time, each in parts, as `window_logits` yields them.
    """

    def __init__(self, windows: Tensor, logits: Logits) -> None:
        self.windows = windows
        self.expected = list(_log_probabilities(logits))

    def divergence(self, logits: Logits) -> float:
        """Return the mean KL(dense || other) in nats per token; `logits`: the other model's."""
        pairs = zip(self.expected, _log_probabilities(logits), strict=True)
        total = sum(float(kl_divergence(p, q).double().sum()) for p, q in pairs)
        return total / predicted_tokens(self.windows)


def _log_probabilities(logits: Logits) -> Iterator[Tensor]:
    """Yield log-probabilities, float32 `[positions, vocabulary]`, a few positions at a time."""
    for windows, parts in logits:
        for _, chunk, _ in chunks_of_parts(parts, windows):
            yield chunk


@dataclass(frozen=True, eq=False)
class ExchangedSource(DenseModel):
    """A dense model on disk with other tensors in place of some, by the names that they are stored under."""

    instead: Mapping[str, Tensor] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """Return the tensor `name`, exchanged or stored."""
        stored = self.tied.get(name, name)
        return self.instead[stored] if stored in self.instead else super().read(name)


class Probe:
    """The probing tokens on their way through a dense model: as it is, and once for each exchanged matrix.

    It accompanies a walk over the same model: call `exchange` at the block that the walk has loaded, `leave` before the
    walk moves on, and `divergences` at the end.
    """

    @torch.no_grad()
    def __init__(self, source: DenseModel, arch: Architecture, windows: Tensor, device: str) -> None:
        """Embed the windows. Raises InputError for a model whose blocks cannot be run one by one."""
        self.source, self.arch, self.windows, self.device = source, arch, windows, device_of(device)
        self.model = from_disk(source, self.device)
        self.states = self.model.embed(windows, len(windows))
        self.streams: list[Tensor | float] = []  # hidden states; of an exchanged table, its divergence
        self.waiting: dict[int, Tensor] = {}  # outputs of the block that the walk is at

    @torch.no_grad()
    @phase("changes")
    def exchange(self, block: Block, name: str, weight: Tensor) -> int:
        """Put `weight [out, in]` into the linear or table at module path `name`; return the number of the change.

        For a token table the model is read once more; a head of its own gets the states that are known.
        """
        number = len(self.streams)
        if block.path:
            with self._exchange(block, name, weight):
                self.waiting[number] = self._run_block(block, self.states.hidden)
            self.streams.append(self.waiting[number])
        else:
            changed = ExchangedSource(**vars(self.source), instead={f"{name}.weight": weight})
            if name == self.arch.head:
                model = from_disk(changed, self.device)
                with model.at_the_end():
                    self.streams.append(self.dense.divergence(self._logits(model, self.states.hidden)))
            else:
                logits = window_logits(OnDisk(changed, str(self.device)), self.windows, AT_ONCE)
                self.streams.append(self.dense.divergence(logits))
        return number

    @torch.no_grad()
    @phase("changes")
    def leave(self, block: Block) -> None:
        """Move all hidden states on to the outputs of a block, whose weights are the dense model's again."""
        if not block.path:
            return
        before = [stream for number, stream in enumerate(self.streams) if number not in self.waiting]
        for stream in (self.states.hidden, *before):
            if isinstance(stream, Tensor):
                stream.copy_(self._run_block(block, stream))
        self.waiting.clear()

    @phase("predictions")
    def divergences(self) -> list[float]:
        """Return the KL of every change, in nats per token, once the last block was left."""
        dense, count = self.dense, count_steps("prediction", len(self.streams))
        divergences = []
        with self.model.at_the_end():
            for stream in self.streams:
                divergences.append(
                    stream if isinstance(stream, float) else dense.divergence(self._logits(self.model, stream))
                )
                count()
        return divergences

    @cached_property
    def dense(self) -> DensePredictions:
        """The predictions of the model as it is, once the last block was left."""
        with self.model.at_the_end():
            return DensePredictions(self.windows, self._logits(self.model, self.states.hidden))

    def _logits(self, model: StreamedModel, hidden: Tensor) -> Logits:
        for start in range(0, len(self.windows), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            yield self.windows[rows], model.predict_parts(self.states, hidden[rows], rows)

    def _run_block(self, block: Block, hidden: Tensor) -> Tensor:
        return run_block(block.module, block.index, self.states, hidden, slice(0, len(hidden)))

    @contextmanager
    def _exchange(self, block: Block, name: str, weight: Tensor) -> Iterator[None]:
        parameter = block.model.get_submodule(name).get_parameter("weight")
        linear, before = self.arch.linears()[name], parameter.data
        parameter.data = (weight.T if linear.transposed else weight).to(before)
        try:
            yield
        finally:
            parameter.data = before


def settle_sensitivities(measured: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """Return sensitivities by matrix and option; one of 0 of an expert becomes the least other one.

    That is of the same linear of other experts in the block: no probing token reaches this one, but other text may.
    """
    kin = {name: f"{match[1]} {name.rpartition('.')[2]}" for name in measured if (match := EXPERT.fullmatch(name))}
    least: dict[tuple[str | None, int], float] = {}
    for name, key in kin.items():
        for number, value in ((number, value) for number, value in measured[name].items() if value):
            least[key, number] = min(value, least.get((key, number), value))
    return {
        name: {number: value or least.get((kin.get(name), number), 0.0) for number, value in own.items()}
        for name, own in measured.items()
    }


def probe_windows(tokens: CalibrationTokens) -> Tensor:
    """Return the tokens to probe with, `[windows, length]`, of the held-out sequences.

    They are the beginnings of the first sequences, then their next parts if there are too few.
    """
    return tokens.held_out_windows(WINDOW).transpose(0, 1).flatten(0, 1)[:WINDOWS].contiguous()
