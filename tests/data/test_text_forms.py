"""Every file and form of text gives the tokens of the same text as .txt, or of the same chat as `messages`."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from llmcompress.data import files
from llmcompress.data import text as sources
from llmcompress.data.calibration import CalibrationTokens, calibration_tokens, source_documents
from llmcompress.data.distillation import read_data
from llmcompress.data.files import read_text
from llmcompress.data.self_data import Answering, prompts
from llmcompress.data.text import PATIENCE, Reading, read_documents
from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluation.perplexity import evaluation_windows, text_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.recipe.calibration import Calibration, TextSource
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import dump, hide_folders, read_as
from llmcompress.recipe.text_files import list_files
from tests.tiers import tiered
from tests.tiny import tiny, tiny_tokenizer

ASKED, ANSWERED = {"role": "user", "content": "Hi, ü"}, {"role": "assistant", "content": "Hello.\nYes?"}
CHAT = [ASKED, ANSWERED]
SHARED = [{"from": "human", "value": "Hi, ü"}, {"from": "gpt", "value": "Hello.\nYes?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = [
    {"text": "007", "id": "0"},
    {"text": "NA", "id": "1"},
    {"text": 'a "b", c\nd\té', "id": "2"},
    {"text": "word " * 40, "id": "3"},
]
Write = Callable[[Path, list[dict[str, Any]]], None]


def pack(data: bytes) -> bytes:
    """Return the bytes as a .zst file has them."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_table(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", encoding: str = "utf-8-sig") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def saved(rows: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list(rows)


FILES: dict[str, Write] = {
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "pretty.json": lambda path, rows: path.write_text(f"\ufeff\n {json.dumps(rows, indent=3)}\n", "utf-8"),
    "lines.json": lambda path, rows: path.write_bytes(lines(rows)),
    "rows.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress(lines(rows[:1])) + gzip.compress(lines(rows[1:]))
    ),
    "rows.jsonl.zst": lambda path, rows: path.write_bytes(pack(lines(rows[:2])) + pack(lines(rows[2:]))),
    "rows.JSONL.GZ": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "rows.csv": write_table,
    "rows.tsv": lambda path, rows: write_table(path, rows, "\t", "utf-8"),
    "rows.csv.zst": lambda path, rows: (write_table(path, rows), path.write_bytes(pack(path.read_bytes()))),
    "rows.arrow": write_arrow,
    "rows.parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "folder": lambda path, rows: saved(rows).save_to_disk(str(path)),
    "splits": lambda path, rows: datasets.DatasetDict(train=saved(rows), test=saved(rows[:1])).save_to_disk(str(path)),
    "shards": lambda path, rows: (
        path.mkdir(),
        [(path / f"{i}.jsonl").write_bytes(lines([rows[i]])) for i in range(4)],
    ),
}


def read(path: Path | str, tokenizer: Any = None, **settings: Any) -> CalibrationTokens:
    defaults = {"samples": 4, "length": 16, "shuffle": False}
    return calibration_tokens(Calibration(dataset=str(path), **defaults | settings), tokenizer or tiny_tokenizer())


def refusal(path: Path, data: bytes | str, **settings: Any) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(InputError) as caught:
        read(path, **settings)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 700 and path.name in said
    return said


