"""A budget for an engine: only forms that it multiplies are chosen, and all of them are exported as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import llmcompress as lc
from llmcompress.allocation.allocate import choose
from llmcompress.allocation.choices import LOW_RATES, find_choices
from llmcompress.allocation.price_file import allocate_by
from llmcompress.allocation.prices import MatrixPrices, OptionPrice
from llmcompress.allocation.target_formats import ENGINE_OBSTACLES, FOUR_BITS, default_options, options_for
from llmcompress.compression.job import prepare
from llmcompress.errors import DiskError, RecipeError
from llmcompress.formats.export import export
from llmcompress.methods.layer import sketch, step
from llmcompress.models.dense.families import Linear
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.file_names import ALLOCATION
from llmcompress.pipeline.engines import ENGINES
from llmcompress.recipe.read import Change, read_recipe
from llmcompress.recipe.target import Engine, Target
from llmcompress.reporting.formatting import target_text
from llmcompress.weight.runtime_formats import compressed_tensors_obstacle, vllm_obstacle
from tests.builders import gaussian, grid, layer, minifloat
from tests.tiny import save_tiny
from tests.zoo import save_zoo

TEXT = "The quick brown fox jumps over the lazy dog, and 42 grey geese fly past the old mill by the river. "


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    changes = {"hidden_size": 64, "intermediate_size": 160, "tie_word_embeddings": True}
    save_tiny("llama", folder / "dense", dtype=torch.bfloat16, **changes)
    save_tiny("gpt2", folder / "gpt2")
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return folder


def recipe(place: Path, target: dict[str, Any], **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(place / "text.txt"), "samples": 16, "length": 48, "held_out": 4}
    return {"version": 1, "name": "for-vllm", "calibration": calibration, "target": target, **more}


def left(place: Path, model: str = "dense", **more: Any) -> Any:
    target = {"bytes": 10**9, "engine": "vllm"}
    return find_choices(prepare(resolve(str(place / model)), read_recipe(recipe(place, target, **more))))


def test_every_name_of_a_target_has_its_rules() -> None:
    assert set(get_args(Engine)) == set(ENGINE_OBSTACLES) == set(ENGINES)


def test_default_options_are_those_that_fit_the_shape_and_leave_tables_alone(place: Path) -> None:
    found = left(place)
    assert not any(one.is_table for one in found.matrices) and len(found.matrices) == 14
    for one in found.matrices:
        stored = [sketch(one.name, one.shape, steps) for steps in one.options]
        assert all(vllm_obstacle(w) is None for w in stored)
        ragged = one.shape[1] > 128  # 160 columns have no groups of 128 or 64, and 64 columns are one group
        assert len(one.options) == len(default_options("vllm", 64)) - 2 * ragged
    odd = options_for("vllm", Linear("odd", (8, 52)), None)
    rows = tuple(default_options("vllm", 52)[place] for place in (0, 1, -2, -1))
    assert odd == rows, "52 columns are one group of 128 or of 64, and no smaller one divides them"


@pytest.mark.parametrize("family", ["granite", "olmo2", "qwen3_moe", "deepseek_v3", "qwen3_5_text", "olmo_hybrid"])
def test_what_vllm_stacks_is_known_of_other_families(family: str, tmp_path: Path) -> None:
    arch = prepare(resolve(str(save_zoo(family, tmp_path / "model"))), read_recipe("gptq-4-g64")).arch
    stacks = {tuple(name.rpartition(".")[2] for name in names) for block in arch.blocks for names in block.siblings()}
    attention = set() if family == "deepseek_v3" else {("q_proj", "k_proj", "v_proj")}
    recurrent = {
        "qwen3_5_text": {("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")},
        "olmo_hybrid": {("q_proj", "k_proj", "v_proj", "g_proj")},
    }
    assert stacks == attention | {("gate_proj", "up_proj")} | recurrent.get(family, set())


def test_prices_of_other_options_are_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may have others by default."""
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place, {"bpw": 6, "engine": "vllm"})))
    allocate_by(tmp_path / "prices.json", job)
    monkeypatch.setattr("llmcompress.allocation.target_formats.FOUR_BITS", FOUR_BITS[:-1])
    with pytest.raises(DiskError, match="options changed"):
        allocate_by(tmp_path / "prices.json", job)


