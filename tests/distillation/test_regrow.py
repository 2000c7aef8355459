"""Pruned matrices that train dense: as many weights as before, where they count most, and nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmcompress.data.batch import Batch
from llmcompress.data.distillation import Data
from llmcompress.distillation import phases
from llmcompress.distillation.phases import run_phases
from llmcompress.distillation.run import distill
from llmcompress.distillation.student.regrow import grow, input_norms, prune_again, regrown_share
from llmcompress.errors import RecipeError
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import read_as
from llmcompress.recipe.sections import Regrowth
from llmcompress.weight.modules import CompressedLinear, compressed_linears
from llmcompress.weight.nodes import Bitmap, Dense, Pattern, Where, shape
from tests.distillation.miniature import cut_short, loaded, make, recipe, weights_bytes

RULES = [
    {"match": "*.mlp.*", "steps": [{"method": "wanda", "pattern": "2:4"}]},
    {"match": "*.q_proj", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]},
    {"match": "*", "steps": [{"method": "sparsegpt", "sparsity": 0.6}]},
]
RATES = {"values": 5e-2, "norms": 5e-3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("regrow"), RULES)


def masks_of(folder: Path) -> dict[str, Tensor]:
    """The weights that a checkpoint's pruned linears store, bool `[out, in]` by name."""
    found = {}
    for name, layer in compressed_linears(AutoModelForCausalLM.from_pretrained(folder)).items():
        if isinstance(where := layer.expression(), Where):
            found[name] = where.index.inside
    return found


@pytest.mark.parametrize("by", ["input_norms", "magnitude"])
def test_growing_at_zero_without_training_keeps_the_bytes(by: Any, folders: Path) -> None:
    student, teacher = loaded(folders)
    before = {name: layer.get_parameter("weight").clone() for name, layer in compressed_linears(student).items()}
    masks = grow(student, Regrowth(by=by), lambda: teacher)
    assert len(masks) == 2 * 6 and not any("q_proj" in name or "lm_head" in name for name in masks)
    grown = compressed_linears(student)
    assert all(isinstance(grown[name].expression(), Dense) for name in masks)
    norms = input_norms(student, masks, tokens(), torch.no_grad) if by == "input_norms" else None
    after = prune_again(grown, masks, norms)
    assert all(torch.equal(layer.get_parameter("weight"), before[name]) for name, layer in after.items())
    assert regrown_share(after, masks) == 0.0


def test_an_expert_that_no_token_reaches_goes_by_size_alone(folders: Path) -> None:
    student, teacher = loaded(folders)
    masks = grow(student, Regrowth(match=("*.o_proj",)), partial(pytest.fail, "the teacher was loaded"))
    mlp = compressed_linears(student)["model.layers.0.mlp.down_proj"]
    idle = {**masks, "model.layers.0.mlp.down_proj": next(iter(masks.values()))}
    student.get_submodule("model.layers.0.mlp").forward = torch.zeros_like
    norms = input_norms(student, idle, tokens(), torch.no_grad)
    assert norms.keys() == idle.keys()
    assert torch.equal(norms["model.layers.0.mlp.down_proj"], torch.ones(shape(mlp.expression())[1]))
    assert all(bool((norms[name] > 0).all()) for name in masks)


def test_weights_that_come_back_may_start_at_the_teachers(folders: Path) -> None:
    student, teacher = loaded(folders)
    masks = grow(student, Regrowth(match=("*.o_proj",), start="teacher"), lambda: teacher)
    for name, mask in masks.items():
        wanted, given = teacher.get_submodule(name).get_parameter("weight"), student.get_submodule(name)
        assert isinstance(given, CompressedLinear)
        assert torch.equal(given.dequantize()[~mask.inside], wanted.to(torch.bfloat16).float()[~mask.inside])


def test_where_masks_learn_all_weights_start_at_the_teachers(folders: Path) -> None:
    student, teacher = loaded(folders)
    for name in grow(student, Regrowth(match=("*.o_proj",), start="teacher", by="learned"), lambda: teacher):
        wanted, given = teacher.get_submodule(name).get_parameter("weight"), student.get_submodule(name)
        assert isinstance(given, CompressedLinear) and torch.equal(
            given.dequantize(), wanted.to(torch.bfloat16).float()
        )