def chat_of(path: Path, row: Any, **settings: Any) -> Any:
    (path / "one.jsonl").write_bytes(lines([row]))
    [document] = read_documents(str(path / "one.jsonl"), **settings)
    return document


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_kind_gives_the_tokens_of_its_text(tmp_path: Path, name: str) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_bytes("\n\n".join(row["text"] for row in ROWS).encode())
    FILES[name](tmp_path / name, ROWS)
    found = read(tmp_path / name / "*.jsonl" if name == "shards" else tmp_path / name)
    assert found.hash == read(plain).hash
    assert found.documents == 4 and found.read_as == "text from text"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_text_is_the_text(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Zwölf Wörter.\r\n" * 40
    (tmp_path / "plain.txt").write_bytes(text.encode())
    packed = tmp_path / f"plain.txt{suffix}"
    packed.write_bytes(gzip.compress(text.encode()) if suffix == ".gz" else pack(text.encode()))
    assert read(packed).hash == read(tmp_path / "plain.txt").hash
    assert not read(packed).notes
    monkeypatch.setattr(sources, "LONGEST_TEXT", 100)
    assert "".join(read_documents(str(packed))) == text.replace("\r\n", "\n")  # type: ignore[arg-type]
    [note] = read(packed, samples=20).notes
    assert "is read as documents of at most" in note


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"conversations": SHARED, "id": 3}, CHAT),
        ({"conversation": CHAT}, CHAT),
        ({"conversations": SHARED, "system": "Be brief."}, [SYSTEM, *CHAT]),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *SHARED], "system": "No."}, [SYSTEM, *CHAT]),
        ({"instruction": "Hi, ü", "input": "", "output": "Hello.\nYes?"}, CHAT),
        ({"instruction": "Hi, ü", "output": "Hello.\nYes?", "system": "Be brief."}, [SYSTEM, *CHAT]),
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}],
        ),
        (
            {"instruction": "Add.", "context": "1, 2", "response": "3"},
            [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"prompt": "Hi, ü", "completion": "Hello.\nYes?"}, CHAT),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, CHAT),
        ({"prompt": "Hi, ü", "response": "Hello.\nYes?", "source": "x"}, CHAT),
        ({"question": "Hi, ü", "answer": "Hello.\nYes?", "system_prompt": "Be brief."}, [SYSTEM, *CHAT]),
        ({"query": "Hi, ü", "response": "Hello.\nYes?"}, CHAT),
        ({"input": "Hi, ü", "output": "Hello.\nYes?"}, CHAT),
        ({"prompt": "Hi, ü", "chosen": "Hello.\nYes?", "rejected": "No."}, CHAT),
        ({"prompt": "Hi, ü", "chosen": CHAT, "rejected": CHAT[:1]}, CHAT),
        ({"prompt": [SYSTEM, ASKED], "chosen": [ANSWERED], "rejected": []}, [SYSTEM, *CHAT]),
        ({"chosen": CHAT, "rejected": CHAT}, CHAT),
        ({"chosen": "Human: Hi", "rejected": "Human: Ho"}, "Human: Hi"),
        ({"content": "words", "id": "x", "url": "y"}, "words"),
        ({"prompt": "Hi, ü", "completion": ""}, [ASKED]),
        ({"text": "words", "instruction": "a", "output": "b"}, "words"),
        ({"messages": CHAT, "text": "words", "system": "Be brief."}, CHAT),
        ({"body": "words", "answer": 5, "question": 7}, "words"),
        ({"body": "words", "tags": [], "meta": {}}, "words"),
        ({"messages": json.dumps(CHAT), "id": "x"}, CHAT),
        ({"messages": "[sic] words"}, "[sic] words"),
        ({"messages": [{"role": "Human", "content": "Hi, ü"}, {"role": "gpt", "content": "Hello.\nYes?"}]}, CHAT),
        ({"conversations": [{"from": "Human", "value": "Hi, ü"}, {"from": "GPT", "value": "Hello.\nYes?"}]}, CHAT),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, ANSWERED]},
            [ASKED, {"role": "assistant", "content": ""}, ANSWERED],
        ),
    ],
)
def test_rows_are_known_by_the_names_of_their_columns(tmp_path: Path, row: Any, chat: Any) -> None:
    assert chat_of(tmp_path, row) == chat
    if isinstance(chat, list):
        (tmp_path / "messages.jsonl").write_bytes(lines([{"messages": chat}] * 3))
        (tmp_path / "one.jsonl").write_bytes(lines([row] * 3))
        messages, form = (read(tmp_path / name, length=12, samples=2) for name in ("messages.jsonl", "one.jsonl"))
        assert messages.hash == form.hash


@pytest.mark.parametrize(
    ("sender", "role"),
    [("user", "user"), ("chatgpt", "assistant"), ("function_call", "assistant"), ("observation", "tool")]
    + [("tool", "tool"), ("function", "tool"), ("system", "system"), ("assistant", "assistant")],
)
def test_senders_are_roles(tmp_path: Path, sender: str, role: str) -> None:
    row = {"conversations": [{"from": sender, "value": "x", "weight": 1}]}
    assert chat_of(tmp_path, row) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize("role", ["developer", "tool", "ipython", "function_call"])
