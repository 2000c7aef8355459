"""The importance of each linear's tokens and rows for the model's predictions, from one backward pass.

It is the squared gradient of the dense model's loss by the linear's outputs, by token and by row. Both are diagonal
parts of a Kronecker factor of the Fisher information (K-FAC, arXiv 1503.05671); GuidedQuant (arXiv 2505.07004) and YAQA
(arXiv 2505.22988) quantize by them. Labels are drawn from the model's own predictions, so it is the curvature of their
KL, whatever the text.

The pass goes block by block, forwards and then backwards. Memory holds one block, its graph for one batch, and the
hidden states of at most TOKENS tokens before every block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.calibration.blocks import TOKENS_PER_BATCH
from llmcompress.calibration.streaming import States, StreamedModel, from_disk, position_parts, run_block
from llmcompress.errors import InputError, NumericsError
from llmcompress.models.dense.experts import Experts, experts_of, holder
from llmcompress.models.dense.families import Architecture
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.dense.skeleton import CAUSAL, MASKED, MULTIMODAL, auto_name
from llmcompress.recipe.calibration import TokenWeights
from llmcompress.runtime.precision import is_finite, products
from llmcompress.runtime.progress import count_steps
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.runtime.seeding import generator

TOKENS = 4096  # whose hidden states are in memory at a time; each time every block is read twice
SAMPLE = (8, 512)  # sequences, and tokens of each, that tell what rows count where tokens count by something else
DRAWN = 32  # labels that are drawn at once
MOST = 30.0  # largest weight of a token, in means
ROWS = (0.05, 20.0)  # smallest and largest weight of a row, in means
NUMBER = re.compile(r"\.\d+(\.[^.]+)$")  # of an expert, in the name of one of its linears

Read = Callable[[str, Tensor | None, Tensor], None]  # (linear, its tokens if not all, gradient [..., out])


@dataclass(frozen=True, eq=False)
class Importance:
    """The importance of each linear's tokens and rows, in means of that linear.

    `tokens`: `[sequences, length]` by linear; experts of a block share one, whose name lacks their number. `rows`:
    `[out]` by linear. Both are float32, on the CPU.
    """

    tokens: dict[str, Tensor]
    rows: dict[str, Tensor]

    def token_weights(self, names: tuple[str, ...], minimum: float) -> Tensor:
        """Return the weights of tokens for linears that read the same input, `[sequences, length]`.

        They are at least `minimum`, and about 1 on average; ones for linears without gradients.
        """
        shares = [self.tokens.get(name, self.tokens.get(NUMBER.sub(r"\1", name))) for name in names]
        known = [share.clamp_max(MOST) for share in shares if share is not None]
        alike = torch.ones_like(next(iter(self.tokens.values())))
        return minimum + (1 - minimum) * torch.stack(known or [alike]).mean(0)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, to be stored."""
        parts = {"tokens": self.tokens, "rows": self.rows}
        return {f"{kind}/{name}": value for kind, part in parts.items() for name, value in part.items()}

    @staticmethod
    def from_tensors(stored: Mapping[str, Tensor]) -> Importance:
        """Return the inverse of `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"tokens": {}, "rows": {}}
        for key, value in stored.items():
            kind, name = key.split("/", 1)
            parts[kind][name] = value
        return Importance(**parts)

    def row_weights(self, name: str) -> Tensor:
        """Return the weights of a linear's rows, `[out]`."""
        return self.rows[name].clamp(*ROWS)


def count_read(weights: TokenWeights | None, sequences: int, length: int) -> tuple[int, int]:
    """Return how many sequences, and how many tokens of each, the backward pass reads; none without one."""
    if weights is None or not (weights.rows or weights.by == "gradient"):
        return 0, 0
    return (sequences, length) if weights.by == "gradient" else (min(sequences, SAMPLE[0]), min(length, SAMPLE[1]))


