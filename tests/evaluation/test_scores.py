"""Scores equal slow float64 computations, and lm-eval runs offline without leaving traces."""

from __future__ import annotations

import collections
import copy
import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.data.builtin import stdlib_text
from llmcompress.errors import DiskError, InputError, NumericsError, RecipeError
from llmcompress.evaluation.distance import Distance, distance
from llmcompress.evaluation.evaluate import evaluate, evaluate_all
from llmcompress.evaluation.lm_eval import TaskScores, _scores, run_tasks
from llmcompress.evaluation.local_tasks import PAIRS, PAIRS_FILE
from llmcompress.evaluation.perplexity import POSITIONS, perplexity, text_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.score import compare, score
from llmcompress.reporting.tables import score_rows
from tests.tiny import VOCABULARY, save_tiny, tiny, tiny_tokenizer

TEXT = "Some plain text for windows, long enough for a few of them. " * 20


def reader(seed: int = 0) -> PreTrainedModel:
    """A tiny model that can read a whole sentence of bytes."""
    return tiny("llama", seed=seed, max_position_embeddings=1024)


def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(ids).logits.log_softmax(-1)


# --- perplexity -------------------------------------------------------------------------------------------------


def test_windows_are_the_text_tokenized_once() -> None:
    whole = tiny_tokenizer()(TEXT, add_special_tokens=False).input_ids
    ids = text_windows(tiny_tokenizer(), TEXT, windows=3, length=50)
    assert ids[:, 1:].flatten().tolist() == whole[: 3 * 49], "behind BOS"
    assert text_windows(tiny_tokenizer(), TEXT, windows=10**6, length=50).shape == (len(whole) // 49, 50)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_equals_the_definition(batch_size: int) -> None:
    model, ids = reader(), text_windows(tiny_tokenizer(), TEXT * 3, windows=3, length=POSITIONS + 44)
    measured = perplexity(model, ids, batch_size)
    logs = log_probabilities(model, ids)
    nll = -sum(float(logs[w, i, ids[w, i + 1]]) for w in range(3) for i in range(ids.shape[1] - 1))
    assert measured.tokens == 3 * (POSITIONS + 43)
    assert math.isclose(measured.nll, nll / measured.tokens, rel_tol=1e-6)
    assert math.isclose(measured.value, math.exp(measured.nll))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = reader()
    model.get_output_embeddings().weight.data.zero_()
    assert math.isclose(perplexity(model, torch.randint(0, 256, (2, 16))).value, VOCABULARY, rel_tol=1e-6)


def test_nan_is_an_error_not_a_score() -> None:
    model = reader()
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="NaN"):
        perplexity(model, torch.randint(0, 256, (1, 8)))


def test_windows_that_cannot_be_cut() -> None:
    with pytest.raises(InputError, match="has 3 tokens, less than one window of 8"):
        text_windows(tiny_tokenizer(), "abc", windows=1, length=8)
    with pytest.raises(RecipeError, match="context of 64"):
        text_windows(tiny_tokenizer(), TEXT, 1, 65, reader().config, tiny("llama").config)
    with pytest.raises(RecipeError, match="at least one window"):
        text_windows(tiny_tokenizer(), TEXT, windows=0, length=8)


# --- distance ----------------------------------------------------------------------------------------------------


def test_a_model_does_not_differ_from_itself() -> None:
    model = reader()
    found = distance(model, copy.deepcopy(model), torch.randint(0, 256, (2, 40)))
    assert found == Distance.to_itself(found.teacher)
    assert (found.kl, found.top1_agreement, found.teacher.tokens) == (0.0, 1.0, 78)


def test_distance_equals_the_definition() -> None:
    ids = torch.randint(0, 256, (3, 4 * POSITIONS + 10), generator=torch.Generator().manual_seed(0))
    teacher, student = reader(0), reader(1)
    found = distance(teacher, student, ids, batch_size=2)
    alone = perplexity(teacher, ids), perplexity(student, ids)
    p, q = (log_probabilities(model, ids)[:, :-1] for model in (teacher, student))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())  # KL(teacher || student)
    assert math.isclose(found.kl, divergence, rel_tol=1e-5)
    assert not math.isclose(found.kl, float((q.exp() * (q - p)).sum(-1).mean()), rel_tol=1e-4)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    assert math.isclose(found.top1_agreement, float(agreement.mean()))
    assert math.isclose(found.top1_agreement_stderr, float(agreement.std() / math.sqrt(3)))
    assert (found.teacher, found.student) == alone


