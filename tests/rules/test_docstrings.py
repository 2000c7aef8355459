"""Docstrings say what a thing does or is, and those of public functions list arguments, results and errors."""

from __future__ import annotations

import ast
import inspect
import re

import llmcompress as lc
from tests.rules.source_tree import PACKAGE, ROOT, read

CLAUSE = re.compile(r"(What|Which|Whether|Where|How|Who|When|Why)\b")
BEGINNING = re.compile(rf'"""\s*{CLAUSE.pattern}')  # of a string, which may be a docstring
FUNCTIONS = [name for name in lc.__all__ if inspect.isroutine(getattr(lc, name))]
PLACES = ("scripts", "research", "tests", "examples")


def test_no_docstring_begins_with_a_clause() -> None:
    paths = (path for place in (PACKAGE.name, *PLACES) for path in sorted((ROOT / place).rglob("*.py")))
    wrong = []
    for module in (read(path) for path in paths if BEGINNING.search(path.read_text(encoding="utf-8"))):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = (ast.get_docstring(node, clean=False) or "").lstrip()
                if CLAUSE.match(text):
                    wrong.append(f"{module}: {text.splitlines()[0]}")
    assert not wrong, f"{wrong}: begin with a verb (Return, Write, True if) or with a noun"


def test_public_functions_list_arguments_results_and_errors() -> None:
    wrong = []
    for name in FUNCTIONS:
        function = inspect.unwrap(getattr(lc, name))
        text = inspect.getdoc(function) or ""
        arguments = text.partition("Args:")[2].partition("\n\n")[0]
        absent = [given for given in inspect.signature(function).parameters if f"\n    {given}: " not in arguments]
        if absent or not ("Returns:" in text or "Yields:" in text):
            wrong.append(f"{name}: {absent or 'Returns'}")
        if "Iterator" not in str(inspect.signature(function).return_annotation) and "Raises:" not in text:
            wrong.append(f"{name}: Raises")
    assert not wrong, f"{wrong}: say in the docstring's Args, Returns and Raises what comes in, out, and can fail"
