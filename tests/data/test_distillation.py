"""Tokens that count: of chats the answers, of packed documents all but first ones. Masks against plain bookkeeping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from llmcompress.data.batch import Batch
from llmcompress.data.calibration import calibration_tokens
from llmcompress.data.chat import answer_tokens
from llmcompress.data.distillation import PATIENCE, Data, read_data
from llmcompress.data.packing import first_tokens, pack_documents
from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.calibration import TextSource
from tests.tiny import tiny_tokenizer

BOS, EOS = 256, 257
CHATS = [
    [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "It is 6.\n")],
    [("user", "Name a river."), ("assistant", "Rhône")],
    [("user", "Any more?"), ("user", "Hello?")],
    [("assistant", "Welcome."), ("user", "Bye."), ("assistant", "")],
]


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def slow(chat: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """The tokens of a chat under the tiny template, byte by byte, and which are an answer's."""
    ids: list[int] = []
    counted: list[bool] = []

    def write(more: list[int], count: bool) -> None:
        ids.extend(more)
        counted.extend([count] * len(more))

    for number, (role, content) in enumerate(chat):
        answer = role == "assistant" and number > 0
        write([BOS], False)
        write(letters(f"{role}\n"), False)
        write([*letters(content), EOS], answer)
        write(letters("\n"), False)
    return ids, counted


def letters(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False).input_ids


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, tokenizer: PreTrainedTokenizerFast | None = None, **more: Any) -> Data:
    source = TextSource(**{"dataset": str(path), "shuffle": False, "held_out": 1, **more})
    return read_data(source, tokenizer or tiny_tokenizer(), None, None)  # type: ignore[arg-type]


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_answers_are_what_the_assistant_says(chat: list[tuple[str, str]]) -> None:
    assert answer_tokens(messages(chat), tiny_tokenizer(), "here") == slow(chat)


def test_an_answer_without_an_ending_token_ends_with_its_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ids, counted = answer_tokens(messages([("user", "a"), ("assistant", "b"), ("user", "c")]), tokenizer, "here")
    assert tokenizer.decode([token for token, counts in zip(ids, counted) if counts]) == "b\n"


def test_a_template_that_rewrites_what_precedes_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)
    with pytest.raises(InputError, match=r"^x, document 3: the chat template writes the messages before answer 2"):
        answer_tokens(messages(CHATS[1]), tokenizer, "x, document 3")


def test_a_chat_that_the_template_refuses_is_named() -> None:
    tokenizer = tiny_tokenizer()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + str(tokenizer.chat_template)
    with pytest.raises(InputError, match=r"^x, document 3: the chat template refuses it \(no system\); leave"):
        answer_tokens(messages(CHATS[0]), tokenizer, "x, document 3")


def test_unpacked_chats_are_padded_and_their_answers_count(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [{"messages": messages(chat)} for chat in CHATS])
    found = read(path, packing=False, length=50, samples=3)
    rows = [slow(CHATS[index]) for index in (0, 1, 3)]
    for row, (ids, counted) in enumerate(rows):
        whole = Batch.join([found.sequences, *found.held_out])
        used = min(50, len(ids))
        assert whole.ids[row].tolist() == ids[:50] + [0] * (50 - used)
        assert whole.counted[row].tolist() == counted[:50] + [False] * (50 - used)
    assert found.report["dropped"] == 1 and found.report["documents"] == 4
    assert found.report["targets"] == sum(sum(counted[:50]) for _, counted in rows)


def test_packed_chats_count_their_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [{"messages": messages(chat)} for chat in CHATS * 2])
    found = read(path, length=40, samples=5)
    whole = Batch.join([found.sequences, *found.held_out])
    stream = [pair for chat in CHATS * 2 for pair in zip(*slow(chat))]
    rows = []
    while len(stream) >= 40:
        bos = [] if stream[0][0] == BOS else [(BOS, False)]
        row, stream = bos + stream[: 40 - len(bos)], stream[40 - len(bos) :]
        row[0] = (row[0][0], False)
        rows += [row] if any(counts for _, counts in row) else []
    assert [list(zip(*row)) for row in rows] == [
        [tuple(ids), tuple(counted)] for ids, counted in zip(whole.ids.tolist(), whole.counted.tolist())
    ]


def test_all_of_a_chat_counts_where_that_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [{"messages": messages(chat)} for chat in CHATS])
    found = read(path, length=30, samples=4, answers_only=False)
    assert found.sequences.counted[:, 1:].all() and not found.sequences.counted[:, 0].any()


