"""Students of another width: linears between hidden states, exactly how they enter the gradient, and where they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from llmcompress.data.batch import Batch
from llmcompress.distillation.objective.hidden_states import StateMatching
from llmcompress.distillation.run import distill
from llmcompress.distillation.student.model import relaxed_student
from llmcompress.errors import RecipeError
from llmcompress.recipe.distillation import Distillation, Term
from llmcompress.recipe.read import dump, read_as
from tests.distillation.miniature import TEXT, Cut
from tests.distillation.test_batches import gradient, objective_of, ragged
from tests.distillation.test_dense_students import asked, tensors
from tests.tiny import save_tiny, tiny

FORWARD = {"of": {"loss": "forward_kl"}}
HIDDEN = {"of": {"loss": "hidden"}, "weight": 0.5, "layers": [[1, 2], [2, 3]]}
EXITS = {"of": {"loss": "ofa"}, "exits": [1, 2], "branch": True, "weight": 0.1}
RATES = {"weights": 2e-2, "norms": 1e-2, "projections": 2e-2}
IDS = torch.arange(36).reshape(3, 12) * 7 % 256


def pair(width: int = 16) -> tuple[Any, Any]:
    """A student of three blocks and a teacher of four, not made from each other, in float64."""
    student = tiny("llama", seed=1, num_hidden_layers=3, hidden_size=width).double()
    return student, tiny("llama", num_hidden_layers=4).double().requires_grad_(False)


def objective(student: Any, teacher: Any, *terms: dict[str, Any]) -> Any:
    """As a training has it."""
    return objective_of(student, teacher, [(Term.model_validate(term), None) for term in terms])


def slow_hidden(student: Any, teacher: Any, matrices: dict[tuple[int, int], Tensor]) -> Tensor:
    """A position at a time, from the states that the library itself returns; the last position predicts nothing."""
    given, wanted = (
        model(IDS, output_hidden_states=True, use_cache=False).hidden_states for model in (student, teacher)
    )
    errors = [
        (matrix @ given[mine][n, t] - wanted[theirs][n, t]).square().sum() / wanted[theirs][n, t].square().sum()
        for (mine, theirs), matrix in matrices.items()
        for n in range(3)
        for t in range(11)
    ]
    return torch.stack(errors).mean()


@pytest.mark.parametrize("width", [16, 48])
def test_the_gradient_goes_through_the_projection_and_to_it(width: int) -> None:
    student, teacher = pair(width)
    found = objective(student, teacher, FORWARD, HIDDEN)
    total, rows = found(Batch.of(IDS), [0.0, 0.5 / 33])
    assert {name: tuple(value.shape) for name, value in found.projections.named_parameters()} == {
        "projection_1_to_2.weight": (32, width),
        "projection_2_to_3.weight": (32, width),
    }
    matrices = [linear.weight.detach().clone().requires_grad_() for linear in found.projections.values()]
    expected = slow_hidden(student, teacher, dict(zip([(1, 2), (2, 3)], matrices, strict=True)))
    assert_close(total, 0.5 * expected, rtol=1e-10, atol=0)
    assert_close(rows[1, 0] / rows[1, 1], expected.detach(), rtol=1e-10, atol=0)
    inside = list(student.model.layers.parameters())
    slopes = torch.autograd.grad(total, inside + list(found.projections.parameters()), materialize_grads=True)
    wanted = torch.autograd.grad(0.5 * expected, inside + matrices, allow_unused=True, materialize_grads=True)
    for one, other in zip(slopes, wanted, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-9)  # the library's norms are float32


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_add_up_to_one_batch(size: int) -> None:
    student, teacher = pair()
    found, batch = objective(student, teacher, FORWARD, HIDDEN, EXITS), ragged()
    whole, parts = (gradient(found, batch.chunks(n), batch.targets) for n in (len(batch), size))
    assert_close(parts[0], whole[0], rtol=1e-10, atol=0)
    assert_close(parts[1], whole[1], rtol=0, atol=1e-10)


def test_equal_widths_need_no_projection() -> None:
    student, teacher = pair(width=32)
    assert not StateMatching.of(student, teacher, [Term.model_validate(HIDDEN)]).projections


def test_relations_see_the_states_themselves() -> None:
    """Beside a loss that compares the same blocks through a linear."""
    student, teacher = pair()
    relations = {"of": {"loss": "minilm", "relation_heads": 4}, "layers": [[1, 2]]}
    rows = [
        objective(student, teacher, FORWARD, *terms)(Batch.of(IDS), [1.0] * (len(terms) + 1))[1]
        for terms in ([relations], [HIDDEN, relations])
    ]
    assert torch.equal(rows[0][-1], rows[1][-1])


@pytest.mark.parametrize("width", [16, 48])
def test_a_projection_starts_without_stretching_and_from_the_seed_alone(width: int) -> None:
    narrow, teacher = tiny("llama", hidden_size=width), tiny("llama")
    terms = [Term.model_validate({"of": {"loss": "hidden"}})]
    before = torch.get_rng_state()
    one, again, other = (
        StateMatching.of(narrow, teacher, terms, seed).projections["projection_1_to_1"] for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    [matrix], [same], [another] = (list(linear.parameters()) for linear in (one, again, other))
    assert matrix.dtype == torch.float32 and torch.equal(matrix, same) and not torch.equal(matrix, another)
    columns = matrix.data if width < 32 else matrix.data.T
    assert_close(columns.T @ columns, torch.eye(min(width, 32)), rtol=0, atol=1e-5)


# --- in a training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` teacher of four blocks, a student of three that are `narrow`, and a text."""
    place = tmp_path_factory.mktemp("projection")
    save_tiny("llama", place / "dense", num_hidden_layers=4)
    save_tiny("llama", place / "narrow", seed=1, num_hidden_layers=3, hidden_size=16)
    (place / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return place


@pytest.mark.slow
def test_a_narrower_student_learns_and_a_cut_run_ends_as_a_whole_one(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The linears are in the run's state, with their moments, and not in the folder."""
    recipe = asked(place, steps=12, losses=[FORWARD, HIDDEN, EXITS], rates=RATES, save_every=5)
    whole = distill(place / "narrow", place / "dense", recipe, tmp_path / "whole")
    assert whole.history[-1]["kl"] < 0.95 * whole.history[0]["kl"]
    assert whole.trained["projections"] == 2 * 16 * 32 + 2 * 16 * 16
    assert not any("to train" in message for message in caplog.messages)
    before, after = tensors(place / "narrow"), tensors(tmp_path / "whole")
    assert {name: (value.dtype, value.shape) for name, value in before.items()} == {
        name: (value.dtype, value.shape) for name, value in after.items()
    }
    for name in ("config.json", "generation_config.json"):
        assert (place / "narrow" / name).read_text() == (tmp_path / "whole" / name).read_text()

    def cut(step: int, *_: Any) -> None:
        if step == 7:
            raise Cut

    with pytest.raises(Cut):
        distill(place / "narrow", place / "dense", recipe, tmp_path / "cut", progress=cut)
    [state] = [load_file(path) for path in (tmp_path / "cut.training").glob("*.safetensors")]
    for kind in ("value", "exp_avg", "exp_avg_sq", "step"):
        names = ("projection_1_to_2", "projection_2_to_3", "branch_2_behind_1", "branch_2_behind_2")
        assert {f"{kind}.{name}.weight" for name in names} <= state.keys()
    projections = StateMatching.of(
        tiny("llama", num_hidden_layers=3, hidden_size=16),
        tiny("llama", num_hidden_layers=4),
        [Term.model_validate(HIDDEN)],
    ).projections
    first = projections.get_parameter("projection_1_to_2.weight").detach()
    assert (state["value.projection_1_to_2.weight"] - first).norm() > 1e-3 * first.norm()
    assert (state["value.branch_2_behind_1.weight"] - torch.eye(16)).norm() > 1e-3
    distill(place / "narrow", place / "dense", recipe, tmp_path / "cut")
    again = tensors(tmp_path / "cut")
    assert all(torch.equal(value, again[name]) for name, value in after.items())
    rows = [
        [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in text.splitlines()]
        for text in ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut"))
    ]
    assert rows[0] == rows[1]
    compared = [row["terms"]["hidden"] for row in rows[0] if "terms" in row]
    assert compared[-1] < 0.9 * compared[0]


@pytest.mark.slow
def test_predictions_alone_teach_a_narrower_student(place: Path, tmp_path: Path) -> None:
    losses = [FORWARD, {"of": {"loss": "forward_kl"}, "exits": [1, 3]}]
    cached = {"kind": "cached", "k": 300}
    found = [
        distill(
            place / "narrow",
            place / "dense",
            asked(place, steps=16, losses=losses, evaluate_every=16, **more),
            tmp_path / str(number),
        ).history
        for number, more in enumerate([{}, {"teacher": cached}, {"checkpointing": True}])
    ]
    online, offline, again = ([row["kl"] for row in history] for history in found)
    assert online[-1] < 0.9 * online[0]
    assert offline == pytest.approx(online, rel=1e-3) and again == pytest.approx(online, rel=1e-6)


def test_a_projection_needs_a_rate(place: Path, tmp_path: Path) -> None:
    recipe = asked(place, losses=[FORWARD, HIDDEN])
    with pytest.raises(RecipeError, match=r"as in rates: {projections: 1.0e-3}, or use the loss minilm"):
        distill(place / "narrow", place / "dense", recipe, tmp_path / "out")
    with pytest.raises(RecipeError, match="the student has no projections to train"):
        relaxed_student(tiny("llama"), {"projections": 1e-3})


@pytest.mark.parametrize(
    "layers, sentence",
    [
        (
            None,
            r"the student has 3 blocks, the teacher 4.*or name pairs of blocks in layers, as in layers: \[\[1, 2\]\]",
        ),
        ([1, [2, 3]], "the student has 3 blocks, the teacher 4"),
        ([[1, 4]], r"layers: \[1, 4\] .* the teacher has no block 4; its last is 3"),
        ([[3, 1]], r"layers: \[3, 1\] .* the student has no block 3; its last is 2"),
        ([[1, -1]], r"a layer is a block of the teacher such as 5, or a pair of blocks such as \[2, 5\]"),
        ([[1, 2, 3]], r"a layer is a block of the teacher"),
        (["two"], r"a layer is a block of the teacher"),
    ],
)
def test_impossible_pairs_are_refused(layers: Any, sentence: str, place: Path, tmp_path: Path) -> None:
    recipe = asked(place, losses=[FORWARD, {"of": {"loss": "hidden"}, "layers": layers}], rates=RATES)
    with pytest.raises(RecipeError, match=sentence):
        distill(place / "narrow", place / "dense", recipe, tmp_path / "out")


def test_a_recipe_with_pairs_reads_back_equal(tmp_path: Path) -> None:
    recipe = Distillation.model_validate({"losses": [FORWARD, HIDDEN, EXITS], "rates": RATES})
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert read_as(Distillation, tmp_path / "recipe.yaml") == recipe
    assert recipe.losses[1].layers == ((1, 2), (2, 3))
