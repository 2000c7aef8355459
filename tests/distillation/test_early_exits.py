"""Exits: early predictions read with the student's own norm and head, against whole logits and plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from llmcompress.data.batch import Batch
from llmcompress.distillation.objective.forward import recompute_activations
from llmcompress.distillation.objective.objective import Objective
from llmcompress.errors import InputError, RecipeError
from llmcompress.models.dense.blocks import states_between
from llmcompress.recipe.distillation import Distillation, Term
from llmcompress.recipe.read import dump, read_as
from tests.distillation.test_batches import gradient, objective_of, ragged
from tests.losses.spy import largest_tensor
from tests.tiny import FAMILY_CONFIGS, VOCABULARY, tiny

FORWARD = {"of": {"loss": "forward_kl"}}
OFA = {"of": {"loss": "ofa", "gamma": 1.5}, "exits": [1, 2], "weight": 0.3}
EXACT = {"rtol": 1e-10, "atol": 1e-13}


def pair(**student: Any) -> tuple[Any, Any]:
    """A student of three blocks, by default half as wide as its teacher of four, in float64."""
    layout = {"num_hidden_layers": 3, "hidden_size": 16} | student
    return (
        tiny("llama", seed=1, **layout).double(),
        tiny("llama", num_hidden_layers=4).double().requires_grad_(False),
    )


def objective(student: Any, teacher: Any, *terms: dict[str, Any]) -> Objective:
    """As a training has it."""
    return objective_of(student, teacher, [(term, term.of.start()) for term in map(Term.model_validate, terms)])


def whole_logits(student: Any, batch: Batch, exits: list[int]) -> list[Tensor]:
    """Return the student's logits behind some of its blocks: the library's norm and head on the library's states."""
    with states_between(student, exits) as states:
        student(batch.ids, use_cache=False)
    frozen = {name: value.detach() for name, value in student.model.norm.named_parameters()}
    head = student.lm_head.weight.detach()
    found = [torch.func.functional_call(student.model.norm, frozen, (states[number],)) for number in exits]
    return [(normed @ head.T)[batch.predicting] for normed in found]


