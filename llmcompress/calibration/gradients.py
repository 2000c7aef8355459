"""The importance of each linear's tokens and rows for the model's predictions, from one backward pass.

It is the squared gradient of the dense model's loss by the linear's outputs: over tokens it says which of them count,
over rows which outputs do. Both are the diagonal parts of a Kronecker factor of the Fisher information (K-FAC, arXiv
1503.05671); GuidedQuant (arXiv 2505.07004) and YAQA (arXiv 2505.22988) quantize by them. Labels are drawn from the
model's own predictions, so that it is the curvature of their KL, whatever the text.

The pass goes block by block, forwards and then backwards. In memory are one block, what its backward pass holds for one
batch, and the hidden states of at most TOKENS tokens before every block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.calibration.blocks import TOKENS_PER_BATCH, drop, load
from llmcompress.calibration.streaming import States, Streamed, from_disk, passed
from llmcompress.errors import InputError, NumericsError
from llmcompress.models.dense.experts import Experts, experts_of, holder
from llmcompress.models.dense.families import Architecture
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.dense.skeleton import CAUSAL, MASKED, MULTIMODAL, auto_name
from llmcompress.runtime.precision import is_finite, products
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.runtime.seeding import generator

TOKENS = 4096  # whose hidden states are kept at a time; each time every block is read twice
MOST = 30.0  # means that a token counts
ROWS = (0.05, 20.0)  # means that a row counts, at least and at most
NUMBER = re.compile(r"\.\d+(\.[^.]+)$")  # of an expert, in the name of one of its linears

Read = Callable[[str, Tensor | None, Tensor], None]  # (linear, its tokens if not all, gradient [..., out])


@dataclass(frozen=True, eq=False)
class Importance:
    """The importance of each linear's tokens and rows, in means of that linear.

    `tokens`: `[sequences, length]` by linear; the experts of a block share one of each kind, whose name lacks their
    number; `rows`: `[out]` by linear. Both float32, on the CPU.
    """

    tokens: dict[str, Tensor]
    rows: dict[str, Tensor]

    def token_weights(self, names: tuple[str, ...], minimum: float) -> Tensor:
        """Return what the tokens count for linears that read the same input, `[sequences, length]`: `minimum` and more,
        about 1 on average."""
        shares = [self.tokens.get(name, self.tokens.get(NUMBER.sub(r"\1", name))) for name in names]
        there = [share.clamp_max(MOST) for share in shares if share is not None]
        return minimum + (1 - minimum) * torch.stack(there).mean(0)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything in one table, to be stored."""
        parts = {"tokens": self.tokens, "rows": self.rows}
        return {f"{kind}/{name}": value for kind, part in parts.items() for name, value in part.items()}

    @staticmethod
    def from_tensors(stored: Mapping[str, Tensor]) -> Importance:
        """Return the inverse of `tensors`."""
        found: dict[str, dict[str, Tensor]] = {"tokens": {}, "rows": {}}
        for key, value in stored.items():
            kind, name = key.split("/", 1)
            found[kind][name] = value
        return Importance(**found)

    def row_weights(self, name: str) -> Tensor:
        """Return what the rows of a linear count, `[out]`."""
        return self.rows[name].clamp(*ROWS)


