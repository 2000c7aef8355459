"""Distance of a compressed model from its teacher, token by token: KL divergence and agreement on the likeliest token.

Perplexity can stay the same while answers change; these two cannot (arXiv 2407.09141). One pass of both models over
the same windows also gives both perplexities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.evaluation.logits import Counting, Readable, window_logits
from llmcompress.evaluation.perplexity import (
    BINS,
    Perplexity,
    chunks_of_parts,
    negative_log_likelihood,
    predicted_tokens,
    reliability,
)
from llmcompress.evaluation.uncertainty import mean, stderr
from llmcompress.runtime.ranks import ALONE, Ranks

# Means over the predicted tokens of a window: KL and agreement; then for teacher and student each the negative
# log-probability, and predictions in bins of confidence.
_Window = tuple[float, float, float, Tensor, float, Tensor]


@dataclass(frozen=True)
class Distance:
    """`kl`: KL(teacher || student) in nats per token. `top1_agreement`: share of tokens with the same likeliest token.

    Standard errors take windows as independent, and are None for one window. `kl_windows`: the mean KL of each.
    """

    kl: float
    kl_stderr: float | None
    top1_agreement: float
    top1_agreement_stderr: float | None
    kl_windows: tuple[float, ...]
    teacher: Perplexity
    student: Perplexity

    @staticmethod
    def to_itself(model: Perplexity) -> Distance:
        """Return the distance of a model from itself."""
        zero = None if model.stderr is None else 0.0
        return Distance(0.0, zero, 1.0, zero, (0.0,) * len(model.windows), teacher=model, student=model)


def distance(
    teacher: Readable,
    student: Readable,
    ids: Tensor,
    batch_size: int = 1,
    processes: Ranks = ALONE,
    progress: Counting | None = None,
    blocks: Counting | None = None,
) -> Distance:
    """Compare both models on windows `ids` [n, length], over the positions that perplexity counts.

    Log-probabilities are float32, sums float64. `progress` and `blocks`: as for `perplexity`, `blocks` for each model.
    """
    share = processes.share(ids)
    rows: list[_Window] = []
    with processes.agree_on_errors():
        for (batch, wanted), (_, given) in zip(
            window_logits(teacher, share, batch_size, blocks), window_logits(student, share, batch_size, blocks)
        ):
            rows += _compare_windows(wanted, given, batch)
            if progress is not None:
                progress(len(rows), len(share))
    divergence, same, of_teacher, in_teacher, of_student, in_student = zip(*processes.gather_items(rows))
    return Distance(
        mean(divergence),
        stderr(divergence),
        mean(same),
        stderr(same),
        divergence,
        teacher=Perplexity.of(of_teacher, in_teacher, predicted_tokens(ids)),
        student=Perplexity.of(of_student, in_student, predicted_tokens(ids)),
    )


def _compare_windows(teacher: Iterable[Tensor], student: Iterable[Tensor], windows: Tensor) -> list[_Window]:
    """Return the means over each of the windows [n, length]; logits are as `window_logits` yields them."""
    bins = torch.zeros(3, BINS, dtype=torch.float64)
    sums = [(0.0, 0, 0.0, bins, 0.0, bins) for _ in windows]
    pairs = zip(chunks_of_parts(teacher, windows), chunks_of_parts(student, windows), strict=True)
    for (number, p, targets), (_, on_student, _) in pairs:
        q = on_student.to(p.device)
        divergence, same, of_teacher, in_teacher, of_student, in_student = sums[number]
        sums[number] = (
            divergence + float(kl_divergence(p, q).double().sum()),
            same + int((p.argmax(-1) == q.argmax(-1)).sum()),
            of_teacher + negative_log_likelihood(p, targets),
            in_teacher + reliability(p, targets).cpu(),
            of_student + negative_log_likelihood(q, targets),
            in_student + reliability(q, targets).cpu(),
        )
    count = windows.shape[1] - 1
    return [
        (divergence / count, same / count, of_teacher / count, in_teacher, of_student / count, in_student)
        for divergence, same, of_teacher, in_teacher, of_student, in_student in sums
    ]


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities [positions, vocabulary] -> [positions], in nats."""
    return nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
