"""Text into token sequences: the same ones every time, special tokens where the report says, bad text refused."""

from __future__ import annotations

import ast
import inspect
import json
import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from llmcompress.data.builtin import _docstring_nodes, builtin_documents, stdlib_documents, stdlib_text
from llmcompress.data.calibration import CalibrationTokens, calibration_tokens, check_tokens, held_out_count
from llmcompress.data.text import read_documents, shuffle
from llmcompress.errors import InputError, NumericsError, RecipeError
from llmcompress.recipe.calibration import Calibration
from tests.tiny import tiny, tiny_tokenizer
from tests.zoo import zoo

BOS, EOS = 256, 257


def read(tokenizer: Any = None, model: Any = None, **settings: Any) -> CalibrationTokens:
    defaults = {"samples": 4, "length": 8, "shuffle": False}
    return calibration_tokens(Calibration(**(defaults | settings)), tokenizer or tiny_tokenizer(), model)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 4)
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    return write


def test_packing_equals_tokenizing_the_whole_text_once(text_file: Path) -> None:
    whole = tiny_tokenizer()(text_file.read_text(), add_special_tokens=False).input_ids
    found = read(dataset=str(text_file), bos=False)
    assert found.sequences.flatten().tolist() == whole[:32]
    assert (found.obtained, found.length, found.tokens, found.documents, found.bos) == (4, 8, 32, 1, False)


@pytest.mark.parametrize("bos", [True, False])
def test_random_tokens_are_drawn_from_those_that_stand_for_text(bos: bool) -> None:
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {"dataset": "random", "samples": 50, "length": 40, "held_out": 0, "bos": bos}
    drawn, again, other = (read(tokenizer, tiny("llama"), seed=seed, **settings) for seed in (1, 1, 2))
    assert drawn.hash == again.hash != other.hash and (drawn.obtained, drawn.length, drawn.held_out) == (50, 40, 0)
    assert drawn.bos == bos and (drawn.sequences[:, 0] == BOS).all() == bos
    tokens, counts = drawn.sequences[:, bos:].unique(return_counts=True)
    assert not set(tokens.tolist()) & set(tokenizer.all_special_ids) and tokens.max() < tiny("llama").config.vocab_size
    assert len(tokens) == len(tokenizer) - len(tokenizer.all_special_ids) and counts.max() < 30  # of 8 on average


def test_bos_starts_every_sequence_once(text_file: Path) -> None:
    whole = tiny_tokenizer()(text_file.read_text(), add_special_tokens=False).input_ids
    found = read(dataset=str(text_file))  # auto: the tiny tokenizer puts BOS itself
    assert found.bos
    assert found.sequences[:, 0].tolist() == [BOS] * 4
    assert found.sequences[:, 1:].flatten().tolist() == whole[:28]


def test_documents_are_joined_with_what_the_report_says(jsonl: Callable[..., Path]) -> None:
    path = jsonl({"text": "abc"}, {"text": " "}, {"text": "defg"}, {"text": "h" * 40})
    with_eos = read(dataset=str(path), bos=False, eos=True, samples=1, length=10)
    assert with_eos.sequences[0].tolist() == [*_bytes("abc"), EOS, *_bytes("defg"), EOS, *_bytes("h")]
    assert (with_eos.eos, with_eos.documents) == (True, 3)
    without = read(dataset=str(path), bos=False, samples=1, length=11)
    assert without.sequences[0].tolist() == [*_bytes("abc"), *_bytes("\n\n"), *_bytes("defg"), *_bytes("\n\n")]


def test_one_document_per_sequence_drops_and_counts_short_ones(jsonl: Callable[..., Path]) -> None:
    path = jsonl({"text": "short"}, {"text": "long enough text"}, {"text": "another long text"}, {"text": "no"})
    found = read(dataset=str(path), packing=False, samples=2, length=12)
    expected = [[BOS, *_bytes("long enough")], [BOS, *_bytes("another lon")]]
    assert found.sequences.tolist() == expected
    assert (found.dropped, found.documents) == (1, 3)


def test_files_from_windows_give_the_same_tokens(tmp_path: Path) -> None:
    texts = b"One line\nand another one, and more\n", b"One line\r\nand another one, and more\r\n"
    hashes = set()
    for content in texts:
        (tmp_path / "text.txt").write_bytes(content)
        hashes.add(read(dataset=str(tmp_path / "text.txt"), bos=False).hash)
    assert len(hashes) == 1


def test_chats_are_rendered_with_the_template_and_bos_is_not_doubled(jsonl: Callable[..., Path]) -> None:
    chat = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi"}]
    path = jsonl({"messages": chat, "text": "ignored"})
    tokenizer = tiny_tokenizer()
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    expected = tokenizer(rendered, add_special_tokens=False).input_ids
    assert expected[0] == BOS
    found = read(dataset=str(path), samples=1, length=20)
    assert found.sequences[0].tolist() == expected[:20]
    plain = read(dataset=str(path), samples=1, length=14, chat_template=False, bos=False)
    assert plain.sequences[0].tolist() == _bytes("Hello there\n\nHi")[:14]
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        read(tokenizer, dataset=str(path), chat_template=True)


