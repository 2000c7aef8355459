"""Several processes compress what one compresses; they resume, and end together, in one sentence, if one of them ends.

In the fast tests processes are threads that take turns.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import llmcompress as lc
from llmcompress.compression import run
from llmcompress.compression.job import prepare
from llmcompress.compression.result import Result
from llmcompress.compression.run_files import FINISHED
from llmcompress.errors import LLMCompressError, RecipeError
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.verify import verify
from llmcompress.models.dense.model import resolve
from llmcompress.pipeline.frontier import PRICES, frontier, sweep
from llmcompress.pipeline.frontier_inputs import budgets
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.read import dump, read_recipe
from llmcompress.runtime.ranks import Ranks
from tests.distillation.launched import free_port
from tests.lockstep import in_lockstep
from tests.rules.source_tree import ROOT
from tests.tiers import tiered, tiered_nightly
from tests.tiny import save_tiny
from tests.zoo import save_zoo

DEPTH = 4
TEXT = "Forty farms bring their corn to the mill by the river, and the miller counts every sack of it. "
GPTQ = {"method": "gptq", "bits": 3, "group_size": 8}
STOP_WITHIN = 60  # seconds
together: Callable[..., Result] = inspect.unwrap(run.compress)  # what holds it back is one thread at a time


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of four blocks, a mixture, and a text."""
    folder = tmp_path_factory.mktemp("processes")
    save_tiny("llama", folder / "dense", num_hidden_layers=DEPTH, tie_word_embeddings=False)
    save_zoo("mixtral", folder / "mixtral")
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return folder


def recipe(place: Path, **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(place / "text.txt"), "samples": 9, "length": 32, "held_out": 2}
    rules = [{"match": "*", "steps": [GPTQ]}]
    return {"version": 1, "name": "test", "calibration": calibration, "rules": rules} | more


def compressed(place: Path, asked: dict[str, Any], out: Path, count: int, model: str = "dense") -> list[Result]:
    """Results of a run in threads that take turns."""
    job = prepare(resolve(str(place / model)), read_recipe(asked))
    return in_lockstep(count, lambda ranks: together(job, out, ranks=ranks))


