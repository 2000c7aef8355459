"""Rules on names: verbs for functions, nouns for values, and no file that only one other file would miss."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

from tests.rules.source_tree import PACKAGE, Module, functions, modules

# Words that name nothing: a reader has to look up what they stand for. A few lines of a loop may use them.
STOP_WORDS = {"found", "one", "there", "asked", "kept", "told", "mine", "how"}
A_FEW_LINES = 6
PARTICIPLES_WITHOUT_ED = {
    *(
        "begun",
        "bound",
        "broken",
        "built",
        "chosen",
        "cut",
        "drawn",
        "driven",
        "fed",
        "found",
        "frozen",
        "given",
        "gone",
    ),
    *(
        "grown",
        "held",
        "hidden",
        "kept",
        "known",
        "laid",
        "learnt",
        "left",
        "lost",
        "made",
        "meant",
        "met",
        "paid",
        "proven",
    ),
    *(
        "said",
        "seen",
        "sent",
        "shown",
        "spent",
        "split",
        "spread",
        "sunk",
        "taken",
        "taught",
        "thought",
        "thrown",
        "told",
    ),
    *("torn", "understood", "unheard", "won", "worn", "woven", "written"),
}
NO_PARTICIPLES = {"embed", "need", "seed", "shed", "speed", "feed", "exceed", "proceed", "shared", "weed", "bed", "red"}
PUBLIC_API = {"decoded"}  # names that users import from `llmcompress`
SMALL_FILE = 60
REGISTRIES = ("methods", "losses", "cli", "latents")  # one method, loss, command or strategy a file
ENTRY_POINTS = {"__init__", "__main__", "plugin", "worker"}  # run or found by another program


def test_functions_and_classes_are_not_bare_participles() -> None:
    wrong = [
        f"{module}:{node.lineno} {node.name}"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if not _is_property(node) and _is_participle(node.name.lower())
    ]
    assert not wrong, f"{wrong}: say what is done to what (`pack_codes`), or name the thing that comes back"


def test_names_that_live_say_what_they_hold() -> None:
    wrong = [
        f"{module}:{line} {name}" for module in modules() for name, line in _lasting_names(module) if name in STOP_WORDS
    ]
    assert not wrong, f"{wrong}: use a noun of the field; {sorted(STOP_WORDS)} may live {A_FEW_LINES} lines"


def test_a_small_file_has_more_than_one_reader() -> None:
    importers: dict[str, set[str]] = defaultdict(set)
    for module in modules():
        for name in module.local_imports():
            importers[name].add(module.name)
    wrong = [
        f"{module} ({len(module.text.splitlines())} lines, for {', '.join(importers[module.name]) or 'nobody'})"
        for module in modules()
        if len(module.text.splitlines()) < SMALL_FILE and len(importers[module.name] - {"llmcompress"}) < 2
        if not {*module.path.relative_to(PACKAGE).parts} & {*REGISTRIES} and module.path.stem not in ENTRY_POINTS
    ]
    assert not wrong, f"{wrong}: a file under {SMALL_FILE} lines with one reader belongs into that reader"


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return any(isinstance(name, ast.Name) and name.id.endswith("property") for name in node.decorator_list)


def _is_json_record(node: ast.ClassDef | ast.Module) -> bool:
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    return any(isinstance(base, ast.Name) and base.id == "JsonRecord" for base in bases)


def _is_participle(name: str) -> bool:
    word = name.strip("_")
    if "_" in word or word in NO_PARTICIPLES or word in PUBLIC_API:
        return False
    return word.endswith("ed") or word in PARTICIPLES_WITHOUT_ED


def _lasting_names(module: Module) -> Iterator[tuple[str, int]]:
    """Names of functions, classes, fields and parameters, and of local values used beyond a few lines; with lines."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name.strip("_"), node.lineno
        if isinstance(node, ast.ClassDef | ast.Module) and not _is_json_record(node):  # whose fields are keys of files
            for statement in node.body:
                for target in _targets(statement):
                    yield target.strip("_"), statement.lineno
    for function in functions(module):
        spans: dict[str, list[int]] = defaultdict(list)
        for node in ast.walk(function):
            if isinstance(node, ast.Name):
                spans[node.id].append(node.lineno)
            elif isinstance(node, ast.arg):
                spans[node.arg].append(node.lineno)
        for name, lines in spans.items():
            if max(lines) - min(lines) > A_FEW_LINES:
                yield name.strip("_"), min(lines)


def _targets(statement: ast.stmt) -> Iterator[str]:
    match statement:
        case ast.AnnAssign(ast.Name(name)):
            yield name
        case ast.Assign(targets):
            yield from (target.id for target in targets if isinstance(target, ast.Name))
