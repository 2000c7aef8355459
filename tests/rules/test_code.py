"""Rules on the code of the package: sizes, errors, documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.rules.source_tree import Module, functions, modules

LONGEST_FILE = 400
LONGEST_FUNCTION = 60
BROAD = {"Exception", "BaseException"}
FILLED = {"empty", "zeros", "ones", "full", "rand", "randn", "eye", "linspace"}  # of torch: in its default dtype
CHOSEN = {name: {"dtype", "device"} for name in FILLED} | {"arange": {"device"}, "tensor": {"device"}}


def test_files_are_short() -> None:
    lines = {str(module): len(module.text.splitlines()) for module in modules()}
    long = {name: count for name, count in lines.items() if count > LONGEST_FILE}
    assert not long, f"{long} lines (at most {LONGEST_FILE}); give a part its own file"


def test_functions_are_short() -> None:
    lines = {f"{m}: {f.name}": (f.end_lineno or 0) - f.lineno + 1 for m in modules() for f in functions(m)}
    long = {name: count for name, count in lines.items() if count > LONGEST_FUNCTION}
    assert not long, f"{long} lines (at most {LONGEST_FUNCTION}); name a step and make it a function"


def test_no_broad_except() -> None:
    """Nor `contextlib.suppress`, which is one."""
    broad = [f"{m}:{line}" for m in modules() for line in _broad_lines(m.tree)]
    assert not broad, f"{broad}: catch the one error you expect, where it arises"


def test_no_assert() -> None:
    found = [f"{m}:{node.lineno}" for m in modules() for node in ast.walk(m.tree) if isinstance(node, ast.Assert)]
    assert not found, f"{found}: raise one of errors.py; asserts vanish under -O"


def test_kernels_choose_dtypes_and_devices() -> None:
    """As torch's defaults are the caller's, and those of any thread that loads a model."""
    kernels = (
        module for module in modules() if module.name.startswith(("llmcompress.kernels.cpu", "llmcompress.kernels.gpu"))
    )
    found = [f"{m}:{line}" for m in kernels for line in _default_lines(m.tree)]
    assert not found, f"{found}: name dtype and device, or take a tensor's by new_empty"


def test_public_things_are_documented() -> None:
    silent = [f"{m}: {name}" for m in modules() for name, node in _public(m) if not ast.get_docstring(node)]
    assert not silent, f"no docstring on {silent}; say what comes back: shape, unit, errors raised"


def _broad_lines(tree: ast.Module) -> Iterator[int]:
    """The lines at which everything is caught."""
    for node in ast.walk(tree):
        match node:
            case ast.ExceptHandler(kind) if kind is None or _names(kind) & BROAD:
                yield node.lineno
            case ast.Call(ast.Name("suppress") | ast.Attribute(attr="suppress"), kinds):
                if any(_names(kind) & BROAD for kind in kinds):
                    yield node.lineno


def _default_lines(tree: ast.Module) -> Iterator[int]:
    """The lines at which torch's defaults decide on a new tensor."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Attribute(ast.Name("torch"), name), _, keywords):
                if CHOSEN.get(name, set()) - {keyword.arg for keyword in keywords}:
                    yield node.lineno


def _names(node: ast.expr) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _public(module: Module) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
    """The module, its public classes and functions, and their public methods; not what a function hides inside."""
    if module.text.strip():
        yield module.name, module.tree
    for node in module.tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        yield node.name, node
        for child in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                yield f"{node.name}.{child.name}", child
