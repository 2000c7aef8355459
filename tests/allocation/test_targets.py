"""State a size, get a model of that size: the whole way, on a small model, judged by the files on disk."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.allocation.allocate import Allocation, allocate, choose, reachable_choices
from llmcompress.allocation.distortion import families
from llmcompress.allocation.prices import MatrixPrices, damage, middle_option
from llmcompress.allocation.solve import random_plan, uniform_plan
from llmcompress.cli.app import app
from llmcompress.compression import run
from llmcompress.compression.job import prepare
from llmcompress.errors import LLMCompressError, MemoryLimitError, RecipeError
from llmcompress.evaluation.verify import verify
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.file_names import ALLOCATION, RECIPE
from llmcompress.recipe.read import dump, parse_recipe, read_recipe
from llmcompress.recipe.target import Target, parse_size
from llmcompress.reporting.report import read_allocation
from llmcompress.runtime.precision import fast_float32
from tests.allocation.aimed import OPTIONS, make, recipe
from tests.tiny import save_tiny

SIZE = 70_000  # between all cheapest and all dearest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("targets"))


@fast_float32()  # as the run that it is compared with
def allocated(place: Path, target: dict[str, Any], **more: Any) -> Allocation:
    return allocate(prepare(resolve(str(place / "dense")), read_recipe(recipe(place, target, **more))))


@pytest.fixture(scope="module")
def plan(place: Path) -> Allocation:
    return allocated(place, {"bytes": SIZE})


@pytest.fixture(scope="module")
def result(place: Path, tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    out = tmp_path_factory.mktemp("result") / "out"
    return lc.compress(place / "dense", recipe(place, {"bytes": f"{SIZE // 1000}kB"}), out)


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_that_do_not_suit_a_shape_are_left_out_for_it(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Keys and values have 32 rows, fewer than the rank of one option."""
    wide = [{"method": "gptq", "bits": 4}, {"method": "eora", "rank": 40}]
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place, {"bpw": 6}, options=[*OPTIONS, wide])))
    counts = {one.name: len(one.options) for one in reachable_choices(job, ()).matrices}
    narrow = {name for name, count in counts.items() if count == len(OPTIONS)}
    assert narrow == {name for name in counts if name.endswith(("k_proj", "v_proj"))}
    assert set(counts.values()) == {len(OPTIONS), len(OPTIONS) + 1}
    [note] = [record.message for record in caplog.records if "have only those that suit" in record.message]
    assert "model.layers.0.self_attn.k_proj" in note and "and 3 more" in note
    with pytest.raises(RecipeError, match=r"k_proj: eora: rank 40 is larger than the matrix \[32, 64\]"):
        reachable_choices(prepare(job.source, read_recipe(recipe(place, {"bpw": 6}, options=[wide]))), ())


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_the_files_on_disk_have_the_size_that_was_asked_for(result: run.Result, place: Path) -> None:
    size = sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    assert 0.99 * SIZE <= size <= SIZE
    assert verify(result.folder, text=place / "text.txt", length=16).layers == 23, "21 linears, and the table twice"
    assert len({row.bpw for row in result.report.layers}) > 2, "not one option for all"


@pytest.mark.slow
def test_bits_per_weight_are_those_that_the_report_counts(place: Path, tmp_path: Path) -> None:
    """With trellises, and a layer that a rule has spoken of."""
    rules = [{"match": "*.0.mlp.down_proj", "steps": [{"method": "rtn", "bits": 8}]}]
    coders = [[{"method": "rotate"}, {"method": "trellis", "bits": bits, "memory": 8}] for bits in (1, 2)]
    asked = recipe(place, {"bpw": 2.6}, rules=rules, options=coders)
    report = lc.compress(place / "dense", asked, tmp_path / "out").report
    assert 0.99 * 2.6 <= report.bpw <= 2.6
    assert len(report.layers) == 21, "the table is no linear"
    [fixed] = [row for row in report.layers if row.name == "model.layers.0.mlp.down_proj"]
    assert fixed.steps == ("rtn",)


@pytest.mark.slow
def test_less_damage_takes_more_bytes_and_is_predicted_to_be_kept(plan: Allocation) -> None:
    least = damage(plan.prices, [len(matrix.options) - 1 for matrix in plan.choices.matrices])
    sizes = []
    for kl in (20 * least, 5 * least, 2 * least):
        chosen = choose(plan.choices, plan.prices, Target(kl=kl))
        assert damage(plan.prices, chosen) <= kl
        sizes.append(plan.choices.size(chosen))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    with pytest.raises(RecipeError, match=r"a KL of \S+ cannot be reached, \S+ is the least"):
        choose(plan.choices, plan.prices, Target(kl=least / 10))


