"""Texts and chats that no one should write: each is read within limits, or refused in a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcompress.data import chat, files
from llmcompress.data import text as texts
from llmcompress.data.calibration import LONG_LINE, PIECE, CalibrationTokens, calibration_tokens, pieces
from llmcompress.data.chat import render_chat
from llmcompress.data.files import file_rows
from llmcompress.data.text import read_documents, shuffle
from llmcompress.errors import InputError
from llmcompress.evaluation import perplexity
from llmcompress.evaluation.perplexity import text_windows
from llmcompress.recipe.calibration import Calibration
from tests.tiny import tiny_tokenizer

FAST = settings(
    derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=list(HealthCheck)
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def documents(tmp_path: Path, data: bytes, suffix: str = ".jsonl") -> list[Any]:
    path = tmp_path / f"text{suffix}"
    path.write_bytes(data)
    return list(read_documents(str(path)))


def refusal(tmp_path: Path, data: bytes, suffix: str = ".jsonl") -> str:
    with pytest.raises(InputError) as caught:
        documents(tmp_path, data, suffix)
    assert str(caught.value).encode()
    return str(caught.value)


def calibrated(path: Path) -> CalibrationTokens:
    return calibration_tokens(Calibration(dataset=str(path), samples=2, length=8), tiny_tokenizer())


def test_a_long_file_is_several_documents_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Zwölf Wörter.\r\n" * 40 + "ü" * 100 + "word " * 40
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(files, "NEAR", 10)
    for length in range(20, 90, 7):
        found = list(file_rows(path, length))
        assert "".join(found) == text.replace("\r\n", "\n")
        assert max(len(one.encode()) for one in found) <= length


def test_a_long_line_is_cut_and_the_report_says_so(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("word " * (PIECE // 2))
    found = calibrated(path)
    assert found.notes == (LONG_LINE,)
    assert found.report()["notes"] == [LONG_LINE]
    path.write_text("word " * 100)
    assert calibrated(path).notes == ()
    assert "notes" not in calibrated(path).report()


@pytest.mark.parametrize("line", ["word " * 99_999, "x" * 999_999, "word\n" * 99_999, "", "short"])
def test_pieces_are_the_text_and_bounded(line: str) -> None:
    found = list(pieces(line))
    assert "".join(found) == line
    assert all(len(one) <= 2 * PIECE for one in found)


def test_shuffling_holds_few_long_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "HELD_CHARACTERS", 100)
    read: list[str] = []

    def source() -> Any:
        for number in range(50):
            read.append(str(number))
            yield str(number) * 30

    order = shuffle(source(), seed=0)
    first = next(order)
    assert len(read) <= 6
    assert len({first, *order}) == 50


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"[" * 200_000, "line 1 is nested too deeply"),
        (b'{"text": "a \\ud800 b"}', r"row 1 has '\ud800', half of a character, at 2"),
        (b'{"messages": [{"role": "user", "content": "\\udfff"}]}', r"message 1 has '\udfff', half of a character"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}',
            "a part that is no text (image)",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}',
            "a part that is no text (text)",
        ),
        (b'{"messages": [{"role": "user", "content": {"a": 1}}]}', "message 1 holds dict, not text"),
        (b'{"text": "\xff"}', "line 1 is not UTF-8 text (byte 10)"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        (b'{"' + b"k" * 5000 + b'": 1}', "name the one with the text"),
    ],
)
def test_rows_are_refused(tmp_path: Path, data: bytes, sentence: str) -> None:
    said = refusal(tmp_path, data)
    assert sentence in said
    assert len(said) < 700


def test_a_line_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 50)
    assert "line 2 has more than 50 bytes" in refusal(tmp_path, b'{"text": "a"}\n{"text": "' + b"a" * 50 + b'"}\n')


@pytest.mark.parametrize("content", [[{"type": "text", "text": "Hel"}, {"text": "lo."}], ["Hel", "lo."], "Hello."])
def test_parts_of_text_are_joined(tmp_path: Path, content: Any) -> None:
    rows = documents(tmp_path, json.dumps({"messages": [{"role": "user", "content": content}]}).encode())
    assert rows == [[{"role": "user", "content": "Hello."}]]


def test_folders_pipes_and_devices_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("folder.txt", "pipe.txt", "zero.txt"):
        with pytest.raises(InputError, match="this is a folder, a pipe or a device"):
            list(read_documents(str(tmp_path / name)))
    with pytest.raises(InputError, match="there is no file"):
        list(read_documents("~nobody-is-called-this/x.txt"))


def test_evaluation_reads_no_more_of_a_text_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    whole = text_windows(tokenizer, "some text " * 50, 3, 16)
    monkeypatch.setattr(perplexity, "AT_ONCE", 60)
    asked: list[str] = []
    plain = type(tokenizer).__call__

    def counting(self: Any, text: str, **how: Any) -> Any:
        asked.append(text)
        return plain(self, text, **how)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    assert text_windows(tokenizer, "some text " * 50, 3, 16).equal(whole)
    assert [len(text) for text in asked] == [1, 60], "one letter, to see whether BOS is put before it"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{% if %}", "Expected an expression"),
        ("{{ a.b.c }}", "undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
        ("{{ 'a' * 10**11 }}", "memory"),
        ("{{ 'a'.center(10**11) }}", "memory"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 20000000 }}", "10,000,000 is the most"),
        ("{% for i in [1] %}" * 50 + "{% endfor %}" * 50, "nested blocks"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_a_sentence(template: str, reason: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="the row: the chat template refuses it") as caught:
        render_chat(CHAT, tokenizer, where="the row")
    assert reason in str(caught.value)
    with pytest.raises(InputError, match="^the chat that begins 'Hi': the chat template refuses it"):
        render_chat(CHAT, tokenizer)


def test_a_template_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render_chat(CHAT, tokenizer) == "Hi"
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    tokenizer.chat_template = LOOP
    with pytest.raises(InputError, match="it takes more than 0.5 seconds"):
        render_chat(CHAT, tokenizer)
    monkeypatch.undo()
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render_chat(CHAT, tokenizer) == "Hi"


@pytest.mark.parametrize("prompt", [False, True])
def test_a_chat_is_rendered_as_transformers_does(prompt: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}{{ messages | tojson }}\x00 ü \u2028"
    )
    chat = [{"role": "user", "content": " a\nb\r\n \U0001f600 \\ \" '"}, *CHAT, {"role": "tool", "content": ""}]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert render_chat(chat, tokenizer, prompt=prompt) == expected


def judge(data: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_bytes(data)
    try:
        calibrated(path)
    except InputError as error:
        assert str(error).encode()


ROWS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("a b \ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "messages", "role", "content", "type", "a"]), inner)
    ),
    max_leaves=10,
)
CHATS = st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": ROWS, "content": ROWS}), max_size=3)}
)


@pytest.mark.slow
@FAST
@given(
    data=st.lists((ROWS | CHATS).map(json.dumps), max_size=4).map("\n".join).map(str.encode) | st.binary(max_size=99)
)
def test_any_bytes_are_json_lines_or_refused(tmp_path: Path, data: bytes) -> None:
    judge(data, ".jsonl", tmp_path)


@pytest.mark.parametrize("suffix", [".txt", ".json", ".csv"])
@FAST
@given(data=st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=99))
def test_any_bytes_are_a_text_or_refused(tmp_path: Path, suffix: str, data: bytes) -> None:
    judge(data, suffix, tmp_path)


@pytest.mark.nightly
@settings(FAST, max_examples=3000)
@given(
    data=st.lists((ROWS | CHATS).map(json.dumps), max_size=4).map("\n".join).map(str.encode) | st.binary(max_size=99)
)
def test_any_bytes_are_json_lines_or_refused_many(tmp_path: Path, data: bytes) -> None:
    judge(data, ".jsonl", tmp_path)
