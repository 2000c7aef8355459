"""Block-wise recovery: each decoder block learns, by itself, to reproduce the outputs of the dense one.

After Block-AP of EfficientQAT (arXiv 2407.11062):

    for each block, in order:
        it reads the hidden states that the blocks before it left after their own recovery
        its parameters move towards the dense block's outputs in the dense model
        its state with the least error on held-out sequences stays: the first one if nothing helped

So a block also learns to undo the errors of the blocks before it, which targets on the student's own inputs would not
teach it. The error is the mean over tokens of |output - target|^2 / |target|^2, because the next block normalises
every token, and the first token's norm may be a hundred times that of the others. A step minimises it as a share of its
initial value, so that gradients have the same size in every block and model.

Each of several processes has sequences of its own. A step takes the sequences that it takes in one process, wherever
they are, and adds up gradients: a block learns what it learns in one process, but for rounding.

Memory: hidden states of all sequences in bfloat16, the student's and the dense model's, 4 bytes x tokens x width (8
while the embeddings are read); and for one block alone, master weights, their gradients and Adam's moments, 16 bytes
for each number that trains, beside the activations of a micro-batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.calibration.block_calls import record_calls
from llmcompress.calibration.blocks import Calls, RowBatch, hidden_of, in_batches
from llmcompress.data.batch import Batch
from llmcompress.data.schedule import rate, rows
from llmcompress.distillation.context import TrainContext
from llmcompress.distillation.student.low_rank import teacher_weights
from llmcompress.distillation.student.model import Student, relaxed_student
from llmcompress.distillation.student.oscillation import Freezer
from llmcompress.errors import InputError, NumericsError, RecipeError
from llmcompress.losses.hidden import HiddenStates
from llmcompress.losses.loss import Features, measure_features
from llmcompress.models.dense.families import block_stack
from llmcompress.models.files.store import Record
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.reconstruction import Reconstruction
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.progress import count_each
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.weight.modules import CompressedLinear, compressed_linears, decoded, put
from llmcompress.weight.trainable.relax import Relaxation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STORED = torch.bfloat16  # hidden states between blocks
BETAS = (0.9, 0.95)
SIGN = (0.0, 0.0)  # betas that make a step of Adam one of the gradient's sign
SMALLEST = 1e-12  # Adam's epsilon: gradients of single codes are small
Block = Callable[[Tensor], Tensor]  # hidden states [sequences, length, width] to those after the block


@dataclass(frozen=True, eq=False)
class Activations:
    """The inputs of a block and the outputs it should give, `[sequences, length, width]`; `counted` bool
    `[sequences, length]`, True if the token counts."""

    inputs: Tensor
    wanted: Tensor
    counted: Tensor

    def __getitem__(self, index: slice | Tensor) -> Activations:
        """Return some of the sequences."""
        return Activations(self.inputs[index], self.wanted[index], self.counted[index])

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.inputs)

    def batches(self, size: int) -> list[Activations]:
        """Return parts of at most `size` sequences."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def error(self, block: Block) -> Tensor:
        """Return the sum over tokens of a block's relative errors, a scalar with gradient."""
        features = Features(block(self.inputs.float()), self.wanted.float(), self.counted)
        return measure_features(features, HiddenStates())[0]


@dataclass(frozen=True)
class BlockErrors(JsonRecord):
    """The errors of a block on the held-out sequences, `before` and `after` it learned.

    `step`: the best one, 0 if nothing helped and the block is as it was, to the bit; `frozen`: the number of codes that
    were frozen by then.
    """

    before: float
    after: float
    step: int
    frozen: int = 0