def test_roles_that_templates_know_stay(tmp_path: Path, role: str) -> None:
    chat = [{"role": role, "content": "x"}]
    assert chat_of(tmp_path, {"messages": chat}) == chat


@pytest.mark.parametrize("delimiter", ",;|\t")
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_first_row_of_a_table_tells_what_parts_its_cells(tmp_path: Path, suffix: str, delimiter: str) -> None:
    path = tmp_path / f"rows{suffix}"
    write_table(path, ROWS, delimiter)
    assert list(read_documents(str(path))) == [row["text"] for row in ROWS]
    path.write_text('"text"\na; b\n')
    assert list(read_documents(str(path))) == ["a; b"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    for prefix in ("", "\ufeff"):
        data = {"a.txt": "words", "a.csv": "text\nwords\n"}.get(name, '{"text": "words"}\n')
        (tmp_path / name).write_text(prefix + data, encoding="utf-8")
        assert list(read_documents(str(tmp_path / name))) == ["words"]
        assert read_text(tmp_path / name) == data


def test_a_column_may_be_named(tmp_path: Path) -> None:
    row = {"text": "words", "talk": SHARED, "frage": "Hi, ü", "antwort": "Hello.\nYes?"}
    assert chat_of(tmp_path, row, column="talk") == CHAT
    assert chat_of(tmp_path, row, column="frage") == "Hi, ü"
    assert chat_of(tmp_path, row, column=("frage", "antwort")) == CHAT
    assert Calibration(dataset="a.csv", column=["frage", "antwort"]).column == ("frage", "antwort")
    with pytest.raises(InputError, match="row 1 has no column 'reply'; it has"):
        chat_of(tmp_path, row, column=("frage", "reply"))


def test_files_are_read_in_the_order_of_their_names_and_lists_in_their_own(tmp_path: Path) -> None:
    for name in ("b", "a", "c/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": name}]))
    assert list(read_documents(f"{tmp_path}/*.jsonl")) == ["a", "b"]
    assert list(read_documents(f"{tmp_path}/**/*.jsonl")) == ["a", "b", "c/d"]
    given = Calibration(dataset=[f"{tmp_path}/c/*.jsonl", f"{tmp_path}/a.jsonl"])
    assert list(read_documents(given.dataset)) == ["c/d", "a"]
    with pytest.raises(InputError, match=r"there is no file .*\*\.csv"):
        list(read_documents(f"{tmp_path}/*.csv"))
    with pytest.raises(InputError, match=r"there is no file .*e\.jsonl"):
        list(read_documents(f"{tmp_path}/a.jsonl,{tmp_path}/e.jsonl"))
    for twice in (f"{tmp_path}/*.jsonl,{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl,{tmp_path}/a.jsonl"):
        with pytest.raises(InputError, match=r"a\.jsonl is 2 times among the files"):
            list(read_documents(twice))
    odd = tmp_path / "x,[y].jsonl"
    odd.write_bytes(lines([{"text": "odd"}]))
    assert list(read_documents(str(odd))) == ["odd"]
    with pytest.raises(ValueError, match="commas part names"):
        Calibration(dataset=[str(odd)])


