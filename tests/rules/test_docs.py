"""The documents show what works: commands parse, recipes are valid, programs run, files are there."""

from __future__ import annotations

import os
import re
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import llmcompress as lc
from llmcompress.recipe.library import find_recipe
from llmcompress.recipe.read import dump, parse_recipe, read_recipe
from llmcompress.weight.nodes import Weight
from tests.rules.documents import DOCUMENTS, RECORDS, blocks, commands, prose
from tests.rules.source_tree import ROOT
from tests.tiers import tiered_nightly
from tests.tiny import save_tiny

PLACEHOLDERS = {"methods/signs.py", "org/name", "org/model", "me/small", "parts/base", "parts/adapter"}
PLACEHOLDERS |= {"org/name/file.gguf", "org/name/path/file.gguf", "path/file.gguf"}
PLACEHOLDERS |= {"OWNER/NAME", "curve/bpw-1.25", "curve/frontier.md", "small-gguf/model.gguf"}
OUTSIDE = {"pip", "hf", "python"}  # commands that are not ours
PROGRAMS = [document for document in DOCUMENTS if document.startswith("docs/") and blocks("python", document)]
RECIPES = [document for document in DOCUMENTS if document != "CONTRIBUTING.md" and blocks("yaml", document)]
SHORT = ("calibration.samples=4", "calibration.length=32")  # for a model of 64 positions


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the recipes of a clone and one's own, a text, and what looks like a checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("recipe.yaml", "other.yaml", "distil.yaml", "mine.txt", "peers.json", "prompts.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "small").mkdir()
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_parse(document: str, place: Path) -> None:
    for words in commands(document):
        if words[0].startswith("./"):
            assert os.access(ROOT / words[0], os.X_OK), f"{document}: there is no {words[0]}"
        elif "llmcompress" in words[:1] or (words[-1:] != words[:1] and "-m" in words and "llmcompress" in words):
            _check(words[words.index("llmcompress") + 1 :], document)
        else:
            assert words[0] in OUTSIDE or words[0].startswith(".venv/"), f"{document}: what is {words[0]}?"


def test_the_page_on_installing_lists_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, flags=re.MULTILINE)) == extras.keys()


def test_settings_with_brackets_are_quoted() -> None:
    texts = {document: "\n".join(blocks("sh", document)) for document in [*DOCUMENTS, *sorted(RECORDS)]}
    texts |= {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "llmcompress" / "cli").glob("*.py")}
    bare = {name: re.findall(r"--set (?!['\"])\S*\[\S*", text) for name, text in texts.items()}
    wrong = {name: settings for name, settings in bare.items() if settings}
    assert not wrong, f"{wrong}: quote these; zsh takes [ for a pattern of files"


@lru_cache(maxsize=1)
def command_line() -> Any:
    """Return the command line as its parser knows it."""
    from typer.main import get_command

    from llmcompress.cli.app import app

    return get_command(app)


def _check(words: list[str], document: str) -> None:
    """Fails unless a command of ours takes these words, and recipes that are given by name are there."""
    command = command_line()
    path = "llmcompress"
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"{document}: there is no command {path} {' '.join(words[:1])}"
        command, path, words = command.commands[words[0]], f"{path} {words[0]}", words[1:]
    given = command.make_context(path, list(words)).params
    for name in [given.get("recipe"), *(given.get("recipes") or ())]:
        if isinstance(name, str):
            assert find_recipe(name, distillation=path.endswith("distill")).is_file(), f"{document}: {name}"


@pytest.mark.parametrize("document", RECIPES)
def test_recipes_are_valid(document: str) -> None:
    for text in blocks("yaml", document):
        values = yaml.safe_load(text)
        whole = {"version": 1, "rules": [{"match": "*", "steps": []}]}
        read_recipe(whole | ({"rules": values} if isinstance(values, list) else values))


@pytest.mark.parametrize("document", tiered_nightly(PROGRAMS, PROGRAMS[1::3].__contains__))
def test_programs_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's programs, one after the other in one namespace, beside a model and what was made from it."""
    monkeypatch.chdir(tmp_path)
    text = next(text for text in blocks("yaml", "docs/quickstart.md") if "version" in text)
    (tmp_path / "recipe.yaml").write_text(dump(parse_recipe(text, settings=SHORT)))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    save_tiny("llama", tmp_path / "smollm2", tie_word_embeddings=True, **sizes)  # a folder wins over the name
    lc.compress("smollm2", "recipe.yaml", "small")
    names: dict[str, object] = {}
    for program in blocks("python", document):
        exec(compile(program, document, "exec"), names)


def test_named_files_are_there() -> None:
    roots = (ROOT, ROOT / "llmcompress", ROOT / "tests" / "rules")
    absent = {}
    for document in DOCUMENTS:
        named = set(re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|toml))`", prose(document))) - PLACEHOLDERS
        absent[document] = sorted(name for name in named if not any((root / name).exists() for root in roots))
    absent = {document: names for document, names in absent.items() if names}
    assert not absent, f"these documents name files that are not there: {absent}"


def test_links_lead_somewhere() -> None:
    absent = {}
    for document in [*DOCUMENTS, *sorted(RECORDS)]:
        targets = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(document)) if "://" not in target]
        absent[document] = [target for target in targets if not ((ROOT / document).parent / target).exists()]
    absent = {document: targets for document, targets in absent.items() if targets}
    assert not absent, f"these documents have links that lead nowhere: {absent}"


def test_every_node_is_explained() -> None:
    """In the table of expressions by its class, and in that of the file format by its name on disk."""
    concepts = (ROOT / "docs" / "concepts" / "expressions.md").read_text(encoding="utf-8")
    formats = (ROOT / "docs" / "reference" / "file-format.md").read_text(encoding="utf-8")
    encoding = (ROOT / "llmcompress" / "weight" / "encoding.py").read_text(encoding="utf-8")
    on_disk = set(re.findall(r'"node": "(\w+)"', encoding))
    assert on_disk and not [name for name in sorted(on_disk) if f"| `{name}` |" not in formats]
    assert not [node.__name__ for node in get_args(Weight) if f"| `{node.__name__}` |" not in concepts]


def test_generated_pages_are_current() -> None:
    from scripts.reference.pages import stale

    assert not stale(), f"{stale()} in docs/reference/ are not what the code says; run ./scripts/docs generate"


def test_the_page_of_recipes_names_only_keys_and_what_the_package_offers() -> None:
    lines = (ROOT / "docs" / "reference" / "recipe.md").read_text(encoding="utf-8").splitlines()
    keys = {found[1] for line in lines if (found := re.match(r"\| `(\w+)` \|", line))}
    prose = [line for line in lines if not line.startswith(("|", "#"))]
    absent = {name for line in prose for name in re.findall(r"`(\w+)`", line)} - keys - set(lc.__all__)
    assert keys and not absent, f"docs/reference/recipe.md names {sorted(absent)}; name what a reader can write"


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    missing = sorted(page for page in pages if not re.search(rf"[ ]{re.escape(page)}$", menu, flags=re.MULTILINE))
    assert not missing, f"mkdocs.yml does not list {missing}"


@pytest.mark.slow
def test_pages_build_without_warnings_and_load_nothing_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")
    pytest.importorskip("material", reason="the extra docs is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(DOCUMENTS) - 3
    loaded = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=.?https?:|<link[^>]*stylesheet[^>]*https?:")
    assert not [page.name for page in pages if loaded.search(page.read_text(encoding="utf-8"))]
