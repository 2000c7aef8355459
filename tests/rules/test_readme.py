"""What the documents promise works: programs run, recipes are valid, commands parse, files are there."""

from __future__ import annotations

import os
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch

import llmcompress.methods.layer
from llmcompress.methods.engines.grid import GridFormat, grid_sketch
from llmcompress.recipe.read import dump, parse_recipe
from llmcompress.weight.expression import bits
from llmcompress.weight.nodes import Dense
from tests.builders import compressed, correlated, gaussian
from tests.rules.source_tree import ROOT
from tests.tiny import save_tiny

DOCUMENTS = ("README.md", "CONTRIBUTING.md")
SHORT = ("calibration.samples=4", "calibration.length=32")  # for a model of 64 positions


def blocks(language: str, document: str = "README.md") -> list[str]:
    """The fenced blocks of a document in one language."""
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command line of the README, split as a shell would."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the README's recipe, made short."""
    monkeypatch.chdir(tmp_path)
    [text] = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(dump(parse_recipe(text, settings=SHORT)))
    (tmp_path / "small").mkdir()
    return tmp_path


def test_programs_run(place: Path) -> None:
    (place / "small").rmdir()
    # a folder wins over the name of the embedded model
    save_tiny(
        "llama",
        place / "smollm2",
        hidden_size=64,
        intermediate_size=96,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    names: dict[str, object] = {}
    for program in blocks("python"):
        exec(compile(program, "README.md", "exec"), names)
    assert (place / "small" / "config.json").is_file()


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "llmcompress"], ids=" ".join)
def test_commands_parse(words: list[str], place: Path) -> None:
    from typer.main import get_command

    from llmcompress.cli.app import app

    group = get_command(app)
    assert words[1] in group.commands, f"there is no command llmcompress {words[1]}"  # type: ignore[attr-defined]
    group.commands[words[1]].make_context(words[1], words[2:])  # type: ignore[attr-defined]


def test_scripts_are_there() -> None:
    scripts = [words[0] for words in commands() if words[0].startswith("./")]
    assert {"./scripts/demo", "./scripts/test"} <= set(scripts)
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_are_there(document: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    named = set(re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|toml))`", text)) - {"methods/mine.py", "org/name"}
    roots = (ROOT, ROOT / "llmcompress", ROOT / "tests" / "rules")
    absent = sorted(name for name in named if not any((root / name).exists() for root in roots))
    assert not absent, f"{document} names {absent}, which are not there"


def test_the_method_of_fifteen_lines_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmcompress.methods.layer, "_METHODS", llmcompress.methods.layer.methods())
    [program] = blocks("python", "CONTRIBUTING.md")
    assert len([line for line in program.splitlines() if line.strip()]) <= 15
    (tmp_path / "method_of_fifteen_lines.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    import_module("method_of_fifteen_lines")
    weight = gaussian(8, 16)
    done = compressed(weight, correlated(64, 16), {"method": "mine"}).approx
    promised = llmcompress.methods.layer.sketch("a", (8, 16), [llmcompress.methods.layer.step({"method": "mine"})])
    assert bits(done) == bits(promised) < bits(Dense(weight.to(torch.bfloat16)))
    assert bits(done) < bits(grid_sketch((8, 16), GridFormat(2)))
