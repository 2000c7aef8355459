"""Tasks in .jsonl files: scores equal slow float64 computations, and programs run within limits."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluation import local_tasks
from llmcompress.evaluation.lm_eval import _decode_whole, run_tasks
from llmcompress.evaluation.local_tasks import KINDS, local_task, run_program
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.tasks import find_tasks
from tests.tiny import tiny, tiny_tokenizer

pytest.importorskip("lm_eval")
PIQA = [
    {"goal": "dry a cup", "sol1": "use a towel on it", "sol2": "use water", "label": 0},
    {"goal": "boil tea", "sol1": "freeze it", "sol2": "heat the water", "label": 1},
    {"goal": "cut bread", "sol1": "with a spoon, slowly", "sol2": "with a knife", "label": 1},
]
LAMBADA = [{"text": "the cat sat on the mat"}, {"text": "a goose flew over the lake"}]
GSM8K = [{"question": "How much is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}]
ADD = "def add(a, b):\n"
PROGRAM = {
    "task_id": "HumanEval/0",
    "prompt": ADD,
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}
APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "  # beside each file on disks of other systems
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama", max_position_embeddings=1024)


def write_lines(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def log_probability(model: PreTrainedModel, prompt: str, answer: str) -> float:
    """The slow way: the sum of an answer's log probabilities in float64, behind BOS."""
    tokenizer = tiny_tokenizer()
    before, whole = tokenizer(prompt).input_ids, torch.tensor([tokenizer(prompt + answer).input_ids])
    with torch.no_grad():
        logs = model(whole).logits.double().log_softmax(-1)[0, :-1]
    return float(logs.gather(1, whole[0, 1:, None])[len(before) - 1 :].sum())


def scores(model: PreTrainedModel, path: str, **options: Any) -> dict[str, float]:
    result = run_tasks(model, tiny_tokenizer(), Protocol(tasks=(path,), **options))
    assert result.failure is None and not result.warnings
    return result.scores[Path(path).stem]


@pytest.mark.slow
def test_two_solutions_are_judged_by_likelihood_and_by_length(model: PreTrainedModel, tmp_path: Path) -> None:
    found = scores(model, write_lines(tmp_path / "piqa.jsonl", PIQA))
    right = dict.fromkeys(("acc", "acc_norm"), 0)
    for row in PIQA:
        texts = [row["sol1"], row["sol2"]]
        logs = [log_probability(model, f"Question: {row['goal']}\nAnswer:", f" {text}") for text in texts]
        right["acc"] += (logs[1] > logs[0]) == row["label"]
        right["acc_norm"] += (logs[1] / len(texts[1]) > logs[0] / len(texts[0])) == row["label"]
    assert {key: found[key] for key in right} == {key: pytest.approx(count / 3) for key, count in right.items()}


def test_last_words_are_predicted_behind_the_others(model: PreTrainedModel, tmp_path: Path) -> None:
    found = scores(model, write_lines(tmp_path / "lambada.jsonl", LAMBADA))
    logs = [
        log_probability(model, *cut) for cut in (("the cat sat on the", " mat"), ("a goose flew over the", " lake"))
    ]
    assert found["perplexity"] == pytest.approx(math.exp(-sum(logs) / 2), rel=1e-4)


def test_white_space_is_no_last_word(model: PreTrainedModel, tmp_path: Path) -> None:
    texts = ["the cat sat on the mat \n", "a goose flew over the\nlake\r\n"]
    found = scores(model, write_lines(tmp_path / "lambada.jsonl", [{"text": text} for text in texts]))
    cuts = ("the cat sat on the", " mat"), ("a goose flew over the", "\nlake")
    assert found["perplexity"] == pytest.approx(
        math.exp(-sum(log_probability(model, *cut) for cut in cuts) / 2), rel=1e-4
    )