def measure_importance(
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

    `dtype`: of products; `ranks`: processes with sequences of their own, whose means are common.

    Raises InputError for a model that does not predict tokens or whose blocks cannot be run one by one, NumericsError
    for gradients that are not finite.
    """
    if auto_name(source.config) not in (CAUSAL, MULTIMODAL, MASKED):
        raise InputError(
            f"{source.name} does not predict tokens, so there is no loss to weigh tokens or rows by; set "
            f"token_weights.by to norm and token_weights.rows to false"
        )
    model = from_disk(source, torch.device(device))
    sums = _GradientSums(sequences.shape)
    with ranks.agree_on_errors():
        at_once = max(1, TOKENS // sequences.shape[1])
        count = count_steps("gradient", 2 * model.depth * -(-len(sequences) // at_once) + len(sequences))
        for first in range(0, len(sequences), at_once):
            chunk = slice(first, min(first + at_once, len(sequences)))
            _add_gradients(model, arch, sequences[chunk], dtype, seed, sums.of(chunk), count)
    return sums.relative(arch, ranks)


class _GradientSums:
    """Sums of squared gradients by linear: over its rows for each token, and over tokens for each row."""

    def __init__(self, size: torch.Size) -> None:
        self.size = size
        self.tokens: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}

    def of(self, chunk: slice) -> Callable[[slice], Read]:
        """Return a function from the rows of a batch within `chunk` to the reader that adds up its gradients."""

        def batch(rows: slice) -> Read:
            place = slice(chunk.start + rows.start, chunk.start + rows.stop)

            def read(name: str, tokens: Tensor | None, gradient: Tensor) -> None:
                squares = gradient.float().square().flatten(0, -2)
                if not is_finite(squares):
                    raise NumericsError(f"{name}: gradients of its outputs are NaN or Inf; check the model")
                key = name if tokens is None else NUMBER.sub(r"\1", name)
                total = self.tokens.setdefault(key, torch.zeros(self.size, dtype=torch.float32))[place].view(-1)
                each = squares.mean(1).cpu()
                total.add_(each) if tokens is None else total.index_add_(0, tokens.cpu(), each)
                sums = squares.sum(0).cpu()
                self.rows[name] = self.rows[name] + sums if name in self.rows else sums

            return read

        return batch

    def relative(self, arch: Architecture, ranks: Ranks) -> Importance:
        """Return the sums of all processes divided by their means; ones for an expert without tokens."""
        rows, tokens = {}, {}
        for name, linear in arch.linears().items():
            total = self.rows.get(name, torch.zeros(linear.shape[0], dtype=torch.float32))
            ranks.add(total)
            rows[name] = total / mean if (mean := float(total.mean())) > 0 else torch.ones_like(total)
        keys = dict.fromkeys(key for each in ranks.gather(list(self.tokens)) for key in each)
        for key in keys:
            own = self.tokens.get(key, torch.zeros(self.size, dtype=torch.float32))
            total = torch.tensor([float(own.sum()), float(own.numel())], dtype=torch.float64)
            ranks.add(total)
            mean = float(total[0] / total[1])
            tokens[key] = own / mean if mean > 0 else torch.ones_like(own)
        return Importance(tokens, rows)


def _add_gradients(
    model: StreamedModel,
    arch: Architecture,
    ids: Tensor,
    dtype: torch.dtype,
    seed: int,
    sums: Callable[[slice], Read],
    count: Callable[[], None],
) -> None:
    """Run one backward pass over `ids [sequences, length]`, and add its gradients to `sums`.

    Calls `count` after each block, forwards and then backwards, and after each sequence's predictions.
    """
    states = model.embed(ids, max(1, TOKENS_PER_BATCH // ids.shape[1]))
    inputs = []
    with torch.no_grad(), products(model.device, dtype):
        for index in range(model.depth):
            inputs.append(states.hidden.clone())
            model.advance(states, index)
            count()
        gradients = _label_gradients(model, states, seed, count)
        for index in reversed(range(model.depth)):
            _pass_block(model, arch, index, states, inputs.pop(), gradients, sums)
            count()


def _label_gradients(model: StreamedModel, states: States, seed: int, count: Callable[[], None]) -> Tensor:
    """Return the gradient of the loss by the last block's outputs, in their shape.

    The loss is the sum over tokens of minus the log-probability of a label that is drawn from the model's prediction.
    """
    gradients = torch.empty_like(states.hidden)
    with model.at_the_end():
        for number, ids in enumerate(states.ids):
            row = slice(number, number + 1)
            draw = generator(seed, "labels", *ids.tolist())  # the same for any other sequences, in any process
            gradients[row] = 0
            for positions in position_parts(model.model.config, 1, len(ids)):
                hidden = states.hidden[row].clone().requires_grad_()
                logits = model.predict(states, hidden, row, positions)
                error = logits.detach().float().softmax(-1)  # becomes the gradient by the logits
                labels = draw_labels(error[0], draw)
                error[0].scatter_add_(1, labels, torch.full_like(labels, -1, dtype=error.dtype))
                (part,) = torch.autograd.grad(logits, hidden, error.to(logits.dtype))
                gradients[row] += part
                del logits, error  # before the next part
            count()
    return gradients


def draw_labels(shares: Tensor, draw: torch.Generator) -> Tensor:
    """Draw an index from each row of probabilities `[n, classes]`: `[n, 1]`. `draw` is a generator of the CPU.

    Much faster on a CPU than `torch.multinomial`.
    """
    labels = []
    for part in shares.split(DRAWN):
        sums = part.cumsum(-1)
        height = torch.rand(len(part), 1, dtype=torch.float32, generator=draw).to(part.device) * sums[:, -1:]
        labels.append(torch.searchsorted(sums, height, right=True).clamp_max(part.shape[1] - 1))
    return torch.cat(labels)


def _pass_block(
    model: StreamedModel,
    arch: Architecture,
    index: int,
    states: States,
    hidden: Tensor,
    gradients: Tensor,
    sums: Callable[[slice], Read],
) -> None:
    """Turn `gradients` by a block's outputs into those by its inputs `hidden`; add those by its linears' outputs."""
    layout = arch.blocks[index]
    block = model.model.get_submodule(layout.path)
    names = {linear.name.removeprefix(f"{layout.path}."): linear.name for group in layout.groups for linear in group}
    with model.hold(block, ()):
        for batch in states.batches:
            x = hidden[batch.rows].clone().requires_grad_()
            with torch.enable_grad(), _read_gradients(block, names, sums(batch.rows)):
                output = run_block(block, index, states, x, batch.rows)
                (gradients[batch.rows],) = torch.autograd.grad(output, x, gradients[batch.rows].to(output.dtype))


@contextmanager
def _read_gradients(block: nn.Module, names: Mapping[str, str], read: Read) -> Iterator[None]:
    """Pass the gradient by the output of each linear to `read`; `names`: by their path inside the block."""
    experts = experts_of(block)

    def hook(name: str, routed: Experts | None) -> Callable[[nn.Module, object, Tensor], None]:
        def watch(_: nn.Module, inputs: object, output: Tensor) -> None:
            tokens = None if routed is None else routed.tokens
            if output.requires_grad:
                output.register_hook(lambda gradient: read(name, tokens, gradient))

        return watch

    with ExitStack() as hooks:
        for inside, name in names.items():
            path = holder(inside, experts)
            routed = None if path is None else experts[path]
            hooks.enter_context(block.get_submodule(inside).register_forward_hook(hook(name, routed)))
        yield