def test_a_path_in_a_text_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(tmp_path / "text.txt"), "~/text.txt"):
        found = evaluate(reader(), tiny_tokenizer(), Protocol(path, windows=2, length=32))
        assert found.to_json() == evaluate(reader(), tiny_tokenizer(), Protocol(TEXT, windows=2, length=32)).to_json()
    assert list(Protocol(domains="~").by_domain()) == ["text"]


def test_one_name_in_place_of_several_is_refused() -> None:
    calls: list[Callable[[], object]] = [
        lambda: Protocol(tasks="piqa"),  # type: ignore[arg-type]
        lambda: lc.compare("small"),
        lambda: lc.compare(Path("small")),  # type: ignore[arg-type]
        lambda: lc.bench("small", lc.SpeedProtocol(threads=(1,))),
        lambda: lc.passport("small", "adapter", "dense"),
    ]
    for call in calls:
        with pytest.raises(RecipeError, match=r"is one name, '\w+', where a list of them is needed"):
            call()


# --- one call for everything ------------------------------------------------------------------------------------


def test_evaluate_has_the_promised_keys(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    alone = evaluate(reader(), tiny_tokenizer(), Protocol(path, windows=2, length=32)).to_json()
    assert set(alone) == {"tokens", "tasks", "calibration_error", "domains"} | {
        name + error for name in ("perplexity", "kl", "top1_agreement") for error in ("", "_stderr")
    }
    assert (alone["tokens"], alone["tasks"], alone["kl"], alone["top1_agreement"]) == (62, {}, None, None)
    assert alone["perplexity_stderr"] > 0


@pytest.mark.slow
def test_both_ways_to_compare_agree_and_read_the_standard_library_by_default() -> None:
    dense, other, tokenizer, protocol = reader(0), reader(1), tiny_tokenizer(), Protocol(windows=2, length=48)
    both = [one.to_json() for one in evaluate_all(dense, [lambda: other], tokenizer, protocol)]
    assert both[0] == evaluate(dense, tokenizer, protocol, against=dense).to_json()
    assert both[1] == evaluate(other, tokenizer, protocol, against=dense).to_json()
    text = evaluate(dense, tokenizer, Protocol(stdlib_text("test"), windows=2, length=48))
    assert both[0]["perplexity"] == text.perplexity.value
    assert json.loads(json.dumps(both)) == both


def test_each_kind_of_text_is_scored_as_alone(tmp_path: Path) -> None:
    dense, other, tokenizer = reader(0), reader(1), tiny_tokenizer()
    for name, text in (("letters", TEXT[::-1]), ("numbers", "0123456789 " * 40)):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "._letters.txt").write_bytes(b"\x00\x05\x16\x07")  # beside each file on a Mac's disks
    protocol = Protocol(TEXT, windows=2, length=32, domains=str(tmp_path))
    assert protocol.to_json()["domains"] == ["letters", "numbers"]
    own, found = (one.to_json() for one in evaluate_all(dense, [lambda: other], tokenizer, protocol))
    assert found == evaluate(other, tokenizer, protocol, against=dense).to_json()
    for name, scores in found["domains"].items():
        alone = Protocol(tmp_path / f"{name}.txt", windows=2, length=32)
        assert scores == evaluate(other, tokenizer, alone, against=dense).texts[None].to_json()
        assert own["domains"][name] == evaluate(dense, tokenizer, alone, against=dense).texts[None].to_json()
        without = evaluate(other, tokenizer, protocol).to_json()["domains"][name]
        assert without == scores | dict.fromkeys(("kl", "kl_stderr", "top1_agreement", "top1_agreement_stderr"))
    assert set(found["domains"]) == {"letters", "numbers"} and found["kl"] not in (0, found["domains"]["letters"]["kl"])


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder with .txt files; put one kind of text into each"):
        evaluate(reader(), tiny_tokenizer(), Protocol(TEXT, windows=1, length=32, domains=tmp_path))
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(InputError, match="short.txt has 3 tokens, less than one window of 32"):
        evaluate(reader(), tiny_tokenizer(), Protocol(TEXT, windows=1, length=32, domains=tmp_path))


# --- tasks ------------------------------------------------------------------------------------------------------


def pairs() -> list[dict[str, str]]:
    return [json.loads(line) for line in PAIRS_FILE.read_text().splitlines()]


def sentence_score(model: PreTrainedModel, sentence: str) -> float:
    ids = torch.tensor([tiny_tokenizer()(sentence).input_ids])  # BOS first
    logs = log_probabilities(model, ids)[0, :-1]
    return float(logs.gather(-1, ids[0, 1:, None]).sum())


