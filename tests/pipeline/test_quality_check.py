"""Gates of quality: a ruined model is never a success, what was measured stays, and nothing is silent."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.allocation.allocate import allocate, choose, damage
from llmcompress.cli.app import app
from llmcompress.compression import run, time_estimate
from llmcompress.compression.job import prepare
from llmcompress.compression.memory_estimate import gate_bytes
from llmcompress.compression.plan import plan_of
from llmcompress.compression.step_timing import Pace
from llmcompress.compression.time_estimate import estimate_time
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.distillation.run import distill
from llmcompress.errors import GateError, LockedError
from llmcompress.evaluation.verify import verify
from llmcompress.formats.hub import _card, _proof, push
from llmcompress.models.dense.model import resolve
from llmcompress.pipeline import compress as pipeline
from llmcompress.pipeline import quality_check
from llmcompress.recipe.read import read_recipe
from llmcompress.recipe.target import Target
from llmcompress.reporting.report import GateReport, read
from llmcompress.runtime.ranks import Ranks
from tests.lockstep import in_lockstep
from tests.tiers import tiered
from tests.tiny import save_tiny, tiny_tokenizer

TEXT = "Forty farms bring their corn to the mill by the river, and the miller counts every sack of it. "
OFF = {"kl": None, "perplexity_ratio": None}
ONE_BIT = [{"match": "*", "steps": [{"method": "rtn", "bits": 1}]}]
FOUR_BIT_INPUTS = {"match": "*", "steps": [{"method": "rtn", "bits": 8}], "inputs": {"format": "nvfp4"}}
EIGHT_BITS = [{"match": "*", "steps": [{"method": "rtn", "bits": 8}]}]


def sharpened(folder: Path, by: float = 60.0) -> Path:
    """Make a random model sure of what it predicts, so that an error costs something."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] * by}, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model that predicts something, and a text."""
    folder = tmp_path_factory.mktemp("gates")
    sharpened(save_tiny("llama", folder / "dense"))
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return folder