def check_alike(one: Path, other: Path, dense: Path, text: Path) -> None:
    """The same layers, sizes and tensors, and predictions that differ by rounding alone.

    Where one code of these small matrices goes the other way, a layer's error moves by a tenth, either way. Without one
    of the sequences, a fifth of the stored bytes differ.
    """
    verify(other, text=text, length=16)
    a, b = (json.loads((folder / "report.json").read_text())["layers"] for folder in (one, other))
    for here, there in zip(a, b, strict=True):
        assert here["name"] == there["name"] and here["bpw"] == there["bpw"]
        assert here["error"] == pytest.approx(there["error"], rel=0.4)
    assert sum(here["error"] for here in a) == pytest.approx(sum(there["error"] for there in b), rel=0.03)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert {name: value.shape for name, value in first.items()} == {name: v.shape for name, v in second.items()}
    same = sum(int((first[name] == second[name]).sum()) for name in first) / sum(v.numel() for v in first.values())
    assert same > 0.85, "a code that lies between two may go the other way"
    scores = [lc.score(folder, Protocol(text, 4, 32), against=dense) for folder in (one, other)]
    assert scores[0]["perplexity"] == pytest.approx(scores[1]["perplexity"], rel=0.01)
    assert scores[0]["kl"] == pytest.approx(scores[1]["kl"], rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("count", tiered([2, 3], lambda count: count == 2))
def test_threads_compress_what_one_compresses(count: int, place: Path, tmp_path: Path) -> None:
    asked = recipe(place, asymmetric=0.5, head=[{"method": "gptq", "bits": 4, "group_size": 8}])
    alone = lc.compress(place / "dense", asked, tmp_path / "alone")
    found = compressed(place, asked, tmp_path / "out", count)
    check_alike(alone.folder, tmp_path / "out", place / "dense", place / "text.txt")
    assert [each.report.to_json() for each in found] == [found[0].report.to_json()] * count
    assert found[0].report.calibration is not None and found[0].report.calibration["processes"] == count
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]
    again = compressed(place, asked, tmp_path / "again", count)
    assert (again[0].folder / "model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


@pytest.mark.slow
def test_experts_that_no_process_sees_alone(place: Path, tmp_path: Path) -> None:
    asked = recipe(place)
    alone = lc.compress(place / "mixtral", asked, tmp_path / "alone")
    found = compressed(place, asked, tmp_path / "out", 3, "mixtral")[0]
    check_alike(alone.folder, found.folder, place / "mixtral", place / "text.txt")
    assert [row.starved for row in found.report.layers] == [row.starved for row in alone.report.layers]


OTHERS: dict[str, dict[str, Any]] = {"awq": {"fuse": {"awq": True}}, "without data": {"calibration": None}}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_recipes_too(name: str, place: Path, tmp_path: Path) -> None:
    asked = OTHERS[name]
    rtn = {"rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 8}]}]}
    alone = lc.compress(place / "dense", recipe(place, **rtn, **asked), tmp_path / "alone")
    found = compressed(place, recipe(place, **rtn, **asked), tmp_path / "out", 2)
    check_alike(alone.folder, found[0].folder, place / "dense", place / "text.txt")


LEARNING: dict[str, dict[str, Any]] = {
    "scales": {"rates": {"scales": 1e-3, "norms": 1e-3}, "batch": 2},
    "weights": {"rates": {"scales": 1e-3, "weights": 1e-3}},
    "pairs": {"rates": {"scales": 1e-3}, "window": 2, "batch": 3, "steps": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", tiered(LEARNING, lambda name: name == "weights"))
def test_blocks_learn_in_threads_what_they_learn_in_one(name: str, place: Path, tmp_path: Path) -> None:
    """With fewer held-out sequences than processes."""
    asked = recipe(place, reconstruct=LEARNING[name] | {"evaluate_every": 2})
    asked["calibration"] |= {"held_out": 1}
    alone = lc.compress(place / "dense", asked, tmp_path / "alone")
    found = compressed(place, asked, tmp_path / "out", 2)
    check_alike(alone.folder, found[0].folder, place / "dense", place / "text.txt")
    here, there = alone.report.blocks, found[0].report.blocks
    assert list(here) == list(there) and all(block["after"] < block["before"] for block in there.values())
    for which in ("before", "after"):
        losses = [[blocks[path][which] for path in here] for blocks in (here, there)]
        assert losses[1] == pytest.approx(losses[0], rel=0.3), "codes that went the other way move later blocks most"
        assert sum(losses[1]) == pytest.approx(sum(losses[0]), rel=0.1)


@pytest.mark.parametrize("counts", tiered_nightly([(2, 2), (2, 3), (2, 1), (1, 2)], (2, 3).__eq__))
def test_runs_resume_in_any_number_of_processes(counts: tuple[int, int], place: Path, tmp_path: Path) -> None:
    """Of the same number, bit for bit."""
    asked = recipe(place, asymmetric=0.5)
    job = prepare(resolve(str(place / "dense")), read_recipe(asked))
    whole = in_lockstep(counts[1], lambda ranks: together(job, tmp_path / "whole", ranks=ranks))[0]

    def cut(ranks: Ranks) -> None:
        def stop(done: int, *_: Any) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as raised:
            together(job, tmp_path / "out", ranks=ranks, progress=stop)
        kept = ["2 finished blocks are kept in " + f"{tmp_path / 'out.partial'}, from where the same command resumes"]
        assert getattr(raised.value, "__notes__", []) == (kept if ranks.rank == 0 else [])

    in_lockstep(counts[0], cut)
    done = in_lockstep(counts[1], lambda ranks: together(job, tmp_path / "out", ranks=ranks))[0]
    assert f"2 of {DEPTH} blocks and tables are from an earlier run, which was interrupted" in done.report.warnings
    assert not list(tmp_path.glob("out.*"))
    if counts[0] == counts[1]:
        assert (tmp_path / "out/model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    else:
        check_alike(whole.folder, done.folder, place / "dense", place / "text.txt")


@pytest.mark.slow
def test_a_finished_run_is_found_by_all(place: Path, tmp_path: Path) -> None:
    compressed(place, recipe(place), tmp_path / "out", 2)
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place)))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".llmcompress").touch()  # the end came before it was removed
    found = in_lockstep(2, lambda ranks: together(job, tmp_path / "out", ranks=ranks))
    assert found[0].report == found[1].report and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_processes_that_were_started_differently_say_in_what(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "dense", tmp_path / "other")
    save_tiny("llama", tmp_path / "other", seed=1, num_hidden_layers=DEPTH, tie_word_embeddings=False)
    own = prepare(resolve(str(place / "dense")), read_recipe(recipe(place)))
    recipes = prepare(resolve(str(place / "dense")), read_recipe(recipe(place, seed=5)))
    models = prepare(resolve(str(tmp_path / "other")), read_recipe(recipe(place)))
    for other, what in ((recipes, "recipe"), (models, "the model's weights")):

        def work(ranks: Ranks, other: Any = other, what: str = what) -> None:
            with pytest.raises(RecipeError, match=f"process 1 of 2 was started with other {what} than process 0"):
                together(other if ranks.rank else own, tmp_path / "out", ranks=ranks)

        in_lockstep(2, work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"], "nothing is left"


@pytest.mark.parametrize(
    "more, output, sentence",
    [
        ({"distill": {"data": {"samples": 8, "length": 32}}}, "out", "2 processes compress, but do not train after it"),
        ({}, None, "2 processes write one checkpoint; name a folder for it"),
    ],
)
def test_what_processes_cannot_share_is_refused(
    more: dict[str, Any], output: str | None, sentence: str, place: Path, tmp_path: Path
) -> None:
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place, **more)))

    def work(ranks: Ranks) -> None:
        with pytest.raises(RecipeError, match=sentence):
            together(job, output and tmp_path / output, ranks=ranks)

    in_lockstep(2, work)
    assert not list(tmp_path.iterdir())


