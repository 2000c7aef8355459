"""Scores with their noise: standard errors against slow computations, several models in one table, shared work."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from typer.testing import CliRunner

import llmcompress as lc
import llmcompress.evaluation.score
from llmcompress.cli.app import app
from llmcompress.errors import DiskError, EndedError, InputError, RecipeError
from llmcompress.evaluation.evaluate import evaluate_all
from llmcompress.evaluation.lm_eval import TaskScores, _items, run_tasks
from llmcompress.evaluation.local_tasks import PAIRS
from llmcompress.evaluation.processes import Processes
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.uncertainty import paired_difference, stderr
from llmcompress.reporting.tables import comparison_markdown
from tests.rules.source_tree import ROOT
from tests.tiny import save_tiny, tiny, tiny_tokenizer

TABLE = {1: 12.706, 2: 4.3027, 3: 3.1824, 4: 2.7764, 7: 2.3646, 30: 2.0423, 120: 1.9799, 5000: 1.9604}
LIMIT = 30


# --- what chance does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "quantile"), TABLE.items())
def test_differences_are_marked_from_the_quantile_of_students_t_on(degrees: int, quantile: float) -> None:
    items = np.random.default_rng(degrees).normal(0, 1, degrees + 1)
    items -= items.mean()
    error = stderr(list(items))
    assert error is not None
    for share, beyond in ((0.9995, False), (1.0005, True)):
        shifted = list(items + share * quantile * error)
        assert paired_difference([0.0] * len(shifted), shifted).beyond_noise is beyond


@pytest.mark.parametrize("count", [2, 3, 40])
def test_standard_errors_are_those_of_the_jackknife(count: int) -> None:
    values = np.random.default_rng(count).normal(3, 2, count)
    without = np.array([np.delete(values, index).mean() for index in range(count)])
    jackknife = math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    assert math.isclose(stderr(list(values)), jackknife, rel_tol=1e-12)


def test_a_paired_difference_counts_what_the_items_share_once() -> None:
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 5, 30)  # how hard an item is, for both
    one, other = shared + generator.normal(0, 0.1, 30), shared + 0.2 + generator.normal(0, 0.1, 30)
    found = paired_difference(list(one), list(other))
    covariance = np.cov(one, other)
    assert math.isclose(found.value, other.mean() - one.mean(), rel_tol=1e-12)
    expected = math.sqrt((covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / 30)
    assert math.isclose(found.stderr, expected, rel_tol=1e-9)
    assert found.beyond_noise and found.items == 30
    assert stderr(list(one)) > 3 * found.value, "their own error bars overlap widely"


@pytest.mark.parametrize("count", [2, 5, 40])
def test_one_difference_in_twenty_is_marked_where_there_is_none(count: int) -> None:
    draw, trials = random.Random(count), 4000
    values = [[draw.gauss(0, 1) for _ in range(count)] for _ in range(2 * trials)]
    marked = sum(bool(paired_difference(*values[2 * trial : 2 * trial + 2]).beyond_noise) for trial in range(trials))
    assert abs(marked / trials - 0.05) < 4 * math.sqrt(0.05 * 0.95 / trials)


def test_too_little_to_tell() -> None:
    assert stderr([1.0]) is None
    single = paired_difference([1.0], [3.0])
    assert (single.value, single.stderr, single.beyond_noise) == (2.0, None, None)
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).beyond_noise is False
    assert [paired_difference([0.0] * n, [1.0] * n).beyond_noise for n in (2, 5, 6)] == [False, False, True]


# --- what lm-eval gives ---------------------------------------------------------------------------------------------


def sample(number: int, kind: str = "none", **metrics: Any) -> dict[str, Any]:
    return {"doc_id": number, "filter": kind, **metrics}


def test_items_are_those_that_a_metric_is_the_mean_of() -> None:
    results = {
        "results": {
            "a": {"acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.7, "sample_len": 2},
            "b": {"acc,none": 1.0, "match,strict": 0.0, "match,loose": 1.0},
            "both": {"acc,none": 2 / 3},
            "all": {"acc,none": 2 / 3},
        },
        "group_subtasks": {"both": ["a", "b"], "all": ["both"]},
        "samples": {
            "a": [sample(0, acc=0.0, f1=(0, 1)), sample(1, acc=1.0, f1=(1, 1))],
            "b": [sample(0, acc=True), sample(0, "strict", match=0.0), sample(0, "loose", match=1.0)],
        },
    }
    both = {("a", 0): 0.0, ("a", 1): 1.0, ("b", 0): 1.0}
    assert _items(results) == {
        "a": {"acc": {("a", 0): 0.0, ("a", 1): 1.0}},
        "b": {"acc": {("b", 0): 1.0}, "match,strict": {("b", 0): 0.0}, "match,loose": {("b", 0): 1.0}},
        "both": {"acc": both},
        "all": {"acc": both},
    }
    results["results"]["both"]["acc,none"] = 0.75  # tasks weighed alike: no mean over items
    assert "both" not in _items(results)


@pytest.mark.slow
def test_prompts_can_be_chats() -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny("llama", max_position_embeddings=1024), tiny_tokenizer()
    protocol = Protocol(tasks=(PAIRS,), limit=1, chat_template=True)
    [sample] = run_tasks(model, tokenizer, protocol).results["samples"][PAIRS]
    assert sample["arguments"][0][0].endswith("assistant\n")
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        run_tasks(model, tokenizer, protocol)


def test_a_task_that_fails_in_one_of_several_processes_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, what was scored besides stands; others would wait in exchanges of lm-eval."""

    def fail(*_: Any) -> Any:
        raise ValueError("odd item")

    monkeypatch.setattr("llmcompress.evaluation.lm_eval._run", fail)
    nothing: Any = object()
    protocol = Protocol(tasks=(PAIRS,))
    assert "odd item" in str(run_tasks(nothing, nothing, protocol, tasks=nothing).failure)
    with pytest.raises(InputError, match="odd item"):
        run_tasks(nothing, nothing, protocol, Processes("cpu", 1, 2), nothing)

    def lose(*_: Any) -> Any:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    monkeypatch.setattr("llmcompress.evaluation.lm_eval._run", lose)
    with pytest.raises(EndedError, match="another process of this run has ended"):
        run_tasks(nothing, nothing, protocol, Processes("cpu", 0, 2), nothing)


