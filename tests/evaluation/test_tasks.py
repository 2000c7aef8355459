"""lm-eval's tasks: prompts that are cut are counted, failures have their place, and nobody else speaks."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.logging import get_logger
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluation.evaluate import evaluate, evaluate_all
from llmcompress.evaluation.lm_eval import run_tasks
from llmcompress.evaluation.local_tasks import PAIRS
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.tasks import find_tasks
from llmcompress.reporting.tables import comparison_markdown
from tests.tiny import save_tiny, tiny, tiny_tokenizer

pytest.importorskip("lm_eval")
CONTEXT = 64  # tokens, of the tiny models
ITEM = '{{"good": "{good}", "bad": "{bad}"}}\n'
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{data}"}}, cache_dir: "{cache}"}}
validation_split: validation
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
target_delimiter: ""
"""
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a task over items, with some lines instead of TASK's own, and returns its path."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def writes(name: str, items: list[tuple[str, str]], **lines: str | None) -> str:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(ITEM.format(good=good, bad=bad) for good, bad in items))
        text = TASK.format(name=name, data=folder / f"{name}.jsonl", cache=tmp_path / "cache")
        old = [line for line in text.splitlines() if line.partition(":")[0] not in lines]
        new = [f"{key}: {value}" for key, value in lines.items() if value is not None]
        (folder / f"{name}.yaml").write_text("\n".join(old + new))
        return str(folder / f"{name}.yaml")

    return writes


# --- prompts that are too long --------------------------------------------------------------------------------------