def line_of(place: Path, **more: Any) -> list[Recipe]:
    """The recipe of a sweep."""
    options = [[{"method": "gptq", "bits": bits, "group_size": 8}] for bits in (2, 4)]
    return [read_recipe(recipe(place, rules=[], target={"bpw": 4}, options=options, **more))]


@pytest.mark.slow
def test_threads_sweep_what_one_sweeps(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices number for number, and so the same plans; what is finished is not repeated."""
    recipes, sizes, protocol = line_of(place), budgets("4.5", None), Protocol(place / "text.txt", 4, 32)
    monkeypatch.setattr(run, "compress", together)
    source = resolve(str(place / "dense"))

    def swept(ranks: Ranks) -> dict[str, Any]:
        name = "alone" if ranks.count == 1 else "out"
        return sweep(source, recipes, sizes, tmp_path / name, protocol, ranks=ranks)

    [alone], found = in_lockstep(1, swept), in_lockstep(2, swept)
    assert found[0] == found[1]
    lists = [json.loads((tmp_path / name / PRICES).read_text())["matrices"] for name in ("alone", "out")]
    assert lists[0] == lists[1] and len(lists[0]) == DEPTH * 7
    assert found[0]["dense"] == alone["dense"]
    [one], [two] = (each["series"][0]["points"] for each in (alone, found[0]))
    assert all(one[key] == two[key] for key in ("budget", "bytes", "bpw", "predicted_kl"))
    check_alike(tmp_path / "alone/bpw-4.5", tmp_path / "out/bpw-4.5", place / "dense", place / "text.txt")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("alone", "out")]
    assert files[0] == files[1]
    monkeypatch.delattr(run, "compress")
    assert in_lockstep(2, swept) == found


def test_a_sweep_of_what_processes_cannot_share_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    training = {"distill": {"data": {"samples": 8, "length": 32}}}
    source, recipes = resolve(str(place / "dense")), line_of(place, **training)

    def work(ranks: Ranks) -> None:
        with pytest.raises(RecipeError, match="2 processes compress, but do not train after it"):
            sweep(source, recipes, budgets("4", None), tmp_path / "out", ranks=ranks)

    in_lockstep(2, work)
    assert not list(tmp_path.iterdir())


def test_sweeps_that_were_started_differently_say_in_what(place: Path, tmp_path: Path) -> None:
    source, protocol = resolve(str(place / "dense")), Protocol(place / "text.txt", 4, 32)
    usual: dict[str, Any] = {"recipes": line_of(place), "sizes": budgets("4", None), "protocol": protocol}
    others: dict[str, dict[str, Any]] = {
        "recipes": {"recipes": line_of(place, seed=5)},
        "budgets": {"sizes": budgets("4,4.5", None)},
        "text or tasks": {"protocol": Protocol(place / "text.txt", 3, 32)},
    }
    for what, other in others.items():

        def work(ranks: Ranks, other: dict[str, Any] = other, what: str = what) -> None:
            with pytest.raises(RecipeError, match=f"process 1 of 2 was started with other {what} than process 0"):
                sweep(source, output=tmp_path / "out", ranks=ranks, **(usual | (other if ranks.rank else {})))

        in_lockstep(2, work)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_first_process_is_one_of_all(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place)))

    def work(ranks: Ranks) -> None:
        with pytest.raises(LLMCompressError, match="precious|exists already|no report") as raised:
            together(job, tmp_path / "out", ranks=ranks)
        assert raised.value.reported_elsewhere == (ranks.rank > 0)

    in_lockstep(2, work)


# --- real processes ---------------------------------------------------------------------------------------------------


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
STOPPED = """
import os, signal, sys
from llmcompress.cli import app, terminal

rank, after = map(int, sys.argv.pop(1).split(":"))
shown = terminal.Terminal.progress

def progress(self, done, total, rate):
    shown(self, done, total, rate)
    if done == after and os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), signal.SIGKILL)

