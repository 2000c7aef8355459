"""Damaged tokenizers and model cards: one sentence, or a card that says nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmcompress.errors import InputError
from llmcompress.models.dense.model import resolve
from llmcompress.models.dense.tokenizer import load_tokenizer
from tests.tiny import save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()  # it goes before that of tokenizer_config.json
    return folder


def damaged(good: Path, folder: Path, name: str, change: Any) -> Path:
    """Return a copy of a tokenizer with one file in other bytes, or with other entries."""
    shutil.copytree(good, folder, dirs_exist_ok=True)
    entries = json.loads((good / name).read_text())
    (folder / name).write_bytes(change if isinstance(change, bytes) else json.dumps(entries | change).encode())
    return folder


DAMAGE = [b"", b"[]", b"5", b"[" * 100_000, b"\xff\xfe", b'{"a":', bytes(range(256))]
DEFINITION: list[Any] = [
    {"model": None},
    {"model": 5},
    {"model": {"type": "BPE", "vocab": [], "merges": []}},
    {"pre_tokenizer": {"type": "Nope"}},
    {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {}, "merges": ["z y"]}},
    {"added_tokens": [{"id": "x"}]},
    {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "Q", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
]
SETTINGS: list[Any] = [
    {"tokenizer_class": 5},
    {"tokenizer_class": ["a"]},
    {"eos_token": 5},
    {"eos_token": {"a": 1}},
    {"model_max_length": "x"},
    {"added_tokens_decoder": {"x": 5}},
    {"extra_special_tokens": 5},
    {"padding_side": "up"},
    {"chat_template": 5},
    {"self": 1},
]


@pytest.mark.parametrize(
    ("name", "change"),
    [("tokenizer.json", change) for change in DAMAGE + DEFINITION]
    + [("tokenizer_config.json", change) for change in DAMAGE + SETTINGS],
    ids=lambda value: ascii(value)[:30],
)
def test_a_damaged_tokenizer_is_one_sentence(good: Path, tmp_path: Path, name: str, change: Any) -> None:
    with pytest.raises(InputError, match="has no tokenizer that can be read"):
        load_tokenizer(damaged(good, tmp_path / "bad", name, change))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("metadata", "license"),
    [
        ("license: mit", "mit"),
        ("{[", None),
        ("a word", None),
        ("- a", None),
        ("license: [a]", None),
        ("\tlicense: mit", None),
        ("a: !!python/object:os.x {}", None),
        ("a: !!bool maybe", None),
        ('a: "\\UFFFFFFFF"', None),
        (f"a: {'9' * 5000}", None),
        ("a: \0", None),
        ("model-index: [5]\nlicense: mit", "mit"),
        ("? [a]\n: b", None),
        ("self: 1", None),
    ],
)
def test_a_damaged_card_says_no_license(model: Path, metadata: str, license: str | None) -> None:
    (model / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    assert resolve(str(model)).license == license
