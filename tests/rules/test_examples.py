"""The programs and notebooks in examples/ run from start to end, on a tiny model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.rules.source_tree import ROOT
from tests.tiers import tiered_nightly
from tests.tiny import save_tiny

EXAMPLES = ROOT / "examples"
PROGRAMS = {  # what each is given besides the model, so that it is short
    "compress_to_size.py": ["--size", "60kB", "--samples", "4"],
    "custom_method.py": [],
    "distill.py": ["--samples", "24", "--windows", "2"],
    "lora_on_compressed.py": ["--steps", "3"],
}
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes as long a context as the examples ask for."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    save_tiny("llama", folder, tie_word_embeddings=True, max_position_embeddings=1024, **sizes)
    return folder


@pytest.fixture
def methods_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that an example registers is gone afterwards."""
    import llmcompress.methods.layer as layer

    monkeypatch.setattr(layer, "_METHODS", layer.methods())


def test_every_example_is_run() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    assert programs == PROGRAMS.keys()
    assert NOTEBOOKS == ["look_inside.ipynb", "quickstart.ipynb"]


@pytest.mark.usefixtures("methods_as_before")
@pytest.mark.parametrize("name", tiered_nightly(sorted(PROGRAMS), {"custom_method.py", "distill.py"}.__contains__))
def test_program_runs(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, "--model", str(tiny), *PROGRAMS[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", tiered_nightly(NOTEBOOKS, "quickstart.ipynb".__eq__))
def test_notebook_runs(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code cells, in order, in one namespace; a kernel of Jupyter would do the same in another process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", str(tiny))
    cells = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"{name}, cell {number}: clear outputs before you commit"
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
    assert capsys.readouterr().out.strip()
