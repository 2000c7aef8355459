"""A run whose teacher has read everything beforehand, and is not in memory while the student learns.

Its predictions on the training sequences are in a cache (`cache.py`), unless a copy of fewer bits reads along
(`quantized.py`). For the held-out sequences, its last hidden states and its output head are kept: little compared with
a whole model or with the logits. A look at them measures the same divergence as with the model, to the bit, without
running it again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from llmcompress.data.batch import Batch
from llmcompress.distillation.context import TrainContext
from llmcompress.distillation.held_out import POSITIONS
from llmcompress.distillation.objective.chunked_loss import LOGITS
from llmcompress.distillation.objective.heads import head_of, hidden_states
from llmcompress.distillation.teacher.cache import CacheOrigin, open_cache, rounded, tokens_digest, write_cache
from llmcompress.distillation.teacher.predictions import ReadBack
from llmcompress.distillation.teacher.top_k import Likeliest
from llmcompress.errors import LLMCompressError
from llmcompress.losses.forward_kl import ForwardKL
from llmcompress.losses.loss import Predictions, measure
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place
from llmcompress.models.files.identity import teacher_digest
from llmcompress.recipe.distillation import Teacher
from llmcompress.runtime.precision import product_dtype
from llmcompress.weight.modules import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RememberedTeacher(nn.Module):
    """The remains of a model that has read `sequences`, each by itself: for these it answers as the model did.

    It has the parts that `objective.hidden_states` and `objective.head_of` ask a model for.
    """

    def __init__(self, model: PreTrainedModel, sequences: Sequence[Batch]) -> None:
        super().__init__()
        self.config = model.config
        self.linear = cast(nn.Module, model.get_output_embeddings())
        self.hidden: dict[bytes, Tensor] = {}
        for batch in chain.from_iterable(each.chunks(1) for each in sequences):
            one = batch.trim()
            with torch.no_grad():
                states = hidden_states(model, one.to(model.device))
            self.hidden[_name(one.ids, None if one.documents is None else one.positions())] = states

    def get_output_embeddings(self) -> nn.Module:
        """Return the model's output head."""
        return self.linear

    def base_model(self, input_ids: Tensor, use_cache: bool, position_ids: Tensor | None = None) -> tuple[Tensor]:
        """Return the last hidden states [1, length, width]. Raises KeyError for a sequence that the model has not
        read."""
        return (self.hidden[_name(input_ids, position_ids)].to(input_ids.device),)


def _name(ids: Tensor, positions: Tensor | None) -> bytes:
    return b"".join(each.cpu().numpy().tobytes() for each in (ids, positions) if each is not None)


def _folder(asked: Teacher, output: Path) -> Path:
    return (
        output.with_name(output.name + ".teacher") if asked.folder is None else Path(os.path.expanduser(asked.folder))
    )


def remove_cache(asked: Teacher, output: Path) -> None:
    """Remove the cache of a finished run, unless the recipe gave it a folder."""
    if asked.folder is None:
        shutil.rmtree(_folder(asked, output))


def remembered(run: TrainContext, place: Place) -> TrainContext:
    """Return `run` with its teacher's answers on the held-out sequences in place of the teacher, which is at `place`.

    Then the teacher itself only has to read along, if at all; if its weights are asked for, it is loaded again for a
    while.
    """
    device, dtype = run.accelerator.device, product_dtype(run.recipe.compute, run.accelerator.device)
    with run.autocast():
        kept = RememberedTeacher(run.teacher, run.data.held_out).to(device, dtype)
    return replace(run, teacher=cast("PreTrainedModel", kept), dense=partial(_loaded, place, device, dtype))


def taught_from_cache(run: TrainContext, asked: Teacher, place: Place, output: Path) -> TrainContext:
    """Return `run` with a cache for a teacher. The teacher that reads along, at `place`, writes it if it is missing.

    Raises, in every process, what `cache.write_cache` and `cache.open_cache` raise.
    """
    model, accelerator, folder = run.reader, run.accelerator, _folder(asked, output)
    sequences, dtype = run.data.sequences, str(model.dtype).removeprefix("torch.")
    origin = CacheOrigin(teacher_digest(place.folder), tokens_digest(sequences), asked.k, dtype, asked.bits)
    failed: list[LLMCompressError | None] = [None]
    if accelerator.is_main_process:
        try:
            with run.autocast():
                vocabulary = head_of(model)(hidden_states(model, sequences[:1].to(model.device))).shape[-1]
                write_cache(folder, origin, sequences.counted, _Logits(model, sequences, vocabulary), vocabulary)
        except LLMCompressError as error:
            failed = [error]
    broadcast_object_list(failed)  # in which the others wait
    if failed[0] is not None:
        raise failed[0]
    return replace(run, teaching=ReadBack(open_cache(folder, origin, sequences.counted)))


def _loaded(place: Place, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    model = load_model(place, str(device)).requires_grad_(False)
    placed: nn.Module = model
    placed.to(dtype)
    return model


@dataclass(frozen=True, eq=False)
class _Logits:
    """See `cache.Logits`."""

    model: PreTrainedModel
    sequences: Batch
    vocabulary: int

    @torch.no_grad()
    def __call__(self, rows: slice) -> Iterator[Tensor]:
        """Yield logits, as many tokens at once as LOGITS allows."""
        batch = self.sequences[rows].trim().to(self.model.device)
        hidden, head = hidden_states(self.model, batch)[batch.predicting], head_of(self.model)
        for part in hidden.split(max(1, LOGITS // self.vocabulary)):
            yield head(part)


@torch.no_grad()
def measured_bias(run: TrainContext, k: int) -> dict[str, float]:
    """Measure what a cache hides of its teacher from the student in `run`: means over tokens of held-out sequences.

    tail_mass: the teacher's probability of all classes but the k likeliest. kl: KL(teacher || student) in nats;
    kl_with_tail: the same over k + 1 symbols as they are cached, the lower bound that a student is trained on.
    """
    loss, totals, tokens = ForwardKL(), torch.zeros(3, dtype=torch.float64), 0
    models = (run.teacher, run.student.model)
    with run.autocast(), decoded(run.teacher), decoded(run.student.model):
        heads = [head_of(model) for model in models]
        for one in chain.from_iterable(part.chunks(1) for part in run.data.held_out):
            batch = one.trim().to(run.accelerator.device)
            hidden = [hidden_states(model, batch)[batch.predicting].split(POSITIONS) for model in models]
            targets = batch.ids[batch.counted].split(POSITIONS)
            for wanted, given, here in zip(*hidden, targets, strict=True):
                teacher, student = heads[0](wanted), heads[1](given)
                known = rounded(Likeliest.of(teacher, k))
                merged = known.beside(student, here, slice(None))["merged"]
                bounds = [measure(each, loss)[0] for each in (Predictions(student, teacher, here), merged)]
                totals += torch.stack([known.log_tail.exp().sum(), *bounds]).double().cpu()
                tokens += len(here)
    return dict(zip(("tail_mass", "kl", "kl_with_tail"), (totals / tokens).tolist()))