def test_data_without_answers_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [{"messages": messages(CHATS[2])}] * 5)
    sentence = (
        r"none of 5 documents from .*chats\.jsonl has an answer of the assistant within 16 tokens, or.*answers_only"
    )
    for packing in (True, False):
        with pytest.raises(InputError, match=sentence):
            read(path, length=16, samples=40, packing=packing)
    many = write(tmp_path / "many.jsonl", [{"messages": messages(CHATS[2])}] * (PATIENCE + 1))
    with pytest.raises(InputError, match=f"none of {PATIENCE} documents"):
        read(many, length=16, samples=10**6)
    texts = write(tmp_path / "texts.jsonl", [{"text": "The river is high this year."}] * 5)
    with pytest.raises(InputError, match="none of 5 documents"):
        read(texts, length=16, samples=4, answers_only=True)


def test_empty_and_other_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="text from .* is empty; give a file or data set with text"):
        read(tmp_path / "empty.txt", length=16, samples=4)
    with pytest.raises(InputError, match="holds neither text nor messages with a role and a content"):
        read(write(tmp_path / "numbers.jsonl", [{"text": 3}]), length=16, samples=4, column="text")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InputError, match="gives 0 of 4 sequences of 16 tokens"):
        read(tmp_path / "short.txt", length=16, samples=4)


def test_answers_need_a_template(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [{"messages": messages(chat)} for chat in CHATS])
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(RecipeError, match="answers_only is true, but the tokenizer has no chat template"):
        read(path, bare, length=16, samples=4, answers_only=True)
    assert read(path, bare, length=16, samples=4).sequences.counted[:, 1:].all()


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"held_out": 0}, "held_out is 0"),
        ({"samples": 1}, "none is left to hold out"),
        ({"dataset": "self", "boundaries": True}, "leave boundaries and answers_only out"),
        ({"answers_only": True, "chat_template": False}, "answers_only needs the chat template"),
        ({"boundaries": True, "packing": False}, "every sequence is one document"),
        ({"subset": "small"}, "subset cannot be chosen for dataset 'builtin'"),  # as for calibration
    ],
)
def test_impossible_sources_are_refused(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        TextSource(**more)


# --- packing ----------------------------------------------------------------------------------------------------------


def test_plain_text_is_read_as_calibration_reads_it(tmp_path: Path) -> None:
    rows = [{"text": f"{number}. " + "Corn and rye. " * (number % 7)} for number in range(40)]
    path = write(tmp_path / "texts.jsonl", rows)
    for more in ({}, {"eos": True}, {"bos": False}, {"shuffle": True, "seed": 3}):
        found = read(path, length=24, samples=20, **more)
        source = TextSource(
            **{"dataset": str(path), "shuffle": False, "held_out": 1, "length": 24, "samples": 20, **more}
        )
        wanted = calibration_tokens(source, tiny_tokenizer())
        assert torch.equal(torch.cat([found.sequences.ids, found.held_out[0].ids]), wanted.sequences)
        assert wanted.report().items() <= found.report.items() and found.report["targets"] == 20 * 23
        assert found.sequences.documents is None


@pytest.mark.parametrize("bos", [None, BOS])
def test_documents_keep_their_boundaries(bos: int | None) -> None:
    """Read back: each document's parts, in order, are the document; the first token of a part is no target."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 30, (40,), generator=generator).tolist()
    documents = [torch.randint(0, 255, (size,), generator=generator).tolist() for size in sizes]
    found = pack_documents(
        (iter([(ids, [True] * len(ids))]) for ids in documents), bos, 16, 1000, boundaries=True
    ).sequences
    assert found.documents is not None
    restored: dict[int, list[int]] = {}
    for ids, counted, numbers in zip(found.ids.tolist(), found.counted.tolist(), found.documents.tolist()):
        for place, (token, counts, number) in enumerate(zip(ids, counted, numbers)):
            first = place == 0 or numbers[place - 1] != number
            assert counts is not first
            if not (first and bos is not None):
                restored.setdefault(number, []).append(token)
            else:
                assert token == BOS
    whole = sorted(restored)[:-1]  # what is left over of the last is dropped
    assert len(whole) > 30 and all(restored[number] == documents[number - 1] for number in whole)
    assert (found.positions() == 0).sum() == (~found.counted).sum()


def test_documents_too_short_to_learn_from_are_dropped() -> None:
    pieces = [[([1, 2, 3], [True] * 3)], [([], []), ([4], [True])], [([5, 6, 7, 8, 9, 10], [True] * 6)]]
    found = first_tokens(map(iter, pieces), None, 4, 10, padded=True)
    assert found.sequences.ids.tolist() == [[1, 2, 3, 0], [5, 6, 7, 8]] and (found.read, found.dropped) == (3, 1)
    assert found.sequences.counted.tolist() == [[False, True, True, False], [False, True, True, True]]
    assert len(first_tokens(map(iter, pieces), BOS, 4, 10, padded=True).sequences) == 3
