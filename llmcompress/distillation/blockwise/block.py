"""Block-wise recovery: each decoder block learns, by itself, to reproduce the outputs of the dense one.

After Block-AP of EfficientQAT (arXiv 2407.11062):

    for each block, in order:
        it reads the hidden states that the blocks before it left after their own recovery
        its parameters move towards the dense block's outputs in the dense model
        its state with the least error on held-out sequences is kept: the first one if nothing helped

So a block also learns to undo the errors of the blocks before it. With targets from the dense block on the student's
own inputs, no block would. The error is the mean over tokens of |output - target|^2 / |target|^2, because the next
block normalises every token, and the first token's norm may be a hundred times that of the others. A step minimises it
as a share of its initial value, so that gradients have the same size in every block and model.

Several processes have sequences of their own. A step takes those that it takes in one process, wherever they are, and
gradients are added up: a block learns what it learns in one, but for rounding. A batch of several shares the work out.

Memory: hidden states of all sequences in bfloat16, the student's and the dense model's, 4 bytes x tokens x width (8
while the embeddings are read); and for one block alone, master weights, their gradients and Adam's moments, 16 bytes
for each number that trains, beside the activations of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.data.schedule import rate, rows
from llmcompress.distillation.student.model import Student
from llmcompress.distillation.student.oscillation import Freezer
from llmcompress.errors import NumericsError
from llmcompress.losses.hidden import HiddenStates
from llmcompress.losses.loss import Features, measure_features
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.reconstruction import Reconstruction
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.ranks import ALONE, Ranks

BETAS = (0.9, 0.95)
SIGN = (0.0, 0.0)  # betas that make a step of Adam one of the gradient's sign
SMALLEST = 1e-12  # Adam's epsilon: gradients of single codes are small
Block = Callable[[Tensor], Tensor]  # hidden states [sequences, length, width] to those after the block


@dataclass(frozen=True, eq=False)
class Activations:
    """The inputs of a block and the outputs it should give, `[sequences, length, width]`, each; `counted` bool
    `[sequences, length]`, true = this token counts."""

    inputs: Tensor
    wanted: Tensor
    counted: Tensor

    def __getitem__(self, index: slice | Tensor) -> Activations:
        """Return some of the sequences."""
        return Activations(self.inputs[index], self.wanted[index], self.counted[index])

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.inputs)

    def split(self, size: int) -> list[Activations]:
        """Split into parts of at most `size` sequences."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def error(self, block: Block) -> Tensor:
        """Return the sum over tokens of a block's relative errors, a scalar with gradient."""
        features = Features(block(self.inputs.float()), self.wanted.float(), self.counted)
        return measure_features(features, HiddenStates())[0]


@dataclass(frozen=True)
class Recovered(JsonRecord):
    """The errors of a block, `before` and `after` it learned, on the held-out sequences. `step`: the best one, 0 where
    nothing helped and the block is as it was, to the bit; `frozen`: the number of frozen codes by then."""

    before: float
    after: float
    step: int
    frozen: int = 0


def recover_block(
    block: Block,
    student: Student,
    train: Activations,
    held_out: Activations,
    recipe: Distillation | Reconstruction,
    name: str,
    ranks: Ranks = ALONE,
) -> Recovered:
    """Train `student`, the part of a model that is in `block`, as `recipe` says: rates, batches, `steps` or one pass.

    Leaves it in its best state on `held_out`, among those at the start and every `evaluate_every` steps. The sequences
    of a step follow from (seed, name, step). Of several processes, `train` and `held_out` are those of this one. Raises
    NumericsError, naming the block, if the error is not finite.
    """
    named = student.named()
    before = mean_error(block, held_out, recipe.micro_batch, ranks)
    best, kept = Recovered(before, before, 0), _copied(named)
    if before == 0 or not named:
        return best
    first, total = _place(len(train), ranks)
    steps = recipe.steps or max(1, total // recipe.batch)
    optimizer = torch.optim.Adam(student.groups(), betas=SIGN if recipe.optimizer == "sign" else BETAS, eps=SMALLEST)
    freezer = Freezer.of(recipe.freezing, student.relaxed)
    for step in range(steps):
        for group in optimizer.param_groups:
            share = rate(step, steps, recipe.warmup, recipe.final_rate)
            group["lr"] = recipe.rates[group["kind"]] * share * group["size"]
        chosen = torch.tensor(rows(step, recipe.batch, total, f"{recipe.seed}/{name}")) - first
        batch = train[chosen[(chosen >= 0) & (chosen < len(train))].to(train.inputs.device)]
        count = _sum(float(batch.counted.sum()), ranks) * before
        for part in batch.split(recipe.micro_batch):
            (part.error(block) / count).backward()
        _add_gradients(named.values(), ranks)
        freezer.hold()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), recipe.clip)
        if not bool(norm.isfinite()):
            raise NumericsError(f"{name}, step {step + 1}: the gradient's norm is {float(norm)}; lower the rates")
        optimizer.step()
        student.settle()
        freezer.watch((step + 1) / steps)
        optimizer.zero_grad(set_to_none=True)
        if step + 1 == steps or (step + 1) % recipe.evaluate_every == 0:
            after = mean_error(block, held_out, recipe.micro_batch, ranks)
            if after < best.after:
                best, kept = Recovered(before, after, step + 1, freezer.frozen()), _copied(named)
    kept = ranks.first(lambda: kept)  # processors of other kinds may have rounded otherwise
    with torch.no_grad():
        for key, value in named.items():
            value.copy_(kept[key])
    return best


@torch.no_grad()
def mean_error(block: Block, data: Activations, size: int, ranks: Ranks = ALONE) -> float:
    """Return the mean over the tokens of all processes of a block's relative errors, `size` sequences at a time. Raises
    NumericsError for NaN."""
    own = sum(float(part.error(block)) for part in data.split(size))
    total = _sum(own, ranks) / _sum(float(data.counted.sum()), ranks)
    if total != total:
        raise NumericsError("the hidden states of a block became NaN; check that both models work in float32")
    return total


def _place(own: int, ranks: Ranks) -> tuple[int, int]:
    """Return the number of this process's first sequence among those of all, and how many they are."""
    sizes = ranks.gather(own)
    return sum(sizes[: ranks.rank]), sum(sizes)


def _sum(value: float, ranks: Ranks) -> float:
    """Return the sum over all processes, the same bits in each."""
    return sum(ranks.gather(value))


def _add_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Give each parameter the gradient of the sequences of all processes."""
    if ranks.count == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        ranks.add(parameter.grad)


def _copied(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in named.items()}
