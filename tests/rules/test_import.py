"""Limits of `import llmcompress` and the command's start: they do little, and nothing that others could notice."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

HEAVY = {"torch", "transformers", "accelerate", "datasets", "lm_eval", "peft", "bitsandbytes", "gguf"}
HEAVY |= {"matplotlib", "numpy", "pandas", "pyarrow", "scipy", "sklearn"}
PROBE = """
import json, logging, os, random, sys, warnings
def state():
    return repr((dict(os.environ), os.getcwd(), sys.path, logging.root.handlers, random.getstate(), warnings.filters))
before, known = state(), set(sys.modules)
import {module}
changed = state() != before
json.dump({{"modules": sorted(set(sys.modules) - known), "changed": changed}}, open(sys.argv[1], "w"))
"""


@dataclass(frozen=True)
class Imported:
    """The effects of one import: the modules it brought, whether it changed global state, what it printed."""

    module: str
    modules: list[str]
    changed: bool
    printed: str


@pytest.fixture(scope="module", params=["llmcompress", "llmcompress.cli.app"])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """The import of one module by a new interpreter."""
    answer = tmp_path_factory.mktemp("import") / "answer.json"
    command = [sys.executable, "-c", PROBE.format(module=request.param), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Imported(request.param, printed=done.stdout + done.stderr, **json.loads(answer.read_text()))


def test_import_has_no_side_effects(imported: Imported) -> None:
    assert imported.printed == "", f"import {imported.module} prints"
    assert not imported.changed, f"import {imported.module} changes the environment, logging, warnings or randomness"


def test_import_is_light(imported: Imported) -> None:
    heavy = sorted({name.split(".")[0] for name in imported.modules} & HEAVY)
    assert not heavy, f"import {imported.module} imports {heavy}; import them inside the function that needs them"


def test_expressions_leave_the_compiler_alone() -> None:
    """Importing it takes a second of every start, and brings Triton before a program can say how it is to run."""
    program = "import sys, llmcompress.weight.expression\nassert 'torch._dynamo' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