def test_several_files_are_read_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the first of them is not all that a short calibration reads."""
    for name, count in (("a", 4), ("b", 2), ("c", 1)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": f"{name}{number}"} for number in range(count)]))
    rows = partial(read_documents, f"{tmp_path}/*.jsonl")
    assert list(rows(in_turn=100)) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]
    assert list(rows()) == ["a0", "a1", "a2", "a3", "b0", "b1", "c0"]
    monkeypatch.setattr(sources, "TURNS", 2)  # as many files as may be open
    assert list(rows(in_turn=100)) == ["a0", "b0", "a1", "b1", "a2", "a3", "c0"]
    reading = Reading()
    assert next(rows(in_turn=100, reading=reading)) == "a0"
    assert reading.notes("*.jsonl") == [
        "b.jsonl, c.jsonl of *.jsonl gave no text: the others were enough, or these are empty"
    ]


def test_plain_text_of_several_files_is_cut_to_be_read_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.data.calibration.TURN", 8)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"line {name}{number}\n" for number in range(3)))
    parts = list(read_documents(f"{tmp_path}/a.txt,{tmp_path}/b.txt", in_turn=8))
    assert parts == [f"line {name}{number}\n" for number in range(3) for name in "ab"]
    assert list(read_documents(f"{tmp_path}/a.txt", in_turn=8)) == ["line a0\nline a1\nline a2\n"]
    config = Calibration(dataset=f"{tmp_path}/*.txt", samples=2, length=8, held_out=0, shuffle=False)
    assert list(source_documents(config, Reading())) == [(tmp_path / f"{name}.txt").read_text() for name in "ab"]
    both = source_documents(config.model_copy(update={"shuffle": True}), reading := Reading())
    assert sorted(map(str, both)) == sorted(parts)
    assert reading.notes("*.txt") == ["long .txt files are read in turn, as documents of at most 8 bytes"]


def test_recipes_in_outputs_name_the_files_without_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": name * 99}]))
    recipes = [
        Distillation(version=1, data={"dataset": dataset, "held_out": 1, "samples": 4})
        for dataset in (f"{tmp_path}/*.jsonl", [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"])
    ]
    hidden = [hide_folders(recipe).data for recipe in recipes]
    assert [text.dataset for text in hidden] == ["*.jsonl", "a.jsonl,b.jsonl"]
    assert hidden[0].sha256 == hidden[1].sha256 is not None
    assert str(tmp_path) not in dump(hide_folders(recipes[1]))
    again = read_as(Distillation, {"version": 1, "data": hidden[1].model_dump()})
    assert again.data == hidden[1]
    source = Calibration(dataset=f"{tmp_path}/*.jsonl", sha256=hidden[0].sha256, samples=1, length=8)
    assert calibration_tokens(source, tiny_tokenizer()).read_as == "text from text"
    (tmp_path / "b.jsonl").write_bytes(lines([{"text": "other"}]))
    with pytest.raises(InputError, match="is not the text of the recipe"):
        calibration_tokens(source, tiny_tokenizer())


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    FILES["splits"](tmp_path / "splits", ROWS)
    assert list(read_documents(str(tmp_path / "splits"), split="test")) == ["007"]
    with pytest.raises(InputError, match="has no split 'dev'; it has train, test"):
        list(read_documents(str(tmp_path / "splits"), split="dev"))
    chosen = saved(ROWS).select([3, 0])
    chosen.save_to_disk(str(tmp_path / "chosen"))
    assert list(read_documents(str(tmp_path / "chosen"))) == [ROWS[3]["text"], ROWS[0]["text"]]


def test_files_of_another_kind_in_a_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads the kind that most files are of, and says nothing of the others."""
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS))
    for name in ("more.txt", ".hidden.txt", "README.md", "._a.jsonl"):
        (tmp_path / name).write_bytes(b"not \x00 read")
    reading = Reading()
    assert len(list(read_documents(str(tmp_path), reading=reading))) == 8
    assert reading.cuts == {f"more.txt in {tmp_path.name} not read, as datasets takes files of one kind"}
    assert read(tmp_path).report()["notes"] == sorted(reading.cuts)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert len(list(read_documents(f"~/{tmp_path.name}"))) == 8


# --- what is said and counted -----------------------------------------------------------------------------------------


def test_what_was_understood_is_said_once_with_an_example_on_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chats.jsonl"
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": 1}], "reasoning_content": "Hm."}
    rows: list[Any] = [{"messages": [{"role": "user", "content": "a\x1b[31m\n\u202e" + "b" * 120}, calls], "tools": []}]
    rows += [{"messages": []}, {"text": None, "other": "x"}, {"text": "plain " * 20}, {"n": 1}, {"messages": CHAT}]
    path.write_bytes(lines(rows))
    with caplog.at_level(logging.INFO, "llmcompress"):
        found = read(path, samples=21)
    [record] = [record for record in caplog.records if hasattr(record, "note")]
    said = record.getMessage()
    assert said.startswith(
        f"{path} is read as chats from messages, without tools; first: user: a\\x1b[31m\\n\\u202ebbb"
    )
    assert said.isprintable() and len(said) < len(str(path)) + 200
    assert found.report()["read_as"] == "chats from messages"
    assert not any("bbb" in str(value) for value in found.report().values()), "reports are published"
    assert (
        found.report()["notes"]
        == list(found.notes)
        == [
            "rows of chats.jsonl were read in several ways: 2 as chats from messages, 1 as text from text",
            "3 of 6 rows of chats.jsonl have no text and were left out",
            "tool_calls of 1 messages of chats.jsonl were left out",
            "reasoning_content of 1 messages of chats.jsonl were left out",
        ]
    )