# --- models beside the first ----------------------------------------------------------------------------------------


def reader(seed: int = 0, noise: float = 0.0) -> PreTrainedModel:
    """A tiny model that can read a whole sentence of bytes, its head disturbed by `noise`."""
    model = tiny("llama", seed=seed, max_position_embeddings=1024)
    head = model.get_output_embeddings().weight
    head.data.add_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)) * noise)
    return model


@pytest.mark.slow
def test_the_same_is_not_marked_and_ruins_are() -> None:
    pytest.importorskip("lm_eval")
    protocol = Protocol(windows=6, length=64, tasks=(PAIRS,), limit=LIMIT)
    loads: list[Callable[[], PreTrainedModel]] = [reader, lambda: reader(noise=2.0)]
    first, same, ruin = evaluate_all(reader(), loads, tiny_tokenizer(), protocol)
    assert same.to_json() == first.to_json()
    found = same.differences(first)
    for change in (found["nll"], found["tasks"][PAIRS]["acc"]):
        assert (change["value"], change["beyond_noise"]) == (0.0, False)
    found = ruin.differences(first)
    assert found["nll"]["beyond_noise"] and found["nll"]["items"] == 6
    assert math.isclose(found["nll"]["value"], math.log(ruin.perplexity.value / first.perplexity.value), rel_tol=1e-9)
    # neither knows any grammar: by McNemar's counts of the items that one gets and the other does not
    wanted, given = (list(one.tasks.items[PAIRS]["acc"].values()) for one in (first, ruin))
    lost, won = (sum(pair == asked for pair in zip(wanted, given)) for asked in ((1.0, 0.0), (0.0, 1.0)))
    spread = ((won + lost) / LIMIT - ((won - lost) / LIMIT) ** 2) / (LIMIT - 1)
    change = found["tasks"][PAIRS]["acc"]
    assert lost and won, "the models agree on everything"
    assert math.isclose(change["value"], (won - lost) / LIMIT, abs_tol=1e-12)
    assert math.isclose(change["stderr"], math.sqrt(spread))
    assert not change["beyond_noise"]