terminal.Terminal.progress = progress
app.main()
"""


def launch(words: list[str], launcher: str = "torch.distributed.run") -> subprocess.CompletedProcess[str]:
    """Run `llmcompress` in two processes."""
    start = {
        "torch.distributed.run": ["--nproc-per-node", "2", "--master-port", str(free_port())],
        "accelerate.commands.launch": ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    }[launcher]
    line = [sys.executable, "-m", launcher, *start, "-m", "llmcompress", *words]
    return subprocess.run(line, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_two_processes_compress_what_one_compresses(place: Path, tmp_path: Path) -> None:
    asked = recipe(place, asymmetric=0.5)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    alone = lc.compress(place / "dense", asked, tmp_path / "alone")
    words = ["compress", str(place / "dense"), str(tmp_path / "recipe.yaml")]
    for number, launcher in enumerate(("torch.distributed.run", "accelerate.commands.launch")):
        done = launch([*words, "-o", str(tmp_path / f"{number}"), "--json"], launcher)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["calibration"]["processes"] == 2, "one of them speaks"
    check_alike(alone.folder, tmp_path / "0", place / "dense", place / "text.txt")
    threads = compressed(place, asked, tmp_path / "threads", 2)[0].folder
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "0", tmp_path / "1", threads)]
    assert weights[0] == weights[1] == weights[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "alone", "recipe.yaml", "threads"]


@pytest.mark.nightly
def test_two_processes_price_what_one_prices(place: Path, tmp_path: Path) -> None:
    """The same list, number for number, and so the same plan.

    Prices of tables are as near as trellises, their default options, whose paths a last bit of an input can turn.
    """
    grids = [[{"method": "gptq", "bits": bits}] for bits in (2, 3, 4)]
    entries: dict[str, Any] = recipe(place, rules=[], target={"bytes": "60KB"}, options=grids)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(entries))
    alone = lc.compress(place / "dense", entries, tmp_path / "alone")
    words = ["compress", str(place / "dense"), str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "two"), "--json"]
    done = launch(words)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "allocation.json").read_text()) for name in ("alone", "two"))
    lists = [[each for each in found["matrices"] if not each["is_table"]] for found in (one, two)]
    assert lists[0] == lists[1] and len(lists[0]) == DEPTH * 7
    tables = [[each for each in found["matrices"] if each["is_table"]] for found in (one, two)]
    assert [len(each) for each in tables] == [2, 2]
    for here, elsewhere in zip(*tables, strict=True):
        assert here["chosen"] == elsewhere["chosen"]
        for offer, other in zip(here["offers"], elsewhere["offers"], strict=True):
            assert offer["bytes"] == other["bytes"] and offer["error"] == pytest.approx(other["error"], rel=0.02)
    assert json.loads(done.stdout)["allocation"]["measured_kl"] == pytest.approx(one["measured_kl"], rel=0.2)
    check_alike(alone.folder, tmp_path / "two", place / "dense", place / "text.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "recipe.yaml", "two"]


@pytest.mark.nightly
def test_two_processes_sweep_what_one_sweeps(place: Path, tmp_path: Path) -> None:
    recipes, protocol = line_of(place), Protocol(place / "text.txt", 4, 32)
    (tmp_path / "recipe.yaml").write_text(dump(recipes[0]))
    words = ["frontier", str(place / "dense"), str(tmp_path / "recipe.yaml"), "--bpw", "4,4.5", "--json"]
    words += ["--text", str(place / "text.txt"), "--windows", "4", "--length", "32", "-o", str(tmp_path / "two")]
    done = launch(words)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = frontier(place / "dense", recipes, budgets("4,4.5", None), tmp_path / "alone", protocol)
    lists = [json.loads((tmp_path / name / PRICES).read_text())["matrices"] for name in ("alone", "two")]
    assert lists[0] == lists[1]
    said = json.loads(done.stdout)
    assert said["dense"]["perplexity"] == pytest.approx(alone["dense"]["perplexity"], rel=1e-6)
    assert len(said["series"][0]["points"]) == 2
    for name in ("bpw-4", "bpw-4.5"):
        check_alike(tmp_path / "alone" / name, tmp_path / "two" / name, place / "dense", place / "text.txt")


@pytest.mark.parametrize("dies", tiered_nightly([0, 1], lambda dies: dies == 1))
def test_the_others_stop_if_one_dies(dies: int, place: Path, tmp_path: Path) -> None:
    """Killed without a word after two blocks; nobody but the other process notices, since no launcher looks on."""
    asked = recipe(place)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked))
    (tmp_path / "stopped.py").write_text(STOPPED)
    out, port = tmp_path / "out", str(free_port())
    words = [f"{dies}:2", "compress", str(place / "dense"), str(tmp_path / "recipe.yaml"), "-o", str(out)]
    started = []
    for rank in map(str, range(2)):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        line = [sys.executable, str(tmp_path / "stopped.py"), *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(line, env=os.environ | ENVIRONMENT | own, **pipes))
    try:
        started[dies].wait(300)
        died = time.monotonic()
        _, said = started[1 - dies].communicate(timeout=STOP_WITHIN)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert time.monotonic() - died < STOP_WITHIN and started[1 - dies].returncode == 1
    [sentence] = [line for line in said.splitlines() if line.startswith("[1]")]
    assert "another process of this run has ended, and so does this one" in sentence and "Traceback" not in said
    assert ("finished blocks are kept in" in sentence) == (dies == 1), "the first one knows"
    assert len(list((tmp_path / "out.partial" / FINISHED).glob("block-*.json"))) >= 2
    job = prepare(resolve(str(place / "dense")), read_recipe(asked))
    resumed = in_lockstep(2, lambda ranks: together(job, out, ranks=ranks))[0]
    assert any("are from an earlier run, which was interrupted" in line for line in resumed.report.warnings)
    whole = compressed(place, asked, tmp_path / "whole", 2)[0]
    assert (out / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