def said_by(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of lm-eval's model, whatever its logger lets through."""
    said: list[str] = []
    logger = importlib.import_module("lm_eval.models.huggingface").eval_logger
    monkeypatch.setattr(logger, "warning", lambda text, *_: said.append(text) if name in text else None)
    return said


def test_cut_prompts_are_counted_as_lm_eval_cuts_them(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token for each byte, and one before the first: 64 bytes are read whole, as the last one is only predicted."""
    sentences = [("a" * length, "b") for length in (10, CONTEXT - 9, CONTEXT - 8, CONTEXT - 7, CONTEXT)]
    said = said_by("Truncating", monkeypatch)
    task, short = write("long", sentences, doc_to_text='"a prompt"'), write("short", sentences, doc_to_text='"q"')
    found = run_tasks(tiny("llama"), tiny_tokenizer(), Protocol(tasks=(task, PAIRS, short), limit=5))
    assert found.failure is None and len(said) == 3
    assert found.warnings == (
        "2 of 5 prompts of long are longer than the model's 64 tokens; the first tokens were cut",
        "1 of 5 prompts of short are longer than the model's 64 tokens; the first tokens were cut",
    )


@pytest.mark.slow
def test_room_for_the_answer_is_kept_free(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    said = said_by("Left truncation", monkeypatch)
    how = {"output_type": "generate_until", "generation_kwargs": "{max_gen_toks: 20}", "doc_to_choice": None}
    how |= {"doc_to_text": '"{{good}}"', "doc_to_target": '"x"', "metric_list": "[{metric: exact_match}]"}
    task = write("said", [("a" * length, "b") for length in (5, 43, 44, 45, 60)], **how)
    found = run_tasks(tiny("llama"), tiny_tokenizer(), Protocol(tasks=(task,), batch_size=1))
    assert len(said) == 3
    room = "the model's 64 tokens, less 20 for the answer"
    assert found.warnings == (f"3 of 5 prompts of said are longer than {room}; the first tokens were cut",)


@pytest.mark.slow
def test_the_warning_is_in_the_result_and_replaces_that_of_transformers(write: Write, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "dense")
    task = write("long", [("a" * 60, "b"), ("c", "d")], doc_to_text='"a long prompt"')
    sentence = "1 of 2 prompts of long are longer than the model's 64 tokens; the first tokens were cut"
    (tmp_path / "text.txt").write_text("A goose flew over the lake.")
    told: list[str] = []
    logger, handler = get_logger("transformers.tokenization_utils_base"), logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        found = lc.compare([folder, folder], Protocol(tmp_path / "text.txt", 1, 16, (task,)))
        words = ["eval", str(folder), "--text", str(tmp_path / "text.txt"), "--length", "16", "--tasks", task]
        done = CliRunner().invoke(app, words)
        assert not told
        tiny_tokenizer()("a" * 80)
        assert len(told) == 1, "whoever reads a text that nobody cuts is warned"
    finally:
        logger.removeHandler(handler)
    assert [row["warnings"] for row in found["models"]] == [[sentence]] * 2
    assert f"- {folder}: {sentence}" in comparison_markdown(found)
    assert done.exit_code == 0 and f"warning: {sentence}" in done.stderr.splitlines()


# --- failures -------------------------------------------------------------------------------------------------------

FINE = ("One.", "Bad.")
LATE = [FINE, FINE, ("Zero.", "Bad.")]


def test_failures_of_files_name_the_line(write: Write, tmp_path: Path) -> None:
    broken = tmp_path / "folder" / "broken.yaml"
    broken.parent.mkdir()
    broken.write_text("task: x\ndoc_to_text: a: b\n")
    including = tmp_path / "including.yaml"
    including.write_text("include: part.txt\ntask: x\n")
    (tmp_path / "part.txt").write_text("a: 1\nb: c: d\n")
    for task, message in (
        (broken, rf"^the task {broken} cannot be loaded \({broken}:2: this is not YAML \(mapping values are not"),
        (broken.parent, rf"^{broken}:2: this is not YAML \(mapping values are not"),
        (including, rf"^the task {including} cannot be loaded \({tmp_path}/part.txt:2: this is not YAML"),
    ):
        with pytest.raises(InputError, match=message):
            find_tasks(tiny_tokenizer(), Protocol(tasks=(str(task),)))
    (tmp_path / "empty.jsonl").write_text('{"sentence_good": "a", "sentence_bad": ""}\n')
    with pytest.raises(InputError, match="empty.jsonl, line 1 has no text under sentence_bad"):
        find_tasks(tiny_tokenizer(), Protocol(tasks=(str(tmp_path / "empty.jsonl"),)))


def test_failures_of_items_name_the_item(write: Write, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    code = tmp_path / "tasks" / "mine.py"
    code.write_text(
        "def choices(doc):\n    return [doc['good'], doc['none']]\n\n\n"
        "def results(doc, scores):\n    assert doc['good'] != 'Zero.'\n    return {'acc': 1.0}\n"
    )
    zero = "\"{{1 / (0 if good == 'Zero.' else 1)}}\""
    early = {
        "empty": write("empty", [("", "Bad."), FINE]),
        "template": write("template", [("Zero.", "Bad.")], doc_to_text=zero),
        "code": write("code", [FINE], doc_to_choice="!function mine.choices"),
        "key": write("key", [FINE], doc_to_texts="a"),
        "nameless": write("nameless", [FINE], task=None),
    }
    first = " at item 0, counted from 0"
    for name, cause in (
        ("empty", rf"{first} \(IndexError: string index out of range\)"),
        ("template", rf"{first} \(ZeroDivisionError: division by zero\)"),
        ("code", rf"{first} \({code}:2: KeyError: 'none'\)"),
        ("key", r" \(TypeError: .*unexpected keyword argument 'doc_to_texts'\)"),
        ("nameless", r" \(ValueError: Unknown config shape: .*\)"),
    ):
        with pytest.raises(InputError, match=f"{name}.yaml cannot be loaded{cause}$"):
            find_tasks(tiny_tokenizer(), Protocol(tasks=(PAIRS, early[name])))
    late = {
        "template": write("template", LATE, doc_to_text=zero),
        "blank": write("blank", [FINE, FINE, ("One.", "")]),
        "endless": write("endless", [FINE, FINE, ("One.", "a" * 100)]),
        "code": write("code", LATE, process_results="!function mine.results"),
    }
    for name, subject, cause in (
        ("template", f"template of {late['template']}", "ZeroDivisionError: division by zero"),
        ("blank", "blank", "IndexError: list index out of range"),
        ("endless", "endless", "AssertionError: assert len(continuation_enc) <= self.max_length"),
        ("code", f"code of {late['code']}", f"{code}:6: AssertionError: assert doc['good'] != 'Zero.'"),
    ):
        found = run_tasks(tiny("llama"), tiny_tokenizer(), Protocol(tasks=(PAIRS, late[name]), limit=3))
        told = f"the task {subject} failed at item 2, counted from 0 ({cause}); what was scored besides stands"
        assert found.failure == told


def test_too_few_examples_are_told_before_anything_is_scored(write: Write) -> None:
    """lm-eval's words would be "Sample larger than population or is negative"."""
    own = write("own", [FINE] * 3)
    asked = [write("split", [FINE] * 3, fewshot_split="validation"), write("none", [FINE], num_fewshot="0")]
    with pytest.raises(RecipeError, match="^the task own has 2 examples for a prompt, and num_fewshot asks for 3; "):
        find_tasks(tiny_tokenizer(), Protocol(tasks=(own,), num_fewshot=3))
    most = Protocol(tasks=(*asked, PAIRS), num_fewshot=3, limit=1)
    assert run_tasks(tiny("llama", max_position_embeddings=512), tiny_tokenizer(), most).failure is None


@pytest.mark.parametrize(("items", "limit"), [(1, None), (3, 1), (3, 0.3)])
def test_a_task_of_fewer_items_than_processes_is_refused(write: Write, items: int, limit: float | None) -> None:
    asked = Protocol(tasks=(write("few", [("a cat", "cat a")] * items),), limit=limit)
    assert find_tasks(tiny_tokenizer(), asked) is not None
    with pytest.raises(RecipeError, match="the task few has 1 items for 2 processes; start at most 1"):
        find_tasks(tiny_tokenizer(), asked, 2)


def test_two_files_with_tasks_of_one_name_are_refused(write: Write) -> None:
    tasks = tuple(write(name, [("a cat", "cat a")], task="mine") for name in ("one", "two"))
    with pytest.raises(RecipeError, match="two tasks are called 'mine', and their scores would be one"):
        find_tasks(tiny_tokenizer(), Protocol(tasks=tasks))


def test_tasks_are_looked_up_before_a_text_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for door in ("perplexity", "distance", "windows_by_text"):
        monkeypatch.setattr(f"llmcompress.evaluation.evaluate.{door}", lambda *_: pytest.fail("noticed too late"))
    model, tokenizer, missing = tiny("llama"), tiny_tokenizer(), Protocol(tasks=(str(tmp_path / "none.yaml"),))
    calls: list[Callable[[], Any]] = [
        lambda: evaluate(model, tokenizer, missing),
        lambda: evaluate(model, tokenizer, missing, against=model),
        lambda: evaluate_all(model, [lambda: model], tokenizer, missing),
    ]
    for call in calls:
        with pytest.raises(InputError, match="there is no task file"):
            call()


@pytest.mark.parametrize("limit", ["1.5", "0", "inf"])
def test_a_limit_is_a_number_of_items_or_a_share(limit: str) -> None:
    with pytest.raises(RecipeError, match=f"^limit {float(limit)} is neither a number of items nor a share of them; "):
        Protocol(limit=float(limit))
    done = CliRunner().invoke(app, ["eval", "smollm2", "--tasks", PAIRS, "--limit", limit])
    assert done.exit_code == 2 and f"limit {float(limit)} is neither" in done.stderr
    assert [Protocol(limit=good).limit for good in (None, 1, 2.0, 0.5)] == [None, 1, 2.0, 0.5]


# --- silence --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_git_does_not_complain_of_a_folder_that_is_no_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = importlib.import_module("lm_eval.evaluator").get_git_commit_hash
    found = run_tasks(tiny("llama"), tiny_tokenizer(), Protocol(tasks=(PAIRS,), limit=2))
    assert found.results["git_hash"] is None and capfd.readouterr().err == ""
    (tmp_path / ".git" / "refs").mkdir(parents=True)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/main\n")
    (tmp_path / ".git" / "refs" / "main").write_text("0123abc\n")
    found = run_tasks(tiny("llama"), tiny_tokenizer(), Protocol(tasks=(PAIRS,), limit=2))
    assert found.results["git_hash"] == "0123abc"
    assert importlib.import_module("lm_eval.evaluator").get_git_commit_hash is own


@pytest.mark.slow
def test_a_command_in_a_pipe_says_only_its_own_lines(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "dense")
    command = [sys.executable, "-m", "llmcompress", "eval", "dense", "--tasks", PAIRS, "--limit", "3"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--windows", "1", "--length", "16", "--against", "dense", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["tasks"][PAIRS]["samples"] == 3
    assert {line.split(" ...")[0] for line in done.stderr.splitlines()} <= {"block 2/2", "window 1/1", "tasks"}