def test_what_vllm_stacks_is_chosen_together(place: Path) -> None:
    """By prices that would give each linear another option."""
    choices = left(place)
    names = [one.name for one in choices.matrices]
    bundles = {tuple(names[number].rpartition(".")[2] for number in bundle) for bundle in choices.bundles}
    assert bundles == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    random = torch.Generator().manual_seed(0)
    prices = []
    for one in choices.matrices:
        draws = torch.rand(len(one.options), generator=random).tolist()
        each = zip(one.options, one.bits, one.bytes, draws, strict=True)
        offers = tuple(OptionPrice(steps, bits, size, 0.1, True, damage) for steps, bits, size, damage in each)
        prices.append(MatrixPrices(one.name, one.shape, False, 1.0, offers))
    room = choices.size(choices.cheapest([one.bytes for one in choices.matrices])) + 10_000
    chosen = choose(choices, prices, Target(bytes=room, engine="vllm"))
    assert all(len({chosen[number] for number in bundle}) == 1 for bundle in choices.bundles)
    assert len(set(chosen)) > 1 and choices.size(chosen) <= room
    apart = choose(replace(choices, bundles=()), prices, Target(bytes=room, engine="vllm"))
    assert any(len({apart[number] for number in bundle}) > 1 for bundle in choices.bundles)


@pytest.mark.slow
def test_what_is_chosen_is_exported_whole_and_the_report_names_the_engine(place: Path, tmp_path: Path) -> None:
    dense = resolve(str(place / "dense"))
    job = prepare(dense, read_recipe(recipe(place, {"bpw": 5.5, "engine": "vllm"})))
    least, most = (sum(pick(one.bits) for one in find_choices(job).matrices) for pick in (min, max))
    result = lc.compress(place / "dense", recipe(place, {"bpw": 5.5, "engine": "vllm"}), tmp_path / "out")
    stored = {row.stored for row in result.report.layers}
    assert len(stored) > 1 and least < most and result.report.bpw is not None and 5 < result.report.bpw <= 5.5
    done = export(result.folder, tmp_path / "packed", "compressed-tensors")
    assert done.changed == () and done.bytes_after < 1.05 * done.bytes_before
    target = json.loads((result.folder / ALLOCATION).read_text())["target"]
    assert target == {"bpw": 5.5, "engine": "vllm"} and target_text(target) == "5.5 bpw for vllm"


@pytest.mark.parametrize(
    "given, complaint",
    [
        ([{"method": "gptq", "bits": 4}], r"options: vllm does not multiply gptq, bits: 4 of model.layers.0.self_attn"),
        ([{"method": "rotate"}, {"method": "mxfp"}], r"vllm does not multiply rotate > mxfp of .*is no single grid\)"),
        ([{"method": "mxfp", "format": "mxfp6"}], r"mxfp, format: mxfp6 of .* \(it has no e2m3 floats g32"),
        (
            [{"method": "rtn", "bits": 8, "narrow_range": True, "group_size": 16}],
            "reads groups of 32, 64, 128 or a row",
        ),
    ],
)
def test_options_that_it_does_not_multiply_are_named(given: list[dict[str, Any]], complaint: str, place: Path) -> None:
    good = [{"method": "mxfp", "format": "fp8"}]
    with pytest.raises(RecipeError, match=complaint):
        left(place, options=[good, given])
    assert len(left(place, options=[good]).matrices[0].options) == 1


def test_our_own_forms_are_those_with_kernels(place: Path) -> None:
    """All default options have one, on both devices; a target without an engine has the same."""
    for engine in ("transformers", "transformers-cuda"):
        target = {"bytes": 10**9, "engine": engine}
        found = find_choices(prepare(resolve(str(place / "dense")), read_recipe(recipe(place, target))))
        plain = find_choices(prepare(resolve(str(place / "dense")), read_recipe(recipe(place, {"bytes": 10**9}))))
        assert found.matrices == plain.matrices and found.fixed_bytes == plain.fixed_bytes
    vectors = [{"method": "vq"}]
    target = {"bpw": 4, "engine": "transformers-cuda"}
    with pytest.raises(RecipeError, match="options: transformers-cuda does not multiply vq of .*no kernel for cuda"):
        find_choices(prepare(resolve(str(place / "dense")), read_recipe(recipe(place, target, options=[vectors]))))
    table = recipe(place, target, embeddings=vectors)
    with pytest.raises(RecipeError, match="transformers-cuda does not read vq of model.embed_tokens"):
        find_choices(prepare(resolve(str(place / "dense")), read_recipe(table)))


