"""The walk of a block-wise phase: hidden states of the recovered student and of the dense model go through the blocks
side by side, and each block of the student is recovered between them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.calibration.block_calls import record_calls
from llmcompress.calibration.blocks import Calls, RowBatch, hidden_of, in_batches
from llmcompress.distillation.blockwise.block import Activations, Block, Recovered, recover_block
from llmcompress.distillation.student.low_rank import teachers_weights
from llmcompress.distillation.student.model import relaxed_student
from llmcompress.errors import InputError, RecipeError
from llmcompress.models.dense.families import block_stack
from llmcompress.models.files.store import Record, Store
from llmcompress.recipe.distillation import Distillation
from llmcompress.weight.modules import CompressedLinear, compressed_linears, decoded, put

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STORED = torch.bfloat16  # hidden states between blocks
Autocast = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Walked:
    """The result of a walk: compressed linears, and what is not compressed, by name; `trained`: the count of numbers of
    each kind that moved; `blocks`: the errors of each, by its path."""

    linears: dict[str, CompressedLinear] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    trained: Counter[str] = field(default_factory=Counter)
    blocks: dict[str, Recovered] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # that each block took


@dataclass(eq=False)
class Stream:
    """The hidden states of all sequences on their way through the blocks of one model, `[sequences, length, width]`."""

    model: PreTrainedModel
    stack: str  # the module path of the list of blocks
    hidden: Tensor
    calls: Calls
    batches: list[RowBatch]
    autocast: Autocast

    @staticmethod
    def of(model: PreTrainedModel, ids: Tensor, batches: list[RowBatch], autocast: Autocast) -> Stream:
        """Start at the first block. Raises InputError for a model whose blocks cannot be run on their own."""
        stack = block_stack(model.config, model)
        hidden, calls, _ = record_calls(model, stack, ids, batches, model.device)
        return Stream(model, stack, hidden.to(STORED), calls, batches, autocast)

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(list(self.model.get_submodule(self.stack).children()))

    def path(self, index: int) -> str:
        """The module path of a block."""
        return f"{self.stack}.{index}"

    def block(self, index: int) -> Block:
        """A block as a function of hidden states alone, float32 outside."""
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
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    ids: Tensor,
    counted: Tensor,
    held_out: int,
    recipe: Distillation,
    store: Store,
    autocast: Autocast,
    report: Callable[[int, int, Recovered, float], None] | None = None,
) -> Walked:
    """Recover the blocks of `model` one after the other, in place, towards those of `teacher`.

    `ids`, `counted` `[sequences, length]`: tokens, and whether each counts; the last `held_out` sequences are only
    measured on. Blocks in the `store` are taken from there. `report(blocks done, blocks, errors of the last one,
    tokens per second)`. Raises InputError where the models differ in their number of blocks, RecipeError where no block
    has anything that trains.
    """
    batches = in_batches(len(ids), held_out, recipe.micro_batch)
    student, dense = (Stream.of(one, ids, batches, autocast) for one in (model, teacher))
    count = student.blocks
    if count != dense.blocks:
        raise InputError("a block-wise phase needs a student with as many blocks as its teacher; leave the phase out")
    walked, counted = Walked(), counted.to(student.hidden.device)
    started = time.monotonic()
    for index in range(count):
        dense.advance(index)
        data = Activations(student.hidden, dense.hidden, counted)
        done = store.get(record_name(index))
        if done is None:
            parts = data[: len(ids) - held_out], data[len(ids) - held_out :]
            done = _recovered(student, teacher, index, parts, recipe)
            store.put(record_name(index), *done)
        _take(walked, student, index, done)
        student.advance(index)
        if report is not None:
            rate = (index + 1) * ids.numel() / (time.monotonic() - started)
            report(index + 1, count, walked.blocks[student.path(index)], rate)
    if not walked.trained:
        raise RecipeError(f"rates: no block has {' or '.join(recipe.rates)} to train; give a rate for what they have")
    return walked


def record_name(index: int) -> str:
    """Return the name of a recovered block in the store."""
    return f"block-{index:05}"


def _recovered(
    student: Stream,
    teacher: PreTrainedModel,
    index: int,
    parts: tuple[Activations, Activations],
    recipe: Distillation,
) -> Record:
    """Recover a block: payloads and dense tensors by name, and below `block` the errors before and after."""
    started = time.monotonic()
    path = student.path(index)
    target = teachers_weights(student.model, teacher) if recipe.latents == "teacher" else None
    part = relaxed_student(student.model, recipe.rates, recipe.estimator, target, f"{path}.", recipe.scales)
    found = recover_block(student.block(index), part, *parts, recipe, path)
    payloads = {f"{name}.weight": layer.get_parameter("weight") for name, layer in part.freeze_into_model().items()}
    trained = {kind: sum(value.numel() for value in values.values()) for kind, values in part.trained.items()}
    entry = {"block": found.to_json(), "trained": trained, "seconds": time.monotonic() - started}
    return Record(entry, payloads | part.dense())


@torch.no_grad()
def _take(walked: Walked, student: Stream, index: int, done: Record) -> None:
    """Put what a block learned into the model, and into what the walk learned."""
    model, path, found = student.model, student.path(index), done.entry
    model.requires_grad_(False)
    layers = compressed_linears(model)
    for key, tensor in done.tensors.items():
        name = key.removesuffix(".weight")
        if name in layers:
            learned = CompressedLinear(layers[name].layout, tensor.to(model.device), layers[name].bias)
            put(model, name, learned)
            walked.linears[name] = learned
        else:
            model.get_parameter(key).copy_(tensor)
            walked.dense[key] = model.get_parameter(key)
    walked.seconds.append(found["seconds"])
    walked.blocks[path] = Recovered(**found["block"])
    walked.trained.update({kind: count for kind, count in found["trained"].items() if count})
