"""Losses that the arena (lessons.py) tries before the package offers them.

They are known to recipes after `register`. What wins moves to `llmcompress/losses`. Each is our reading of an idea for
classifiers or vision models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llmcompress.losses.divergence import kl, log_probabilities, over_tokens, wide
from llmcompress.losses.loss import Features, LossConfig, LossState, Predictions, SumAndCount, feature_loss, loss


class Reliable(LossConfig):
    """Arguments of `reliable`."""

    loss: Literal["reliable"] = "reliable"
    least: float = Field(0.01, ge=0, lt=1, description="probability of the truth below which a teacher is not believed")
    smoothing: float = Field(0.1, ge=0, lt=1, description="share of such a label that the teacher's distribution keeps")

    @property
    def reads_truth(self) -> bool:
        """See `LossConfig.reads_truth`."""
        return True


def reliable(predictions: Predictions, config: Reliable, state: LossState | None) -> SumAndCount:
    """Forward KL, but cross-entropy with a softened truth where the teacher finds that unlikely (FerKD, 2312.17473)."""
    log_q, log_p = log_probabilities(predictions)
    truth = log_p.gather(-1, predictions.targets[:, None])[:, 0].exp() < config.least
    known = nn.functional.nll_loss(log_q, predictions.targets, reduction="none")
    softened = (1 - config.smoothing) * known - config.smoothing * (log_p.exp() * log_q).sum(-1)
    return over_tokens(softened.where(truth, kl(log_p, log_q)))


class Drifted(LossConfig):
    """Arguments of `drifted`."""

    loss: Literal["drifted"] = "drifted"
    gamma: float = Field(0.5, ge=-2, le=2, description="0 weighs all tokens the same")

    @property
    def counts_tokens(self) -> bool:
        """False: the count is the sum of the tokens' weights."""
        return False


def drifted(predictions: Predictions, config: Drifted, state: LossState | None) -> SumAndCount:
    """Sum of w KL(p || q) and of w = KL^gamma, without gradient: the more a token has drifted, the more it weighs."""
    each = kl(*reversed(log_probabilities(predictions)))
    weights = each.detach().clamp_min(1e-4) ** config.gamma
    return (weights * each).sum(), weights.sum()


class Unsure(LossConfig):
    """Arguments of `unsure`: none."""

    loss: Literal["unsure"] = "unsure"

    @property
    def reads_truth(self) -> bool:
        """See `LossConfig.reads_truth`."""
        return True

    @property
    def counts_tokens(self) -> bool:
        """False: the count is the sum of the tokens' weights."""
        return False


def unsure(predictions: Predictions, config: Unsure, state: LossState | None) -> SumAndCount:
    """Sum of w KL(p || q) and of w = -log p(truth), what the teacher loses on a token (TSLD, 2308.06744)."""
    log_q, log_p = log_probabilities(predictions)
    weights = nn.functional.nll_loss(log_p, predictions.targets, reduction="none")
    return (weights * kl(log_p, log_q)).sum(), weights.sum()


class Confident(LossConfig):
    """Arguments of `confident`: none."""

    loss: Literal["confident"] = "confident"

    @property
    def reads_truth(self) -> bool:
        """See `LossConfig.reads_truth`."""
        return True


def confident(predictions: Predictions, config: Confident, state: LossState | None) -> SumAndCount:
    """Reverse KL and forward KL, shared out by the teacher's probability of the truth (BitDistiller, 2402.10631).

    In the paper that is a mean over the whole text, found beforehand; here it is one over the tokens of a chunk.
    """
    log_q, log_p = log_probabilities(predictions)
    sure = log_p.gather(-1, predictions.targets[:, None]).exp().mean()
    return over_tokens(sure * kl(log_q, log_p) + (1 - sure) * kl(log_p, log_q))


class Explicit(LossConfig):
    """Arguments of `explicit`."""

    loss: Literal["explicit"] = "explicit"
    k: int = Field(10, ge=1, description="number of the teacher's likeliest classes")


def explicit(predictions: Predictions, config: Explicit, state: LossState | None) -> SumAndCount:
    """Reverse KL over the teacher's likeliest classes, its explicit knowledge, and forward KL over the others.

    Parts have no mass of 1, so each counts what its masses differ by, and none is below zero. TopKLD balances these two
    kinds of knowledge, by an abstract whose paper we could not read; that the directions differ is our reading.
    """
    log_q, log_p = log_probabilities(predictions)
    index = log_p.topk(min(config.k, log_p.shape[-1])).indices
    likely = torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, index, True)
    p, q, gap = log_p.exp(), log_q.exp(), log_p - log_q
    return over_tokens(torch.where(likely, p - q - q * gap, q - p + p * gap).sum(-1))