def test_parquet_and_jsonl_rows_read_alike(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"text": f"document number {i}", "id": i} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_documents(str(tmp_path / "rows.parquet"))) == list(read_documents(str(jsonl(*rows))))


def test_same_settings_same_hash_another_seed_another_order(jsonl: Callable[..., Path]) -> None:
    path = str(jsonl(*({"text": f"document {i} " * 3} for i in range(30))))
    first, again, other = (read(dataset=path, shuffle=True, seed=seed) for seed in (1, 1, 2))
    assert first.hash == again.hash != other.hash
    assert len(first.hash) == 64


def test_shuffling_loses_nothing_and_small_buffers_shuffle_too() -> None:
    documents = [str(i) for i in range(50)]
    for buffer in (1, 7, 100):
        assert sorted(map(str, shuffle(documents, 0, buffer)), key=int) == documents
    assert list(shuffle(documents, 0, 7)) != documents


def test_standard_library_is_deterministic_and_its_test_part_is_disjoint() -> None:
    train, test = stdlib_documents("train"), stdlib_documents("test")
    assert not {name for name, _ in train} & {name for name, _ in test}
    paragraphs = [{" ".join(p.split()) for _, text in part for p in text.split("\n\n")} for part in (train, test)]
    assert not paragraphs[0] & paragraphs[1]
    assert len(stdlib_text("train")) > 1_000_000
    assert len(stdlib_text("test")) > 150_000  # 32 windows of 1024 tokens
    found = read(dataset="stdlib", samples=16, length=64)
    assert "Python 3" in found.source
    assert found.held_out == 2
    with pytest.raises(RecipeError, match="no split 'valid'"):
        read(dataset="stdlib", split="valid")


def test_documented_statements_come_in_the_order_of_a_walk_of_the_tree() -> None:
    try_all = "try:\n def a(): 0\nexcept:\n def b(): 0\nelse:\n def c(): 0\nfinally:\n async def d(): 0\n"
    matched = "match 1:\n case 1:\n  class e: 0\nfor _ in []:\n def f(): 0\nelse:\n with g:\n  def h(): 0\n"
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for source in (try_all + matched, *(Path(module.__file__).read_text() for module in (ast, inspect, pydoc))):
        tree = ast.parse(source)
        found = list(_docstring_nodes(tree))
        assert found == [node for node in ast.walk(tree) if isinstance(node, kinds)] and len(found) >= 8


def test_builtin_text_is_of_many_kinds_a_quarter_of_it_documentation_and_none_of_it_evaluation_text() -> None:
    documents = builtin_documents()
    train = {text for _, text in stdlib_documents("train")}
    documentation = [text for text in documents if any(whole.startswith(text) for whole in train)]
    own = [text for text in documents if text not in documentation]
    assert len(own) > 300
    assert 3 * sum(map(len, documentation)) > sum(map(len, own)) > 2 * sum(map(len, documentation)) > 600_000
    assert sum(len(text.encode()) for text in own) < 1_000_000
    assert sum(not text.isascii() and sum(letter > "\u02ff" for letter in text) > 300 for text in own) > 20  # scripts
    assert documents[-len(documentation) :] == tuple(documentation)
    test = {" ".join(part.split()) for part in stdlib_text("test").split("\n\n")}
    assert not test & {" ".join(part.split()) for text in documents[:-1] for part in text.split("\n\n")}
    report = read(dataset="builtin", samples=64, length=128).report()
    assert "texts of llmcompress" in report["source"] and "read_as" not in report
    assert report["documents"] > 1


@pytest.mark.parametrize(
    ("held_out", "sequences", "expected"),
    [(0.125, 16, 2), (0.125, 2, 1), (0.125, 1, 0), (0, 16, 0), (3, 16, 3), (3, 3, 2), (0.99, 4, 3)],
)
def test_held_out_counts(held_out: float, sequences: int, expected: int) -> None:
    assert held_out_count(held_out, sequences) == expected


def test_report_holds_plain_values() -> None:
    report = read(dataset="stdlib").report()
    assert json.loads(json.dumps(report)) == report
    assert {"source", "tokens", "hash", "sequences", "length", "bos", "eos", "packing", "documents", "dropped"} <= set(
        report
    )


# --- text the teacher writes ------------------------------------------------------------------------------------