def test_a_column_that_no_row_has_is_refused_before_the_source_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([{"n": 1}] * PATIENCE + [{"text": "late"}]))
    reading = Reading()
    with pytest.raises(InputError, match=r"row 1 has the columns \['n'\]; name the one with the text"):
        list(read_documents(str(path), reading=reading))
    assert reading.rows == PATIENCE
    path.write_bytes(lines([{"n": 1}] * (PATIENCE - 1) + [{"text": "in time"}] + [{"n": 1}] * PATIENCE))
    reading = Reading()
    assert list(read_documents(str(path), reading=reading)) == ["in time"]
    assert (reading.rows, reading.empty) == (2 * PATIENCE, 2 * PATIENCE - 1)


def test_distillation_counts_the_answers_of_every_form(tmp_path: Path) -> None:
    for name, row in (("messages", {"messages": CHAT}), ("alpaca", {"instruction": "Hi, ü", "output": "Hello.\nYes?"})):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([row] * 9))
    config = tiny("llama").config
    texts = [
        read_data(
            TextSource(dataset=f"{tmp_path}/{name}.jsonl", samples=4, length=24, held_out=1),
            tiny_tokenizer(),
            lambda: tiny("llama"),
            config,
        )
        for name in ("messages", "alpaca")
    ]
    assert texts[0].hash == texts[1].hash
    assert texts[1].report["read_as"] == "chats from instruction, output"
    with pytest.raises(RecipeError, match="no chat template"):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        read(tmp_path / "alpaca.jsonl", tokenizer, chat_template=True)