def importance(
    source: DenseModel,
    arch: Architecture,
    sequences: Tensor,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
) -> Importance:
    """Return the importance of tokens and rows for token ids `sequences [sequences, length]`.

    `dtype`: of products; `ranks`: processes with sequences of their own, over all of which the means are taken.

    Raises InputError for a model that does not predict tokens, or whose blocks cannot be run one by one, NumericsError
    for gradients that are not finite.
    """
    if auto_name(source.config) not in (CAUSAL, MULTIMODAL, MASKED):
        raise InputError(
            f"{source.name} does not predict tokens, so there is no loss to weigh them by; set token_weights.by to norm"
        )
    model = from_disk(source, torch.device(device))
    sums = _Sums(sequences.shape)
    with ranks.agree_on_errors():
        for first in range(0, len(sequences), at_once := max(1, TOKENS // sequences.shape[1])):
            chunk = slice(first, min(first + at_once, len(sequences)))
            _backward(model, source, arch, sequences[chunk], dtype, seed, sums.of(chunk))
    return sums.relative(arch, ranks)


class _Sums:
    """Sums of squared gradients: over the rows of each linear by token, and over tokens by row."""

    def __init__(self, size: torch.Size) -> None:
        self.size = size
        self.tokens: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}

    def of(self, chunk: slice) -> Callable[[slice], Read]:
        """Return the function that gives, for a batch of the `chunk` of all sequences, what adds up its gradients."""

        def batch(rows: slice) -> Read:
            there = slice(chunk.start + rows.start, chunk.start + rows.stop)

            def read(name: str, tokens: Tensor | None, gradient: Tensor) -> None:
                squares = gradient.float().square().flatten(0, -2)
                if not is_finite(squares):
                    raise NumericsError(f"{name}: gradients of its outputs are NaN or Inf; check the model")
                key = name if tokens is None else NUMBER.sub(r"\1", name)
                found = self.tokens.setdefault(key, torch.zeros(self.size))[there].view(-1)
                each = squares.mean(1).cpu()
                found.add_(each) if tokens is None else found.index_add_(0, tokens.cpu(), each)
                sums = squares.sum(0).cpu()
                self.rows[name] = self.rows[name] + sums if name in self.rows else sums

            return read

        return batch

    def relative(self, arch: Architecture, ranks: Ranks) -> Importance:
        """Return the sums of all processes over their means; of an expert that no token came to, ones."""
        rows, tokens = {}, {}
        for name, linear in arch.linears().items():
            total = self.rows.get(name, torch.zeros(linear.shape[0]))
            ranks.add(total)
            rows[name] = total / mean if (mean := float(total.mean())) > 0 else torch.ones_like(total)
        keys = dict.fromkeys(key for each in ranks.gather(list(self.tokens)) for key in each)
        for key in keys:
            found = self.tokens.get(key, torch.zeros(self.size))
            total = torch.tensor([float(found.sum()), float(found.numel())], dtype=torch.float64)
            ranks.add(total)
            mean = float(total[0] / total[1])
            tokens[key] = found / mean if mean > 0 else torch.ones_like(found)
        return Importance(tokens, rows)


def _backward(
    model: Streamed,
    source: DenseModel,
    arch: Architecture,
    ids: Tensor,
    dtype: torch.dtype,
    seed: int,
    sums: Callable[[slice], Read],
) -> None:
    """One backward pass over `ids [sequences, length]`."""
    states = model.embedded(ids, max(1, TOKENS_PER_BATCH // ids.shape[1]))
    inputs = []
    with torch.no_grad(), products(model.device, dtype):
        for index in range(model.depth):
            inputs.append(states.hidden.clone())
            model.advance(states, index)
        gradients = _of_labels(model, states, seed)
        for index in reversed(range(model.depth)):
            _through(model, source, arch, index, states, inputs.pop(), gradients, sums)


def _of_labels(model: Streamed, states: States, seed: int) -> Tensor:
    """Return the gradient of the loss by the hidden states after the last block, alike; the loss is the sum over tokens
    of minus the log-probability of a label that the model draws there."""
    gradients = torch.empty_like(states.hidden)
    with model.at_the_end():
        for number, ids in enumerate(states.ids):
            row = slice(number, number + 1)
            hidden = states.hidden[row].clone().requires_grad_()
            logits = model.predicted(states, hidden, row)
            error = logits.detach().float().softmax(-1)  # becomes the gradient by the logits
            draw = generator(seed, "labels", *ids.tolist())  # whatever other sequences there are, and in what process
            labels = drawn(error[0], draw)
            error[0].scatter_add_(1, labels, torch.full_like(labels, -1, dtype=error.dtype))
            (gradients[row],) = torch.autograd.grad(logits, hidden, error.to(logits.dtype))
    return gradients


def drawn(shares: Tensor, draw: torch.Generator) -> Tensor:
    """Return an index for each row of probabilities `[n, classes]`, drawn by it, `[n, 1]`: much faster on a CPU than
    `torch.multinomial`. `draw` is a generator of the CPU."""
    sums = shares.cumsum(-1)
    height = torch.rand(len(shares), 1, generator=draw).to(shares.device) * sums[:, -1:]
    return torch.searchsorted(sums, height, right=True).clamp_max(shares.shape[1] - 1)


def _through(
    model: Streamed,
    source: DenseModel,
    arch: Architecture,
    index: int,
    states: States,
    hidden: Tensor,
    gradients: Tensor,
    sums: Callable[[slice], Read],
) -> None:
    """Move `gradients`, by the outputs of a block, on to its inputs `hidden`; sum up those of its linears' outputs."""
    layout = arch.blocks[index]
    block = model.model.get_submodule(layout.path)
    names = {linear.name.removeprefix(f"{layout.path}."): linear.name for group in layout.groups for linear in group}
    load(block, layout.path, source, model.device)
    try:
        for batch in states.batches:
            x = hidden[batch.rows].clone().requires_grad_()
            with torch.enable_grad(), _read(block, names, sums(batch.rows)):
                output = passed(block, index, states, x, batch.rows)
                (gradients[batch.rows],) = torch.autograd.grad(output, x, gradients[batch.rows].to(output.dtype))
    finally:
        drop(block)


@contextmanager
def _read(block: nn.Module, names: Mapping[str, str], read: Read) -> Iterator[None]:
    """Let `read` have the gradient by the output of each linear of a block, `names` by their path inside it."""
    experts = experts_of(block)

    def hook(name: str, routed: Experts | None) -> Callable[[nn.Module, object, Tensor], None]:
        def seen(_: nn.Module, inputs: object, output: Tensor) -> None:
            tokens = None if routed is None else routed.tokens
            if output.requires_grad:
                output.register_hook(lambda gradient: read(name, tokens, gradient))

        return seen

    handles = []
    try:
        for inside, name in names.items():
            path = holder(inside, experts)
            routed = None if path is None else experts[path]
            handles.append(block.get_submodule(inside).register_forward_hook(hook(name, routed)))
        yield
    finally:
        for handle in handles:
            handle.remove()