def test_teacher_text_is_seeded_full_and_leaves_the_global_random_state_alone() -> None:
    model = tiny("llama")
    state = torch.random.get_rng_state()
    first, again, other = (
        read(model=given, dataset="self", samples=18, length=24, seed=seed)
        for given, seed in ((model, 0), (lambda: model, 0), (model, 1))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.sequences, again.sequences)
    assert first.hash != other.hash
    assert first.sequences.shape == (18, 24)
    assert first.bos
    assert "free text and answers to prompts" in first.source


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_teacher_text_follows_the_models_own_distribution(family: str) -> None:
    """At a temperature near 0 each sampled token is the argmax of a plain forward pass without a cache."""
    model = tiny("llama") if family == "llama" else zoo(family, tie_word_embeddings=False)
    found = read(model=model, dataset="self", chat_template=False, samples=3, length=16, temperature=1e-4)
    with torch.no_grad():
        best = model(found.sequences).logits.argmax(-1)
    sampled = found.sequences[:, 1:] != BOS  # the start of a next document is fed in
    assert torch.equal(found.sequences[:, 1:][sampled], best[:, :-1][sampled])


def test_teacher_starts_the_next_document_when_one_ends() -> None:
    model = tiny("llama")
    head = model.get_output_embeddings().weight.data
    head.zero_()  # all tokens alike; then </s> wins always
    model.generation_config.eos_token_id = list(range(264))  # every token ends a document
    found = read(model=model, dataset="self", chat_template=False, samples=2, length=9)
    assert found.sequences[:, ::2].tolist() == [[BOS] * 5] * 2
    assert found.documents == 10


def test_top_p_keeps_the_likeliest_tokens() -> None:
    model = tiny("llama")
    greedy, narrow = (
        read(model=model, dataset="self", samples=2, length=12, chat_template=False, **choice).sequences
        for choice in ({"temperature": 1e-4}, {"top_p": 1e-6})
    )
    assert torch.equal(greedy, narrow)


def test_teacher_with_nan_weights_is_named() -> None:
    model = tiny("llama")
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="logits"):
        read(model=model, dataset="self")


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("too short", "gives 1 of 4 sequences"),
        ("a" * 400, "one token"),
        (b"\xff\xfe\x00bad", "not UTF-8"),
    ],
)
def test_text_that_cannot_serve(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        read(dataset=str(path), bos=False)


def test_a_small_shortfall_is_accepted_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 19)
    found = read(dataset=str(path), bos=False, samples=20)
    assert (found.requested, found.obtained) == (20, 19)
    assert found.report()["requested"] == 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("rows.jsonl", '{"a": "x", "b": "y"}', "name the one with the text"),
        ("rows.jsonl", "[1, 2]", "row 1 is list"),
        ("rows.jsonl", '{"text": [1]}', "neither text nor messages"),
        ("rows.parquet", "no parquet", "not a readable parquet file"),
        ("rows.xml", "text\na", r"\.xml"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read(dataset=str(tmp_path / name))


def test_missing_things_are_named(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read(dataset=str(tmp_path / "missing.txt"))
    with pytest.raises(InputError, match="no column 'body'"):
        read(dataset=str(jsonl({"text": "a"})), column="body")
    with pytest.raises(RecipeError, match="needs the dense model"):
        read(dataset="self")
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(RecipeError, match="no BOS token"):
        read(tokenizer, dataset="stdlib", bos=True)


def test_a_data_set_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def absent(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(InputError, match=r"data set 'a/b', split 'train' cannot be read \(Dataset 'a/b' doesn't"):
        read(dataset="a/b")


def test_a_data_set_by_name_is_read_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def rows(name: str, subset: str, **settings: Any) -> Any:
        asked.update(settings, name=name, subset=subset)
        return ({"text": f"row {i} " * 5} for i in range(10**9))  # streaming: only what is needed is fetched

    monkeypatch.setattr(datasets, "load_dataset", rows)
    found = read(dataset="a/b", subset="raw", revision="abc", split="validation", shuffle=True)
    assert asked == {"name": "a/b", "subset": "raw", "revision": "abc", "split": "validation", "streaming": True}
    assert found.source == "a/b@abc, subset raw, split validation"


def test_tokens_outside_the_vocabulary_and_too_long_sequences() -> None:
    config = tiny("llama").config
    with pytest.raises(InputError, match="token 264, outside the model's vocabulary of 264"):
        check_tokens(torch.tensor([[1, 2], [3, 264]]), "here", config)
    with pytest.raises(InputError, match="token -1"):
        check_tokens(torch.tensor([[1, -1]]), "here")
    with pytest.raises(RecipeError, match="context of 64"):
        calibration_tokens(Calibration(length=65), tiny_tokenizer(), model_config=config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lenght": 3}, "lenght"),
        ({"samples": 0}, "samples"),
        ({"length": 1}, "length"),
        ({"held_out": 1.5}, "neither a share"),
        ({"held_out": 16, "samples": 16}, "leaves none"),
        ({"held_out": -0.1}, "held_out"),
        ({"dataset": "self", "packing": False}, "always packed"),
        ({"dataset": "stdlib", "revision": "main"}, "revision cannot be chosen"),
        ({"dataset": "builtin", "split": "test"}, "split cannot be chosen"),
        ({"dataset": "x.txt", "split": "train"}, "split cannot be chosen"),
        ({"temperature": 0}, "temperature"),
        ({"bos": "perhaps"}, "bos"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Calibration(**settings)


def _bytes(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False).input_ids