def test_prompts_of_every_form_are_answered(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_table(path, [{"question": "Hi, ü", "answer": "Hello.\nYes?"}, {"question": "Ho", "answer": ""}])
    assert [(prompt.messages[0]["content"], prompt.reference) for prompt in prompts(Answering(str(path)))] == [
        ("Hi, ü", "Hello.\nYes?"),
        ("Ho", None),
    ]


def test_evaluation_reads_documents_as_calibration_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    rows, packed, plain = (tmp_path / name for name in ("rows.jsonl", "plain.txt.gz", "plain.txt"))
    text = "\n\n".join(row["text"] for row in ROWS)
    rows.write_bytes(lines([*ROWS, {"text": ""}]))
    packed.write_bytes(gzip.compress(text.encode()))
    plain.write_text(text)
    expected = text_windows(tokenizer, text, 5, 16)
    for path in (rows, packed, plain, Path(f"{tmp_path}/pl*.txt")):
        assert evaluation_windows(tokenizer, Protocol(path, 5, 16)).equal(expected)
    with caplog.at_level(logging.INFO, "llmcompress"):
        evaluation_windows(tokenizer, Protocol(rows, 99, 16))
    assert "1 of 5 rows of" in caplog.text
    assert Protocol(rows).to_json()["text"] == "documents of rows.jsonl"
    assert Protocol(plain).to_json()["text"] == "plain.txt"
    assert Protocol(Path(f"{rows},{plain}")).to_json()["text"] == "documents of rows.jsonl, plain.txt"
    with pytest.raises(InputError, match=r"has less than one window of 999 tokens"):
        evaluation_windows(tokenizer, Protocol(rows, 1, 999))
    with pytest.raises(RecipeError, match="at least one window"):
        evaluation_windows(tokenizer, Protocol(rows, 1, 1))


def test_parquet_files_and_groups_without_rows_are_read(tmp_path: Path) -> None:
    full = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", full.schema) as writer:
        for table in (full[:0], full, full[:0]):
            writer.write_table(table)
    with pyarrow.parquet.ParquetWriter(tmp_path / "b.parquet", full.schema):
        pass
    pyarrow.parquet.write_table(full[:0], tmp_path / "c.parquet")
    assert list(read_documents(f"{tmp_path}/*.parquet")) == [row["text"] for row in ROWS]
    with pytest.raises(InputError, match="is empty"):
        read(tmp_path / "c.parquet")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.json", b'{"version": "1",\n "data": []}', "line 1 is not JSON"),
        ("a.json", b'[{"text": "a"},, {"text": "b"}]', "entry 2 of its list is not JSON"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "entry 2 of its list is not JSON (a comma is missing"),
        ("a.json", b'[,{"text": "a"}]', "entry 1 of its list is not JSON (a comma is missing, or one too many)"),
        ("a.json", b'[{"text": "a"},]', "entry 2 of its list is not JSON"),
        ("a.json", b'[{"text": "a"}', "entry 2 of its list is not JSON"),
        ("a.json", b'[{"text": "a"}, {"text": "b', "entry 2 of its list is not JSON (Unterminated string"),
        ("a.json", b'[{"text": "a"}] [{"text": "b"}]', "goes on behind its list"),
        ("a.json", b"[[1, 2], [3]]", "row 1 is list, not an object"),
        ("a.json", b"[1, 2]", "row 1 is int, not an object"),
        ("a.json", b'[{"text": ' + b"[" * 99_999, "entry 1 of its list is nested too deeply"),
        ("a.json", b'["' + "ü".encode("latin-1") + b'"]', "not UTF-8"),
        ("a.json", '[{"text": "ü"}]'.encode("utf-16"), "not UTF-8"),
        ("a.json", b'[{"text": ' + b"9" * 5000 + b"}]", "entry 1 of its list is not JSON"),
        ("a.jsonl", b'{"conversations": [{"from": "alien", "value": "x"}]}', "message 1 is from 'alien'; write one of"),
        ("a.jsonl", b'{"conversations": [{"from": 5, "value": "x"}]}', "role 1 holds int, not text"),
        ("a.jsonl", b'{"conversations": [{"from": "gpt", "value": {}}]}', "message 1 holds dict, not text"),
        ("a.jsonl", b'{"conversations": [{"user": "a", "bot": "b"}]}', "neither text nor messages"),
        ("a.jsonl", b'{"prompt": "a", "completion": "\\ud800"}', "half of a character"),
        ("a.csv", b'text\n"a" b\n', "line 2 is no row of a table (',' expected after '\"')"),
        ("a.csv", b'text\n"a\nb', "line 3 is no row of a table (unexpected end of data)"),
        ("a.csv", b"text,id\na,1\nb, c,2\n", "line 3 ends a row of 3 cells, and the first row names 2 columns"),
        ("a.csv", b"text,text\na,1\n", "names a column twice"),
        ("a.csv", b"text\nok\n\xff\n", "line 3 is not UTF-8"),
        ("a.csv", "text\nü\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("a.jsonl", '{"text": "ü"}\n'.encode("utf-16"), "line 1 is not UTF-8"),
        ("a.jsonl", b'{"id": "1", "data": ["a", "b"]}', "name the one with the text as `column`"),
        ("a.json", b'{"data": [{"text": "a"}]}', "row 1 holds rows in 'data'; write these alone"),
        ("a.json", b'{"0": {"text": "a"}, "1": {"text": "b"}}', "row 1 holds rows in '0'; write these alone"),
        (
            "a.csv",
            b"messages\n\"[{'role': 'user', 'content': 'a'}]\"\n",
            "column 'messages' holds a list that is not JSON",
        ),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text\n", "is empty"),
        ("a.tsv", b"a\tb\nx\ty\n", "name the one with the text"),
        ("a.jsonl.gz", b"no archive", "cannot be read (Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:-9], "cannot be read (Compressed file ended"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:20] + b"\xff" * 99, "cannot be read"),
        ("a.jsonl.zst", b"no archive", "cannot be read"),
        ("a.jsonl.zst", pack(lines(ROWS))[:-3], "cannot be read (Truncated compressed stream)"),
        ("a.gz", gzip.compress(b"text", mtime=0), "not from .gz"),
        ("a.parquet.gz", gzip.compress(b"text", mtime=0), "not from .parquet.gz"),
        ("a.arrow", b"no table", "is not a readable arrow file"),
        ("a.xml", b"<a/>", "not from .xml"),
    ],
)
def test_files_that_no_one_should_write(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    assert sentence in refusal(tmp_path / name, data)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path: Path, name: str) -> None:
    """A clone without Git LFS has one in the place of every large file; in a table it would be a row."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"
    assert "run `git lfs pull`" in refusal(tmp_path / name, pointer)
    with pytest.raises(InputError, match="run `git lfs pull`"):
        read_text(tmp_path / name)


@pytest.mark.parametrize("damage", [2**31 - 1, -5])
def test_a_saved_data_set_with_wrong_offsets_is_refused_not_read(tmp_path: Path, damage: int) -> None:
    """To read it ends the process."""
    saved([{"text": "x" * 50}] * 100).save_to_disk(str(tmp_path / "folder"))
    [path] = (tmp_path / "folder").glob("*.arrow")
    data, offsets = path.read_bytes(), b"".join(number.to_bytes(4, "little") for number in (50, 100, 150))
    place = data.index(offsets) + 4
    path.write_bytes(data[:place] + damage.to_bytes(4, "little", signed=True) + data[place + 4 :])
    with pytest.raises(InputError, match="is not a readable folder of a data set"):
        read(tmp_path / "folder")
    (tmp_path / "folder" / "state.json").write_text("{}")
    with pytest.raises(InputError, match="is not a readable folder of a data set"):
        read(tmp_path / "folder")


@pytest.mark.parametrize(
    ("name", "begin", "filling", "sentence"),
    [
        ("a.jsonl.gz", b'{"text": "', b"a", "line 1 has more than"),
        ("a.jsonl.zst", b'{"text": "', b"a", "line 1 has more than"),
        ("a.json.gz", b'[{"text": "', b"a", "entry 1 of its list has more than"),
        ("a.json.gz", b"[" + b" " * 99, b" ", "entry 1 of its list has more than"),
        ("a.csv.gz", b'text\n"', b"a", "line 2 is in a row of more than"),
        ("a.csv.gz", b'text\n"', b"a\n", "is in a row of more than"),
        ("a.csv.gz", b"text\n", b'"\n",', "is in a row of more than"),
    ],
)
def test_an_endless_row_takes_no_more_than_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begin: bytes, filling: bytes, sentence: str
) -> None:
    for limit, size in (("LONGEST_LINE", 1 << 18), ("LONGEST_RECORD", 1 << 16), ("CHUNK", 1 << 16)):
        monkeypatch.setattr(files, limit, size)
    data = begin + filling * (9_000_000 // len(filling))
    (tmp_path / name).write_bytes(pack(data) if name.endswith("zst") else gzip.compress(data, 1))
    assert (tmp_path / name).stat().st_size < 400_000
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=sentence):
            list(read_documents(str(tmp_path / name)))
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", tiered(["rows.json", "rows.csv.gz", "rows.jsonl.zst"], "rows.json".__eq__))
def test_memory_does_not_follow_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(files, "CHUNK", 1 << 16)
    rows = [{"text": f"{number} " + "x" * 2000} for number in range(4000)]
    match name:
        case "rows.json":
            data = json.dumps(rows).encode()
        case "rows.csv.gz":
            write_table(tmp_path / "rows.csv", rows)
            data = gzip.compress((tmp_path / "rows.csv").read_bytes(), 1)
        case _:
            data = pack(lines(rows))
    (tmp_path / name).write_bytes(data)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_documents(str(tmp_path / name))) == 4000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000, "of 8 million"
    finally:
        tracemalloc.stop()


def test_entries_of_a_list_are_those_of_the_json_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the text is cut while it is read."""
    values = [{"text": 'a"]\\,[{é\U0001f600\n', "n": [1.5e-7, -2, True, None, {}]}, "plain", {"b": [], "c": "\\"}]
    for text in (json.dumps(values), json.dumps(values, ensure_ascii=False, indent=1), "[ ]", "[]"):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        for size in range(1, 40):
            monkeypatch.setattr(files, "CHUNK", size)
            assert list(files.file_rows(tmp_path / "a.json")) == json.loads(text)


def test_list_files_is_stable_where_nothing_matches(tmp_path: Path) -> None:
    assert list_files(f"{tmp_path}/*.none") == [tmp_path / "*.none"]
