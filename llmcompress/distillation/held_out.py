"""The distance between student and teacher on sequences that training never reads."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from operator import add
from typing import TYPE_CHECKING, Any

import torch

from llmcompress.data.batch import Batch
from llmcompress.distillation.context import TrainContext
from llmcompress.distillation.objective.forward import head_of, hidden_states
from llmcompress.distillation.student.nested import at_size
from llmcompress.errors import NumericsError
from llmcompress.evaluation.distance import kl_divergence
from llmcompress.evaluation.perplexity import negative_log_likelihood
from llmcompress.runtime.progress import count_each

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = 256  # that a head predicts for at once: 256 * 49152 * 4 bytes = 50 MB


@dataclass(frozen=True)
class Distances:
    """Sums over `tokens` that count, in nats: KL(teacher || student), negative log-likelihoods of both models."""

    kl: float = 0.0
    student: float = 0.0
    teacher: float = 0.0
    tokens: int = 0

    def __add__(self, other: Distances) -> Distances:
        """Return the sums over both texts."""
        return Distances(*map(add, astuple(self), astuple(other)))

    def means(self) -> dict[str, float]:
        """Return {kl, perplexity, teacher_perplexity}, per token. Raises NumericsError if one is not finite."""
        if not math.isfinite(self.kl + self.student + self.teacher):
            raise NumericsError("log-probabilities on the held-out sequences are NaN or infinite; lower the rates")
        return {
            "kl": self.kl / self.tokens,
            "perplexity": _exponential(self.student / self.tokens),
            "teacher_perplexity": _exponential(self.teacher / self.tokens),
        }


def _exponential(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


@torch.no_grad()
def distances(teacher: PreTrainedModel, student: PreTrainedModel, sequences: Batch, device: torch.device) -> Distances:
    """Measure over all targets of `sequences`, one sequence at a time. Log-probabilities are float32, sums float64."""
    total, heads = Distances(), [head_of(model) for model in (teacher, student)]
    for sequence in count_each([*sequences.chunks(1)], "held-out sequence"):
        batch = sequence.trim().to(device)
        hidden = [hidden_states(model, batch)[batch.predicting].split(POSITIONS) for model in (teacher, student)]
        targets = batch.ids[batch.counted].split(POSITIONS)
        for of_teacher, of_student, next_tokens in zip(*hidden, targets, strict=True):
            p, q = heads[0](of_teacher).float().log_softmax(-1), heads[1](of_student).float().log_softmax(-1)
            total += Distances(
                float(kl_divergence(p, q).double().sum()),
                negative_log_likelihood(q, next_tokens),
                negative_log_likelihood(p, next_tokens),
                len(next_tokens),
            )
    return total


def evaluate_held_out(run: TrainContext, step: int) -> dict[str, Any]:
    """Measure the student on the held-out sequences: {step, kl, perplexity, teacher_perplexity}; with several domains,
    also each of them, below `domains`; with smaller sizes, each of them by its components, below `sizes`."""
    parts = {name: held_out_distances(run, part) for name, part in zip(run.data.names, run.data.held_out, strict=True)}
    domains = {"domains": {name: part.means() for name, part in parts.items()}} if len(parts) > 1 else {}
    sizes = {}
    for rank in run.recipe.nested:
        with at_size(run.student.model, rank):
            read = (held_out_distances(run, part) for part in run.data.held_out)
            sizes[str(rank)] = sum(read, start=Distances()).means()
    whole = sum(parts.values(), start=Distances()).means()
    return {"step": step, **whole, **domains, **({"sizes": sizes} if sizes else {})}


def held_out_distances(run: TrainContext, sequences: Batch) -> Distances:
    """Return the distances of the student from its teacher on `sequences`, in the precision of the training."""
    with run.autocast():
        return distances(run.teacher, run.student.model, sequences, run.accelerator.device)