def recipe(place: Path, **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(place / "text.txt"), "samples": 16, "length": 48, "held_out": 4}
    return {"version": 1, "name": "gated", "calibration": calibration, "rules": ONE_BIT} | more


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def missed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder and the end of a command whose model is outside of the gates that every recipe has."""
    folder = tmp_path_factory.mktemp("missed")
    (folder / "one.yaml").write_text(json.dumps(recipe(place)))
    return folder / "out", invoke("compress", place / "dense", folder / "one.yaml", "-o", folder / "out", "--json")


def test_a_ruined_model_is_no_success_and_stays_as_evidence(missed: tuple[Path, Any], place: Path) -> None:
    folder, done = missed
    found = json.loads(done.stdout)
    assert done.exit_code == 3 and found["error"]["code"] == 3
    assert re.search(
        r"^\[3\] the compressed model is outside of its gates: KL \S+ nats per token \(at most 2.5\)", done.stderr, re.M
    )
    assert "the size that keeps them is unknown without prices, and --kl 2" in found["error"]["message"]
    assert found["gates"]["kl"] > 2.5 and found["gates"]["limits"] == {"kl": 2.5, "perplexity_ratio": 10.0}
    assert read(folder).to_json()["gates"] == found["gates"] and found["gates"]["held"] is False
    assert verify(folder, text=place / "text.txt", length=16).layers == 14
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    shown = invoke("inspect", folder).stdout
    assert re.search(r"^gates   missed: KL \d\S+ nats per token \(at most 2.5\), perplexity ", shown, re.MULTILINE)
    assert "Gates of its recipe missed: KL" in _card(folder, "me/small", _proof(folder))["README.md"].decode()
    assert invoke("report", folder, "-o", folder.parent / "page.html").exit_code == 0
    assert "Held against the gates of the recipe" in (folder.parent / "page.html").read_text()


def test_the_error_has_the_result(place: Path, tmp_path: Path) -> None:
    """Also without an output folder, whose model would be gone."""
    with pytest.raises(GateError, match="save the error's `result` to keep it") as error:
        lc.compress(place / "dense", recipe(place, gates={"kl": 1e-9}), device=torch.device("cpu"))  # type: ignore[arg-type]
    result = error.value.result
    assert result is not None and result.report.gates is not None and result.report.gates.held is False
    assert verify(result.save(tmp_path / "kept"), text=place / "text.txt", length=16).layers == 14


@pytest.mark.slow
def test_it_is_not_pushed(missed: tuple[Path, Any]) -> None:
    with pytest.raises(GateError, match=r"out is outside of its gates \(KL .*\) and is not pushed"):
        push(missed[0], "me/small", dry_run=True)


@pytest.mark.slow
def test_asked_again_it_says_the_same_and_other_gates_judge_it_anew(
    missed: tuple[Path, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, done = missed

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("what is known is neither made nor measured again")

    monkeypatch.setattr(quality_check, "measure", never)
    monkeypatch.setattr(run, "compress", never)
    with pytest.raises(GateError) as again:
        lc.compress(place / "dense", recipe(place), folder)
    assert str(again.value) == json.loads(done.stdout)["error"]["message"]
    wide = {"kl": 1e3, "perplexity_ratio": 1e300}
    report = lc.compress(place / "dense", recipe(place, gates=wide), folder).report
    assert report.gates is not None and report.gates.held and read(folder) == report
    assert push(folder, "me/small", dry_run=True).commit is None


@pytest.mark.slow
def test_null_switches_it_off(place: Path, tmp_path: Path) -> None:
    report = lc.compress(place / "dense", recipe(place, gates=OFF), tmp_path / "out").report
    assert report.gates is None and not any("gates" in warning for warning in report.warnings)
    assert push(tmp_path / "out", "me/small", dry_run=True).commit is None
    half = {"kl": None, "perplexity_ratio": 1e300}
    with_one = lc.compress(place / "dense", recipe(place, gates=half), tmp_path / "half").report.gates
    assert with_one is not None and with_one.held and with_one.limits == {"perplexity_ratio": 1e300}


EDITED: dict[str, dict[str, Any]] = {
    "llama": {"head": [{"method": "rtn", "bits": 6}], "embeddings": [{"method": "rtn", "bits": 6}]},
    "qwen3": {"embeddings": [{"method": "rtn", "bits": 6}]},
    "gpt2": {},
    "gemma2": {"embeddings": [{"method": "rtn", "bits": 6}]},
    "gpt_neox": {},
    "mistral": {"fuse": {"rotation": True, "untie": True}},
    "phi3": {"rules": [FOUR_BIT_INPUTS]},
}


@pytest.mark.parametrize("family", tiered(EDITED, {"llama", "phi3"}.__contains__))
def test_it_is_what_eval_measures_on_the_same_tokens(family: str, place: Path, tmp_path: Path) -> None:
    """Whatever is tied, transposed, scaled, rotated, compressed, or rounds inputs."""
    dense = save_tiny(family, tmp_path / "dense")
    steps = [{"method": "rotate"}, {"method": "gptq", "bits": 2}, {"method": "eora", "rank": 2}]
    rules = [{"match": "*", "steps": steps if family != "mistral" else steps[1:]}]
    report = lc.compress(dense, recipe(place, **{"rules": rules} | EDITED[family]), tmp_path / "out").report
    tokens = prepare(resolve(str(dense)), read_recipe(recipe(place))).tokens
    assert tokens is not None and report.gates is not None
    read_there = quality_check.gate_windows(tokens)
    text = tiny_tokenizer().decode(read_there[:, 1:].flatten())  # BOS comes again
    found = lc.score(tmp_path / "out", lc.Protocol(text=text, windows=4, length=48), against=str(dense))
    alone = lc.score(dense, lc.Protocol(text=text, windows=4, length=48))
    assert report.gates.tokens == found["tokens"] == 4 * 47
    assert report.gates.kl == pytest.approx(found["kl"], rel=1e-3, abs=1e-7) and found["kl"] > 1e-5
    assert report.gates.perplexity_ratio == pytest.approx(found["perplexity"] / alone["perplexity"], rel=1e-5)


def test_windows_are_whole_and_few() -> None:
    text = torch.arange(7 * 1100).reshape(7, 1100)
    windows = quality_check.gate_windows(CalibrationTokens(text, 6, "", 7))
    assert windows.shape == (8, 256) and windows[4].tolist() == list(range(2200, 2456)), "four of each sequence"
    assert quality_check.gate_windows(CalibrationTokens(text[:, :40], 6, "", 7)).shape == (6, 40)


# --- sizes ----------------------------------------------------------------------------------------------------------

OPTIONS = [[{"method": "gptq", "bits": bits}] for bits in (1, 2, 3, 4, 6, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "bpw"])
def test_a_run_to_a_target_tells_the_bytes_that_hold_and_they_do(kind: str, place: Path, tmp_path: Path) -> None:
    """Within a half: a prediction for another size is no measurement."""
    less = {"bytes": 16_000, "bpw": 1.6}[kind]
    asked = recipe(place, options=OPTIONS, gates={"kl": 0.5, "perplexity_ratio": None})
    del asked["rules"]
    with pytest.raises(GateError, match=r"(\S+) bytes \(--\S+ \S+\) are predicted to hold them") as error:
        lc.compress(place / "dense", asked | {"target": {kind: less}}, tmp_path / "out")
    assert (tmp_path / "out.prices.json").is_file(), "for the next size"
    with pytest.raises(GateError) as again:
        lc.compress(place / "dense", asked | {"target": {kind: less}}, tmp_path / "out")
    assert str(again.value) == str(error.value)
    gates = read(tmp_path / "out").gates
    assert gates is not None and gates.predicted_bytes is not None
    [(size, word)] = re.findall(r"([\d,]+) bytes \(--\w+ ([\d.]+)B?\)", str(error.value))
    assert int(size.replace(",", "")) == gates.predicted_bytes
    more = {kind: int(word) if kind == "bytes" else float(word)}
    plan = allocate(prepare(resolve(str(place / "dense")), read_recipe(asked | {"target": more})))
    assert damage(plan.prices, plan.chosen) <= 0.5
    smaller = choose(plan.choices, plan.prices, Target(kl=0.5))
    assert gates.predicted_bytes >= plan.choices.size(smaller), "no less than what the prices alone say"
    nearly = asked | {"target": more, "gates": {"kl": 0.75, "perplexity_ratio": None}}
    held = lc.compress(place / "dense", nearly, tmp_path / "more").report.gates
    assert held is not None and held.kl is not None and gates.kl is not None and held.kl < gates.kl
    assert not (tmp_path / "more.prices.json").exists() and held.held


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_cut_while_it_measures_measures_when_it_is_asked_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(place, rules=EIGHT_BITS)

    def cut(done: int, total: int) -> None:
        assert total == 4, "two blocks of two models"
        if done == 3:
            with pytest.raises(LockedError, match="is being written by another process"):
                lc.compress(place / "dense", asked, tmp_path / "out")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stop:
        lc.compress(place / "dense", asked, tmp_path / "out", judging=cut)
    assert stop.value.__notes__ == [f"{tmp_path / 'out'} is complete, and the same command measures its gates"]
    with pytest.raises(GateError, match="is not pushed, since the run ended before it was measured; run the same"):
        push(tmp_path / "out", "me/small", dry_run=True)
    calls = []
    monkeypatch.setattr(run, "compress", lambda *given, **named: calls.append(given))
    seen: list[int] = []
    report = lc.compress(place / "dense", asked, tmp_path / "out", judging=lambda done, _: seen.append(done)).report
    assert not calls and seen == [1, 2, 3, 4]
    assert report.gates is not None and report.gates.held and read(tmp_path / "out") == report


def test_processes_end_alike(place: Path, tmp_path: Path) -> None:
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place)))
    told = []

    def work(ranks: Ranks) -> None:
        way = pipeline._RunOptions(partial(run.compress.__wrapped__, ranks=ranks), None, True, ranks)  # type: ignore[attr-defined]
        with pytest.raises(GateError) as error:
            pipeline._judge_result(pipeline._reuse_or_run(job, tmp_path / "out", way), job, way)
        told.append((str(error.value), ranks.rank, error.value.reported_elsewhere))

    in_lockstep(2, work)
    assert len({sentence for sentence, *_ in told}) == 1
    assert {(rank, other) for _, rank, other in told} == {(0, False), (1, True)}, "the first one says it"


def distillation(text: Path, steps: int) -> dict[str, Any]:
    """Return a section that learns from the file `text`."""
    data = {"dataset": str(text), "samples": 28, "length": 32, "held_out": 4}
    return {"data": data, "batch": 4, "compute": "float32", "steps": steps, "rates": {"scales": 5e-3}}


def test_text_that_a_distillation_learned_from_judges_nothing(place: Path, tmp_path: Path) -> None:
    asked = recipe(place, rules=EIGHT_BITS, distill=distillation(place / "text.txt", 1))
    report = lc.compress(place / "dense", asked, tmp_path / "out").report
    assert report.gates is not None and report.gates.held and report.gates.text == "distillation"
    assert not quality_check.is_unsettled(tmp_path / "out", read_recipe(asked))


@pytest.mark.slow
def test_a_distillation_comes_before(place: Path, tmp_path: Path) -> None:
    section = distillation(Path(shutil.copy(place / "text.txt", tmp_path / "other.txt")), 4)
    asked = recipe(place, gates={"kl": 1e-6}, distill=section)
    with pytest.raises(GateError, match="held out of the calibration"):
        lc.compress(place / "dense", asked, tmp_path / "out")
    gates = read(tmp_path / "out").gates
    assert gates is not None and gates.text == "calibration" and (tmp_path / "out" / "distillation.json").is_file()
    with pytest.raises(GateError, match="held out of the calibration"):
        lc.compress(place / "dense", asked, tmp_path / "out")
    done = distill(tmp_path / "out", place / "dense", section | {"version": 1}, tmp_path / "further")
    after = read(tmp_path / "further").gates
    assert after is not None and after.kl == done.history[-1]["kl"] and after.held is False
    assert after.sentence().endswith("on text held out of the distillation")


@pytest.mark.slow
@pytest.mark.parametrize("count", tiered([2, 5], lambda count: count == 5))
def test_processes_share_the_windows_where_all_see_the_model(count: int, place: Path, tmp_path: Path) -> None:
    """Elsewhere the first one measures. One of five has no window of the four."""
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place)))
    run.compress(job, tmp_path / "out")
    for name in ("again", "once", "beside", "stale"):
        shutil.copytree(tmp_path / "out", tmp_path / name)
    (tmp_path / "stale" / "report.json").write_text("{}")  # of an earlier run, on another machine's disk
    alone = quality_check.judge(job, tmp_path / "out", "cpu").gates
    assert alone is not None and alone.kl is not None and alone.held is False
    read_by: dict[Path, list[int]] = {}

    def judged(ranks: Ranks, folder: Path) -> GateReport | None:
        def told(*_: int) -> None:
            read_by.setdefault(folder, []).append(ranks.rank)

        return quality_check.judge(job, folder, "cpu", told, ranks=ranks).gates

    shared = in_lockstep(count, lambda ranks: judged(ranks, tmp_path / "again"))
    assert shared == [alone] * count
    assert set(read_by[tmp_path / "again"]) == set(range(min(count, 4)))
    unseen = in_lockstep(count, lambda ranks: judged(ranks, tmp_path / ("once" if ranks.rank == 0 else "nowhere")))
    assert unseen == [alone] * count and set(read_by[tmp_path / "once"]) == {0}
    stale = in_lockstep(count, lambda ranks: judged(ranks, tmp_path / ("stale" if ranks.rank else "beside")))
    assert stale == [alone] * count and set(read_by[tmp_path / "beside"]) == {0}


def test_what_one_process_cannot_read_all_leave_unmeasured(place: Path, tmp_path: Path) -> None:
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place)))
    run.compress(job, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no header")
    found = in_lockstep(
        2, lambda r: quality_check.judge(job, tmp_path / ("damaged" if r.rank else "out"), "cpu", ranks=r).gates
    )
    assert found[0] == found[1] and found[0] is not None
    assert found[0].held is None and str(found[0].unmeasured).startswith("that failed (")


# --- nothing to measure ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"calibration": None}, "the recipe has no calibration text"),
        pytest.param(
            {"calibration": {"samples": 8, "length": 32, "held_out": 0}},
            "none of the calibration text is held out",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"calibration": {"samples": 1, "length": 32}},
            "the calibration text is one sequence, and none is held out",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_measured_is_said(more: dict[str, Any], reason: str, place: Path, tmp_path: Path) -> None:
    report = lc.compress(place / "dense", recipe(place, **more), tmp_path / "out").report
    assert report.gates is not None and report.gates.held is None and report.gates.unmeasured == reason
    assert [warning for warning in report.warnings if reason in warning] == [
        f"gates: the distance to the dense model is not measured, since {reason}"
    ]
    assert push(tmp_path / "out", "me/small", dry_run=True).commit is None
    assert f"gates   not measured: {reason}" in invoke("inspect", tmp_path / "out").stdout


def test_too_little_memory_leaves_it_unmeasured(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_check, "gate_bytes", lambda *_: 10**15)
    report = lc.compress(place / "dense", recipe(place), tmp_path / "out").report
    assert report.gates is not None and str(report.gates.unmeasured).startswith("that takes about 1000000.00 GB")
    assert any("since that takes about" in warning for warning in report.warnings)


def test_it_is_in_the_plan_s_memory_and_time(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose logits are most of what is held."""
    monkeypatch.setattr(time_estimate, "paces", lambda asked, data: dict.fromkeys(asked, Pace({1: 0.0}, 0.0, 0.0)))
    monkeypatch.setattr(time_estimate, "product_speed", lambda dtype: 1e6)
    monkeypatch.setattr(time_estimate, "text_seconds", lambda: 1.0)
    source = resolve(str(save_tiny("llama", tmp_path / "wide", vocab_size=400_000)))
    jobs = [prepare(source, read_recipe(recipe(place, gates=gates))) for gates in ({}, OFF)]
    with_gates, without = (plan_of(job).peak_memory_bytes for job in jobs)
    assert gate_bytes(jobs[0]) == with_gates > without and gate_bytes(jobs[1]) == 0
    seconds = [estimate_time(job).seconds for job in jobs]
    assert seconds[0] > seconds[1]
