"""The teacher's predictions of a step, and their sources: the teacher itself, as far as losses compare anything, or a
cache on disk (`cache.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from llmcompress.data.batch import Batch
from llmcompress.distillation.objective.forward import Head, as_function, head_of, hidden_states
from llmcompress.losses.divergence import FLOOR, wide
from llmcompress.losses.loss import Predictions, Reads
from llmcompress.models.dense.blocks import run_until

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TeacherLogits(Protocol):
    """The predictions of a teacher, a row for each token."""

    def __len__(self) -> int:
        """Return the number of tokens."""

    def vocabulary(self) -> int:
        """Return the number of classes of its whole predictions."""

    def beside(self, student: Tensor, targets: Tensor, rows: slice) -> Mapping[Reads, Predictions]:
        """Return its predictions of `rows` beside the student's logits [tokens, vocabulary] and the targets [tokens] of
        these rows, for the kinds of losses that it can serve."""


@dataclass(frozen=True, eq=False)
class Online:
    """Whole predictions. `hidden` [tokens, width]: the input of the teacher's head."""

    hidden: Tensor
    head: Tensor | Head

    def __len__(self) -> int:
        return len(self.hidden)

    @torch.no_grad()
    def vocabulary(self) -> int:
        """See `TeacherLogits.vocabulary`."""
        return self._logits(slice(1)).shape[-1]

    def beside(self, student: Tensor, targets: Tensor, rows: slice) -> Mapping[Reads, Predictions]:
        """See `TeacherLogits.beside`: every kind."""
        with torch.no_grad():
            predictions = Predictions(student, self._logits(rows), targets)
        return {"whole": predictions, "merged": predictions, "nothing": predictions}

    def _logits(self, rows: slice) -> Tensor:
        return as_function(self.head)(self.hidden.detach()[rows])


@dataclass(frozen=True, eq=False)
class Likeliest:
    """The k likeliest classes of each prediction, and one more that stands for all others: the tail.

    Together they are a distribution over k + 1 symbols. Merging classes never moves distributions apart, so a
    divergence on these symbols is a lower bound of that on all classes. It is 0 for a student that agrees on the k
    classes and on the mass of the tail. From the k classes alone, renormalised, a student would learn that all others
    are impossible. Probabilities are natural logarithms.
    """

    ids: Tensor  # int64 [tokens, k], the likeliest first
    log_p: Tensor  # [tokens, k]
    log_tail: Tensor  # [tokens], of the mass of all other classes; -inf without any
    classes: int

    @staticmethod
    def of(logits: Tensor, k: int) -> Likeliest:
        """Take the likeliest of whole predictions, [tokens, vocabulary]; all classes if there are fewer than k."""
        log_p = wide(logits).log_softmax(-1)
        top, ids = log_p.topk(min(k, log_p.shape[-1]))
        tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        return Likeliest(ids, top, tail, log_p.shape[-1])

    def __len__(self) -> int:
        return len(self.ids)

    def vocabulary(self) -> int:
        """See `TeacherLogits.vocabulary`."""
        return self.classes

    def beside(self, student: Tensor, targets: Tensor, rows: slice) -> Mapping[Reads, Predictions]:
        """See `TeacherLogits.beside`: predictions of k + 1 symbols, and the student alone for losses without a teacher.

        The student's tail is its mass on the classes outside the teacher's k. It comes from logits, not from a
        difference to 1, which would lose all digits of a small tail.
        """
        ids, logits = self.ids[rows], wide(student)
        inside = logits.gather(-1, ids)
        outside = logits.scatter(-1, ids, FLOOR).logsumexp(-1, keepdim=True)
        known = torch.cat((self.log_p[rows], self.log_tail[rows, None]), -1)
        none = torch.full_like(targets, -1)  # no loss on symbols reads which one the true class is part of
        return {
            "merged": Predictions(torch.cat((inside, outside), -1), known, none),
            "nothing": Predictions(student, student.detach(), targets),
        }


@dataclass(frozen=True)
class NoPredictions:
    """Stands for the predictions of `tokens` tokens where no loss reads any."""

    tokens: int
    classes: int

    def __len__(self) -> int:
        return self.tokens

    def vocabulary(self) -> int:
        """See `TeacherLogits.vocabulary`."""
        return self.classes

    def beside(self, student: Tensor, targets: Tensor, rows: slice) -> Mapping[Reads, Predictions]:
        """See `TeacherLogits.beside`: the student in the teacher's place, for losses without a teacher."""
        return {"nothing": Predictions(student, student.detach(), targets)}


class TeacherSource(Protocol):
    """Gives the teacher's predictions of sequences."""

    def predictions(self, batch: Batch) -> TeacherLogits:
        """Return the predictions of all tokens of `batch` that count, sequence after sequence."""


@dataclass(frozen=True, eq=False)
class OnlineTeacher:
    """A teacher that reads what the student reads."""

    model: PreTrainedModel

    @torch.no_grad()
    def predictions(self, batch: Batch) -> Online:
        """See `TeacherSource.predictions`."""
        return Online(hidden_states(self.model, batch)[batch.predicting], head_of(self.model))


@dataclass(frozen=True)
class NoTeacher:
    """Stands for a teacher of `classes` tokens where no loss reads one."""

    classes: int

    def predictions(self, batch: Batch) -> NoPredictions:
        """See `TeacherSource.predictions`."""
        return NoPredictions(batch.targets, self.classes)


@dataclass(frozen=True, eq=False)
class TruncatedTeacher:
    """A teacher of `classes` tokens that predicts nothing. It reads up to the input of `block`, the last that a loss
    compares (DMAE, arXiv 2208.12256: early features for a part of the teacher's time)."""

    model: PreTrainedModel
    block: int
    classes: int

    @torch.no_grad()
    def predictions(self, batch: Batch) -> NoPredictions:
        """See `TeacherSource.predictions`."""
        run_until(self.model, self.block, lambda: hidden_states(self.model, batch))
        return NoPredictions(batch.targets, self.classes)


class HeldOutTeacher(nn.Module):
    """Stands for a teacher on the held-out `sequences` alone: its last hidden states there, and its output head.

    That is little compared with the model or with its logits, and measures the same distances, to the bit. It has the
    parts that `hidden_states` and `head_of` read of a model; `original` is the class of that model.
    """

    def __init__(self, model: PreTrainedModel, sequences: Sequence[Batch]) -> None:
        super().__init__()
        self.config, self.original = model.config, type(model)
        self.linear = cast(nn.Module, model.get_output_embeddings())
        self.hidden: dict[bytes, Tensor] = {}
        for each in chain.from_iterable(part.chunks(1) for part in sequences):
            batch = each.trim()
            with torch.no_grad():
                states = hidden_states(model, batch.to(model.device))
            self.hidden[_key(batch.ids, None if batch.documents is None else batch.positions())] = states

    def get_output_embeddings(self) -> nn.Module:
        """Return the model's output head."""
        return self.linear

    def get_decoder(self) -> Callable[..., tuple[Tensor]]:
        """Return the text part, of a model that reads more than text."""
        return self.base_model

    def base_model(self, input_ids: Tensor, use_cache: bool, position_ids: Tensor | None = None) -> tuple[Tensor]:
        """Return the last hidden states [1, length, width]. Raises KeyError for any other sequence."""
        return (self.hidden[_key(input_ids, position_ids)].to(input_ids.device),)


def _key(ids: Tensor, positions: Tensor | None) -> bytes:
    return b"".join(each.cpu().numpy().tobytes() for each in (ids, positions) if each is not None)
