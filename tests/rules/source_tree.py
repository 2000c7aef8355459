"""The package as its rules see it: every module's path, name and syntax tree, read once."""

from __future__ import annotations

import ast
import gc
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmcompress"


@dataclass(frozen=True)
class Module:
    """One file of the package. `str(module)` is its path from the repository's root."""

    path: Path
    text: str

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree, parsed when a test first asks."""
        tree = ast.parse(self.text, str(self.path))
        gc.freeze()  # it stays: the collector, which so many nodes call often, need not look through it
        return tree

    @property
    def name(self) -> str:
        """The dotted name that imports it."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        """The first name below the package; empty for the package's own `__init__`."""
        return (self.name.split(".") + [""])[1]

    @cached_property
    def imports(self) -> tuple[tuple[str, bool], ...]:
        """The dotted names it imports, each with whether importing the module itself imports that too."""
        return tuple(_imports(self.tree, at_top=True))

    def local_imports(self) -> set[str]:
        """The names of the package's modules that it imports, wherever in the file and for whatever use."""
        names = {name for name, _ in self.imports if name.split(".")[0] == PACKAGE.name}
        return {_module_of(name) for name in names}


def _imports(node: ast.AST, at_top: bool) -> Iterator[tuple[str, bool]]:
    match node:
        case ast.Import(names):
            yield from ((alias.name, at_top) for alias in names)
        case ast.ImportFrom(module, names, 0):
            yield from ((f"{module}.{alias.name}", at_top) for alias in names)
        case ast.ImportFrom():
            raise AssertionError(f"line {node.lineno}: a relative import; write the package's name")
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            continue  # no expression holds a statement
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        only_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        yield from _imports(child, at_top and not inside and not only_for_types)


def _module_of(name: str) -> str:
    """`llmcompress.weight.expression.Dense` -> `llmcompress.weight.expression`."""
    while name and not _file_of(name):
        name = name.rpartition(".")[0]
    return name


def _file_of(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@cache
def read(path: Path) -> Module:
    """The module in a file, one for all who read it."""
    return Module(path, path.read_text(encoding="utf-8"))


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, nested ones too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def repository_files() -> list[Path]:
    """Every file that git tracks or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the package."""
    return tuple(read(path) for path in sorted(PACKAGE.rglob("*.py")))
