"""Losses on the predictions of two models, from their last hidden states, one chunk of logits at a time.

Logits are [tokens, vocabulary]: for 4096 tokens and 128 k classes 2 GB a tensor, and a loss holds several. Here only
the logits of a chunk of tokens exist at a time. The forward pass computes a chunk's loss and at once its gradient, with
respect to the student's hidden states and to its head's parameters if they train. It keeps these gradients alone,
[tokens, width] and the parameters' own size, and the backward pass multiplies them by the incoming number. Any
separable loss works unchanged, and the heads run once, forward and backward, as they would unchunked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmcompress.distillation.objective.forward import Head, as_function
from llmcompress.distillation.teacher.predictions import TeacherLogits
from llmcompress.errors import InputError
from llmcompress.losses.loss import LossConfig, LossState, SumAndCount, measure

LOGITS = 2**24  # logits of each model in memory at once: 64 MiB a tensor in float32
LOGITS_ON_CPU = 2**22  # from 32 MiB on, an allocator asks the system for new pages each time: a third slower

Term = tuple[LossConfig, LossState | None, float]  # a loss, its state, and its weight in the total


@dataclass(frozen=True)
class HeadLoss:
    """The value of all terms. `total`: sum over terms of weight * sum, with grad; `terms`: each term's (sum, count),
    without."""

    total: Tensor
    terms: tuple[SumAndCount, ...]


def chunked_loss(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher: TeacherLogits,
    targets: Tensor,
    terms: Sequence[Term],
    chunk: int | None = None,
    parameters: Sequence[Tensor] | None = None,
) -> HeadLoss:
    """Measure the losses of `terms` over all tokens, `chunk` of them at a time; by default, as many as LOGITS allows.

    Args:
        student_hidden: [tokens, width], the input of the head, so after the last norm, at the positions that count.
        student_head: a function, a module, or its matrix [vocabulary, width]. A compressed head is decoded for every
            chunk unless inside `modules.decoded`.
        teacher: has a row for each token.
        targets: int64 [tokens].
        terms: the losses. Their sums are not divided by anything: put 1 / count of the whole step into each weight. A
            count that is a sum of weights (`LossConfig.counts_tokens` false) comes from a call under `torch.no_grad()`.
        parameters: those of the student's head that may train; by default the matrix itself, or all of a module. Any
            other head requires them.

    Raises InputError for vocabularies that differ, ValueError if there is no term, no token in a chunk or rows do not
    match, and KeyError for a loss that requires more than the teacher has.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; at least one token must be in memory at once")
    if not terms or not len(student_hidden) == len(teacher) == len(targets):
        raise ValueError(
            f"{len(terms)} losses of {len(student_hidden)} student rows, {len(teacher)} teacher rows and "
            f"{len(targets)} targets; give a loss, and equal numbers of rows and targets"
        )
    trained = _parameters(student_head) if parameters is None else list(parameters)
    head = as_function(student_head)
    work = _Work(head, teacher, teacher.vocabulary(), targets, tuple(terms))
    logits = LOGITS_ON_CPU if student_hidden.device.type == "cpu" else LOGITS
    size = chunk or max(1, logits // work.vocabulary)
    total, report = _ChunkedLoss.apply(work, size, torch.is_grad_enabled(), student_hidden, *trained)
    return HeadLoss(total, tuple((each[0], each[1]) for each in report.unbind()))


@dataclass(frozen=True)
class _Work:
    """The inputs of a chunk beside the student's hidden states."""

    student_head: Head
    teacher: TeacherLogits
    vocabulary: int  # the teacher's number of classes
    targets: Tensor
    terms: tuple[Term, ...]

    def of_chunk(self, hidden: Tensor, rows: slice, wanted: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Return (sum, count) of each term, [terms, 2], and the weighted sum's gradients with respect to `wanted`."""
        with torch.set_grad_enabled(bool(wanted)):
            student = self.student_head(hidden)
            if student.shape[-1] != self.vocabulary:
                raise InputError(
                    f"the student has a vocabulary of {student.shape[-1]} tokens, its teacher one of "
                    f"{self.vocabulary}; distil from the model that the student was made from"
                )
            predictions = self.teacher.beside(student, self.targets[rows], rows)
            pairs = [measure(predictions[config.reads()], config, state) for config, state, _ in self.terms]
            total = torch.stack([weight * pair[0] for (*_, weight), pair in zip(self.terms, pairs)]).sum()
        gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True) if wanted else ()
        return torch.stack([torch.stack(pair).detach() for pair in pairs]), gradients


class _ChunkedLoss(torch.autograd.Function):
    """The function (work, chunk, differentiate, hidden, *parameters) -> (total, report [terms, 2])."""

    @staticmethod
    def forward(ctx: Any, work: _Work, chunk: int, differentiate: bool, hidden: Tensor, *parameters: Tensor) -> Any:
        """Run all chunks, and store their gradients."""
        ctx.wanted = [differentiate and value.requires_grad for value in (hidden, *parameters)]
        trained = [value for value, wanted in zip(parameters, ctx.wanted[1:]) if wanted]
        of_hidden = torch.empty_like(hidden) if ctx.wanted[0] else None
        # a sum of many small parts, which bfloat16 would round away
        of_trained = [
            torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32)) for value in trained
        ]
        reports = []
        for start in range(0, max(len(hidden), 1), chunk):
            rows = slice(start, start + chunk)
            part = hidden[rows].detach().requires_grad_(ctx.wanted[0])
            wanted = ([part] if ctx.wanted[0] else []) + trained
            report, gradients = work.of_chunk(part, rows, wanted)
            reports.append(report)
            if of_hidden is not None:
                of_hidden[rows], *gradients = gradients
            for total, gradient in zip(of_trained, gradients, strict=True):
                total += gradient
        ctx.save_for_backward(*([] if of_hidden is None else [of_hidden]), *of_trained)
        ctx.dtypes = [value.dtype for value in (hidden, *parameters)]
        report = torch.stack(reports).sum(0)
        ctx.mark_non_differentiable(report)
        weights = report.new_tensor([weight for *_, weight in work.terms])
        return (report[:, 0] * weights).sum(), report  # as a product, autocast would round it to bfloat16

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> Any:
        """Scale the stored gradients."""
        stored = iter(ctx.saved_tensors)
        scaled = [(next(stored) * incoming).to(dtype) if want else None for want, dtype in zip(ctx.wanted, ctx.dtypes)]
        return None, None, None, *scaled


def _parameters(head: Tensor | Head) -> list[Tensor]:
    match head:
        case Tensor():
            return [head]
        case nn.Module():
            return list(head.parameters())
        case _:
            return []
