"""Losses on hidden states in a training: which states are compared, exactly how they enter the objective, schedules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmcompress as lc
from llmcompress.data.batch import Batch
from llmcompress.distillation import setup
from llmcompress.distillation.objective.hidden_states import StateMatching
from llmcompress.distillation.objective.objective import Objective
from llmcompress.distillation.run import distill
from llmcompress.distillation.student.low_rank import teacher_weights
from llmcompress.distillation.student.model import relaxed_student
from llmcompress.distillation.teacher.predictions import OnlineTeacher
from llmcompress.errors import RecipeError
from llmcompress.models.dense.blocks import KEPT, matched_blocks
from llmcompress.recipe.distillation import Distillation, Schedule, Term
from llmcompress.recipe.read import dump, read_as
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import compressed_linears
from tests.distillation.miniature import TEXT, Cut
from tests.distillation.test_batches import objective_of
from tests.distillation.test_dense_students import asked, tensors
from tests.tiers import tiered_nightly
from tests.tiny import save_tiny, tiny

HIDDEN = {"of": {"loss": "hidden"}, "weight": 0.5}
IDS = torch.arange(36).reshape(3, 12) * 7 % 256


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of four blocks, a `short` one without the third, and a text."""
    place = tmp_path_factory.mktemp("matching")
    save_tiny("llama", place / "dense", num_hidden_layers=4, tie_word_embeddings=True)
    lc.drop_blocks(place / "dense", [2], place / "short")
    (place / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return place


def pair() -> tuple[Any, Any]:
    """A student of the teacher's blocks 0, 1 and 3, a little astray, and the teacher, in float64."""
    teacher, student = (tiny("llama", num_hidden_layers=4).double() for _ in range(2))
    del student.model.layers[2]
    student.config.num_hidden_layers = 3
    setattr(student.config, KEPT, [0, 1, 3])
    generator = torch.Generator().manual_seed(1)
    for value in student.model.layers.parameters():
        value.data += 0.01 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return student, teacher.requires_grad_(False)


def objective(student: Any, teacher: Any, *terms: dict[str, Any]) -> Objective:
    """As a training has it."""
    return objective_of(student, teacher, [(term, term.of.start()) for term in map(Term.model_validate, terms)])


def gradients(total: Tensor, model: Any) -> list[Tensor]:
    """With respect to the blocks."""
    return list(torch.autograd.grad(total, list(model.model.layers.parameters())))


def slow_hidden(student: Any, teacher: Any, pairs: list[tuple[int, int]]) -> Tensor:
    """A position at a time, from the states that the library itself returns; the last position predicts nothing."""
    given, wanted = (
        model(IDS, output_hidden_states=True, use_cache=False).hidden_states for model in (student, teacher)
    )
    errors = [
        (given[mine][n, t] - wanted[theirs][n, t]).square().sum() / wanted[theirs][n, t].square().sum()
        for mine, theirs in pairs
        for n in range(3)
        for t in range(11)
    ]
    return torch.stack(errors).mean()


def slow_kl(student: Any, teacher: Any) -> Tensor:
    """Mean over the tokens that are predicted."""
    q, p = (model(IDS, use_cache=False).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("layers, pairs", [(None, [(1, 1), (2, 3)]), ([3], [(2, 3)]), ([0, 3], [(0, 0), (2, 3)])])
def test_the_objective_is_the_weighted_sum_of_its_losses(layers: Any, pairs: list[tuple[int, int]]) -> None:
    student, teacher = pair()
    found = objective(student, teacher, HIDDEN | {"layers": layers}, {"of": {"loss": "forward_kl"}})
    total, rows = found(Batch.of(IDS), [0.5 / 33, 2 / 33])
    hidden, kl = slow_hidden(student, teacher, pairs), slow_kl(student, teacher)
    torch.testing.assert_close(total, 0.5 * hidden + 2 * kl, rtol=1e-9, atol=0)
    torch.testing.assert_close(rows[:, 0] / rows[:, 1], torch.stack([hidden, kl]).detach(), rtol=1e-9, atol=0)
    assert rows[:, 1].tolist() == [33, 33]
    for one, other in zip(gradients(total, student), gradients(0.5 * hidden + 2 * kl, student)):
        assert (one - other).norm() < 1e-5 * other.norm()  # the library's norms are float32


def test_recomputed_activations_change_nothing() -> None:
    """The states may come from a block's first run or from its second."""
    student, teacher = pair()
    found = objective(student, teacher, HIDDEN, {"of": {"loss": "forward_kl"}})
    expected = gradients(found(Batch.of(IDS), [1 / 33, 1 / 33])[0], student)
    student.train().gradient_checkpointing_enable({"use_reentrant": False})
    again: list[int] = []
    handle = student.model.layers[1].input_layernorm.register_forward_hook(lambda *_: again.append(1))
    total = found(Batch.of(IDS), [1 / 33, 1 / 33])[0]
    for one, other in zip(gradients(total, student), expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    handle.remove()
    assert len(again) == 2


@pytest.mark.parametrize("layers", tiered_nightly([[1], [0, 1], [[2, 1]]], [[2, 1]].__eq__))
def test_a_teacher_of_early_states_alone_runs_no_further(layers: Any, place: Path, tmp_path: Path) -> None:
    """Not one of its blocks from the last compared state on, and the student learns what it learns otherwise."""
    early = {"of": {"loss": "hidden"}, "layers": layers}
    recipe = asked(place, losses=[{"of": {"loss": "cross_entropy"}}, early], steps=3)
    chosen, found = setup.choose_source, {}
    for name, source in {"short": chosen, "whole": lambda *models: OnlineTeacher(models[-1])}.items():
        ran: list[int] = []

        def counted(*models: Any, source: Any = source, ran: list[int] = ran) -> Any:
            for number, block in enumerate(models[-1].model.layers):
                block.register_forward_hook(lambda *_, number=number: ran.append(number))
            return source(*models)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(setup, "choose_source", counted)
            done = distill(place / "short", place / "dense", recipe, tmp_path / name)
        found[name] = [row["kl"] for row in done.history], [ran.count(block) for block in range(4)]
    [kls, counts], [same, all_of_it] = found["short"], found["whole"]
    assert kls == same and len(set(all_of_it)) == 1
    assert counts[0] == all_of_it[0] > counts[1] == counts[2] == counts[3]  # which looks at held-out text run


def test_a_teacher_gets_no_gradient() -> None:
    student, teacher = pair()
    teacher.requires_grad_(True)
    found = objective(student, teacher, HIDDEN, {"of": {"loss": "minilm", "relation_heads": 4}}, {"of": {"loss": "js"}})
    found(Batch.of(IDS), [1.0, 1.0, 1.0])[0].backward()
    assert all(value.grad is None for value in teacher.parameters())
    assert all(value.grad is not None for value in student.model.layers.parameters())


@pytest.mark.parametrize(
    "term",
    [
        pytest.param(HIDDEN | {"layers": [1, 3]}, id="token"),
        pytest.param({"of": {"loss": "hidden", "per": "layer"}, "layers": [3]}, id="layer", marks=pytest.mark.slow),
        pytest.param(
            {"of": {"loss": "minilm", "relation_heads": 4}, "layers": [3]}, id="minilm", marks=pytest.mark.slow
        ),
    ],
)
def test_the_gradient_does_not_depend_on_micro_batches(term: dict[str, Any], place: Path, tmp_path: Path) -> None:
    losses = [{"of": {"loss": "forward_kl"}}, term]
    results = [
        distill(
            place / "short",
            place / "dense",
            asked(place, steps=2, micro_batch=size, losses=losses),
            tmp_path / str(size),
        ).history[-1]
        for size in (1, 4)
    ]
    assert math.isclose(results[0]["loss"], results[1]["loss"], rel_tol=1e-5)
    assert math.isclose(results[0]["kl"], results[1]["kl"], rel_tol=1e-4)


@pytest.mark.slow
def test_hidden_states_and_predictions_recover_a_shortened_model(place: Path, tmp_path: Path) -> None:
    """Interrupted in the middle, it ends as a whole run: a schedule is a function of the step."""
    schedule = {"from": 1.0, "to": 0.0, "until": 0.5}
    losses = [{"of": {"loss": "forward_kl"}}, {"of": {"loss": "hidden"}, "weight": schedule, "layers": [1, 3]}]
    recipe = asked(place, steps=10, losses=losses, save_every=4)
    done = distill(place / "short", place / "dense", recipe, tmp_path / "whole")
    assert done.history[-1]["kl"] < 0.7 * done.history[0]["kl"]

    def cut(step: int, *_: Any) -> None:
        if step == 6:
            raise Cut

    with pytest.raises(Cut):
        distill(place / "short", place / "dense", recipe, tmp_path / "cut", progress=cut)
    distill(place / "short", place / "dense", recipe, tmp_path / "cut")
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())[KEPT] == [0, 1, 3]


# --- schedules --------------------------------------------------------------------------------------------------------


def test_scheduled_weights_are_linear_then_constant() -> None:
    falling = Term.model_validate({"of": {"loss": "forward_kl"}, "weight": {"from": 1.0, "to": 0.2, "until": 0.5}})
    found = [falling.weight_at(step, 8) for step in range(8)]
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2])
    assert [Term.model_validate({"of": {"loss": "forward_kl"}, "weight": 3}).weight_at(n, 8) for n in (0, 7)] == [3, 3]
    assert isinstance(falling.weight, Schedule)