def test_embedded_pairs_are_many_distinct_and_evenly_spread() -> None:
    rows = pairs()
    assert len(rows) >= 120
    assert len({row["sentence_good"] for row in rows} | {row["sentence_bad"] for row in rows}) == 2 * len(rows)
    assert set(collections.Counter(row["phenomenon"] for row in rows).values()) == {12}
    assert len({row["phenomenon"] for row in rows[:14]}) == 14  # so that a limit sees all of them


def test_pairs_are_scored_as_by_hand_and_nothing_is_left_behind(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = reader().train(), tiny_tokenizer()
    tokenizer.pad_token = None
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), dict(os.environ)
    scores = run_tasks(model, tokenizer, Protocol(tasks=(PAIRS,), limit=40)).scores
    assert capfd.readouterr().out == ""
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert dict(os.environ) == states[3]
    assert model.training
    assert tokenizer.pad_token is None
    model.eval()
    right = [
        sentence_score(model, row["sentence_good"]) > sentence_score(model, row["sentence_bad"]) for row in pairs()
    ]
    assert scores[PAIRS]["acc"] == sum(right[:40]) / 40
    assert scores[PAIRS]["samples"] == 40


@pytest.mark.slow
def test_local_files_and_folders_are_tasks(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    own = tmp_path / "own_pairs.jsonl"
    own.write_text("\n".join(json.dumps(row) for row in pairs()[:6]))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "same.yaml").write_text(
        f"""
task: same_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{own}"}}, cache_dir: "{tmp_path / "cache"}"}}
validation_split: validation
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
doc_to_target: 0
target_delimiter: ""
"""
    )
    model = reader()
    for same in (tmp_path / "tasks", tmp_path / "tasks" / "same.yaml"):
        scores = run_tasks(model, tiny_tokenizer(), Protocol(tasks=(str(own), str(same)))).scores
        assert scores["own_pairs"]["acc"] == scores["same_pairs"]["acc"]
        assert scores["same_pairs"]["samples"] == 6


