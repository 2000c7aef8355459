"""The wheel works outside the clone: in an environment that has nothing of it, recipes come along by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.rules.source_tree import ROOT
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow
READ = """
import json, pathlib, llmcompress as lc
report = lc.read(pathlib.Path("out"))
print(json.dumps([lc.__file__, report.bpw, report.recipe]))
"""


UNAIDED = """
import sys
from transformers import AutoModelForCausalLM
assert not [name for name in sys.modules if name.split(".")[0] == "llmcompress"]
model = AutoModelForCausalLM.from_pretrained("out")
print(type(model.model.layers[0].mlp.up_proj).__name__, model.config.quantization_config.quant_method)
"""
PIPELINE = """
from transformers import pipeline
print(len(pipeline("text-generation", "out", max_new_tokens=4)("a")))
"""
LM_EVAL = """
from lm_eval.models.huggingface import HFLM
print(type(HFLM(pretrained="out", device="cpu").model).__name__)
"""
STARTED = """
import sys
print(*sorted({"typing", "importlib.util", "llmcompress"} & sys.modules.keys()), "_llmcompress_autoload" in sys.modules)
"""


def run(*command: str | Path, folder: Path) -> str:
    """Run a command in a folder outside the clone, without the clone on any path; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the clone builds, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
        folder=folder,
    )
    [found] = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment with the wheel, and of this one what the wheel requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
        folder=folder,
    )
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "required.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files do not count
    return python.parent


def test_the_wheel_has_every_recipe_and_every_data_file(wheel: Path) -> None:
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "llmcompress").rglob("*") if path.is_file()}
    expected = {f"llmcompress/{name}" for name in tracked} | {name for name in sources if "__pycache__" not in name}
    expected -= {"llmcompress/models/transformers/autoload.py", "llmcompress/models/transformers/autoload.pth"}
    expected |= {"_llmcompress_autoload.py", "llmcompress.pth"}  # where Python reads them
    with ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_recipes_come_along(programs: Path, tmp_path: Path) -> None:
    listed = json.loads(run(programs / "llmcompress", "recipes", "--json", folder=tmp_path))["recipes"]
    assert len(listed) == len(list((ROOT / "configs").glob("*/*.yaml"))) - len(
        list((ROOT / "configs/accelerate").iterdir())
    )
    assert all(Path(row["path"]).is_relative_to(programs.parent) for row in listed)


@pytest.mark.nightly
def test_a_model_is_compressed_by_a_recipe_of_the_wheel(programs: Path, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "dense", hidden_size=64, intermediate_size=128)
    settings = ["--set", "calibration.samples=4", "--set", "calibration.length=64"]
    run(programs / "llmcompress", "compress", model, "gptq-4-g64", "-o", "out", *settings, folder=tmp_path)
    file, bpw, recipe = json.loads(run(programs / "python", "-c", READ, folder=tmp_path).splitlines()[-1])
    assert Path(file).is_relative_to(programs.parent) and recipe == "gptq-4-g64" and 4 < bpw < 5
    unaided = run(programs / "python", "-c", UNAIDED, folder=tmp_path)
    assert unaided.split()[-2:] == ["CompressedLinear", "llmcompress"], "found without import llmcompress"
    assert run(programs / "python", "-c", PIPELINE, folder=tmp_path).split()[-1] == "1"
    assert run(programs / "python", "-c", LM_EVAL, folder=tmp_path).split()[-1] == "LlamaForCausalLM"


def test_a_start_of_python_brings_one_small_file(programs: Path, tmp_path: Path) -> None:
    assert run(programs / "python", "-I", "-c", STARTED, folder=tmp_path).split() == ["True"]
    assert run(programs / "python", "-S", "-c", STARTED, folder=tmp_path).split() == ["False"]
