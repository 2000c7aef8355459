"""Recipes with mistakes: each is read or refused in one sentence, whatever its bytes are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcompress.errors import RecipeError
from llmcompress.models.dense.families import Linear
from llmcompress.recipe.matching import assign
from llmcompress.recipe.read import parse_recipe, read_recipe
from llmcompress.recipe.text_files import is_file
from llmcompress.recipe.yaml import MOST_ENTRIES

RULE = "rules: [{match: '*', steps: [{method: rtn, bits: 4}]}]\n"
RECIPE = f"version: 1\n{RULE}"
LINEARS = [Linear(f"model.layers.{block}.self_attn.{name}_proj", (32, 32)) for block in range(30) for name in "qkvo"]
FAST = settings(
    derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=list(HealthCheck)
)
PARTS = (
    "version: 1\n", "version: true\n", RULE, "name: ", "seed: ", "calibration: {samples: ", "target: {bytes: ", "}\n",
    "[", "]", "{", "\n", "- ", "  ", "? ", ": ", "&a ", "*a", "<<: ", "!!int ", "!!bool ", "!!float ", "!!map ",
    "!!timestamp ", "!!python/name:os ", "'", '"', "\\UFFFFFFFF", "1:3", "1e999", ".inf", ".nan", "-.inf", "re:", "~",
    "é", "null", "true", "match: ", "steps: ", "rtn", "%", "@", "|\n", ">\n", "---\n", "...\n", "#", ",",
)  # fmt: skip
YAML = st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=30).map("".join)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
KEYS = ("version", "name", "seed", "calibration", "cap", "target", "rules", "options", "distill", "fuse", "gates")


def complaint(text: str, *settings: str) -> str:
    """Return the sentence about a recipe; an empty one if it is read."""
    try:
        assign(parse_recipe(text, settings=settings), LINEARS)
    except RecipeError as error:
        sentence = str(error)
        assert sentence.encode() and "\n" not in sentence and len(sentence) < 2000
        return sentence
    return ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"version: true\n{RULE}", "version is true; it must be 1"),
        (f"{RECIPE}distill: {{steps: 1, version: true}}\n", "version is true; it must be 1"),
        (f"{RECIPE}calibration: {{held_out: .inf}}\n", "held_out is Infinity; it must be a number at least 0"),
        (f"version: 1\ncalibration: {{}}\ntarget: {{bytes: {'9' * 400}MB}}\n", "is no size"),
        (f"seed: 1{'0' * 5000}\n{RECIPE}", "is not a value"),
        (f"{RECIPE}seed: 0x{'f' * 5000}\n", "is not a value"),
        (f'{RECIPE}name: "\\UFFFFFFFF"\n', "an escape stands for no character"),
        (f"{RECIPE}gates: !!bool maybe\n", "maybe is not a value"),
        ("a: &a [*a]\n", "nested too deeply"),
        (f"a: &a [{'1,' * 300}]\nb: &b [{'*a,' * 300}]\n", f"at most {MOST_ENTRIES} entries"),
        ("version: 1\nrules: [{match: 're:((', steps: []}]\n", "is no regular expression"),
        (f"version: 1\nrules: [{{match: 're:{'(' * 5000}', steps: []}}]\n", f"match has 're:{'(' * 97}', which is no"),
        ("version: 1\nrules: [{match: 're:a{99999999999999999999}', steps: []}]\n", "is no regular expression"),
    ],
)
def test_a_mistake_is_one_sentence(text: str, sentence: str) -> None:
    assert sentence in complaint(text)


@pytest.mark.parametrize("setting", ["version=true", "cap=.inf", "rules[0].match=re:(", "seed=&a [*a]", "x"])
def test_settings_are_refused_alike(setting: str) -> None:
    assert complaint(RECIPE, setting).startswith(f"--set {setting}:")


@pytest.mark.parametrize("key", ["version", "seed", "rules", "name", "no such key"])
def test_plain_values_that_cannot_be_shown_are_refused(key: str) -> None:
    huge, deep = 1 << 20_000, list[Any]()
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RecipeError, match="^a key: a number has too many digits"):
        read_recipe({"version": 1, huge: 1})
    for value in (huge, -huge, {huge: 1}, (2, [{"bits": huge}]), deep):
        with pytest.raises(RecipeError, match=f"^{key}: a number has too many digits, or entries are nested"):
            read_recipe({"version": 1, key: value})


def test_many_unmatched_patterns_are_listed_soon() -> None:
    many = ",".join(f"x{number}" for number in range(2000))
    assignment = assign(parse_recipe(f"version: 1\nrules: [{{match: [{many}], steps: []}}]\n"), LINEARS)
    assert len(assignment.unmatched) == len(assignment.complaints) == 2000
    assert "the nearest name is" in assignment.complaints[0]
    assert assignment.complaints[-1].endswith('matches no layer of the model ("x1999")')


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (".", "Is a directory"),
        ("a\0b.yaml", "embedded null byte"),
        ("a\ud800.yaml", "surrogates not allowed"),
        ("a" * 5000 + ".yaml", "File name too long"),
        ("~nobody-is-called-this/x.yaml", "No such file"),
    ],
)
def test_a_path_without_a_recipe_is_a_sentence(path: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert sentence in str(caught.value) and str(caught.value).encode()


def test_a_pipe_with_a_recipe_is_read() -> None:
    reading, writing = os.pipe()
    os.write(writing, RECIPE.encode())
    os.close(writing)
    assert read_recipe(f"/dev/fd/{reading}").rules
    os.close(reading)


@pytest.mark.parametrize("dataset", ["~nobody-is-called-this/x", "a" * 5000, "a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_a_data_set(dataset: str) -> None:
    assert not is_file(dataset)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@FAST
@given(data=YAML.map(str.encode) | st.binary(max_size=200))
def test_any_bytes_are_a_recipe_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    try:
        assign(read_recipe(path), LINEARS)
    except RecipeError as error:
        assert str(error).encode()


@FAST
@given(changes=st.dictionaries(st.sampled_from(KEYS), PLAIN, max_size=4))
def test_any_values_are_a_recipe_or_refused(changes: dict[str, Any]) -> None:
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]
    try:
        read_recipe({"version": 1, "rules": rules} | changes)
    except RecipeError as error:
        assert str(error).encode()
