"""What `import llmcompress` and the command's start may do: little, and nothing that others could notice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

STARTS = [("torch", "llmcompress"), ("json", "llmcompress.cli")]  # what is imported before, and what then
HEAVY = {"lm_eval", "matplotlib", "scipy", "datasets", "pyarrow", "pandas", "peft", "bitsandbytes", "gguf", "sklearn"}
MODELS = "transformers.models."  # a model's own source: thousands of lines that only a run needs
PROBE = """
import json, logging, os, sys
import random
import {before}
def state():
    torch = sys.modules.get("torch")
    return [dict(os.environ), repr(logging.root.handlers), random.getstate(), os.getcwd(), sys.path, torch and [
        str(torch.get_default_dtype()), torch.get_num_threads(), torch.random.initial_seed(), torch.is_grad_enabled()]]
before = repr(state())
known = set(sys.modules)
import {module}
changed = repr(state()) != before
json.dump({{"modules": sorted(set(sys.modules) - known), "changed": changed}}, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module", params=STARTS, ids=lambda pair: pair[1])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, object]]:
    """The module's name; the modules its import brings, whether it changed global state, and what it printed."""
    before, module = request.param
    answer = tmp_path_factory.mktemp("import") / "answer.json"
    program = PROBE.format(before=before, module=module)
    done = subprocess.run([sys.executable, "-c", program, answer], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return module, json.loads(answer.read_text()) | {"printed": done.stdout + done.stderr}


def test_import_has_no_side_effects(imported: tuple[str, dict[str, object]]) -> None:
    module, found = imported
    assert found["printed"] == "", f"import {module} prints"
    assert not found["changed"], f"import {module} changes the environment, logging, randomness or torch's settings"


def test_import_is_light(imported: tuple[str, dict[str, object]]) -> None:
    module, found = imported
    names = found["modules"]
    assert isinstance(names, list)
    heavy = sorted({name.split(".")[0] for name in names} & HEAVY)
    models = sorted({name.split(".")[2] for name in names if name.startswith(MODELS)} - {"auto"})
    assert not heavy + models, f"import {module} brings {heavy + models}; import them where they are used"


def test_the_command_starts_without_torch(imported: tuple[str, dict[str, object]]) -> None:
    module, found = imported
    names = found["modules"]
    if module == "llmcompress.cli":
        assert isinstance(names, list)
        assert not {"torch", "transformers"} & set(names), "llmcompress.cli imports torch before a command runs"
