"""README.md and CONTRIBUTING.md promise what works: programs run, the method of twenty lines is a method."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import llmcompress.methods.layer
from llmcompress.methods.layer import relative_error
from llmcompress.methods.solvers.grid import GridFormat, grid_sketch
from llmcompress.recipe.read import dump, parse_recipe
from llmcompress.weight.expression import bits, dense
from tests.builders import compressed, correlated, gaussian
from tests.rules.documents import blocks, commands
from tests.rules.source_tree import ROOT
from tests.rules.test_names import STOP_WORDS
from tests.tiny import save_tiny

SHORT = ("calibration.samples=4", "calibration.length=32")  # for a model of 64 positions


@pytest.mark.slow
def test_programs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = next(text for text in blocks("yaml", "docs/quickstart.md") if "version" in text)
    (tmp_path / "recipe.yaml").write_text(dump(parse_recipe(text, settings=SHORT)))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    save_tiny("llama", tmp_path / "smollm2", tie_word_embeddings=True, **sizes)  # a folder wins over the name
    names: dict[str, object] = {}
    for program in blocks("python"):
        exec(compile(program, "README.md", "exec"), names)
    assert (tmp_path / "small" / "config.json").is_file()


def test_it_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_two_commands_that_need_nothing_are_named() -> None:
    assert {"./scripts/demo", "./scripts/test"} <= {words[0] for words in commands()}


def test_the_method_of_twenty_lines_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = llmcompress.methods.layer.methods()
    monkeypatch.setattr(llmcompress.methods.layer, "_METHODS", dict(others))
    [program] = blocks("python", "CONTRIBUTING.md")
    assert len([line for line in program.splitlines() if line.strip()]) <= 20
    (tmp_path / "method_of_twenty_lines.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    import_module("method_of_twenty_lines")
    [name] = llmcompress.methods.layer.methods().keys() - others
    assert name not in STOP_WORDS
    weight, inputs = gaussian(8, 16), correlated(64, 16)
    inputs[:, :4] = 0
    done = compressed(weight, inputs, {"method": name}).approx
    promised = llmcompress.methods.layer.sketch("a", (8, 16), [llmcompress.methods.layer.step({"method": name})])
    assert bits(done) == bits(promised) == bits(grid_sketch((8, 16), GridFormat(2)))
    assert relative_error(weight[:, :4], dense(done)[:, :4]) < 1, "channels without inputs keep energy"