def test_low_targets_have_the_forms_with_kernels(place: Path, tmp_path: Path) -> None:
    """Binary factors have one on CPUs alone."""
    sides: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4}
    dense = resolve(str(save_tiny("llama", tmp_path, **sides)))
    counts = {}
    for engine in (None, "transformers", "transformers-cuda"):
        wanted = read_recipe(recipe(place, {"bpw": 1.2, "engine": engine}))
        counts[engine] = len(find_choices(prepare(dense, wanted)).matrices[0].options)
    assert counts[None] == counts["transformers"] == counts["transformers-cuda"] + len(LOW_RATES)


def test_rules_tables_and_transposed_layers_are_refused(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"rules: vllm does not multiply rtn, bits: 2 of .*o_proj .*change the rule"):
        left(place, rules=[{"match": "*.o_proj", "steps": [{"method": "rtn", "bits": 2}]}])
    assert len(left(place, rules=[{"match": "*.o_proj", "steps": []}]).matrices) == 12
    with pytest.raises(RecipeError, match="vllm has no compressed model.embed_tokens; leave it as it is"):
        left(place, embeddings=[{"method": "rtn"}])
    with pytest.raises(RecipeError, match=r"multiplies no form of transformer.h.0.attn.c_attn \(it is no plain linear"):
        left(place, "gpt2")


def test_an_unknown_engine_is_one_sentence() -> None:
    base = {"version": 1, "calibration": {"samples": 4, "length": 32}}
    with pytest.raises(RecipeError, match=r"unknown engine 'vlm'; did you mean 'vllm'\?"):
        read_recipe(base | {"target": {"bpw": 4, "engine": "vlm"}})
    with pytest.raises(RecipeError, match="unknown engine 'sparta'; known: vllm"):
        read_recipe(base | {"target": {"bpw": 4, "engine": "sparta"}})
    with pytest.raises(RecipeError, match="give exactly one of bpw, bytes, kl and sparsity"):
        read_recipe(base | {"target": {"engine": "vllm"}})


def test_another_size_on_the_command_line_keeps_the_engine() -> None:
    base = {"version": 1, "calibration": {"samples": 4, "length": 32}, "target": {"bpw": 4, "engine": "vllm"}}
    change = Change("target", {"bytes": "40MB"}, "--size", stay=("engine",))
    assert read_recipe(base, [], [change]).target == Target(bytes=40_000_000, engine="vllm")
    assert read_recipe(base | {"target": None}, [], [change]).target == Target(bytes=40_000_000)


def test_narrow_grids_fit_integers_of_their_bits() -> None:
    """An odd number of levels is centred on a code, so that 4 bits stay 4 bits in the format."""
    for bits in (4, 8):
        w = sketch("x", (4, 64), [step({"method": "gptq", "bits": bits, "narrow_range": True})])
        assert vllm_obstacle(w) is None
        wide = sketch("x", (4, 64), [step({"method": "gptq", "bits": bits})])
        assert f"stored in integers of {bits + 1} bits" in str(vllm_obstacle(wide))
    with pytest.raises(ValueError, match="narrow_range: true needs symmetric: true and bits from 2 to 8"):
        step({"method": "gptq", "bits": 4, "symmetric": False, "narrow_range": True})


def test_vllm_takes_less_than_the_format_holds() -> None:
    assert compressed_tensors_obstacle(grid((4, 64), 3, 32, 0, True)) is None
    assert "integers of 2 bits" in str(vllm_obstacle(grid((4, 64), 3, 32, 0, True)))
    assert vllm_obstacle(minifloat((4, 64), "e2m1", "e8m0", 32, 0)) is None
    assert "no single grid" in str(vllm_obstacle(layer(gaussian(4, 64), gaussian(8, 64)).approx))
