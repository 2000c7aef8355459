"""Median scales are the medians of the latents' weights, which stay what they were; such a student trains."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress.distillation.parallel.launch import check_sharding
from llmcompress.distillation.run import distill
from llmcompress.distillation.student.low_rank import teacher_weights
from llmcompress.distillation.student.median_scales import median_scales
from llmcompress.distillation.student.model import relaxed_student
from llmcompress.errors import RecipeError
from llmcompress.evaluation.verify import verify
from llmcompress.recipe.distillation import Distillation
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.modules import compressed_linears
from llmcompress.weight.nodes import Bitmap, Dense, Grid, LowRank, RotatedInputs, Sum, Weight, Where
from llmcompress.weight.trainable.relax import Relaxation, RelaxedWeight, relax
from tests.builders import grid, seeded
from tests.distillation.miniature import cut_short, loaded, make, recipe, weight_files

RULES = [
    {"match": "*.q_proj", "steps": [{"method": "rtn", "bits": "ternary", "group_size": 16}]},
    {"match": "*.k_proj", "steps": [{"method": "rtn", "bits": 1}]},
    {"match": "*.down_proj", "steps": [{"method": "rtn", "bits": 3, "group_size": 16}]},
    {"match": "*", "steps": [{"method": "rotate"}, {"method": "rtn", "bits": "ternary", "group_size": 16}]},
]
MEDIAN = {"scales": "median", "latents": "teacher", "rates": {"codes": 2e-2}, "steps": 5, "evaluate_every": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("medians"), RULES)


def bitmap(seed: int) -> Bitmap:
    return Bitmap(torch.rand(6, 10, generator=seeded(seed)) < 0.3)


def plain(levels: int, group: int, one_row: bool = False, seed: int = 0) -> Grid:
    return grid((6, 10), levels, group, seed, symmetric=True, one_row=one_row)


LEFT = Bitmap(torch.arange(10).expand(6, 10) < 5)
SIGNS = torch.rand(10, generator=seeded(3)) < 0.5
EXPRESSIONS: dict[str, tuple[Weight, int]] = {  # and how many of its grids have scales that can follow
    "binary rows": (plain(2, 10), 1),
    "ternary groups, the last one shorter": (plain(3, 4), 1),
    "one row of scales": (plain(3, 5, one_row=True), 1),
    "beside salient values": (Where(bitmap(1), plain(16, 10), plain(2, 4)), 1),
    "inside and outside": (Where(bitmap(2), plain(2, 4), plain(3, 10, seed=1)), 2),
    "groups without a code": (Where(LEFT, Dense(torch.ones(6, 10)), plain(3, 2)), 1),
    "rotated": (RotatedInputs(plain(3, 4), SIGNS, 2), 1),
    "added": (Sum((plain(2, 5), plain(2, 5, seed=1))), 2),
    "four levels": (plain(4, 4), 0),
    "with zero points": (grid((6, 10), 2, 4, 0, symmetric=False), 0),
    "factors": (LowRank(grid((6, 2), 3, 2, 0, symmetric=True), grid((2, 10), 3, 4, 1, symmetric=True)), 0),
}
every = pytest.mark.parametrize("name", EXPRESSIONS)


def moved(w: Weight, spread: float = 0.6, seed: int = 0) -> RelaxedWeight:
    """`w` under training, its latents anywhere near where they start."""
    module = relax(w, Relaxation(frozenset({"codes", "scales"})))
    for name in module.levels:
        latent = module.get_parameter(name).data
        latent.add_(spread * torch.randn(latent.shape, generator=seeded(seed)))
    return module


def parts(w: Weight, path: str = "", shown: Tensor | None = None) -> dict[str, tuple[Grid, Tensor]]:
    """The grids of `w` that are no factors, by path, with the elements that they store."""
    everywhere = torch.ones(6, 10, dtype=torch.bool) if shown is None else shown
    match w:
        case Grid():
            return {path: (w, everywhere)}
        case Where(index, inside, outside):
            found = parts(inside, f"{path}inside_", everywhere & index.inside)
            return found | parts(outside, f"{path}outside_", everywhere & ~index.inside)
        case RotatedInputs(inner):
            return parts(inner, f"{path}inner_")
        case Sum(added):
            return {key: each for i, part in enumerate(added) for key, each in parts(part, f"{path}{i}_").items()}
    return {}


def weights(module: RelaxedWeight, path: str, form: Grid, shown: Tensor) -> dict[tuple[int, int], list[float]]:
    """Return the values that a grid's latents stand for, in float64, by row and group."""
    scale = module.get_parameter(path + "scale").detach().double().reshape(form.scale.shape)
    latents = iter(module.get_parameter(path + "codes").double().tolist())
    found = defaultdict(list)
    for row, column in torch.nonzero(shown).tolist():
        place = (row if len(scale) > 1 else 0, column // form.group_size)
        found[place].append(float(scale[place]) * (next(latents) - (form.levels - 1) / 2))
    return found


@every
def test_scales_are_the_medians_and_the_weights_stay(name: str) -> None:
    w, count = EXPRESSIONS[name]
    module = moved(w)
    scales = median_scales(w, module)
    assert len(scales) == count
    followed = {scale.path for scale in scales}
    grids = {path: each for path, each in parts(w).items() if path in followed}
    before = {path: weights(module, path, *each) for path, each in grids.items()}
    moves = tuple(f"{path}{leaf}" for path in followed for leaf in ("codes", "scale"))
    others = {key: value.clone() for key, value in module.named_parameters() if key not in moves}
    for scale in scales:
        scale.update()
    for path, (form, shown) in grids.items():
        after = weights(module, path, form, shown)
        found = module.get_parameter(path + "scale").detach().reshape(form.scale.shape)
        for place, sizes in before[path].items():
            middle = sorted(map(abs, sizes))[(len(sizes) - 1) // 2]
            level = float(found[place]) * (form.levels - 1) / 2
            assert level == pytest.approx(middle, rel=2**-11) and float(found[place]) == float(found[place].half())
            assert after[place] == pytest.approx(sizes, rel=1e-5, abs=1e-6)
        places = itertools.product(*map(range, found.shape))
        assert all(found[place] == form.scale[place] for place in places if place not in after)
    assert all(torch.equal(value, module.get_parameter(key)) for key, value in others.items())
    again = {key: value.clone() for key, value in module.named_parameters()}
    for scale in scales:
        scale.update()
    assert all(torch.equal(value, module.get_parameter(key)) for key, value in again.items())


@pytest.mark.parametrize("levels", [2, 3])
def test_neither_outliers_nor_confining_move_a_scale(levels: int) -> None:
    w = plain(levels, 5)
    found = []
    for outliers in (1.0, 1e3):
        module = moved(w)
        middle = (levels - 1) / 2
        latent = module.get_parameter("codes").data.view(6, 2, 5)
        away = latent - middle
        largest = away.abs() > away.abs().median(-1, keepdim=True).values
        latent.copy_(torch.where(largest, middle + outliers * away, latent))
        [scale] = median_scales(w, module)
        for _ in range(3):
            scale.update()
            module.settle()
            found.append(module.get_parameter("scale").clone())
    assert all(torch.equal(each, found[0]) for each in found)
    assert bool((found[0] != w.scale.float().flatten()).any()), "they did move, from what was stored to the medians"


def test_scales_that_follow_reach_weights_of_another_size() -> None:
    """Codes that train alone cannot: half as large a matrix needs half the scales."""
    w = plain(2, 5)
    size = w.scale.float().repeat_interleave(5, 1)
    target, lost = 0.5 * dense(w), []
    for follows in (False, True):
        module = relax(w, Relaxation(frozenset({"codes", "scales"})))
        scales = median_scales(w, module) if follows else ()
        optimizer = torch.optim.SGD([module.get_parameter("codes")], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            ((module.weight() - target) / size).square().sum().backward()
            optimizer.step()
            for scale in scales:
                scale.update()
            module.settle()
        lost.append(float(((dense(module.freeze()) - target) / size).square().mean()))
    assert lost[0] >= 0.06 and lost[1] < 0.01


def test_a_group_of_zeros_stays() -> None:
    """In a ternary grid whose scale is 0, and in one whose latents are all in the middle."""
    w = plain(3, 5)
    w.scale[0, 0] = 0
    module = moved(w)
    module.get_parameter("codes").data.view(6, 10)[1, :5] = 1.0
    [scale] = median_scales(w, module)
    scale.update()
    after = module.get_parameter("scale").reshape(6, 2)
    assert after[0, 0] == 0 and after[1, 0] == w.scale[1, 0] and bool((after[2:] != w.scale[2:]).all())
    assert all(torch.isfinite(value).all() for value in module.parameters())


def test_median_scales_keep_levels_and_layout() -> None:
    w = plain(3, 4)
    module = moved(w)
    for scale in median_scales(w, module):
        scale.update()
    module.settle()
    stored = module.freeze()
    assert torch.equal(dense(stored), module.weight()) and describe(stored) == describe(w)
    assert {k: v.numel() for k, v in encode(stored)[1].items()} == {k: v.numel() for k, v in encode(w)[1].items()}
    assert all(len(set(row.abs().tolist()) - {0.0}) <= 1 for row in dense(stored)[:, :4])


# --- in a run -------------------------------------------------------------------------------------------------------


def expressions(folder: Path) -> dict[str, Weight]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: layer.expression() for name, layer in compressed_linears(model).items() if "layers" in name}


def run(folders: Path, output: Path, **more: Any) -> Any:
    return distill(folders / "small", folders / "dense", recipe(folders, **MEDIAN | more), output)


@pytest.mark.slow
def test_a_student_with_median_scales_learns(folders: Path, tmp_path: Path) -> None:
    done = run(folders, tmp_path / "out", steps=10)
    distances = [row["kl"] for row in done.history]
    assert distances[-1] < 0.9 * distances[1]  # the first step sets the scales
    before, after = expressions(folders / "small"), expressions(tmp_path / "out")
    counted = 0
    for name, w in after.items():
        assert describe(w) == describe(before[name])
        [scale] = [value for key, value in encode(w)[1].items() if key.endswith("scale")]
        [was] = [value for key, value in encode(before[name])[1].items() if key.endswith("scale")]
        if "down_proj" in name:
            assert torch.equal(scale, was)  # eight levels, and rates has nothing for scales
        else:
            assert float((scale != was).float().mean()) > 0.9
            counted += scale.numel()
    assert done.trained["scales"] == counted
    assert verify(tmp_path / "out", text=folders / "text.txt", length=16).layers > 0


def test_other_scales_learn_at_their_rate(folders: Path, tmp_path: Path) -> None:
    student, teacher = loaded(folders)
    found = relaxed_student(student, {"codes": 0.1, "scales": 0.1}, teacher_weights(student, teacher), scales="median")
    grouped = [id(value) for group in found.groups() for value in group["params"]]
    for name, value in found.trained["scales"].items():
        assert (id(value) in grouped) == value.requires_grad == ("down_proj" in name)
    assert len(found.medians) == sum("down_proj" not in name for name in found.relaxed)


@pytest.mark.slow
def test_an_interrupted_run_resumes_exactly(folders: Path, tmp_path: Path) -> None:
    """With frozen codes, too, which stay codes while their scales move."""
    freezing = {"momentum": 0.4, "threshold": 0.3, "final_threshold": 0.3}
    more = {"rates": {"codes": 0.15}, "freezing": freezing, "save_every": 2}
    whole = run(folders, tmp_path / "whole", **more)
    asked = recipe(folders, **MEDIAN | more)
    cut_short(folders, asked, tmp_path / "cut", calls=4)
    again = distill(folders / "small", folders / "dense", asked, tmp_path / "cut")
    assert [row["kl"] for row in again.history] == [row["kl"] for row in whole.history]
    assert again.phases[0]["frozen"] == whole.phases[0]["frozen"] > 0
    assert weight_files(tmp_path / "whole") == weight_files(tmp_path / "cut")


@pytest.mark.slow
def test_blocks_have_median_scales_too(folders: Path, tmp_path: Path) -> None:
    phase = {"kind": "blockwise", "steps": 8, "evaluate_every": 2, "rates": {"codes": 3e-2}}
    asked = recipe(folders, phases=[phase | {"scales": "median", "latents": "teacher"}])
    done = distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    blocks = done.phases[0]["blocks"].values()
    before, after = expressions(folders / "small"), expressions(tmp_path / "out")
    for path, block in zip(("model.layers.0.", "model.layers.1."), blocks, strict=True):
        for name in (name for name in after if name.startswith(path) and "down_proj" not in name):
            pair = [
                next(value for key, value in encode(one[name])[1].items() if key.endswith("scale"))
                for one in (before, after)
            ]
            assert torch.equal(*pair) == (block["step"] == 0), name
    assert json.loads((tmp_path / "out" / "distillation.json").read_text())["trained"]["scales"] > 0


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"latents": "codes"}, "scales: median needs latents that are weights.*set latents: teacher"),
        ({"rates": {"norms": 1e-3}}, "scales: median needs codes that train, and rates has none for them"),
        ({"estimator": "biper"}, "scales: median does not go with estimator: biper"),
        ({"scales": "mean"}, 'scales is "mean"; it must be "learned" or "median"'),
    ],
)
def test_impossible_medians_are_refused(more: dict[str, Any], sentence: str, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        run(folders, tmp_path / "out", **more)


def test_a_student_without_such_grids_is_refused(folders: Path, tmp_path: Path) -> None:
    other = make(tmp_path, [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}])
    with pytest.raises(RecipeError, match="scales: median is of symmetric grids with two or three levels"):
        run(other, tmp_path / "out")


def test_groups_are_not_shared_out() -> None:
    recipe = Distillation(rates={"codes": 1e-2}, latents="teacher", scales="median")
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    accelerator: Any = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
    with pytest.raises(RecipeError, match="scales: median requires whole groups of latents, which shares would split"):
        check_sharding(accelerator, recipe)