@dataclass(frozen=True)
class RecoveredBlocks:
    """The compressed linears and other tensors of all blocks, by name; `trained`: how many numbers of each kind moved;
    `errors`: by a block's path; `seconds`: of all blocks."""

    linears: dict[str, CompressedLinear] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    trained: Counter[str] = field(default_factory=Counter)
    errors: dict[str, BlockErrors] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Stream:
    """The hidden states of all sequences on their way through the blocks of one model, `[sequences, length, width]`."""

    model: PreTrainedModel
    stack: str  # the module path of the list of blocks
    hidden: Tensor
    calls: Calls
    batches: list[RowBatch]
    autocast: Callable[[], AbstractContextManager[None]]

    @staticmethod
    def of(
        model: PreTrainedModel,
        ids: Tensor,
        batches: list[RowBatch],
        autocast: Callable[[], AbstractContextManager[None]],
        sizes: Collection[int] = (),
    ) -> Stream:
        """Start at the first block, which also runs on other `sizes` of batches.

        Raises InputError for a model whose blocks cannot be run on their own.
        """
        stack = block_stack(model.config, model)
        hidden, calls, _ = record_calls(model, stack, ids, batches, model.device, sizes)
        return Stream(model, stack, hidden.to(STORED), calls, batches, autocast)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(list(self.model.get_submodule(self.stack).children()))

    def path(self, index: int) -> str:
        """Return the module path of a block."""
        return f"{self.stack}.{index}"

    def block(self, index: int) -> Block:
        """Return a block as a function of hidden states alone, float32 outside."""
        module = self.model.get_submodule(self.path(index))

        def run(hidden: Tensor) -> Tensor:
            call = self.calls.of(index, len(hidden), None)
            with self.autocast():
                output = module(hidden, *call.args, **call.kwargs)
            return hidden_of(output, hidden, self.path(index))

        return run

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Move on to the outputs of a block."""
        run = self.block(index)
        with decoded(self.model.get_submodule(self.path(index))):
            for batch in self.batches:
                self.hidden[batch.rows] = run(self.hidden[batch.rows].float()).to(STORED)


def recover_blocks(
    run: TrainContext, text: Batch, held_out: int, report: Callable[[int, int, BlockErrors, float], None] | None = None
) -> RecoveredBlocks:
    """Recover the blocks of the student one after the other, in place, towards those of the teacher.

    `text`: the last `held_out` sequences are only measured on. Blocks in `run.store` are taken from there.
    `report(blocks done, blocks, errors of the last one, tokens per second)`.

    Raises InputError if the models differ in their number of blocks, RecipeError if no block has anything that trains.
    """
    recipe, ids = run.recipe, text.ids
    batches = in_batches(len(ids), held_out, recipe.micro_batch)
    models = run.student.model, run.dense_teacher()
    student, dense = (Stream.of(model, ids, batches, run.autocast, [recipe.micro_batch]) for model in models)
    count = student.blocks
    if count != dense.blocks:
        raise InputError("a block-wise phase needs a student with as many blocks as its teacher; leave the phase out")
    recovered, counted = RecoveredBlocks(), text.read.to(student.hidden.device)
    started = time.monotonic()
    for index in range(count):
        dense.advance(index)
        data = Activations(student.hidden, dense.hidden, counted)
        record = run.store.get(record_name(index))
        if record is None:
            parts = data[: len(ids) - held_out], data[len(ids) - held_out :]
            record = _recover_next(student, dense.model, index, parts, recipe)
            run.store.put(record_name(index), *record)
        _take_record(recovered, student, index, record)
        student.advance(index)
        if report is not None:
            speed = (index + 1) * ids.numel() / (time.monotonic() - started)
            report(index + 1, count, recovered.errors[student.path(index)], speed)
    if not any(recovered.trained.values()):
        raise RecipeError(f"rates: no block has {' or '.join(recipe.rates)} to train; give a rate for what they have")
    return recovered


def record_name(index: int) -> str:
    """Return the name of a recovered block in the store."""
    return f"block-{index:05}"


def _recover_next(
    student: Stream, teacher: PreTrainedModel, index: int, parts: tuple[Activations, Activations], recipe: Distillation
) -> Record:
    """Recover a block. Returns its payloads and dense tensors by name, and its errors below `block`."""
    started = time.monotonic()
    path = student.path(index)
    target = teacher_weights(student.model, teacher) if recipe.latents == "teacher" else None
    relaxation = Relaxation(frozenset(), recipe.estimator)
    part = relaxed_student(student.model, recipe.rates, target, f"{path}.", recipe.scales, relaxation)
    errors = recover_block(student.block(index), part, *parts, recipe, path)
    payloads = {f"{name}.weight": layer.get_parameter("weight") for name, layer in part.freeze_into_model().items()}
    trained = {kind: sum(value.numel() for value in values.values()) for kind, values in part.trained.items()}
    entry = {"block": errors.to_json(), "trained": trained, "seconds": time.monotonic() - started}
    return Record(entry, payloads | part.dense())


@torch.no_grad()
def _take_record(recovered: RecoveredBlocks, student: Stream, index: int, record: Record) -> None:
    """Put the tensors of a recovered block into the model and into `recovered`."""
    model = student.model
    model.requires_grad_(False)
    layers = compressed_linears(model)
    for key, tensor in record.tensors.items():
        name = key.removesuffix(".weight")
        if name in layers:
            linear = CompressedLinear(layers[name].layout, tensor.to(model.device), layers[name].bias)
            put(model, name, linear)
            recovered.linears[name] = linear
        else:
            model.get_parameter(key).copy_(tensor)
            recovered.dense[key] = model.get_parameter(key)
    recovered.seconds.append(record.entry["seconds"])
    recovered.errors[student.path(index)] = BlockErrors(**record.entry["block"])
    recovered.trained.update(record.entry["trained"])


def recover_block(
    block: Block,
    student: Student,
    train: Activations,
    held_out: Activations,
    recipe: Distillation | Reconstruction,
    name: str,
    ranks: Ranks = ALONE,
) -> BlockErrors:
    """Train `student`, the part of a model that is in `block`, as `recipe` says: rates, batches, `steps` or one pass.

    Leaves it in its best state on `held_out`, among those at the start and every `evaluate_every` steps. The sequences
    of a step follow from (seed, name, step). `train`, `held_out`: those of this process. Raises NumericsError, naming
    the block, if the error is not finite.
    """
    named = student.named_parameters()
    before = mean_error(block, held_out, recipe.micro_batch, ranks)
    best, values = BlockErrors(before, before, 0), _copy_values(named)
    if before == 0 or not named:
        return best
    sizes = ranks.gather(len(train))
    first, total = sum(sizes[: ranks.rank]), sum(sizes)  # the number of this process's first sequence; of all
    steps = recipe.steps or max(1, total // recipe.batch)
    optimizer = torch.optim.Adam(student.groups(), betas=SIGN if recipe.optimizer == "sign" else BETAS, eps=SMALLEST)
    freezer = Freezer.of(recipe.freezing, student.relaxed)
    for step in count_each(range(steps), "step of a block"):
        for group in optimizer.param_groups:
            share = rate(step, steps, recipe.warmup, recipe.final_rate)
            group["lr"] = recipe.rates[group["kind"]] * share * group["size"]
        chosen = torch.tensor(rows(step, recipe.batch, total, f"{recipe.seed}/{name}")) - first
        batch = train[chosen[(chosen >= 0) & (chosen < len(train))].to(train.inputs.device)]
        count = _sum(float(batch.counted.sum()), ranks) * before
        for part in batch.batches(recipe.micro_batch):
            (part.error(block) / count).backward()
        _add_gradients(named.values(), ranks)
        freezer.hold()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), recipe.clip)
        if not bool(norm.isfinite()):
            raise NumericsError(f"{name}, step {step + 1}: the gradient's norm is {float(norm)}; lower the rates")
        student.hold()
        optimizer.step()
        student.settle()
        freezer.watch((step + 1) / steps)
        optimizer.zero_grad(set_to_none=True)
        if step + 1 == steps or (step + 1) % recipe.evaluate_every == 0:
            after = mean_error(block, held_out, recipe.micro_batch, ranks)
            if after < best.after:
                best, values = BlockErrors(before, after, step + 1, freezer.count_frozen()), _copy_values(named)
    values = ranks.first(lambda: values)  # processors of other kinds may have rounded otherwise
    with torch.no_grad():
        for key, value in named.items():
            value.copy_(values[key])
    return best


@torch.no_grad()
def mean_error(block: Block, data: Activations, size: int, ranks: Ranks = ALONE) -> float:
    """Return the mean over the tokens of all processes of a block's relative errors, `size` sequences at a time. Raises
    NumericsError for NaN."""
    own = sum(float(part.error(block)) for part in data.batches(size))
    total = _sum(own, ranks) / _sum(float(data.counted.sum()), ranks)
    if total != total:
        raise NumericsError("the hidden states of a block became NaN; check that both models work in float32")
    return total


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


def _copy_values(named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in named.items()}
