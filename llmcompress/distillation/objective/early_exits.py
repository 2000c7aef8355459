"""Losses on early predictions of a student: its hidden states after some of its blocks, read as if they were the last
(the logit exits of OFA-KD, arXiv 2310.19444).

The student's last norm and output head turn such states into logits, and any loss on predictions compares these with
the teacher's final ones. No block of the teacher is matched, so the models may differ in width and depth. An exit's
gradient reaches the blocks before it alone, not the norm and the head.

In the paper, every exit has a branch that trains. Here a recipe may ask for one: a square matrix between the states and
the norm, which starts as the identity and is dropped after the run. An exit has logits for a chunk of tokens at a time.
It costs one more run of both models' heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.distillation.objective.chunked_loss import chunked_loss
from llmcompress.distillation.objective.forward import head_of
from llmcompress.distillation.objective.hidden_states import started_linear
from llmcompress.distillation.teacher.predictions import TeacherLogits
from llmcompress.errors import InputError, RecipeError
from llmcompress.losses.divergence import wide
from llmcompress.losses.loss import LossState, SumAndCount
from llmcompress.models.dense.blocks import body, depth, states_between
from llmcompress.models.dense.families import block_stack
from llmcompress.recipe.distillation import Term

if TYPE_CHECKING:
    from transformers import PreTrainedModel

States = Mapping[int, Tensor]  # [sequences, length, width], by the number of blocks before them


@dataclass(frozen=True)
class Exits:
    """The losses of a recipe that are taken at exits.

    `numbers`: by the number of a loss in the recipe, its exits, each as the number of blocks before it; `ending`: the
    student's modules between its last block and its head; `branches`: linears of exits, by `branch_name`.
    """

    student: PreTrainedModel
    numbers: dict[int, tuple[int, ...]]
    ending: tuple[nn.Module, ...]
    branches: nn.ModuleDict

    @staticmethod
    def of(student: PreTrainedModel, losses: Sequence[Term]) -> Exits:
        """Let the student read two tokens to learn how it ends.

        Raises RecipeError for an exit that it does not have, InputError for a model whose ending is unknown.
        """
        numbers = {number: term.exits for number, term in enumerate(losses) if term.exits is not None}
        branches = nn.ModuleDict()
        if not numbers:
            return Exits(student, numbers, (), branches)
        blocks = depth(student)
        for number in (each for exits in numbers.values() for each in exits):
            if number > blocks:
                raise RecipeError(f"exits: there is none after block {number}; the student has {blocks} blocks")
        width = student.config.get_text_config(decoder=True).hidden_size
        shape = (width, width, next(student.parameters()))
        for number, exits in numbers.items():
            if losses[number].branch:
                branches.update({branch_name(number, each): started_linear(*shape, nn.init.eye_) for each in exits})
        return Exits(student, numbers, ending_of(student), branches)

    @contextmanager
    def record_states(self) -> Iterator[States]:
        """Record the student's states at exits within the context."""
        if not self.numbers:
            yield {}
            return
        with states_between(self.student, {each for exits in self.numbers.values() for each in exits}) as states:
            yield states

    def measure(
        self,
        number: int,
        loss: tuple[Term, LossState | None],
        states: States,
        rows: Tensor,
        teacher: TeacherLogits,
        targets: Tensor,
    ) -> SumAndCount:
        """Measure loss `number`, the mean over its exits, at the positions `rows`, bool `[sequences, length]`.

        For each position, `teacher` has a prediction and `targets` the next token.
        """
        exits, head = self.numbers[number], head_of(self.student)
        (term, state), weight = loss, 1 / len(exits)

        def logits(hidden: Tensor) -> Tensor:
            return head(_run_modules(self.ending, hidden))

        losses = [
            # no parameters: the modules after the exit stay as they are
            chunked_loss(hidden, logits, teacher, targets, [(term.of, state, weight)], parameters=())
            for hidden in (self._run_branch(number, each, states[each][rows]) for each in exits)
        ]
        sums, counts = [each.total for each in losses], [each.terms[0][1] for each in losses]
        return torch.stack(sums).sum(), torch.stack(counts).mean()

    def _run_branch(self, number: int, each: int, states: Tensor) -> Tensor:
        """Return the states of an exit `[tokens, width]` after its branch, if it has one."""
        name = branch_name(number, each)
        if name not in self.branches:
            return states
        with torch.autocast(states.device.type, enabled=False):
            output: Tensor = self.branches[name](wide(states))
        return output.to(states.dtype)


def branch_name(number: int, each: int) -> str:
    """Return the name that the branch of an exit has in a run's state; `number`: of the loss in the recipe."""
    return f"branch_{number}_behind_{each}"


@torch.no_grad()
def ending_of(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Return the modules from the last block's output to the head's input: a norm, in some families also a projection.

    Raises InputError for a model that does anything else there.
    """
    stack = block_stack(model.config, model)
    holder, last = model.get_submodule(stack.rpartition(".")[0]), list(model.get_submodule(stack).children())[-1]
    called: list[nn.Module] = []
    blocks = depth(model)
    with ExitStack() as hooks, states_between(model, [blocks]) as states:
        hooks.enter_context(last.register_forward_hook(lambda *_: called.clear()))
        for each in holder.children():
            hooks.enter_context(each.register_forward_pre_hook(lambda module, _: called.append(module)))
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        read: Tensor = body(model)(input_ids=ids, use_cache=False)[0]
    output = _run_modules(called, states[blocks])
    if output.shape != read.shape or not torch.allclose(output, read):
        kind = type(model).__name__
        raise InputError(f"the path of a {kind} from its last block to its head is unknown; leave exits out of losses")
    return tuple(called)


def _run_modules(modules: Sequence[nn.Module], states: Tensor) -> Tensor:
    for module in modules:
        states = module(states)
    return states
