"""Rules on what texts refer to: each back-quoted name and path in the package's docstrings and in documents exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.rules.source_tree import PACKAGE, ROOT, read, repository_files

QUOTED = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)")
PATH = re.compile(
    r"(?<![\w/.:{<*-])((?:[a-z][\w-]*/)+[\w-]+\.(?:py|md|yaml|yml|json|jsonl|toml|html)|(?:[a-z][\w-]*/){2,})(?![\w*{<])"
)
COMMENT = re.compile(r"#\s(.*)")
NAMES = ("id", "attr", "arg", "name", "asname", "module")  # of nodes of a syntax tree
CODE = {".py", ".yaml", ".yml", ".toml", ".jsonl", ".json", ".html", ".css"}
HISTORY = ("research/log", "CHANGELOG.md")  # these name what was there at the time
# Names of other libraries, of formats and of mathematics that no code here spells.
ELSEWHERE = {
    *("IQ1", "IQ2", "IQ3", "AutoModelFor", "mma", "m16n8k16", "strtri", "absmax", "attention_type", "enforce_eager"),
    *("load_checkpoint_and_dispatch", "print_trainable_parameters", "inner_inside_codes"),
}
NOT_OURS = {"methods/signs.py", "pydoc_data/topics.py", "curve/frontier.md", "budget-2/recipe.yaml", "out/demo.json"}


def test_back_quoted_names_exist() -> None:
    known = vocabulary() | ELSEWHERE
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, text in texts()
        for name in sorted(set(QUOTED.findall(text)))
        if not set(name.strip(".").split(".")) <= known
    ]
    assert not wrong, f"{wrong}: no code has this name; write the name of today, or leave the quotes out"


def test_paths_exist() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path, text in texts()
        for name in sorted(set(PATH.findall(text)) - NOT_OURS)
        if not _exists(name, path)
    ]
    assert not wrong, f"{wrong}: no such file here; write the path of today"


def texts() -> Iterator[tuple[Path, str]]:
    """Docstrings and comments of the package, and whole documents."""
    for path in repository_files():
        if path.relative_to(ROOT).as_posix().startswith(HISTORY):
            continue
        if path.suffix == ".py" and path.is_relative_to(PACKAGE):
            yield path, _words(path)[0]
        elif path.suffix == ".md":
            yield path, path.read_text(encoding="utf-8")


@cache
def vocabulary() -> frozenset[str]:
    """Every word of code, of strings in code, and of recipes, records and settings."""
    words: set[str] = set()
    for path in repository_files():
        if path.suffix == ".py" and path.is_relative_to(PACKAGE):
            words |= _words(path)[1]
        elif path.suffix in CODE or path.parent.name == "scripts":
            words |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
        words |= {path.stem, *path.parent.parts}
    return frozenset(words)


@cache
def _words(path: Path) -> tuple[str, frozenset[str]]:
    """Return the docstrings and comments of a Python file, and the words of its code."""
    module = read(path)
    texts, strings, code = COMMENT.findall(module.text), [], set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts.append(node.value.value)
            node.value.value = ""  # not a word of the code when the walk comes to it
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.append(node.value)
        else:
            code |= {value for name in NAMES if isinstance(value := getattr(node, name, None), str)}
    return "\n".join(texts), frozenset(code | set(re.findall(r"\w+", " ".join([*strings, *code]))))


def _exists(name: str, reader: Path) -> bool:
    """True if a path exists from the root, beside its reader, or at the end of some file's path."""
    if any((base / name).exists() for base in (ROOT, reader.parent, ROOT / "docs", ROOT / "llmcompress")):
        return True
    return any(path.as_posix().endswith("/" + name) for path in repository_files_once())


@cache
def repository_files_once() -> tuple[Path, ...]:
    """`repository_files`, asked of git once."""
    return tuple(repository_files())