class MutualInformation(LossConfig):
    """Arguments of `mutual_information`."""

    loss: Literal["mutual_information"] = "mutual_information"
    temperature: float = Field(0.1, gt=0, description="cosines are divided by it")

    @property
    def needs_one_width(self) -> bool:
        """See `LossConfig.needs_one_width`."""
        return True


def mutual_information(features: Features, config: MutualInformation) -> SumAndCount:
    """InfoNCE between states [sequences, length, width]: which of its sequence's positions a student's state is of.

    It is the bound on mutual information of Distiller (2109.11105) at alpha 1, with cosines as the critic.
    """
    keep = _kept(features)
    student, teacher = (
        nn.functional.normalize(wide(states), dim=-1).where(keep[..., None], 0)
        for states in (features.student, features.teacher.detach())
    )
    alike = student @ teacher.transpose(-1, -2) / config.temperature  # [sequences, length, length]
    others = alike.masked_fill(~keep[:, None, :], -1e30).log_softmax(-1)
    own = -others.diagonal(dim1=-2, dim2=-1)
    return own.where(keep, 0).sum(), keep.sum().to(own)


class Across(LossConfig):
    """Arguments of `across`: none."""

    loss: Literal["across"] = "across"


def across(features: Features, config: Across) -> SumAndCount:
    """Squared differences of cosines between equal positions of the sequences that are read together.

    It is the relation between samples of fine-grained manifold distillation (2107.01378). It depends on which
    sequences share a micro-batch, which no loss of the package does.
    """
    keep = _kept(features)
    alike = [
        nn.functional.normalize(wide(states), dim=-1).transpose(0, 1)
        for states in (features.student, features.teacher.detach())
    ]
    mine, theirs = (states @ states.transpose(-1, -2) for states in alike)  # [length, sequences, sequences]
    counted = keep.T[:, :, None] & keep.T[:, None, :]
    each = (mine - theirs).square().where(counted, 0).sum(-1)
    return each.sum(), keep.sum().to(each)


class Between(LossConfig):
    """Arguments of `between`: none."""

    loss: Literal["between"] = "between"


def between() -> Callable[[Features, Between], SumAndCount]:
    """Return a loss: squared differences of the cosines between a layer's states and those of the layer before.

    It is the relation across layers of SKT (2003.10120), which layers of any two widths have. The loss is called once
    for each layer, in order, and remembers the last one; the first of a forward pass has none before it.
    """
    last: list[Features] = []

    def between(features: Features, config: Between) -> SumAndCount:
        keep, before = _kept(features), last.pop() if last else None
        last.append(features)
        count = keep.sum().to(wide(features.student))
        if before is None or before.keep is not features.keep:  # of another pass
            return torch.zeros_like(count), count
        mine, theirs = (
            nn.functional.cosine_similarity(wide(one), wide(other), dim=-1)
            for one, other in (
                (before.student, features.student),
                (before.teacher.detach(), features.teacher.detach()),
            )
        )
        return (mine - theirs).square().where(keep, 0).sum(), count

    return between


class Principal(LossConfig):
    """Arguments of `principal`."""

    loss: Literal["principal"] = "principal"
    share: float = Field(0.25, gt=0, le=1, description="dimensions that are compared, as a share of the width")

    @property
    def needs_one_width(self) -> bool:
        """See `LossConfig.needs_one_width`."""
        return True


def principal(features: Features, config: Principal) -> SumAndCount:
    """`hidden` in the principal directions of the teacher's states (low-rank mimicry of BinaryDM, 2404.05662).

    The directions are those of the states at hand, about their mean.
    """
    keep = _kept(features)
    student, teacher = wide(features.student)[keep], wide(features.teacher.detach())[keep]
    directions = torch.linalg.eigh(teacher.T.cov()).eigenvectors
    basis = directions[:, -max(1, round(config.share * teacher.shape[-1])) :]  # [width, dimensions]
    error, energy = ((student - teacher) @ basis).square().sum(-1), (teacher @ basis).square().sum(-1)
    return (error / energy).sum(), keep.sum().to(error)


def register() -> None:
    """Let recipes in this process name them."""
    loss("reliable", Reliable)(reliable)
    loss("drifted", Drifted)(drifted)
    loss("unsure", Unsure)(unsure)
    loss("confident", Confident)(confident)
    loss("explicit", Explicit)(explicit)
    feature_loss("mutual_information", MutualInformation)(mutual_information)
    feature_loss("across", Across)(across)
    feature_loss("between", Between)(between())
    feature_loss("principal", Principal)(principal)


def _kept(features: Features) -> Tensor:
    if features.keep is not None:
        return features.keep
    return torch.ones(features.student.shape[:2], dtype=torch.bool, device=features.student.device)
