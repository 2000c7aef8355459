"""Damage to the model's predictions when one of its matrices changes: KL, measured by forward passes alone.

The dense model's input of every block is kept. So a change in a block costs only the blocks from there on and the
output head: on average half a forward. ECoFLaP (arXiv 2310.02998) perturbs all layers alike, by noise; here each is
perturbed by an error that compressing it makes. The whole dense model is in memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.calibrate.blocks import RowBatch
from llmcompress.calibrate.recording import answered, recorded
from llmcompress.evaluate.distance import kl_divergence
from llmcompress.evaluate.logits import window_logits
from llmcompress.evaluate.perplexity import POSITIONS
from llmcompress.models.families import Architecture
from llmcompress.models.hidden_states import states_between

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 128  # tokens
WINDOWS = (
    4  # docs/log.md, "how many tokens to probe with"; 84 GFLOP a layer on SmolLM2-135M, a third of it for the logits
)
AT_ONCE = 2  # windows whose logits are in memory together


class DensePredictions:
    """The dense model's predictions on `windows`, int64 `[windows, length]`, at every token but each window's last.

    `logits [part, length, vocabulary]`, here and below: a few windows at a time, as `in_parts` returns them.
    """

    def __init__(self, windows: Tensor, logits: Iterable[Tensor]) -> None:
        self.windows = windows
        self.expected = list(_log_probabilities(logits))

    @property
    def tokens(self) -> int:
        """The number of predictions that are compared."""
        return self.windows.shape[0] * (self.windows.shape[1] - 1)

    def divergence(self, logits: Iterable[Tensor]) -> float:
        """Return the mean KL(dense || other), in nats per token; `logits`: the other model's."""
        pairs = zip(self.expected, _log_probabilities(logits), strict=True)
        total = sum(float(kl_divergence(p, q).double().sum()) for p, q in pairs)
        return total / self.tokens


def _log_probabilities(logits: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield log-probabilities, float32 `[positions, vocabulary]`, a few positions at a time."""
    for row in chain.from_iterable(logits):
        for chunk in row[:-1].split(POSITIONS):
            yield chunk.float().log_softmax(-1)


def in_parts(model: PreTrainedModel, windows: Tensor) -> Iterator[Tensor]:
    """Return the model's logits on `windows [windows, length]`, `[part, length, vocabulary]` of a few at a time."""
    return (logits for _, logits in window_logits(model, windows, AT_ONCE))


class Probe:
    """A dense model in which one matrix at a time is exchanged."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, arch: Architecture, windows: Tensor) -> None:
        """Run the model on `windows`. Raises InputError for one whose blocks cannot be run one by one."""
        self.model, self.arch = model, arch
        here = windows.to(model.device)
        self.parts = here.split(AT_ONCE)
        first = self.parts[0]
        _, _, self.extra = recorded(model, arch.stack, first, [RowBatch(slice(0, len(first)), False)], model.device)
        self.inputs: list[dict[int, Tensor]] = []  # of every block, by part
        self.dense = DensePredictions(here, self._recorded())

    @torch.no_grad()
    def divergence(self, name: str, weight: Tensor) -> float:
        """Return the KL, in nats per token, with `weight [out, in]` in the linear or table at module path `name`."""
        inside = (number for number, layout in enumerate(self.arch.blocks) if name.startswith(f"{layout.path}."))
        with self._exchanged(name, weight):
            return self.dense.divergence(self._from(next(inside, 0)))

    def _recorded(self) -> Iterator[Tensor]:
        """Yield the logits of every part, and keep the inputs of its blocks."""
        for part in self.parts:
            with states_between(self.model, range(len(self.arch.blocks))) as states:
                logits = self._logits(part)
            self.inputs.append(dict(states))
            yield logits

    def _from(self, block: int) -> Iterator[Tensor]:
        """Yield the logits of every part, run from `block` on."""
        for part, inputs in zip(self.parts, self.inputs, strict=True):
            with answered(self.model, self.arch.stack, block, inputs[block], self.extra):
                logits = self._logits(part)
            yield logits

    def _logits(self, part: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=part, use_cache=False).logits
        return logits

    @contextmanager
    def _exchanged(self, name: str, weight: Tensor) -> Iterator[None]:
        parameter = self.model.get_submodule(name).get_parameter("weight")
        linear, before = self.arch.linears().get(name), parameter.data
        parameter.data = (weight.T if linear is not None and linear.transposed else weight).to(before)
        try:
            yield
        finally:
            parameter.data = before


def probe_windows(held_out: Tensor) -> Tensor:
    """Return the tokens to probe with: the beginnings of the first held-out sequences `[sequences, length]`, then
    their next parts if there are too few sequences."""
    length = min(WINDOW, held_out.shape[1])
    parts = held_out[:, : held_out.shape[1] // length * length].unfold(1, length, length)  # [sequences, parts, length]
    return parts.transpose(0, 1).reshape(-1, length)[:WINDOWS].contiguous()
