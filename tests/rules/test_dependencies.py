"""pyproject.toml declares what the package imports: in the core, or in an extra and then not at import time."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata

from tests.rules.source_tree import ROOT, Module, modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LATE = {  # read only when what they are about is there: kernels in Triton, changes to PEFT, vLLM
    "llmcompress.formats.vllm.layers",
    "llmcompress.kernels.gpu.column_search",
    "llmcompress.kernels.gpu.grid_columns",
    "llmcompress.kernels.gpu.grid_triton",
    "llmcompress.kernels.gpu.trace_triton",
    "llmcompress.kernels.gpu.trellis_triton",
    "llmcompress.kernels.gpu.turn_triton",
}
DISTRIBUTIONS = metadata.packages_distributions() | {
    name: [distribution]  # for an environment without these extras
    for name, distribution in (("lm_eval", "lm-eval"), ("bitsandbytes", "bitsandbytes"), ("peft", "peft"))
}


def _name(requirement: str) -> str:
    """`Lm_Eval>=0.4` -> `lm-eval`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


CORE = {_name(requirement) for requirement in PROJECT["dependencies"]}
EXTRAS = {_name(r) for name, group in PROJECT["optional-dependencies"].items() if name != "dev" for r in group}


def _others(module: Module) -> dict[str, bool]:
    """The distributions that a module imports, each with whether it does so at import time."""
    found: dict[str, bool] = {}
    for dotted, at_top in module.imports:
        package = dotted.split(".")[0]
        if package not in sys.stdlib_module_names and package != "llmcompress":
            name = _name(DISTRIBUTIONS.get(package, [package])[0])
            found[name] = found.get(name, False) or at_top
    return found


def test_imports_are_declared() -> None:
    undeclared = {str(m): sorted(_others(m).keys() - CORE - EXTRAS) for m in modules()}
    undeclared = {module: names for module, names in undeclared.items() if names}
    assert not undeclared, f"declare in pyproject.toml, core or an extra: {undeclared}"


def test_extras_are_imported_when_used() -> None:
    early = [m for m in modules() if m.name not in LATE]
    eager = {str(m): sorted(n for n, at_top in _others(m).items() if at_top and n not in CORE) for m in early}
    eager = {module: names for module, names in eager.items() if names}
    assert not eager, f"these come with an extra, so import them inside the function that needs them: {eager}"


def test_late_files_are_imported_when_used() -> None:
    others = [m for m in modules() if m.name not in LATE]
    eager = [f"{m}: {name}" for m in others for name, at_top in m.imports if at_top and _in_a_late_file(name)]
    assert not eager, f"these need an extra, so import them inside the function that needs them: {eager}"


def _in_a_late_file(dotted: str) -> bool:
    return any(f"{dotted}.".startswith(f"{name}.") for name in LATE)


def test_core_is_lean() -> None:
    unused = CORE - {name for module in modules() for name in _others(module)}
    assert not unused, f"nothing in llmcompress/ imports {sorted(unused)}; take them out of pyproject.toml's core"