@pytest.mark.parametrize("chat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_answers_have_bits_a_byte(model: PreTrainedModel, tmp_path: Path, chat: bool) -> None:
    path, row = write_lines(tmp_path / "gsm8k.jsonl", GSM8K), GSM8K[0]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    result = run_tasks(model, tokenizer, Protocol(tasks=(path,), chat_template=chat))
    prompt = f"<user>{row['question']}</user><assistant>" if chat else f"Question: {row['question']}\nAnswer:"
    answer = row["answer"] if chat else f" {row['answer']}"
    wanted = -log_probability(model, prompt, answer) / math.log(2) / len(answer)
    assert result.scores["gsm8k"]["bits_per_byte"] == pytest.approx(wanted, rel=1e-4)


def test_solutions_have_bits_a_byte_and_are_not_run(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_tasks, "run_program", lambda *_: pytest.fail("a program was run"))
    found = scores(model, write_lines(tmp_path / "code.jsonl", [PROGRAM]))
    wanted = -log_probability(model, ADD[:-1], "\n" + PROGRAM["canonical_solution"]) / math.log(2) / 18
    assert found["bits_per_byte"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_a_chat_asks_for_a_program_and_begins_the_answer(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tasks = (write_lines(tmp_path / "code.jsonl", [PROGRAM]),)
    result = run_tasks(model, tokenizer, Protocol(tasks=tasks, chat_template=True))
    prompt = f"<user>Complete this function, and repeat all of it:\n```python\n{ADD}\n```\n</user><assistant>"
    wanted = log_probability(model, f"{prompt}```python\n{ADD[:-1]}", "\n" + PROGRAM["canonical_solution"])
    assert result.scores["code"]["bits_per_byte"] == pytest.approx(-wanted / math.log(2) / 18, rel=1e-4)


def test_the_space_that_a_written_text_begins_with_stays() -> None:
    """Some tokenizers strip it from what they decode, and a program behind a docstring needs all of its spaces."""
    from tokenizers import decoders

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    ids = tokenizer("    return a", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "   return a" and _decode_whole(tokenizer, ids) == "    return a"
    assert _decode_whole(tokenizer, 257, skip_special_tokens=False) == "</s>"


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    for name, rows in (("a", PIQA), ("b", LAMBADA)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tasks = tuple(f"{tmp_path}/{name}/test.jsonl" for name in "ab")
    with pytest.raises(RecipeError, match="two tasks are called 'test'"):
        find_tasks(tiny_tokenizer(), Protocol(tasks=tasks))


@pytest.mark.parametrize(
    ("row", "chat", "written", "metric", "score"),
    [
        (GSM8K[0], False, " it is 5, so\n#### 5", "exact_match", 1),
        pytest.param(GSM8K[0], True, " the answer is $5.", "exact_match", 1, marks=pytest.mark.slow),
        pytest.param(GSM8K[0], False, " 5 minus 1 is 4", "exact_match", 0, marks=pytest.mark.slow),
        (PROGRAM, True, "    return a + b\n", "pass@1", 1),
        pytest.param(PROGRAM, False, "    return a - b\n", "pass@1", 0, marks=pytest.mark.slow),
    ],
)
def test_written_answers_are_checked(
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: dict[str, str],
    chat: bool,
    written: str,
    metric: str,
    score: int,
) -> None:
    from lm_eval.models.huggingface import HFLM

    prompts: list[str] = []

    def write(self: HFLM, requests: list[Any], **_: Any) -> list[str]:
        prompts.extend(request.args[0] for request in requests)
        return [written] * len(requests)

    monkeypatch.setattr(HFLM, "generate_until", write)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tasks = (write_lines(tmp_path / "task.jsonl", [row]),)
    result = run_tasks(model, tokenizer, Protocol(tasks=tasks, generate=True, chat_template=chat))
    assert result.scores["task"][metric] == score
    [prompt] = prompts
    assert prompt.startswith("<user>") == chat == ("<assistant>" in prompt)
    assert row.get("question", ADD.strip()) in prompt


def test_a_folder_of_files_is_one_task(model: PreTrainedModel, tmp_path: Path) -> None:
    folder = tmp_path / "blimp"
    folder.mkdir()
    pairs = [{"sentence_good": f"a goose flies {n}", "sentence_bad": f"a goose fly {n}"} for n in range(6)]
    write_lines(folder / "one.jsonl", pairs[:2])
    write_lines(folder / "two.jsonl", pairs[2:])
    together, parts = scores(model, str(folder)), [scores(model, str(path)) for path in sorted(folder.iterdir())]
    (folder / "._one.jsonl").write_bytes(APPLE_DOUBLE)
    assert scores(model, str(folder)) == together
    assert together["samples"] == 6
    assert together["acc"] == pytest.approx((2 * parts[0]["acc"] + 4 * parts[1]["acc"]) / 6)
    write_lines(folder / "other.jsonl", LAMBADA)
    with pytest.raises(InputError, match="keep kinds apart"):
        find_tasks(tiny_tokenizer(), Protocol(tasks=(str(folder),)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"word": "a"}], "line 1 is of no kind of task"),
        ([PIQA[0], {"goal": "a"}], "line 2 has no sol1, but the lines before it are goals with two solutions"),
        ([{**PIQA[0], "label": 2}], "has the label 2"),
        ([{**PIQA[0], "label": True}], "has the label True"),
        ([{**PIQA[0], "goal": 3}], "has no text under goal"),
        ([{"text": "word"}], "a text of one word"),
        ([{"text": " word\n"}], "a text of one word"),
        (
            [{"sentence_good": "a", "sentence_bad": "b"}, {"sentence_good": "a", "sentence_bad": "a"}],
            "line 2 has one sent",
        ),
        ([{"question": "a", "answer": " "}], "has no text under answer"),
        (["text"], "is no JSON object"),
        ([], "has no items"),
    ],
)
def test_a_damaged_file_is_refused(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        local_task([Path(write_lines(tmp_path / "task.jsonl", rows))], Protocol(), "task")


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    item = {"question": "one\u2028two", "answer": "three"}
    (tmp_path / "task.jsonl").write_text(json.dumps(item, ensure_ascii=False) + "\r\n", encoding="utf-8")
    made = local_task([tmp_path / "task.jsonl"], Protocol(), "task")
    assert list(made["custom_dataset"]()["test"]) == [item]


def test_scores_of_before_have_the_protocol_of_today() -> None:
    assert "generate" not in Protocol().to_json() and Protocol(generate=True).to_json()["generate"] is True


def test_no_kind_hides_another() -> None:
    for number, kind in enumerate(KINDS):
        assert not any(set(kind.keys) >= set(earlier.keys) for earlier in KINDS[:number]), kind.name


# --- programs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "ends_well"),
    [
        ("import math, typing\nassert math.sqrt(4) == 2\nprint('text')", True),
        ("assert False", False),
        ("syntax error", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("x = 'a' * (2 << 30)", False),
        ("open('large', 'wb').write(bytes(2 << 20))", False),
        ("import os; assert set(os.listdir()) == {'program.py', 'printed'}", True),
        ("import os; assert 'SECRET' not in os.environ", True),
        ("assert input() == ''", False),
    ],
)
def test_a_program_has_to_come_to_its_end(program: str, ends_well: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert run_program(program) is ends_well


@pytest.mark.slow
def test_an_endless_program_and_its_children_are_ended(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    program = f"""
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
while True: pass
"""
    assert not run_program(program, seconds=1.5)
    path = Path("/proc", (tmp_path / "child").read_text(), "stat")
    for _ in range(100):
        if not path.exists() or path.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")
