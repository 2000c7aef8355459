"""Rules on the code of the package: sizes, errors, documentation."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.rules.source_tree import MODULES, Module, functions

LONGEST_FILE = 400
LONGEST_FUNCTION = 60
BROAD = {"Exception", "BaseException"}
modules = pytest.mark.parametrize("module", MODULES, ids=str)


@modules
def test_file_is_short(module: Module) -> None:
    lines = len(module.text.splitlines())
    assert lines <= LONGEST_FILE, f"{module} has {lines} lines (at most {LONGEST_FILE}); give a part its own file"


@modules
def test_functions_are_short(module: Module) -> None:
    lines = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions(module)}
    long = {name: count for name, count in lines.items() if count > LONGEST_FUNCTION}
    assert not long, f"{module}: {long} lines (at most {LONGEST_FUNCTION}); name a step and make it a function"


@modules
def test_no_broad_except(module: Module) -> None:
    handlers = [node for node in ast.walk(module.tree) if isinstance(node, ast.ExceptHandler)]
    broad = [
        node.lineno for node in handlers if node.type is None or _names(node.type) & {"Exception", "BaseException"}
    ]
    assert not broad, f"{module}, lines {broad}: catch the one error you expect, where it arises"


@modules
def test_no_assert(module: Module) -> None:
    lines = [node.lineno for node in ast.walk(module.tree) if isinstance(node, ast.Assert)]
    assert not lines, f"{module}, lines {lines}: raise one of errors.py; asserts vanish under -O"


@modules
def test_public_things_are_documented(module: Module) -> None:
    silent = [name for name, node in _public(module) if not ast.get_docstring(node)]
    assert not silent, f"{module}: no docstring on {silent}; say what comes back: shape, unit, errors raised"


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