@pytest.mark.slow
def test_tasks_that_cannot_run(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [")
    (tmp_path / "own.jsonl").write_text('{"sentence_good": "Zero.", "sentence_bad": "Bad."}\n')
    divides = tmp_path / "divides.yaml"
    divides.write_text(FAILING.format(own=tmp_path / "own.jsonl", cache=tmp_path / "cache"))
    no_pairs = tmp_path / "no.jsonl"
    no_pairs.write_text('{"sentence_good": "a"}')
    (tmp_path / "empty").mkdir()
    for task, kind, message in (
        ("arc_eazy", RecipeError, "did you mean 'arc_easy'"),
        (str(tmp_path / "missing.yaml"), InputError, "no task file"),
        (str(tmp_path / "missing.jsonl"), InputError, "cannot be read"),
        (str(broken), InputError, "cannot be loaded"),
        (str(divides), InputError, "cannot be loaded at item 0, counted from 0 .ZeroDivisionError: division by zero"),
        (str(no_pairs), InputError, "line 1 is of no kind of task"),
        (str(tmp_path / "empty"), InputError, "has no task files"),
    ):
        with pytest.raises(kind, match=message):
            run_tasks(reader(), tiny_tokenizer(), Protocol(tasks=(task,)))
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(RecipeError, match="neither"):
        run_tasks(reader(), tokenizer, Protocol(tasks=(PAIRS,)))


def test_missing_lm_eval_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r'pip install "llmcompress\[eval\]"'):
        run_tasks(reader(), tiny_tokenizer(), Protocol(tasks=(PAIRS,)))


def test_results_are_read_with_care() -> None:
    entry = {
        "alias": "x",
        "sample_len": 3,
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "exact_match,strict": 1,
        "ok": True,
    }
    assert _scores({"results": {"x": entry, "group": {" ": " "}}}) == {
        "x": {"acc": 0.5, "exact_match,strict": 1.0, "samples": 3}
    }


@pytest.mark.slow
def test_importing_evaluation_imports_nothing_large() -> None:
    program = (
        "import sys, llmcompress.evaluation, llmcompress.data.calibration\n"
        "print([name for name in ('lm_eval', 'datasets', 'pyarrow', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_progress_is_told_window_by_window() -> None:
    model, told = tiny("llama"), []
    protocol = Protocol(text="a goose flew over the lake, " * 20, windows=3, length=32)
    evaluate(model, tiny_tokenizer(), protocol, against=model, progress=lambda *one: told.append(one))
    assert told == [("window", 1, 3), ("window", 2, 3), ("window", 3, 3)]


FAILING = """
task: failing
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{own}"}}, cache_dir: "{cache}"}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{1 / (0 if sentence_good == 'Zero.' else 1)}}}}"
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
doc_to_target: 0
"""


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task that can be loaded and cannot be run."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own.jsonl"
    pairs = [{"sentence_good": good, "sentence_bad": "Bad."} for good in ("One.", "Zero.")]  # the first is tried early
    own.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    task = tmp_path / "failing.yaml"
    task.write_text(FAILING.format(own=own, cache=tmp_path / "cache"))
    return str(task)


@pytest.mark.slow
def test_unknown_tasks_and_texts_are_named_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    folder = save_tiny("llama", tmp_path / "dense")

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for module, door in (("score", "open_model"), ("verify", "load_model")):
        monkeypatch.setattr(importlib.import_module(f"llmcompress.evaluation.{module}"), door, load)
    for asked, kind, message in (
        (Protocol(windows=1, length=16, tasks=(str(tmp_path / "none.jsonl"),)), InputError, "cannot be read"),
        (Protocol(windows=1, length=16, tasks=("~nouser/none.yaml",)), InputError, "no task file"),
        (Protocol(windows=1, length=16, tasks=("x" * 300 + ".yaml",)), InputError, "no task file"),
        (Protocol(tmp_path / "none.txt", 1, 16), InputError, "cannot be read"),
    ):
        with pytest.raises(kind, match=message):
            score(folder, asked, against=str(folder))
        with pytest.raises(kind, match=message):
            compare([folder, folder], asked)
    with pytest.raises(InputError, match="does not exist"):
        score(folder, Protocol(windows=1, length=16), against="./none")


@pytest.mark.slow
def test_what_was_scored_is_kept_when_a_task_fails(failing: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "dense")
    asked = Protocol(windows=1, length=16, tasks=(failing,))
    found = score(folder, asked, against=folder, output=str(tmp_path / "out"))
    assert found["perplexity"] > 1 and found["kl"] == pytest.approx(0) and found["tasks"] == {}
    assert "failing.yaml failed at item 1, counted from 0 (ZeroDivisionError" in found["tasks_failed"]
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["kl"] == found["kl"]
    rows = compare([folder, folder], asked)["models"]
    assert all(row["perplexity"] > 1 and "tasks_failed" in row for row in rows)


def test_the_command_shows_what_was_scored_and_ends_with_the_failure(failing: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "dense")
    words = ["eval", str(folder), "--windows", "1", "--length", "16", "--tasks", failing]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 5 and "perplexity" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("[5] the task failing ")
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert found["perplexity"] > 1 and found["error"]["code"] == 5


def test_tasks_that_fail_on_the_dense_model_are_told_and_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, small = save_tiny("llama", tmp_path / "dense"), tmp_path / "small"
    lc.compress(dense, {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]}, small)
    both = iter([TaskScores({"x": {"acc": 0.5, "samples": 4}}), TaskScores(failure="the task x failed")])
    monkeypatch.setattr("llmcompress.evaluation.evaluate.run_tasks", lambda *_: next(both))
    for module in ("evaluate", "score"):
        monkeypatch.setattr(f"llmcompress.evaluation.{module}.find_tasks", lambda *_: None)
    found = score(small, Protocol(windows=1, length=16, tasks=("x",)), against=str(dense), save=True)
    assert found["tasks_failed"] == "the task x failed" and found["tasks"] == {"x": {"acc": 0.5, "samples": 4}}
    assert score_rows(json.loads((small / "eval.json").read_text()))[-1] == ("x: acc", "?", "0.5000", "")


def test_scores_are_in_the_output_even_if_the_model_cannot_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DiskError("the disk is full; free some space")

    dense, small = save_tiny("llama", tmp_path / "dense"), tmp_path / "small"
    lc.compress(dense, {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]}, small)
    monkeypatch.setattr("llmcompress.evaluation.score.save_scores", full)
    with pytest.raises(DiskError, match="the disk is full"):
        score(small, Protocol(windows=1, length=16), against=str(dense), save=True, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["perplexity"] > 1


def test_whoever_stops_the_tasks_is_told_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmcompress.evaluation.evaluate.run_tasks", stopped)
    model = reader()
    with pytest.raises(KeyboardInterrupt) as stop:
        evaluate(model, tiny_tokenizer(), Protocol(TEXT, 1, 16), against=model)
    assert re.fullmatch(r"measured before the tasks: perplexity [\d.]+ and KL -?0.00000", stop.value.__notes__[0])
