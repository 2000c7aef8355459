"""The expected calibration error: beside a slow definition, and where it is known."""

import math

import pytest
import torch
from torch import Tensor

from llmcompress.evaluation.perplexity import BINS, calibration_error, reliability


def predictions(confidences: list[float], right: list[bool]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [positions, 3] of which token 0 has the given confidence, and the next tokens."""
    sure = torch.tensor(confidences, dtype=torch.float64)
    rest = ((1 - sure) / 2)[:, None].expand(-1, 2)
    return torch.cat((sure[:, None], rest), 1).log().float(), torch.tensor([0 if one else 1 for one in right])


def by_definition(log_probabilities: Tensor, targets: Tensor) -> float:
    """The paper's sum over bins (b / BINS, (b + 1) / BINS], one token after the other."""
    error, count = 0.0, len(targets)
    sure = [max(row) for row in log_probabilities.double().exp().tolist()]
    right = [row.index(max(row)) == target for row, target in zip(log_probabilities.tolist(), targets.tolist())]
    for b in range(BINS):
        members = [i for i in range(count) if b / BINS < sure[i] <= (b + 1) / BINS]
        if members:
            accuracy = sum(right[i] for i in members) / len(members)
            confidence = math.fsum(sure[i] for i in members) / len(members)
            error += len(members) / count * abs(accuracy - confidence)
    return error


def test_it_equals_the_definition_in_one_piece_or_in_several() -> None:
    generator = torch.Generator().manual_seed(0)
    logs = (3 * torch.randn(500, 40, generator=generator)).log_softmax(-1)
    targets = torch.randint(0, 40, (500,), generator=generator)
    whole = calibration_error([reliability(logs, targets)])
    pieces = [reliability(*each) for each in zip(logs.split(77), targets.split(77))]
    assert whole == pytest.approx(by_definition(logs, targets), abs=1e-7)
    assert calibration_error(pieces) == pytest.approx(whole, abs=1e-12)


def test_it_is_zero_where_seven_of_ten_come_true_at_seventy_percent() -> None:
    logs, targets = predictions([0.7] * 10, [True] * 7 + [False] * 3)
    assert calibration_error([reliability(logs, targets)]) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(("right", "error"), [(True, 0.1), (False, 0.9)])
def test_it_tells_too_little_confidence_from_too_much(right: bool, error: float) -> None:
    logs, targets = predictions([0.9] * 6, [right] * 6)
    assert calibration_error([reliability(logs, targets)]) == pytest.approx(error, abs=1e-6)


def test_errors_of_bins_do_not_cancel_each_other() -> None:
    logs, targets = predictions([0.9] * 4 + [0.5] * 4, [True] * 2 + [False] * 2 + [True] * 4)
    assert calibration_error([reliability(logs, targets)]) == pytest.approx((0.4 + 0.5) / 2, abs=1e-6)


def test_certainty_is_in_the_last_bin() -> None:
    bins = reliability(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))
    assert bins[:, -1].tolist() == [1, 1, 1] and bins[:, :-1].sum() == 0
