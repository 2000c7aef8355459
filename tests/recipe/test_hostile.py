"""Recipes that no one should write: each is read or refused in a sentence, soon, whatever its bytes are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmcompress.errors import RecipeError
from llmcompress.models.dense.families import Linear
from llmcompress.recipe import user_file
from llmcompress.recipe.calibration import is_file
from llmcompress.recipe.matching import assign
from llmcompress.recipe.patterns import matches
from llmcompress.recipe.plain import check_plain
from llmcompress.recipe.read import parse_recipe, read_recipe

HEX, DIGITS = "0x" + "f" * 6000, "1" + "0" * 5000
RULE = "rules: [{match: '*', steps: [{method: rtn, bits: 4}]}]\n"
RECIPE = f"version: 1\n{RULE}"
NAMES = [f"model.layers.{block}.self_attn.{name}_proj" for block in range(30) for name in "qkvo"]
LINEARS = [Linear(name, (32, 32)) for name in NAMES]
FAST = settings(
    derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=list(HealthCheck)
)
ALL = settings(FAST, max_examples=3000)
PARTS = (
    "version: 1\n", "version: true\n", RULE, "name: ", "seed: ", "calibration: {samples: ", "target: {bytes: ", "}\n",
    "[", "]", "{", "\n", "- ", "  ", "? ", ": ", "&a ", "*a", "<<: ", "!!int ", "!!bool ", "!!float ", "!!map ",
    "!!timestamp ", "!!python/name:os ", "'", '"', "\\ud800", "\\UFFFFFFFF", "0x", "f" * 5000, "9" * 5000, "1:" * 300,
    "1e999", ".inf", ".nan", "-.inf", "re:", "(", ")", "+", "*", "(?=", "{1,9}", "\\1", "\0", "é", "\ud800", "~",
    "null", "true", "match: ", "steps: ", "rtn", "%", "@", "|\n", ">\n", "---\n", "...\n", "#", ",",
)  # fmt: skip
YAML = st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=30).map("".join)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**64, -(10**400)])
    | st.floats()
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
KEYS = ("version", "name", "seed", "calibration", "cap", "target", "rules", "options", "distill", "fuse", "gates")


def refused(text: str, *settings: str) -> str:
    """Return the sentence about a recipe; an empty one where it is read."""
    try:
        assign(parse_recipe(text, settings=settings), LINEARS)
    except RecipeError as error:
        said = str(error)
        assert said.encode() and "\n" not in said and len(said) < 2000
        return said
    return ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"seed: {HEX}\n{RECIPE}", "write a number of at most 64 bits"),
        (f"seed: {DIGITS}\n{RECIPE}", "write a number of at most 64 bits"),
        (f"version: {HEX}\n", "write a number of at most 64 bits"),
        (f"seed: {'1:' * 3000}1\n{RECIPE}", "write a number of at most 64 bits"),
        (f"version: true\n{RULE}", "version is true; write version: 1"),
        (f"{RECIPE}distill: {{steps: 1, version: true}}\n", "version is true; it must be 1"),
        (f"{RECIPE}calibration: {{held_out: .inf}}\n", "held_out is Infinity; it must be a number at least 0"),
        (f"version: 1\ncalibration: {{}}\ntarget: {{bytes: {'9' * 400}MB}}\n", "is no size"),
        (f"{RECIPE}calibration: {{dataset: {'a' * 5000}}}\n", "4096 is the most"),
        (f'{RECIPE}name: "a\\0b"\n', "which is no text"),
        (f'{RECIPE}name: "a\\ud800b"\n', "which is no text"),
        (f'{RECIPE}name: "\\UFFFFFFFF"\n', "an escape stands for no character"),
        (f"{RECIPE}gates: !!bool maybe\n", "maybe is not a value"),
        (f"{'x' * 1000}: 1\n{RECIPE}", "too long or not printable"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        (
            f"version: 1\nrules: [{{match: [{'re:a,' * 300}], steps: []}}]\n",
            "300 regular expressions, and 200 is the most",
        ),
        (f"version: 1\nrules: [{{match: [{'a,' * 10_001}], steps: []}}]\n", "10001 patterns, and 10000 is the most"),
        (f"version: 1\nrules: [{{match: '{'[' * 301}', steps: []}}]\n", "write at most 300"),
        (f"version: 1\nrules: [{{match: 're:{'(' * 140}', steps: []}}]\n", "is no regular expression"),
        ("version: 1\nrules: [{match: 're:a{99999999999999999999}', steps: []}]\n", "repeats too often"),
        ("version: 1\nrules: [{match: 're:(?=a)((a{99}){99}){99}', steps: []}]\n", "may take too long"),
        (f"version: 1\nrules: [{{match: 're:(?=a){'(?:' * 30}a{')+' * 30}', steps: []}}]\n", "may take too long"),
    ],
)
def test_one_sentence_refuses(text: str, sentence: str) -> None:
    assert sentence in refused(text)


@pytest.mark.parametrize(
    "setting",
    [
        f"seed={HEX}",
        f"seed={DIGITS}",
        f"rules[{'9' * 6000}]=1",
        f"{'a' * 100_000}=1",
        "seed=" + "[" * 100_000,
        "name=\0",
        "name=\ud800",
        "version=true",
        "cap=.inf",
        f"{'.'.join(['name'] * 50_000)}=1",
        "x" * 300_000,
        "rules[0].match=re:" + "(" * 140,
        "seed=&a [*a]",
    ],
    ids=lambda setting: ascii(setting[:20]),
)
def test_settings_are_refused_alike(setting: str) -> None:
    assert refused(RECIPE, setting)


@pytest.mark.parametrize("values", [{"a": 10**5000}, {"a": "\ud800"}, {"\0": 1}, {"a" * 999: 1}, {"a": "b" * 5000}])
def test_python_values_are_refused_alike(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        check_plain(values, {})


def test_values_inside_themselves_are_refused() -> None:
    values: dict[str, Any] = {"version": 1}
    values["rules"] = values
    with pytest.raises(RecipeError, match="at most 20 levels"):
        read_recipe(values)


CATASTROPHES = (r"re:(\w+\.?)+!", r"re:(.*)*(.*)*(.*)*x!", f"re:{'.*' * 30}!", r"re:((((\w*)*)*)*)*[!?]")


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_expressions_take_time_in_proportion_to_names(pattern: str) -> None:
    assert not matches(pattern, "model.layers." * 300)


def test_an_expression_that_looks_ahead_is_stopped() -> None:
    with pytest.raises(RecipeError, match="takes more than 0.2 seconds for the layer"):
        matches(r"re:(.+)(.+)(.+)(.+)\4\3\2\1", "model.layers.0.self_attn.q_proj" * 6)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (r"re:(?!.*\.(0|1)\.)model\.layers\.\d{1,2}\..*", 28 * 4),
        (r"re:.*\.(q|k)_proj", 60),
        (r"re:.*(?<!q)_proj", 90),
        (r"re:.*\.(1)\1\..*", 4),
        (r"re:model\.layers\.(?:1|2|3)\.self_attn\.q_proj\Z", 3),
        (r"re:(?i)MODEL.*Q_PROJ", 30),
        (r"re:model|model\.layers\.0\.self_attn\.q_proj", 1),
        (r"re:(?x) model \. .* # all", 120),
    ],
)
def test_expressions_mean_what_they_mean_in_python(pattern: str, count: int) -> None:
    assert sum(matches(pattern, name) for name in NAMES) == count


def test_many_patterns_without_a_layer_are_told_soon() -> None:
    many = ",".join(f"x{number}" for number in range(2000))
    laid = assign(parse_recipe(f"version: 1\nrules: [{{match: [{many}], steps: []}}]\n"), LINEARS)
    assert len(laid.unmatched) == len(laid.complaints) == 2000
    assert "the nearest name is" in laid.complaints[0]
    assert laid.complaints[-1].endswith('matches no layer of the model ("x1999")')


def test_only_files_and_pipes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge, pipe = tmp_path / "huge.yaml", tmp_path / "pipe.yaml"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(pipe)
    monkeypatch.setattr(user_file, "PATIENCE", 0.1)
    for path, sentence in (
        ("/dev/zero", "it is a device"),
        (huge, "it has more than 1,000,000 bytes"),
        (pipe, "silent for 0.1 seconds"),
        (tmp_path, "Is a directory"),
        ("a\0b.yaml", "embedded null byte"),
        ("a\ud800.yaml", "surrogates not allowed"),
        ("a" * 5000 + ".yaml", "File name too long"),
        ("~nobody-is-called-this/x.yaml", "No such file"),
    ):
        with pytest.raises(RecipeError) as caught:
            read_recipe(path)
        assert sentence in str(caught.value)
        assert str(caught.value).encode()


def test_a_pipe_with_a_recipe_is_read() -> None:
    reading, writing = os.pipe()
    os.write(writing, RECIPE.encode())
    os.close(writing)
    assert read_recipe(f"/dev/fd/{reading}").rules
    os.close(reading)


@pytest.mark.parametrize("dataset", ["~nobody-is-called-this/x", "a" * 5000, "a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_a_data_set(dataset: str) -> None:
    assert not is_file(dataset)


def judge(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    try:
        assign(read_recipe(path), LINEARS)
    except RecipeError as error:
        assert str(error).encode()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@FAST
@given(data=YAML.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=200))
def test_any_bytes_are_a_recipe_or_refused(tmp_path: Path, data: bytes) -> None:
    judge(data, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@ALL
@given(data=YAML.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=200))
def test_any_bytes_are_a_recipe_or_refused_many(tmp_path: Path, data: bytes) -> None:
    judge(data, tmp_path)


@FAST
@given(changes=st.dictionaries(st.sampled_from(KEYS), PLAIN, max_size=4))
def test_any_values_are_a_recipe_or_refused(changes: dict[str, Any]) -> None:
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]
    try:
        read_recipe({"version": 1, "rules": rules} | changes)
    except RecipeError as error:
        assert str(error).encode()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@FAST
@given(
    pattern=st.lists(st.sampled_from([*r"ab.()[]{}*+?|\^$1,-", "(?=", "(?<!", "{1,9}", r"\w", r"\1"]), max_size=12).map(
        "".join
    )
)
def test_any_pattern_matches_or_is_refused(pattern: str) -> None:
    refused(f"version: 1\nrules: [{{match: [{('re:' + pattern)!r}], steps: []}}]\n")