def test_two_models_are_in_memory_at_a_time() -> None:
    alive: list[weakref.ref[PreTrainedModel]] = []

    def load() -> PreTrainedModel:
        assert sum(one() is not None for one in alive) == 0
        model = reader(len(alive))
        alive.append(weakref.ref(model))
        return model

    assert len(evaluate_all(reader(), [load] * 3, tiny_tokenizer(), Protocol(windows=1, length=16))) == 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `dense` model, a `small` one made from it, and one with `other` tokens."""
    place = tmp_path_factory.mktemp("models")
    save_tiny("llama", place / "dense", max_position_embeddings=1024)
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]
    lc.compress(str(place / "dense"), {"version": 1, "rules": rules}, place / "small")
    save_tiny("llama", place / "other", tokenizer=False, max_position_embeddings=1024)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(place / "other")
    return place


@pytest.mark.slow
def test_models_by_name_make_one_table(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    protocol = Protocol(windows=3, length=48)
    found = lc.compare(["dense", "small", "dense"], protocol, output=tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text()) == found
    assert list(tmp_path.iterdir()) == [tmp_path / "all.json"]
    dense, small, again = found["models"]
    alone = lc.score("small", protocol, against="dense")
    assert alone == {name: small[name] for name in alone.keys() - {"protocol"}} | {"protocol": found["protocol"]}
    assert found["protocol"] == alone["protocol"] == protocol.to_json() | {"bos": True}
    assert (dense["differences"], again["differences"]["nll"]["value"]) == (None, 0.0)
    assert [row["model"] for row in found["models"]] == ["dense", "small", "dense"]
    found = lc.compare(["dense", "small"], protocol, output=str(tmp_path / "table.md"))
    assert (tmp_path / "table.md").read_text() == comparison_markdown(found)


def test_comparisons_that_cannot_be_made(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders)
    monkeypatch.setattr(llmcompress.evaluation.score, "open_model", lambda *given: pytest.fail("noticed too late"))
    (tmp_path / "there.md").touch()
    for models, output, kind, message in (
        (["dense"], None, RecipeError, "two models or more"),
        (["dense", "other"], None, InputError, "^dense and other have different vocabularies: token 258"),
        (["dense", "small"], "table.txt", RecipeError, "as .md or .json, not as table.txt"),
        (["dense", "small"], "there.md", DiskError, "exists already"),
        (["dense", "small"], "none/table.md", DiskError, "there is no folder"),
    ):
        with pytest.raises(kind, match=message):
            lc.compare(models, Protocol(windows=1, length=16), output=output and str(tmp_path / output))
    with pytest.raises(DiskError, match="there.md exists already"):
        lc.score("small", output=str(tmp_path / "there.md"))


@pytest.mark.slow
def test_what_another_tool_quantized_is_scored_beside_ours(folders: Path, tmp_path: Path) -> None:
    """Here bitsandbytes' 4-bit floats; it reads whatever transformers does, and counts every stored tensor."""
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    dense = save_tiny("llama", tmp_path / "dense", tie_word_embeddings=True, hidden_size=64, intermediate_size=128)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=asked).save_pretrained(tmp_path / "nf4")
    tiny_tokenizer().save_pretrained(tmp_path / "nf4")
    found = lc.compare([dense, tmp_path / "nf4"], Protocol(windows=2, length=32))
    plain, quantized = found["models"]
    assert 0 < quantized["kl"] < 1 and quantized["perplexity"] != plain["perplexity"]
    weights = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128)
    stored = load_file(tmp_path / "nf4" / "model.safetensors")
    held = sum(value.numel() * value.element_size() for name, value in stored.items() if "_proj" in name)
    assert quantized["bpw"] == held * 8 / weights > 4.5
    size = (tmp_path / "nf4" / "model.safetensors").stat().st_size
    assert quantized["bytes"] == size
    assert quantized["model_bpw"] / plain["model_bpw"] == pytest.approx(size / plain["bytes"])


