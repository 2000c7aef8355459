"""How much the model's predictions suffer when one of its matrices changes: KL, measured by forward passes alone.

The dense model's input of every block is kept, so that a change in a block costs the blocks from there on, and the
output head: on average half a forward (ECoFLaP, arXiv 2310.02998, perturbs layers alike, by noise; here each is
perturbed by an error that compressing it makes). The whole dense model is in memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.architecture import Architecture
from llmcompress.blocks import Batch, answered, recorded
from llmcompress.evaluate.distance import kl_divergence
from llmcompress.states import states_between

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 128  # tokens: two of them make 42 GFLOP a layer on SmolLM2-135M, a third of it for the logits
WINDOWS = 2


class Dense:
    """What the dense model predicts on `windows`, int64 `[windows, length]`: float32 log-probabilities of every token
    that another follows, `[windows, length - 1, vocabulary]`."""

    def __init__(self, windows: Tensor, logits: Tensor) -> None:
        self.windows, self.expected = windows, _log_probabilities(logits)

    @property
    def tokens(self) -> int:
        """How many predictions are compared."""
        return self.expected.shape[0] * self.expected.shape[1]

    def divergence(self, logits: Tensor) -> float:
        """The mean KL(dense || other), in nats per token, of the other's `logits [windows, length, vocabulary]`."""
        found = _log_probabilities(logits)
        total = sum(float(kl_divergence(p, q).double().sum()) for p, q in zip(self.expected, found, strict=True))
        return total / self.tokens


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits[:, :-1].float().log_softmax(-1)


class Probe:
    """A dense model in which one matrix at a time is exchanged."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, arch: Architecture, windows: Tensor) -> None:
        """Runs the model on `windows`. Raises InputError for one whose blocks cannot be run one by one."""
        self.model, self.arch, self.windows = model, arch, windows.to(model.device)
        every = [Batch(slice(0, len(windows)), held_out=False)]
        _, _, self.as_tuple = recorded(model, arch.stack, self.windows, every, model.device)
        with states_between(model, range(len(arch.blocks))) as states:
            self.dense = Dense(self.windows, self._logits())
        self.inputs = dict(states)

    @torch.no_grad()
    def divergence(self, name: str, weight: Tensor) -> float:
        """KL, in nats per token, with `weight [out, in]` in the linear or the table at module path `name`."""
        inside = (number for number, layout in enumerate(self.arch.blocks) if name.startswith(f"{layout.path}."))
        first = next(inside, 0)
        with self._exchanged(name, weight):
            if not first:
                return self.dense.divergence(self._logits())
            with answered(self.model, self.arch.stack, first, self.inputs[first], self.as_tuple):
                return self.dense.divergence(self._logits())

    def _logits(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.windows, use_cache=False).logits
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
    """The tokens to probe with: the beginnings of the first held-out sequences `[sequences, length]`, or one sequence's
    first parts where there are no more."""
    length = min(WINDOW, held_out.shape[1])
    parts = held_out[:, : held_out.shape[1] // length * length].unfold(1, length, length)  # [sequences, parts, length]
    return parts.transpose(0, 1).reshape(-1, length)[:WINDOWS].contiguous()