def enhanced_cross_entropy(student: Tensor, teacher: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """arXiv 2310.19444: the sum of -((p + e)^gamma - e) log q, one token at a time."""
    total = student.new_zeros(())
    for z, u, target in zip(student, teacher, targets, strict=True):
        true = torch.nn.functional.one_hot(target, len(u)).to(u)
        total = total - (((u.softmax(-1) + true) ** gamma - true) * z.log_softmax(-1)).sum()
    return total


def flat(total: Tensor, model: Any) -> Tensor:
    """The gradient with respect to all parameters; zero where there is none."""
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("chunk", [1, 5, 10**6])
def test_exits_are_losses_on_whole_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another width and depth than the teacher's; value, and gradient with respect to everything."""
    monkeypatch.setattr("llmcompress.distillation.objective.chunked_loss.LOGITS_ON_CPU", chunk * VOCABULARY)
    student, teacher = pair()
    batch, rates = ragged(), [0.7 / 29, 0.3 / 29]
    total, rows = objective(student, teacher, FORWARD, OFA)(batch, rates)
    wanted = teacher(batch.ids, use_cache=False).logits[batch.predicting]
    targets = batch.ids[batch.counted]
    last = student(batch.ids, use_cache=False).logits[batch.predicting]
    end = (wanted.softmax(-1) * (wanted.log_softmax(-1) - last.log_softmax(-1))).sum()
    early = [enhanced_cross_entropy(z, wanted, targets, 1.5) for z in whole_logits(student, batch, [1, 2])]
    expected = rates[0] * end + rates[1] * (early[0] + early[1]) / 2
    assert_close(total, expected, **EXACT)
    assert_close(rows[:, 0], torch.stack([end, (early[0] + early[1]) / 2]).detach(), **EXACT)
    assert rows[:, 1].tolist() == [len(targets)] * 2
    assert_close(flat(total, student), flat(expected, student), rtol=0, atol=1e-8)  # the library's norms are float32


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_an_exit_after_the_last_block_equals_the_final_loss(family: str) -> None:
    """In every family: with its norm, its projection, its cap on logits."""
    student, teacher = tiny(family, seed=1), tiny(family).requires_grad_(False)
    batch = Batch.of(ragged().ids[:1])
    terms = [FORWARD, {"of": {"loss": "ofa"}}]
    at_end = [each | {"exits": [2]} for each in terms]
    total, rows = objective(student, teacher, *terms, *at_end)(batch, [0.0, 0.0, 1.0, 1.0])
    assert_close(rows[2:], rows[:2], rtol=1e-5, atol=1e-6)
    end, _ = objective(student, teacher, *terms)(batch, [1.0, 1.0])
    inside = [value for name, value in student.named_parameters() if ".0." in name or ".1." in name]
    slopes = [torch.autograd.grad(each, inside, allow_unused=True, materialize_grads=True) for each in (total, end)]
    for found, wanted in zip(*slopes, strict=True):
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_exit_teaches_the_blocks_before_it_alone() -> None:
    student, teacher = pair()
    total, _ = objective(student, teacher, FORWARD, OFA | {"exits": [2]})(ragged(), [0.0, 1.0])
    total.backward()
    reached = {name for name, value in student.named_parameters() if value.grad is not None and value.grad.any()}
    blocks = {name for name, _ in student.named_parameters() if ".layers.0." in name or ".layers.1." in name}
    assert reached == blocks | {"model.embed_tokens.weight"}


@pytest.mark.parametrize("loss", ["ofa", "forward_kl", "dad", "taid"])
@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_add_up_to_one_batch(loss: str, size: int) -> None:
    student, teacher = pair()
    terms = [FORWARD, {"of": {"loss": loss}, "exits": [1, 3], "weight": 0.5}]
    batch = ragged()
    if loss == "dad":  # its count is a sum of weights, the same at every exit
        rows = [objective(student, teacher, *terms)(part, [1.0, 1.0])[1] for part in (batch, *batch.chunks(size))]
        assert_close(torch.stack(rows[1:]).sum(0), rows[0], **EXACT)
        return
    whole, parts = (
        gradient(objective(student, teacher, *terms), batch.chunks(n), batch.targets) for n in (len(batch), size)
    )
    assert_close(parts[0], whole[0], rtol=1e-10, atol=0)
    assert_close(parts[1], whole[1], rtol=0, atol=1e-10)


def test_losses_are_reported_in_float32_where_products_are_bfloat16() -> None:
    student, teacher = (tiny("llama", seed=seed, num_hidden_layers=3) for seed in (1, 0))
    rates = [0.7, 0.2, 0.1]
    terms = [FORWARD, {"of": {"loss": "hidden"}}, OFA]
    with torch.autocast("cpu", torch.bfloat16):
        total, rows = objective(student, teacher.requires_grad_(False), *terms)(ragged(), rates)
    assert total.dtype == rows.dtype == torch.float32
    assert_close(total.detach(), (rows[:, 0] * torch.tensor(rates)).sum(), rtol=1e-6, atol=0)
    assert not torch.equal(rows[:, 0], rows[:, 0].bfloat16().float())


def test_recomputed_activations_change_nothing() -> None:
    student, teacher = pair()
    found = objective(student, teacher, FORWARD, OFA | {"exits": [1, 3]})
    batch = ragged()
    wanted = flat(found(batch, [0.1, 0.1])[0], student)
    runs: list[int] = []
    student.model.layers[1].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    with recompute_activations(student):
        runs.clear()
        total, _ = found(batch, [0.1, 0.1])
        assert_close(flat(total, student), wanted, rtol=1e-12, atol=1e-15)
    assert len(runs) == 2


def test_logits_of_an_exit_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.distillation.objective.chunked_loss.LOGITS_ON_CPU", 4 * VOCABULARY)
    student, teacher = tiny("llama", seed=1, num_hidden_layers=3), tiny("llama").requires_grad_(False)
    found = objective(student, teacher, FORWARD, OFA)
    batch = Batch.of(torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0)))
    most = largest_tensor(lambda: found(batch, [1.0, 1.0])[0].backward())  # type: ignore[no-untyped-call]
    assert most < batch.targets * VOCABULARY * 4 / 2


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_an_exit_that_the_student_lacks_is_refused() -> None:
    student, teacher = pair()
    with pytest.raises(RecipeError, match="exits: there is none after block 4; the student has 3 blocks"):
        objective(student, teacher, FORWARD, OFA | {"exits": [2, 4]})