# --- quality --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_by_kl_an_option_costs_what_a_model_with_it_alone_loses(place: Path, plan: Allocation, tmp_path: Path) -> None:
    probed = allocated(place, {"bytes": SIZE}, damage="kl")
    assert [[offer.error for offer in one.offers] for one in probed.prices] == [
        [offer.error for offer in one.offers] for one in plan.prices
    ]
    assert probed.recipe.damage == "distortion" and probed.recipe.target is None, "the driver's recipe has no target"
    for one, other, matrix in zip(probed.prices, plan.prices, plan.choices.matrices, strict=True):
        middle = middle_option(matrix)  # the one that sensitivities are measured with
        assert one.offers[middle].damage == pytest.approx(other.offers[middle].damage)
    for name, option in (("model.layers.0.mlp.up_proj", 0), ("model.layers.2.self_attn.v_proj", 0)):
        rules = [{"match": name, "steps": OPTIONS[option]}, {"match": "*", "steps": []}]
        alone = recipe(place, {}, rules=rules, prefix="dense")
        del alone["target"], alone["options"]
        folder = lc.compress(place / "dense", alone, tmp_path / name).folder
        [priced] = [one for one in probed.prices if one.name == name]
        assert priced.offers[option].damage == pytest.approx(probed.measure_kl(folder), rel=0.05)
    with pytest.raises(RecipeError, match="damage: it says how options are judged, and there is no target"):
        read_recipe({"version": 1, "damage": "kl", "rules": [{"match": "*", "steps": [{"method": "rtn"}]}]})


@pytest.mark.parametrize("target", [{"bytes": SIZE}, {"bpw": 3.5}, {"kl": 0.05}])
def test_plans_of_no_thought_stand_beside_the_chosen_one(place: Path, plan: Allocation, target: dict[str, Any]) -> None:
    """Of the same size, by the same prices."""
    aimed = Target.model_validate(target)
    job = plan.job.with_recipe(plan.job.recipe.model_copy(update={"target": aimed}))
    found = dataclasses.replace(plan, job=job, chosen=choose(plan.choices, plan.prices, aimed))
    summary = found.summary(0.0, 0)
    costs = [one.costs(aimed) for one in plan.choices.matrices]
    limit = sum(row[option] for row, option in zip(costs, found.chosen, strict=True))
    uniform = uniform_plan(costs, limit)
    assert uniform is not None
    assert summary["baselines"]["uniform"] == damage(plan.prices, uniform) >= summary["predicted_kl"]
    assert summary["baselines"]["random"] > summary["predicted_kl"] - 1e-12  # which may be the best of everything


@pytest.mark.slow
def test_a_chosen_plan_beats_plans_of_no_thought_and_damages_are_ranked(plan: Allocation, tmp_path: Path) -> None:
    costs = [one.bytes for one in plan.choices.matrices]
    limit = sum(row[option] for row, option in zip(costs, plan.chosen, strict=True))
    equal = [uniform_plan(costs, limit), *(random_plan(costs, limit, Random(seed)) for seed in range(5))]
    others = [
        other
        for size in (0.85 * limit, 1.2 * limit, 1.5 * limit)
        for other in (uniform_plan(costs, size), random_plan(costs, size, Random(5)))
    ]
    predicted, measured = [], []
    for number, chosen in enumerate((plan.chosen, *equal, *others)):
        assert chosen is not None
        one = dataclasses.replace(plan, chosen=chosen)
        folder = run.compress(one.settled, tmp_path / str(number)).folder
        predicted.append(damage(one.prices, chosen))
        measured.append(one.measure_kl(folder))
    of_its_size = slice(1, 1 + len(equal))
    assert measured[0] < 0.9 * min(measured[of_its_size]) and predicted[0] < min(predicted[of_its_size])
    assert spearmanr(predicted, measured).statistic > 0.9
    assert 0.5 < median(m / p for m, p in zip(measured, predicted, strict=True)) < 2


@pytest.mark.parametrize(
    "family, tied",
    [
        ("llama", False),
        ("gpt2", True),
        pytest.param("opt", True, marks=pytest.mark.slow),
        pytest.param("gemma2", False, marks=pytest.mark.slow),
    ],
)
def test_every_matrix_of_other_families_has_its_price(family: str, tied: bool, place: Path, tmp_path: Path) -> None:
    source = resolve(str(save_tiny(family, tmp_path / "dense", tie_word_embeddings=tied)))
    plan = allocate(prepare(source, read_recipe(recipe(place, {"bytes": "1MB"}))))
    assert plan.chosen == tuple(len(one.offers) - 1 for one in plan.prices), "there is room for the best of everything"
    assert sum(one.is_table for one in plan.prices) == 2 - tied
    for one in plan.prices:
        for kin in families([offer.steps for offer in one.offers]):  # one may end where another begins
            errors = [one.offers[number].error for number in kin]
            assert errors == sorted(errors, reverse=True)
        assert one.offers[-1].error < one.offers[0].error / 10
    assert all(one.sensitivity > 0 for one in plan.prices if one.is_table)
    folder = run.compress(plan.settled, tmp_path / "out").folder
    assert 0 <= plan.measure_kl(folder) < 10 * damage(plan.prices, plan.chosen) + 1e-6


