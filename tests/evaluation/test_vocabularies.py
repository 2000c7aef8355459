"""Two models in one command have one vocabulary, or it ends in a sentence before anything is computed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.benchmark.protocol import SpeedProtocol
from llmcompress.cli.app import app
from llmcompress.errors import InputError
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import check_vocabularies
from tests.distillation.miniature import make, recipe
from tests.tiny import save_tiny, tiny_tokenizer

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}]
SENTENCE = r"have different vocabularies: token 64 is 'a(new)?' in \S+ and 'a(new)?' in \S+; take two models"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`, `small` made from it, and `other`: the dense model, whose tokenizer has another token at one number."""
    place = make(tmp_path_factory.mktemp("vocabularies"), RULES)
    save_tiny("llama", place / "other", tie_word_embeddings=True)
    edit(place / "other", lambda entries: rename(entries["model"]["vocab"], "a", "anew"))
    (place / "distil.yaml").write_text(json.dumps(recipe(place)))
    return place


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the tokenizer of a folder."""
    path = folder / "tokenizer.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    change(entries)
    path.write_text(json.dumps(entries), encoding="utf-8")


def rename(vocabulary: dict[str, int], old: str, new: str) -> None:
    vocabulary[new] = vocabulary.pop(old)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded, and no process started; adapters are taken for sound."""
    monkeypatch.setattr("llmcompress.evaluation.adapter_transfer._check_adapter", lambda _: None)
    for module, doors in {
        "evaluation.score": ["open_model"],
        "evaluation.drift": ["open_model"],
        "evaluation.verify": ["open_model", "load_model"],
        "evaluation.adapter_transfer": ["load_model"],
        "benchmark.measure": ["Worker"],
        "distillation.run": ["load_pair"],
    }.items():
        for door in doors:
            monkeypatch.setattr(
                importlib.import_module(f"llmcompress.{module}"), door, lambda *_, **__: pytest.fail("noticed too late")
            )


def written(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "small", "--against", "other", "-o", "out"],
        ["eval", "small", "--against", "other", "--save"],
        ["compare", "small", "small", "other", "-o", "out.md"],
        ["verify", "small", "--against", "other"],
        ["drift", "small", "--against", "other"],
        ["passport", "small", "adapter", "--against", "other"],
        ["bench", "small", "--against", "other", "-o", "out.md"],
        ["distill", "small", "distil.yaml", "--teacher", "other", "-o", "out"],
    ],
    ids=" ".join,
)
def test_commands_refuse_a_token_that_is_another(
    words: list[str], folders: Path, idle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    before = written(folders)
    done = CliRunner().invoke(app, words)
    [line] = done.stderr.splitlines()
    assert (done.exit_code, done.stdout, line[:4]) == (InputError.exit_code, "", "[5] ")
    assert written(folders) == before
    with pytest.raises(InputError, match=SENTENCE):
        raise InputError(line)


def test_functions_refuse_a_token_that_is_another(
    folders: Path, idle: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folders)
    calls: list[Callable[[], Any]] = [
        lambda: lc.score("small", against="other", output=tmp_path / "out"),
        lambda: lc.compare(["dense", "small", "other"], output=tmp_path / "out.md"),
        lambda: lc.verify("small", against="other"),
        lambda: lc.drift("small", "other"),
        lambda: lc.passport("small", ["adapter"], "other"),
        lambda: lc.bench(["dense", "small"], SpeedProtocol((1,)), against="other", table=tmp_path / "out.md"),
        lambda: lc.distill("small", "other", recipe(folders), tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(InputError, match=SENTENCE):
            call()
    assert not list(tmp_path.iterdir())


def test_a_token_more_is_named(folders: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(save_tiny("llama", tmp_path / "more", tokenizer=False))
    with pytest.raises(InputError, match=r"token 258 is missing in \S*dense and 'the' in \S*more"):
        check(folders / "dense", tmp_path / "more")


def test_texts_that_are_read_differently_are_shown(folders: Path, tmp_path: Path) -> None:
    def without_bos(entries: dict[str, Any]) -> None:
        entries["post_processor"] = None

    def split_bos(entries: dict[str, Any]) -> None:
        entries["added_tokens"] = entries["added_tokens"][1:]
        entries["model"]["vocab"]["<s>"] = 256
        entries["post_processor"] = None

    def lower(entries: dict[str, Any]) -> None:
        entries["normalizer"] = {"type": "Lowercase"}

    for name, change, message in (
        ("without_bos", without_bos, r"\"The miller .* is read as 256 51 71 ... in \S+ and as 51 71 68 ... in"),
        ("lower", lower, r"\"The miller .* is read as ... 51 71 68 ... in \S+ and as ... 83 71 68 ... in"),
    ):
        edit(save_tiny("llama", tmp_path / name), change)
        with pytest.raises(InputError, match=message):
            check(folders / "dense", tmp_path / name)
    for name, change in (("whole", without_bos), ("split", split_bos)):
        edit(save_tiny("llama", tmp_path / name), change)
        special = tmp_path / name / "tokenizer_config.json"
        entries = {key: value for key, value in json.loads(special.read_text()).items() if key != "bos_token"}
        special.write_text(json.dumps({**entries, "added_tokens_decoder": {}}))
    with pytest.raises(InputError, match=r"'<s>' is read as 256 in \S+whole and as 27 82 29 in"):
        check(tmp_path / "whole", tmp_path / "split")


def test_tables_of_other_sizes_matter_where_predictions_are_compared(folders: Path, tmp_path: Path) -> None:
    padded = save_tiny("llama", tmp_path / "padded", vocab_size=300)
    with pytest.raises(InputError, match=r"the table of tokens has 264 rows in \S*dense and 300 in \S*padded"):
        check(folders / "dense", padded)
    check(folders / "dense", padded, predictions=False)
    protocol = lc.Protocol(text=folders / "text.txt", windows=2, length=24)
    assert lc.drift(folders / "small", padded, protocol).tokens == 46
    with pytest.raises(InputError, match="264 rows"):
        lc.score(folders / "small", protocol, against=str(padded))


def test_one_tokenizer_in_several_files_is_one(folders: Path, tmp_path: Path) -> None:
    """Padded tables (264 rows for 258 tokens), files that transformers wrote again, other ends of a text."""
    again = save_tiny("llama", tmp_path / "again", tokenizer=False)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<s>", None, None
    tokenizer.save_pretrained(again)
    compact = save_tiny("llama", tmp_path / "compact")
    edit(compact, lambda entries: None)
    for path in (again, compact):
        assert {file.name: file.read_bytes() for file in path.glob("tokenizer*")} != {
            file.name: file.read_bytes() for file in (folders / "dense").glob("tokenizer*")
        }
        check(folders / "dense", path)
    check(folders / "dense", folders / "small", folders / "dense")
    found = lc.score(
        folders / "small", lc.Protocol(folders / "text.txt", windows=1, length=24), against=str(folders / "dense")
    )
    assert 0 < found["kl"] < 1


def test_speeds_need_no_vocabulary_without_a_reference(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        """The models were accepted."""

    def start(*_: object) -> None:
        raise Started

    monkeypatch.setattr(importlib.import_module("llmcompress.benchmark.measure"), "Worker", start)
    for against, models in ((None, ["small", "other"]), ("dense", ["small"])):
        reference = against and str(folders / against)
        with pytest.raises(Started):
            lc.bench([folders / name for name in models], SpeedProtocol((1,), 4, 4), against=reference)


def check(*folders: Path, predictions: bool = True) -> None:
    check_vocabularies([locate(folder) for folder in folders], predictions)
