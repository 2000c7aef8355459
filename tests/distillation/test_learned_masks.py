"""Masks that learn: scores in every step, as many weights as before, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.distillation.run import distill
from llmcompress.distillation.student.learned_masks import LearnedMask, learned_masks
from llmcompress.errors import RecipeError
from llmcompress.recipe.sections import RANK
from llmcompress.weight.nodes import Bitmap, Dense, Pattern
from llmcompress.weight.trainable.relax import Relaxation, relax
from tests.distillation.miniature import cut_short, make, recipe, weights_bytes
from tests.distillation.test_regrow import RATES, RULES, masks_of

LEARNED = {"start": "teacher", "by": "learned", "match": "*.mlp.*"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("moving"), RULES)


def masks() -> dict[str, Bitmap | Pattern]:
    """A mask with 71 of 12 x 16 weights, and one in 2:4."""
    some = torch.zeros(12 * 16, dtype=torch.bool).index_fill(0, torch.arange(71), True).view(12, 16)
    return {"bitmap": Bitmap(some), "pattern": Pattern(torch.arange(16).remainder(4).lt(2).expand(12, 16), 2, 4)}


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def best(mask: Bitmap | Pattern, scores: Tensor) -> Tensor:
    """The mask of the best scores, by sorting in float64."""
    scores = scores.double()
    if isinstance(mask, Bitmap):
        order = scores.reshape(-1).argsort(descending=True)[: int(mask.inside.sum())]
        return torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, order, True).view(scores.shape)
    groups = scores.view(len(scores), -1, mask.group)
    order = groups.argsort(dim=2, descending=True)[..., : mask.keep]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(2, order, True).view(scores.shape)


@pytest.mark.parametrize("which", ["bitmap", "pattern"])
def test_a_learned_mask_starts_as_that_of_sizes_and_inputs(which: str) -> None:
    mask, values, norms = masks()[which], numbers(12, 16), numbers(16, seed=1).square() + 0.1
    module = relax(
        Dense(values), Relaxation(frozenset({"values"}), values=learned_masks({"x": mask}, {"x": norms}, 3)["x"])
    )
    wanted = best(mask, values.abs() * norms.sqrt())
    assert torch.equal(module.weight().detach(), values * wanted)
    frozen = module.freeze()
    assert isinstance(frozen, Dense) and torch.equal(frozen.values, values * wanted)
    kinds = module.kinds()
    assert {name.rpartition(".")[2]: kind for name, kind in kinds.items()} == {
        "values": "values",
        **dict.fromkeys(("left", "right", "rows", "columns"), "masks"),
    }


@pytest.mark.parametrize("which", ["bitmap", "pattern"])
def test_gradient_of_a_score_is_weight_times_gradient(which: str) -> None:
    """Gradients against their closed form in float64, and the mask against sorted scores, after scores have moved."""
    mask, values, norms = masks()[which], numbers(12, 16), numbers(16, seed=1).square() + 0.1
    module = LearnedMask(values.reshape(-1).clone(), mask=mask, norms=norms, rank=3)
    with torch.no_grad():
        for seed, parameter in enumerate((module.right, module.rows, module.columns), start=2):
            parameter.copy_(numbers(*parameter.shape, seed=seed))
    learned = module.left @ module.right + module.rows + module.columns
    inside = best(mask, values.abs() * norms.sqrt() / module.unit + learned.detach())
    found = module()
    assert torch.equal(found.detach().view(12, 16), values * inside)
    assert not torch.equal(inside, best(mask, values.abs() * norms.sqrt()))
    above = numbers(12, 16, seed=9)
    (found.view(12, 16) * above).sum().backward()
    scores = (above * values).double()
    wanted = {
        "values": (above * inside).reshape(-1),
        "left": scores @ module.right.detach().double().T,
        "right": module.left.detach().double().T @ scores,
        "rows": scores.sum(1, keepdim=True),
        "columns": scores.sum(0),
    }
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad.double(), wanted[name].double(), rtol=1e-4, atol=1e-5), name


def test_scores_of_a_real_matrix_are_few() -> None:
    """Under 2 % of the weights of the embedded model's matrices, at the default rank."""
    for out, width in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
        mask = Bitmap(torch.ones(out, width, dtype=torch.bool))
        built = learned_masks({"x": mask}, {"x": torch.ones(width)}, RANK)["x"](torch.ones(out * width))
        learning = sum(value.numel() for name, value in built.named_parameters() if name != "values")
        assert learning < (0.02 if out >= 576 and width >= 576 else 0.035) * out * width


@pytest.mark.parametrize("more", [LEARNED, pytest.param({**LEARNED, "rank": 1}, marks=pytest.mark.slow)])
def test_masks_change_and_no_byte_is_added(more: dict[str, Any], folders: Path, tmp_path: Path) -> None:
    settings = recipe(folders, rates={**RATES, "masks": 5e-2}, regrow=more, steps=6)
    found = distill(folders / "small", folders / "dense", settings, tmp_path / "out")
    assert 0 < found.phases[0]["regrown"] < 0.9
    assert weights_bytes(tmp_path / "out") == weights_bytes(folders / "small")
    for name, mask in masks_of(tmp_path / "out").items():
        before = masks_of(folders / "small")[name]
        assert torch.equal(mask, before) == ("mlp" not in name)
        assert int(mask.sum()) == int(before.sum())
    assert found.trained["masks"] > 0
    assert found.history[-1]["kl"] == pytest.approx(found.history[-2]["kl"], rel=1e-3)  # it trained as it is kept


@pytest.mark.slow
def test_masks_may_learn_while_values_stay(folders: Path, tmp_path: Path) -> None:
    settings = recipe(folders, rates={"masks": 5e-2}, regrow=LEARNED, steps=4)
    found = distill(folders / "small", folders / "dense", settings, tmp_path / "out")
    assert set(found.trained) == {"masks"} and found.phases[0]["regrown"] > 0


@pytest.mark.slow
def test_a_run_that_was_cut_while_masks_learned_ends_as_a_whole_one(folders: Path, tmp_path: Path) -> None:
    settings = recipe(folders, rates={**RATES, "masks": 5e-2}, regrow=LEARNED, steps=4, save_every=1)
    distill(folders / "small", folders / "dense", settings, tmp_path / "whole")
    cut_short(folders, settings, tmp_path / "cut", 2)
    distill(folders / "small", folders / "dense", settings, tmp_path / "cut")
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"regrow": {"by": "learned"}}, "set start to teacher"),
        ({"regrow": {"rank": 4}}, "rank is of learned scores, and by is input_norms"),
        ({"regrow": LEARNED, "rates": RATES}, "regrow learns masks, and rates has none for them"),
        (
            {"phases": [{"kind": "blockwise", "regrow": LEARNED}]},
            "masks learn end to end",
        ),
    ],
)
def test_impossible_learned_masks_are_refused(
    more: dict[str, Any], sentence: str, folders: Path, tmp_path: Path
) -> None:
    rates = {"rates": {**RATES, "masks": 1e-2}}
    with pytest.raises(RecipeError, match=sentence):
        distill(folders / "small", folders / "dense", recipe(folders, **rates | more), tmp_path / "out")
