"""Forwards over batches: documents that share a sequence are read as alone, and no division of the work shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmcompress.data.batch import PADDING, Batch
from llmcompress.distillation.held_out import Distances, distances
from llmcompress.distillation.objective.chunked_loss import chunked_loss
from llmcompress.distillation.objective.forward import check_boundaries, hidden_states
from llmcompress.distillation.objective.hidden_states import StateMatching
from llmcompress.distillation.objective.objective import Objective
from llmcompress.distillation.teacher.predictions import Online, OnlineTeacher
from llmcompress.errors import InputError, NumericsError
from llmcompress.evaluation.distance import distance
from llmcompress.recipe.distillation import Term
from tests.losses.cases import CASES, config, spelled
from tests.tiny import FAMILY_CONFIGS, tiny

LENGTHS = (9, 1, 4, 12, 2, 7)


def ragged(lengths: tuple[int, ...] = LENGTHS, width: int = 12) -> Batch:
    """A document a sequence, padded."""
    ids = torch.randint(1, 256, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]
    whole = Batch.of(ids)
    return Batch(ids * inside, whole.counted & inside)


def packed(lengths: tuple[int, ...] = (5, 1, 6), width: int = 14) -> Batch:
    """Documents in one sequence, then padding."""
    ids = torch.randint(1, 256, (1, width), generator=torch.Generator().manual_seed(4))
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    documents = torch.nn.functional.pad(numbers, (0, width - len(numbers)), value=PADDING)[None]
    counted = torch.zeros_like(ids, dtype=torch.bool)
    counted[:, 1:] = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] != PADDING)
    return Batch(ids, counted, documents)


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS.keys() - {"opt"}))
def test_documents_of_a_sequence_are_read_as_alone(family: str) -> None:
    model, batch = tiny(family), packed()
    together, start = hidden_states(model, batch), 0
    check_boundaries(model, batch.ids)
    for length in (5, 1, 6):
        part = slice(start, start + length)
        assert_close(together[:, part], hidden_states(model, Batch.of(batch.ids[:, part])), rtol=0, atol=1e-5)
        start += length
    plain = hidden_states(model, Batch.of(batch.ids))
    assert not torch.allclose(plain[:, 6:12], together[:, 6:12], rtol=0, atol=1e-3)


def test_a_model_in_which_documents_see_each_other_is_refused() -> None:
    """OPT counts positions by its mask and makes no other mask of them."""
    with pytest.raises(InputError, match=r"see each other in a OPTForCausalLM; set boundaries: false in its data"):
        check_boundaries(tiny("opt"), packed().ids)


def test_padding_is_read_by_nothing() -> None:
    model, batch = tiny("llama"), ragged()
    states = hidden_states(model, batch)
    for row, length in zip(range(len(batch)), LENGTHS, strict=True):
        alone = hidden_states(model, Batch.of(batch.ids[row : row + 1, :length]))
        assert_close(states[row : row + 1, :length], alone, rtol=0, atol=1e-5)


def test_positions_and_targets() -> None:
    batch = Batch.join([packed((2, 3), 5), ragged((3,), 4)])
    assert batch.positions().tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert batch.counted.tolist() == [[False, True, False, True, True], [False, True, True, False, False]]
    assert batch.predicting.tolist() == [[True, False, True, True, False], [True, True, False, False, False]]
    assert batch.read.tolist() == [[True] * 5, [True, True, True, False, False]]
    assert batch.targets == 5 and batch[1:].trim().ids.shape == (1, 3)
    assert [len(part) for part in batch.chunks(1)] == [1, 1]


def terms(*names: str) -> list[tuple[Term, Any]]:
    made = [Term(of=config(name), weight=0.5 + number) for number, name in enumerate(names)]
    return [(term, term.of.start()) for term in made]


def objective_of(student: Any, teacher: Any, losses: list[tuple[Term, Any]]) -> Objective:
    """As a training has it, with a teacher that reads along."""
    return Objective(
        student, OnlineTeacher(teacher), StateMatching.of(student, teacher, [term for term, _ in losses]), losses
    )


def gradient(objective: Objective, parts: list[Batch], targets: int) -> tuple[Tensor, Tensor]:
    """The objective of a step and its gradient, the parts one after the other."""
    weights = [term.weight_at(0, 1) / targets for term, _ in objective.terms]
    total = torch.zeros((), dtype=torch.float64)
    objective.zero_grad()
    for part in parts:
        loss, report = objective(part.trim(), weights)
        assert report.shape == (len(weights), 2) and float(report[0, 1]) == part.targets
        loss.backward()
        total += loss.detach()
    return total, torch.cat([value.grad.flatten() for value in objective.parameters() if value.grad is not None])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_of_ragged_parts_add_up_to_one_batch(size: int) -> None:
    student, teacher = tiny("llama", seed=1).double(), tiny("llama").double().requires_grad_(False)
    states = [{"loss": "hidden"}, {"loss": "minilm", "relation_heads": 4}]
    on_states = [(Term.model_validate({"of": one}), None) for one in states]
    objective = objective_of(student, teacher, terms("forward_kl", "cross_entropy", "taid") + on_states)
    batch = ragged()
    whole, parts = (gradient(objective, batch.chunks(n), batch.targets) for n in (len(batch), size))
    assert_close(parts[0], whole[0], rtol=1e-10, atol=0)
    assert_close(parts[1], whole[1], rtol=0, atol=1e-10)


def test_gradient_equals_the_mean_over_single_targets() -> None:
    """Sum over targets of KL(teacher || student) / their number, documents alone and unpadded, by plain autograd."""
    student, teacher = tiny("llama", seed=1).double(), tiny("llama").double().requires_grad_(False)
    batch = Batch.join([packed(), ragged()])
    total, found = gradient(objective_of(student, teacher, terms("forward_kl")), batch.chunks(3), batch.targets)
    alone = [packed().ids[:, 0:5], packed().ids[:, 6:12]]
    alone += [ragged().ids[row : row + 1, :length] for row, length in enumerate(LENGTHS) if length > 1]
    student.zero_grad()
    losses = []
    for ids in alone:
        p, q = teacher(ids).logits[0, :-1].log_softmax(-1), student(ids).logits[0, :-1].log_softmax(-1)
        losses.append((p.exp() * (p - q)).sum())
    count = sum(ids.shape[1] - 1 for ids in alone)
    expected = 0.5 * torch.stack(losses).sum() / count
    expected.backward()  # type: ignore[no-untyped-call]
    wanted = torch.cat([value.grad.flatten() for value in student.parameters() if value.grad is not None])
    assert batch.targets == count
    assert_close(total, expected.detach(), rtol=1e-10, atol=0)
    assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=map(spelled, CASES))
def test_a_part_without_targets_has_a_zero_gradient(case: dict[str, Any]) -> None:
    term = Term(of=case)
    student, teacher = (torch.nn.Linear(8, 11, bias=False) for _ in range(2))
    hidden = torch.zeros(0, 8, requires_grad=True)
    found = chunked_loss(
        hidden, student, Online(hidden, teacher), torch.zeros(0, dtype=torch.int64), [(term.of, term.of.start(), 1.0)]
    )
    found.total.backward()  # type: ignore[no-untyped-call]
    assert found.total.item() == found.terms[0][0].item() == found.terms[0][1].item() == 0
    assert student.weight.grad is not None and not student.weight.grad.any()


def test_an_objective_without_targets_reaches_every_parameter() -> None:
    """So that wrappers of several processes, which wait for all of them, go on."""
    student, teacher = tiny("llama", seed=1), tiny("llama")
    batch = ragged()
    empty = Batch(batch.ids, torch.zeros_like(batch.counted)).trim()
    loss, report = objective_of(student, teacher, terms("forward_kl"))(empty, [10.0])
    loss.backward()
    assert loss.item() == 0 and not report.any()
    assert all(value.grad is not None and not value.grad.any() for value in student.parameters())


def test_held_out_distances_are_those_of_plain_windows() -> None:
    student, teacher = tiny("gemma2", seed=1), tiny("gemma2")
    ids = torch.randint(1, 256, (3, 16), generator=torch.Generator().manual_seed(5))
    found, wanted = distances(teacher, student, Batch.of(ids), ids.device).means(), distance(teacher, student, ids)
    plain = {
        "kl": wanted.kl,
        "perplexity": wanted.student.value,
        "teacher_perplexity": wanted.teacher.value,
    }
    assert found == pytest.approx(plain, rel=1e-5)


def test_held_out_distances_add_and_see_targets_alone() -> None:
    student, teacher = tiny("llama", seed=1), tiny("llama")
    batch = ragged()
    whole = distances(teacher, student, batch, batch.ids.device)
    other = Batch(torch.where(batch.counted | batch.predicting, batch.ids, 7), batch.counted)
    again = [distances(teacher, student, part, batch.ids.device) for part in (other[:2], other[2:])]
    assert (again[0] + again[1]).means() == pytest.approx(whole.means(), rel=1e-6)
    with pytest.raises(NumericsError, match="held-out sequences are NaN or infinite"):
        Distances(float("nan"), 0, 0, 1).means()