def test_a_recipe_with_schedules_and_layers_reads_back_equal(tmp_path: Path) -> None:
    terms = [{"of": {"loss": "forward_kl"}, "weight": {"from": 0, "to": 1}}, HIDDEN | {"layers": [2, 5]}]
    recipe = Distillation.model_validate({"losses": terms})
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert read_as(Distillation, tmp_path / "recipe.yaml") == recipe and "from: 0.0" in dump(recipe)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "terms, sentence",
    [
        ([HIDDEN], "hidden states alone teach no predictions"),
        ([{"of": {"loss": "forward_kl"}, "layers": [1]}], "forward_kl reads predictions.*leave layers out"),
        ([{"of": {"loss": "forward_kl"}}, {"of": {"loss": "hidden", "per": "layer"}}], "name it in layers"),
        ([{"of": {"loss": "forward_kl"}}, {"of": {"loss": "hiden"}}], "did you mean 'hidden'"),
        ([{"of": {"loss": "forward_kl"}, "weight": {"from": 1.0}}], "a map such as {from: 1.0"),
        ([{"of": {"loss": "forward_kl"}, "weight": 0}], "weight is 0; it must be a number above 0"),
        (
            [{"of": {"loss": "forward_kl"}}, HIDDEN | {"layers": [2]}],
            "not have the teacher's block 2; it has 0, 1, 3",
        ),
        ([{"of": {"loss": "forward_kl"}}, HIDDEN | {"layers": [9]}], "not have the teacher's block 9"),
    ],
)
def test_impossible_losses_are_refused(terms: Any, sentence: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        distill(place / "short", place / "dense", asked(place, losses=terms), tmp_path / "out")


def test_blocks_are_matched_by_their_original_numbers() -> None:
    student, teacher = pair()
    assert matched_blocks(student, teacher) == {0: 0, 1: 1, 2: 3}
    assert matched_blocks(teacher, teacher) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert matched_blocks(student, student) == {0: 0, 1: 1, 2: 2}
    setattr(student.config, KEPT, [0, 3])
    with pytest.raises(RecipeError, match="has 2 blocks for its 3"):
        matched_blocks(student, teacher)
    delattr(student.config, KEPT)
    with pytest.raises(RecipeError, match="the student has 3 blocks, the teacher 4.*drop blocks with"):
        matched_blocks(student, teacher)
    setattr(student.config, KEPT, [0, 1, 7])
    with pytest.raises(RecipeError, match="of which the teacher lacks 7"):
        matched_blocks(student, teacher)


def test_relations_are_compared_at_any_width() -> None:
    narrow, teacher = tiny("llama", hidden_size=16), tiny("llama")
    relations = Term.model_validate({"of": {"loss": "minilm", "relation_heads": 4}})
    found = StateMatching.of(narrow, teacher, [relations])
    assert found.pairs == {0: ((1, 1),)} and not found.projections


def test_latents_start_at_the_blocks_that_the_student_kept(place: Path, tmp_path: Path) -> None:
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 8, "group_size": 16}]}]
    student = lc.compress(place / "short", {"version": 1, "rules": rules}, tmp_path / "small").model
    teacher = tiny("llama", num_hidden_layers=4, tie_word_embeddings=True)
    stored = {name: dense(layer.expression()) for name, layer in compressed_linears(student).items()}
    found = relaxed_student(student, {"codes": 1e-3}, teacher_weights(student, teacher))
    name = "model.layers.2.mlp.up_proj"
    grid = found.relaxed[name].relaxed
    [latents] = [value for key, value in grid.named_parameters() if "codes" in key]
    away = (latents - latents.round()).abs()
    inside = float((away < 0.49).float().mean())
    assert inside > 0.95  # block 3 of the teacher lies in the cells; of block 2 most numbers would be at their edges
    torch.testing.assert_close(stored[name], teacher.model.layers[3].mlp.up_proj.weight, rtol=0, atol=2e-2)