# --- results in a folder, and by several processes ------------------------------------------------------------------


def raising(*given: Any) -> None:
    """A full disk."""
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_a_failure_leaves_no_results(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    protocol = Protocol(windows=1, length=16, tasks=(PAIRS,), limit=2)
    with monkeypatch.context() as patch:
        patch.setattr(TaskScores, "save", raising)
        with pytest.raises(DiskError, match="No space left"):
            lc.score(folders / "dense", protocol, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:  # lm-eval itself only warns
        patch.setattr("lm_eval.loggers.evaluation_tracker.handle_non_serializable", raising)
        with pytest.raises(DiskError, match="lm-eval could not write all of its files"):
            lc.score(folders / "dense", protocol, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(DiskError, match="exists already"):
        lc.score(folders / "dense", protocol, output=tmp_path / "out")


@pytest.mark.nightly
def test_two_processes_find_what_one_finds(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` on the command line, for a compressed and a dense model at once."""
    pytest.importorskip("lm_eval")
    words = ["eval", "small", "--against", "dense", "--windows", "5", "--length", "64", "--tasks", PAIRS]
    words += ["--limit", "41", "--json", "-o"]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    two = subprocess.run(
        [sys.executable, *launcher, "-m", "llmcompress", *words, str(tmp_path / "two")],
        cwd=folders,
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0, two.stderr
    monkeypatch.chdir(folders)
    before = dict(PartialState._shared_state)
    one = CliRunner().invoke(app, [*words, str(tmp_path / "one")])
    assert PartialState._shared_state == before and not torch.distributed.is_initialized(), "alone, there is no group"
    alone, together = json.loads(one.stdout), json.loads(two.stdout)
    tasks = alone.pop("tasks"), together.pop("tasks")
    assert tasks[0] == tasks[1] and tasks[0][PAIRS]["samples"] == 41
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert together[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), name
    written = ["eval.json", "manifest.json", "small/results_DATE.json", f"small/samples_{PAIRS}_DATE.jsonl"]
    assert files(tmp_path / "one") == files(tmp_path / "two") == written
    once, shared = (item_lines(tmp_path / run) for run in ("one", "two"))
    assert once == sorted(shared)
    assert [number for number, _ in shared] == [*range(0, 41, 2), *range(1, 41, 2)], "each had every second item"


def files(folder: Path) -> list[str]:
    """Every file below a folder, without the date in its name."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(re.sub(r"_\d{4}-.*\.", "_DATE.", name) for name in names)


def item_lines(folder: Path) -> list[tuple[int, float]]:
    """(number, accuracy) of the items in lm-eval's samples file."""
    [path] = folder.glob("*/samples_*.jsonl")
    return [(row["doc_id"], row["acc"]) for row in map(json.loads, path.read_text().splitlines())]


def test_shares_are_all_of_the_windows_in_order() -> None:
    ids = torch.arange(14).reshape(7, 2)
    for count in (1, 3, 7, 9):
        shares = [Processes("cpu", rank, count).share(ids) for rank in range(count)]
        assert torch.equal(torch.cat(shares), ids)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