@pytest.mark.parametrize(
    "terms, sentence",
    [
        ([FORWARD, {"of": {"loss": "hidden"}, "exits": [1]}], "hidden reads hidden states, not predictions at exits"),
        ([FORWARD, OFA | {"layers": [1]}], "ofa reads predictions, which belong to no layer; leave layers out"),
        ([FORWARD, OFA | {"exits": [2, 1, 2]}], "exits 2, 1, 2 must be different numbers of blocks"),
        ([FORWARD, OFA | {"exits": [0]}], "exits 0 must be different numbers of blocks, from 1 on"),
        ([OFA, {"of": {"loss": "hidden"}}], "exits do not train the blocks after them; add a loss without"),
    ],
)
def test_impossible_exits_are_refused(terms: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        read_as(Distillation, {"version": 1, "losses": terms})


def test_a_model_that_ends_in_another_way_is_refused() -> None:
    student, teacher = tiny("llama"), tiny("llama")
    student.base_model.register_forward_hook(lambda _, inputs, output: type(output)(output[0] * 2))
    with pytest.raises(InputError, match="the path of a LlamaForCausalLM from its last block to its head is unknown"):
        objective(student, teacher, FORWARD, OFA)


def test_a_recipe_with_exits_reads_back_equal(tmp_path: Path) -> None:
    recipe = Distillation.model_validate({"losses": [FORWARD, OFA]})
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert read_as(Distillation, tmp_path / "recipe.yaml") == recipe and recipe.losses[1].exits == (1, 2)


def test_a_branch_starts_as_the_identity_and_has_the_gradient_of_a_matrix() -> None:
    """Beside whole logits of states that a matrix turns, by plain autograd."""
    student, teacher = pair()
    batch, weight = ragged(), 0.3 / 29
    plain, _ = objective(student, teacher, FORWARD, OFA)(batch, [0.0, weight])
    found = objective(student, teacher, FORWARD, OFA | {"branch": True})
    total, _ = found(batch, [0.0, weight])
    assert_close(total, plain, **EXACT)
    assert sorted(found.projections) == ["branch_1_behind_1", "branch_1_behind_2"]
    generator = torch.Generator().manual_seed(0)
    for branch in found.projections.values():
        branch.weight.data += 0.1 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
    matrices = [branch.weight.detach().clone().requires_grad_() for branch in found.projections.values()]
    wanted = teacher(batch.ids, use_cache=False).logits[batch.predicting]
    with states_between(student, [1, 2]) as states:
        student(batch.ids, use_cache=False)
    frozen = {name: value.detach() for name, value in student.model.norm.named_parameters()}
    expected, head = torch.zeros((), dtype=torch.float64), student.lm_head.weight.detach()
    for number, matrix in zip([1, 2], matrices, strict=True):
        turned = states[number][batch.predicting] @ matrix.T
        logits = torch.func.functional_call(student.model.norm, frozen, (turned,)) @ head.T
        loss = enhanced_cross_entropy(logits, wanted, batch.ids[batch.counted], 1.5)
        expected = expected + weight * loss / 2
    total, _ = found(batch, [0.0, weight])
    assert_close(total, expected, **EXACT)
    inside = list(student.model.layers.parameters())
    slopes = torch.autograd.grad(total, inside + list(found.projections.parameters()), materialize_grads=True)
    others = torch.autograd.grad(expected, inside + matrices, allow_unused=True, materialize_grads=True)
    for one, other in zip(slopes, others, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-9)  # the library's norms are float32


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([FORWARD, {"of": {"loss": "ofa"}, "branch": True}], "branch needs exits"),
        ([FORWARD, OFA | {"branch": True}], "add it"),
    ],
)
def test_branches_without_exits_or_rate_are_refused(losses: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_as(Distillation, {"version": 1, "losses": losses})
