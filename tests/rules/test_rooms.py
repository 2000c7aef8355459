"""The order of the house: what may import what, and what a file may be called."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter

from tests.rules.source_tree import ROOT, Module, modules, repository_files

# The rooms, and what each may import besides its own files and `errors`.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "runtime": set(),
    "weight": set(),
    "kernels": {"weight", "runtime"},
    "methods": {"kernels", "weight", "runtime"},
    "losses": set(),
    "recipe": {"methods", "losses", "weight"},
    "models": {"kernels", "weight", "runtime"},
    "data": {"models", "recipe", "runtime"},
    "calibration": {"models", "recipe", "methods", "weight", "runtime"},
    "reporting": {"models", "recipe", "runtime"},
}
ROOMS["evaluation"] = {"reporting", "calibration", "data", "models", "recipe", "kernels", "weight", "runtime"}
ROOMS["benchmark"] = {"reporting", "evaluation", "data", "models", "runtime"}
ROOMS["distillation"] = ROOMS["evaluation"] - {"kernels"} | {"evaluation", "losses", "methods"}
ROOMS["compression"] = ROOMS["distillation"] - {"losses"} | {"distillation"}
ROOMS["formats"] = {"reporting", "evaluation", "models", "kernels", "weight", "runtime"}
ROOMS["allocation"] = ROOMS["compression"] - {"distillation"} | {"compression", "formats", "kernels"}
ROOMS["pipeline"] = ROOMS["allocation"] - {"kernels"} | {"allocation", "distillation"}
ROOMS["surgery"] = ROOMS["pipeline"] - {"formats"} | {"pipeline"}
ROOMS["cli"] = set(ROOMS)
ROOMS["__main__"] = {"cli"}
# A method shares code with others through the files of methods/ that register none. The exceptions:
SIBLINGS = {
    "llmcompress.methods.grids.gptq": {
        "llmcompress.methods.grids.rtn",
        "llmcompress.methods.grids.mxfp",
    },  # these with feedback
    "llmcompress.methods.grids.hqq": {"llmcompress.methods.grids.rtn"},  # rtn whose grids are solved for again
}
NOUNS_MISSING = {"utils", "util", "common", "base", "manager", "helpers", "misc"}


def room_modules() -> list[Module]:
    """Return every module that is in a room."""
    return [module for module in modules() if module.room]


def method_modules() -> set[str]:
    """Return the names of the modules that register a method."""
    return {module.name for module in modules() if "\n@method(" in module.text}


def test_every_file_has_a_room() -> None:
    homeless = sorted(str(module) for module in room_modules() if module.room not in ROOMS)
    assert not homeless, f"{homeless} are in no room; put each into the one whose subject it shares"


def test_every_room_says_what_it_holds_and_contributing_lists_it() -> None:
    """The table is made of the rooms' docstrings, from the top of the house to its foot."""
    rows = []
    for room in [room for room in reversed(ROOMS) if (ROOT / "llmcompress" / room).is_dir()]:
        text = ast.get_docstring(ast.parse((ROOT / "llmcompress" / room / "__init__.py").read_text(encoding="utf-8")))
        assert text and len(text.splitlines()) <= 10 and ".py` first" in " ".join(text.split()), (
            f"{room}/__init__.py says what comes in, what goes out, and which file to open first, in ten lines"
        )
        named = re.findall(r"`([\w/]+\.py)`", text)
        assert named and all((ROOT / "llmcompress" / room / name).is_file() for name in named), f"{room} names {named}"
        rows.append(f"| `{room}/` | {text.splitlines()[0].rstrip('.')} |")
    table = "\n".join(rows)
    assert table in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), f"put this into CONTRIBUTING.md:\n{table}"


def test_imports_go_down() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in room_modules()
        for name in sorted(module.local_imports())
        if _room(name) not in {module.room, "errors", "", *ROOMS.get(module.room, ())}
    ]
    assert not wrong, f"{wrong}: a room may import only the rooms that ROOMS lists for it. Move the shared part down."


def test_imports_have_no_circle() -> None:
    TopologicalSorter({module.name: module.local_imports() - {module.name} for module in modules()}).prepare()


def test_methods_do_not_import_methods() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in room_modules()
        if module.room == "methods" and module.name != "llmcompress.methods"
        for name in sorted(module.local_imports() & method_modules() - {module.name} - SIBLINGS.get(module.name, set()))
    ]
    assert not wrong, f"{wrong}: move the shared part to a file without @method"


def _room(name: str) -> str:
    return (name.split(".") + [""])[1]


def test_every_method_is_registered() -> None:
    [index] = [module for module in modules() if module.name == "llmcompress.methods"]
    absent = method_modules() - index.local_imports()
    assert not absent, f"methods/__init__.py does not import {sorted(absent)}"


def test_no_file_is_named_after_nothing() -> None:
    named = [str(path.relative_to(ROOT)) for path in repository_files() if path.stem in NOUNS_MISSING]
    assert not named, f"{named}: a function without a room shows a missing noun; name the file after what it holds"


def test_no_two_public_classes_share_a_name() -> None:
    homes: dict[str, list[str]] = {}
    for module in modules():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(module))
    twice = {name: places for name, places in homes.items() if len(places) > 1}
    assert not twice, f"{twice}: one word names one thing; call one of them what the field calls it"