def test_the_weights_that_count_most_stay() -> None:
    """Against a sort in float64, unstructured and in a pattern."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(12, 16, generator=generator).to(torch.bfloat16)
    norms = torch.rand(16, generator=generator) * 10
    scores = values.double().square() * norms.double()
    layer = CompressedLinear.of(Dense(values))
    some = torch.zeros(12, 16, dtype=torch.bool).view(-1).index_fill(0, torch.arange(71), True).view(12, 16)
    first = torch.arange(16).remainder(4).lt(2).expand(12, 16)
    found = prune_again(
        {"a": layer, "b": layer}, {"a": Bitmap(some), "b": Pattern(first, 2, 4)}, dict.fromkeys("ab", norms)
    )
    by_size = sorted(range(12 * 16), key=lambda place: -float(scores.view(-1)[place]))
    wanted = set(by_size[:71])
    one, two = (found[name].expression() for name in "ab")
    assert isinstance(one, Where) and set(one.index.inside.view(-1).nonzero().view(-1).tolist()) == wanted
    assert isinstance(two, Where) and isinstance(two.index, Pattern)
    for row in range(12):
        for start in range(0, 16, 4):
            best = sorted(range(start, start + 4), key=lambda column: -float(scores[row, column]))[:2]
            assert set((two.index.inside[row, start : start + 4].nonzero().view(-1) + start).tolist()) == set(best)
    new = (one.index.inside & ~some).sum() + (two.index.inside & ~first).sum()
    assert regrown_share(found, {"a": Bitmap(some), "b": Pattern(first, 2, 4)}) == float(new) / (71 + 96)


@torch.no_grad()
def test_input_norms_equal_those_of_recorded_inputs(folders: Path) -> None:
    student, _ = loaded(folders)
    batch = tokens()
    norms = input_norms(student, ["model.layers.0.self_attn.k_proj"], batch, torch.no_grad)
    embedded = student.get_input_embeddings()(batch.ids)
    norm = student.get_submodule("model.layers.0.input_layernorm")
    assert isinstance(norm, nn.Module)
    wanted = norm(embedded).double().square().sum((0, 1))
    assert torch.allclose(norms["model.layers.0.self_attn.k_proj"].double(), wanted, rtol=1e-4)
    assert not student.get_submodule("model.layers.0.self_attn.k_proj")._forward_pre_hooks


def test_every_text_decides_which_weights_stay(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its weight: three of the first text, one of the second; of one text, the first four."""
    monkeypatch.setattr(phases, "SEQUENCES", 4)
    student, name = loaded(folders)[0], "model.layers.0.self_attn.k_proj"
    text = Batch.of(torch.arange(12).repeat_interleave(16).view(12, 16))
    for sizes, weights, chosen in (((8, 4), (3.0, 1.0), [0, 1, 2, 8]), ((12,), (1.0,), [0, 1, 2, 3])):
        names = tuple(map(str, sizes))
        data = Data(text, (), names, weights, sizes, {}, "")
        run: Any = SimpleNamespace(student=SimpleNamespace(model=student), data=data, autocast=torch.no_grad)
        found = phases._norms(run, {name: Bitmap(torch.ones(1, 1, dtype=torch.bool))})[name]
        assert torch.equal(found, input_norms(student, [name], text[torch.tensor(chosen)], torch.no_grad)[name])


@pytest.mark.parametrize("start", ["zero", pytest.param("teacher", marks=pytest.mark.slow)])
def test_a_phase_changes_its_own_masks_alone_and_no_byte(start: str, folders: Path, tmp_path: Path) -> None:
    phases = [
        {"kind": "end_to_end", "steps": 6, "regrow": {"match": "*.mlp.*", "start": start}},
        {"kind": "end_to_end", "steps": 2},
    ]
    settings = recipe(folders, rates=RATES | {"values": 7e-2}, phases=phases)
    found = distill(folders / "small", folders / "dense", settings, tmp_path / "out")
    assert 0 < found.phases[0]["regrown"] < 0.5 and "regrown" not in found.phases[1]
    assert found.bytes_before == found.bytes_after
    assert weights_bytes(tmp_path / "out") == weights_bytes(folders / "small")
    before, after = masks_of(folders / "small"), masks_of(tmp_path / "out")
    for name, mask in before.items():
        if "mlp" in name:
            assert not torch.equal(after[name], mask)
            assert bool((after[name].view(len(mask), -1, 4).sum(2) == 2).all())
        else:
            assert torch.equal(after[name], mask)
    rows = [(row["phase"], row["step"]) for row in found.history]
    assert rows == [(1, 0), (1, 6), (1, 6), (2, 0), (2, 2)]
    assert found.history[2]["kl"] != found.history[1]["kl"]  # pruned again
    if start == "teacher":  # what came back was worth something
        assert found.history[2]["kl"] > found.history[1]["kl"]
    assert found.history[3]["kl"] == pytest.approx(found.history[2]["kl"], rel=1e-4)
    if start == "zero":  # what comes back by itself and goes again is a detour for a tiny model
        assert found.history[2]["kl"] < found.history[0]["kl"]


@pytest.mark.slow
def test_a_run_interrupted_after_pruning_resumes_exactly(folders: Path, tmp_path: Path) -> None:
    phases = [{"kind": "end_to_end", "steps": 2, "regrow": {"match": "*.mlp.*"}}, {"kind": "end_to_end", "steps": 2}]
    settings = recipe(folders, rates=RATES, phases=phases, save_every=1)
    distill(folders / "small", folders / "dense", settings, tmp_path / "whole")
    cut_short(folders, settings, tmp_path / "cut", 3)
    distill(folders / "small", folders / "dense", settings, tmp_path / "cut")
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    whole, cut = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut"))
    assert len(whole) == len(cut)


@pytest.mark.parametrize(
    "more, sentence",
    [
        (
            {"regrow": {"match": "*.q_proj"}},
            r'regrow matches no matrix of values and zeros of the student \("\*.q_proj"',
        ),
        ({"regrow": {}, "rates": {"norms": 1e-3}}, "regrow trains kept weights, and rates has none for them"),
        ({"regrow": {}, "phases": [{"kind": "end_to_end"}]}, "regrow does not go with phases"),
        ({"regrow": {"by": "size"}}, 'by is "size"; it must be "input_norms" or "magnitude"'),
    ],
)
def test_impossible_regrowth_is_refused(more: dict[str, Any], sentence: str, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        distill(folders / "small", folders / "dense", recipe(folders, **{"rates": RATES} | more), tmp_path / "out")


def test_several_processes_are_refused(folders: Path) -> None:
    settings = read_as(Distillation, recipe(folders, rates=RATES, regrow={}))
    two: Any = SimpleNamespace(recipe=settings, accelerator=SimpleNamespace(num_processes=2))
    with pytest.raises(RecipeError, match="regrow runs in one process, and 2 were started"):
        run_phases(two)


def tokens() -> Batch:
    """A few sequences of random tokens."""
    return Batch.of(torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(3)))