# --- what is left beside the model ----------------------------------------------------------------------------------


def test_prices_and_plan_travel_with_the_model(
    result: run.Result, plan: Allocation, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe names its text without a folder, and runs where that text lies."""
    monkeypatch.chdir(place)
    found = read_allocation(result.folder)
    assert found is not None and result.allocation is not None
    assert found["target"] == {"bytes": SIZE} and found["measured_bytes"] == result.report.bytes
    assert found["predicted_kl"] == pytest.approx(damage(plan.prices, plan.chosen))
    assert found["predicted_bytes"] >= found["measured_bytes"]
    matrices = [{key: value for key, value in one.items() if key != "chosen"} for one in found["matrices"]]
    prices = tuple(MatrixPrices.from_json(one) for one in matrices)
    assert [one.to_json() for one in prices] == json.loads(json.dumps([one.to_json() for one in plan.prices]))
    assert all(sum(offer.measured for offer in one.offers) == 3 for one in prices if not one.is_table)
    chosen = [one["chosen"] for one in found["matrices"]]
    total = found["fixed_bytes"] + sum(one.offers[o].bytes for one, o in zip(prices, chosen, strict=True))
    assert total == found["predicted_bytes"]
    concrete = read_recipe(result.folder / RECIPE)
    assert concrete.target is None and concrete.embeddings
    assert len({rule.steps for rule in concrete.rules}) == len(concrete.rules), "layers of equal steps share a rule"
    again = lc.compress(plan.job.source.folder, concrete, tmp_path / "again")
    for path in result.folder.glob("*.safetensors"):
        assert path.read_bytes() == (again.folder / path.name).read_bytes()


@pytest.mark.slow
def test_the_command_line_aims_and_says_how_well(place: Path, tmp_path: Path, result: run.Result) -> None:
    asked = recipe(place, {"kl": 1.0})
    (tmp_path / "aimed.yaml").write_text(dump(read_recipe(asked)))
    words = ["compress", place / "dense", tmp_path / "aimed.yaml", "-o", tmp_path / "out", "--size", "70 kB", "--json"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert "priced block 3/3" in done.stderr and "block 3/3" in done.stderr
    assert found["allocation"]["target"] == {"bytes": SIZE} and found["bytes"] == result.report.bytes
    assert (tmp_path / "out" / ALLOCATION).is_file()
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    assert re.search(
        r"target +0\.1 MB · KL predicted 0\.\d+ \(0\.\d+ to 0\.\d+\), measured 0\.\d+ on 188 tokens", shown
    )


@pytest.mark.slow
def test_a_distillation_follows_the_chosen_recipe(place: Path, tmp_path: Path) -> None:
    data = {"dataset": str(place / "text.txt"), "samples": 12, "length": 32, "held_out": 4}
    section = {"data": data, "rates": {"scales": 5e-3}, "batch": 4, "compute": "float32", "steps": 2}
    found = lc.compress(place / "dense", recipe(place, {"bpw": 3.5}, distill=section), tmp_path / "out")
    assert found.distillation is not None and found.report.bpw <= 3.5
    assert read_allocation(found.folder) == json.loads((found.folder / ALLOCATION).read_text())
    assert verify(found.folder, text=place / "text.txt", length=16).layers == 21


# --- what cannot be -------------------------------------------------------------------------------------------------


def test_sizes_in_words() -> None:
    assert [parse_size(size) for size in ("40MB", "1.5 GiB", "7", "12 kB", "3 KB", 5)] == [
        40_000_000,
        1_610_612_736,
        7,
        12_000,
        3_000,
        5,
    ]
    for size in ("40 MiBs", "MB", "40bits", "-3MB"):
        with pytest.raises(ValueError, match="write a number and one of B, kB, MB, GB, KiB, MiB, GiB, such as 40MB"):
            parse_size(size)


LINE = "version: 1\ncalibration: {samples: 4, length: 32}\n"
WRONG = [
    ("target: {bytes: 40 megs}", "recipe.yaml:3: target: bytes: '40 megs' is no size; write a number and one of B, kB"),
    ("target: {bpw: 2, kl: 1}", "recipe.yaml:3: target: give exactly one of bpw, bytes, kl and sparsity"),
    ("target: {}", "recipe.yaml:3: target: give exactly one of bpw, bytes, kl and sparsity"),
    ("target: {bpw: -1}", "recipe.yaml:3: target: bpw is -1; it must be a number more than 0"),
    ("target: {size: 3}", 'recipe.yaml:3: unknown key "size" in target; known: bpw, bytes, kl, sparsity'),
    ("target: {bpw: 2}\noptions: []", "recipe.yaml:4: options is []; it must not be empty"),
    ("target: {bpw: 2}\noptions: [[]]", "options is []; it must not be empty"),
    ("target: {bpw: 2}\noptions: [[{method: gtpq}]]", "recipe.yaml:4: unknown method 'gtpq'; did you mean 'gptq'?"),
    ("rules: [{match: '*', steps: []}]\noptions: [[{method: rtn}]]", "options: they are the choices for a target"),
    ("target: {bpw: 2}\ncalibration: null", "is already at"),
    ("target: {bytes: 40MB}\ndistill: {adapt: {rank: 4}}", "adapt adds low-rank terms, which a size has no room for"),
    ("target: {bpw: 2}\ndistill: {phases: [{kind: end_to_end, adapt: {rank: 4}}]}", "adapt adds low-rank terms"),
    ("", 'the key "rules" is missing'),
]


@pytest.mark.parametrize("line, complaint", WRONG)
def test_what_is_wrong_with_a_target_is_one_sentence(line: str, complaint: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(LINE + line)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)


def without_calibration(place: Path) -> Any:
    return read_recipe(recipe(place, {"bpw": 3}, calibration=None))


def none_held_out(place: Path) -> Any:
    return read_recipe(recipe(place, {"bpw": 3}), ["calibration.held_out=0"])


def one_sequence(place: Path) -> Any:
    return allocated(place, {"bpw": 3}, calibration={"dataset": str(place / "text.txt"), "samples": 1, "length": 48})


def too_small_a_file(place: Path) -> Any:
    return allocated(place, {"bytes": 9000})


def too_few_bits(place: Path) -> Any:
    return allocated(place, {"bpw": 1.0})


def nothing_left(place: Path) -> Any:
    return allocated(place, {"bpw": 3}, rules=[{"match": "*", "steps": [{"method": "rtn"}]}])


def a_rule_for_nothing(place: Path) -> Any:
    return allocated(place, {"bpw": 3}, rules=[{"match": "*.x_proj", "steps": []}])


def an_option_that_does_not_fit(place: Path) -> Any:
    return allocated(place, {"bpw": 3}, options=[[{"method": "magnitude", "pattern": "5:7"}]])


CANNOT = [
    (without_calibration, "target: options are judged on held-out text; add calibration with held_out more than 0"),
    (none_held_out, "target: options are judged on held-out text"),
    (one_sequence, "the calibration text gives 1 sequences, none of which is held out to judge options on"),
    (too_small_a_file, r"target: 9,000 bytes cannot be reached, \d\d,\d\d\d is the least that the options can do; "),
    (too_few_bits, r"target: 1 bpw cannot be reached, 2\.\d+ is the least that the options can do; raise it"),
    (nothing_left, "the rules of recipe 'aimed' cover every layer of .*, so none is left to choose steps for"),
    (a_rule_for_nothing, r'rule 1 matches no layer of the model \("\*.x_proj"\)'),
    (an_option_that_does_not_fit, r"model.layers.0.self_attn.q_proj: magnitude: .*64"),
]


@pytest.mark.parametrize("act, complaint", CANNOT, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_is_said_before_anything_is_measured(
    act: Callable[[Path], Any], complaint: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("llmcompress.allocation.allocate.Probe", never)
    with pytest.raises(LLMCompressError, match=complaint):
        act(place)


def test_a_model_larger_than_the_machine_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.allocation.allocate.total_memory", lambda: 100_000)
    with pytest.raises(MemoryLimitError, match=r"a target of .* takes about \d+\.\d MB, and this machine has 0.1 MB"):
        allocated(place, {"bpw": 3})


def test_a_command_without_recipe_needs_a_target(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compress", "none", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and "there is no RECIPE; name one, or give a target" in done.output
    done = CliRunner().invoke(app, ["compress", "none", "-o", str(tmp_path / "out"), "--bpw", "2", "--kl", "1"])
    assert done.exit_code == 2 and "give exactly one of bpw, bytes, kl and sparsity" in done.output
    done = CliRunner().invoke(app, ["compress", "none", "-o", str(tmp_path / "out"), "--bpw", "2"])
    assert done.exit_code == 5 and "none is not in the cache" in done.output
