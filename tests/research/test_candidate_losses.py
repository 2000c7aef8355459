"""Losses that only the arena knows, against loops over tokens in float64."""

from __future__ import annotations

import math

import candidate_losses
import pytest
import torch
from torch import Tensor, nn

from llmcompress.losses.loss import Features, Predictions


def predictions() -> Predictions:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return Predictions(student.requires_grad_(), teacher, torch.tensor([0, 1, 2, 3, 4, 0]))


def divergences(given: Predictions) -> list[float]:
    """KL of every token."""
    p, q = given.teacher.softmax(-1), given.student.detach().softmax(-1)
    return [sum(float(a * (a / b).log()) for a, b in zip(*rows)) for rows in zip(p, q)]


def test_truth_is_read_where_the_teacher_finds_it_unlikely() -> None:
    given = predictions()
    p, q = given.teacher.softmax(-1), given.student.detach().softmax(-1)
    wanted, softened = 0.0, 0
    for token, (target, divergence) in enumerate(zip(given.targets.tolist(), divergences(given))):
        if p[token, target] >= 0.05:
            wanted += divergence
            continue
        label = 0.3 * p[token] + 0.7 * nn.functional.one_hot(torch.tensor(target), 5)
        wanted -= float((label * q[token].log()).sum())
        softened += 1
    assert 0 < softened < 6
    total, count = candidate_losses.reliable(given, candidate_losses.Reliable(least=0.05, smoothing=0.3), None)
    assert total.item() == pytest.approx(wanted) and float(count) == 6


@pytest.mark.parametrize("gamma", [-0.5, 0.0, 1.0])
def test_what_drifted_weighs_by_its_divergence(gamma: float) -> None:
    given = predictions()
    each = divergences(given)
    total, count = candidate_losses.drifted(given, candidate_losses.Drifted(gamma=gamma), None)
    assert total.item() == pytest.approx(sum(one ** (1 + gamma) for one in each))
    assert float(count) == pytest.approx(sum(one**gamma for one in each))
    [slope] = torch.autograd.grad(total, given.student)
    q, p = given.student.detach().softmax(-1), given.teacher.softmax(-1)
    torch.testing.assert_close(slope, (q - p) * torch.tensor(each, dtype=torch.float64)[:, None] ** gamma)


def test_tokens_weigh_by_what_the_teacher_loses_on_them() -> None:
    given = predictions()
    rows = zip(divergences(given), given.teacher.softmax(-1), given.targets)
    pairs = [(each, -float(p[target].log())) for each, p, target in rows]
    total, count = candidate_losses.unsure(given, candidate_losses.Unsure(), None)
    assert total.item() == pytest.approx(sum(each * weight for each, weight in pairs))
    assert float(count) == pytest.approx(sum(weight for _, weight in pairs))


def test_a_sure_teacher_is_followed_from_the_student_s_side() -> None:
    given = predictions()
    swapped = Predictions(given.teacher, given.student.detach(), given.targets)
    sure = sum(float(p[target]) for p, target in zip(given.teacher.softmax(-1), given.targets)) / 6
    wanted = (1 - sure) * sum(divergences(given)) + sure * sum(divergences(swapped))
    total, count = candidate_losses.confident(given, candidate_losses.Confident(), None)
    assert total.item() == pytest.approx(wanted) and float(count) == 6


def test_what_is_likely_is_followed_from_the_student_s_side() -> None:
    given = predictions()
    wanted = 0.0
    for p, q in zip(given.teacher.softmax(-1), given.student.detach().softmax(-1)):
        likely = p.argsort(descending=True)[:2].tolist()
        for one, (theirs, mine) in enumerate(zip(p.tolist(), q.tolist())):
            wanted += theirs - mine + mine * math.log(mine / theirs) if one in likely else mine - theirs
            wanted += 0.0 if one in likely else theirs * math.log(theirs / mine)
    total, count = candidate_losses.explicit(given, candidate_losses.Explicit(k=2), None)
    assert total.item() == pytest.approx(wanted) and float(count) == 6
    student = given.student.detach()
    for k, same in ((10, Predictions(given.teacher, student, given.targets)), (0, given)):
        total, _ = candidate_losses.explicit(given, candidate_losses.Explicit.model_construct(k=k), None)
        assert total.item() == pytest.approx(sum(divergences(same)))


@pytest.fixture
def features() -> Features:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return Features(student, teacher, torch.tensor([[True] * 4, [True, True, False, False], [True, False, True, True]]))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def test_a_position_is_told_from_the_others_of_its_sequence(features: Features) -> None:
    wanted, counted = 0.0, 0
    for student, teacher, keep in zip(features.student, features.teacher, features.keep):
        for position in keep.nonzero()[:, 0]:
            others = [cosine(student[position], teacher[other]) / 0.5 for other in keep.nonzero()[:, 0]]
            own = cosine(student[position], teacher[position]) / 0.5
            wanted += math.log(sum(math.exp(other) for other in others)) - own
            counted += 1
    total, count = candidate_losses.mutual_information(features, candidate_losses.MutualInformation(temperature=0.5))
    assert total.item() == pytest.approx(wanted) and float(count) == counted == 9


def test_sequences_are_related_position_by_position(features: Features) -> None:
    wanted = 0.0
    for position in range(4):
        there = features.keep[:, position].nonzero()[:, 0]
        for one in there:
            for other in there:
                mine, theirs = (
                    cosine(states[one, position], states[other, position])
                    for states in (features.student, features.teacher)
                )
                wanted += (mine - theirs) ** 2
    total, count = candidate_losses.across(features, candidate_losses.Across())
    assert total.item() == pytest.approx(wanted) and float(count) == 9


def test_states_are_compared_in_the_teachers_principal_directions(features: Features) -> None:
    seen = features.teacher[features.keep]
    directions = torch.linalg.svd(seen - seen.mean(0)).Vh[:2]  # of largest variance first
    wanted = 0.0
    for mine, theirs in zip(features.student[features.keep], seen):
        wanted += float((directions @ (mine - theirs)).square().sum() / (directions @ theirs).square().sum())
    total, count = candidate_losses.principal(features, candidate_losses.Principal(share=0.4))
    assert total.item() == pytest.approx(wanted) and float(count) == 9
    other = Features(features.student, features.teacher, None)
    whole, _ = candidate_losses.principal(other, candidate_losses.Principal(share=1.0))
    relative = (features.student - features.teacher).square().sum(-1) / features.teacher.square().sum(-1)
    assert whole.item() == pytest.approx(float(relative.sum()))


def test_layers_are_related_to_the_one_before(features: Features) -> None:
    later = Features(features.student.flip(-1), features.teacher.roll(1, -1), features.keep)
    run = candidate_losses.between()
    assert [float(value) for value in run(features, candidate_losses.Between())] == [0, 9]  # has none before it
    wanted = 0.0
    for sequence, position in features.keep.nonzero().tolist():
        mine, theirs = (
            cosine(one[sequence, position], other[sequence, position])
            for one, other in ((features.student, later.student), (features.teacher, later.teacher))
        )
        wanted += (mine - theirs) ** 2
    total, count = run(later, candidate_losses.Between())
    assert total.item() == pytest.approx(wanted) and float(count) == 9
    another = Features(features.student, features.teacher, features.keep.clone())
    assert float(run(another, candidate_losses.Between())[0]) == 0  # of another forward pass
