"""The files beside a model's weights that go with it: tokenizer, chat templates, generation config, processor, licence.

Only files that transformers names are copied, never whatever else lies there: keys, notes, adapters. Code is copied
where the model needs it and the user trusts it. They are read before work starts, so that a broken one is found then.
What stays behind is told to the user in a log message, and nowhere in the output, since the names may be private too.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmcompress.errors import InputError, first_line, list_names
from llmcompress.models.dense.config import MODEL, PROCESSORS, code_files, needs_code, public_entries
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import CARD, MANIFEST
from llmcompress.models.files.identity import tokenizer_files
from llmcompress.models.files.integrity import INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)
LARGEST = 500_000_000  # bytes; the largest known tokenizer has 40 MB
GENERATION = "generation_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
MORE_TEMPLATES = "additional_chat_templates"  # a folder
CONFIGS = {"tokenizer_config.json", GENERATION, *PROCESSORS}
VOCABULARY = re.compile(r"tokenizer\.model(\.v\d+)?|tiktoken\.model|tekken\.json|tokenizer\.\d[\d.]*\.json")
LICENCE = re.compile(r"(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)([-_.][A-Za-z0-9.-]*)?", re.IGNORECASE)
TEXT = {"", ".txt", ".md", ".rst", ".pdf"}  # ends of a licence's name
BLOB = re.compile(r"(\.\./){2,3}blobs/[0-9a-f]{40,64}")  # a link in the snapshots of the Hub's cache


@dataclass(frozen=True)
class Companions:
    """The files of `folder` that are copied, and those that stay behind, by their names there. `code`: those of the
    former with Python code."""

    folder: Path
    names: tuple[str, ...]
    left: tuple[str, ...]
    code: tuple[str, ...] = ()

    def copy(self, target: Path) -> None:
        """Copy them to `target`, without what is private in them, and tell the user what stays behind."""
        stripped = []
        for name in self.names:
            (target / name).parent.mkdir(exist_ok=True)
            found = _entries(self.folder / name) if name in CONFIGS else {}
            if self._private(name, found):
                stripped.append(name)
                entries = public_entries(found, self._runs(name))
                (target / name).write_text(json.dumps(entries, indent=2, ensure_ascii=False), "utf-8")
            else:
                shutil.copyfile(self.folder / name, target / name)
        entries = _entries(self.folder / MODEL) if (self.folder / MODEL).is_file() else {}
        if self._private(MODEL, entries):  # which whoever writes config.json leaves out
            stripped.append(MODEL)
        if self.left:
            LOG.warning("left behind in %s: %s", self.folder, "; ".join(self._reasons()))
        if stripped:
            LOG.warning("%s goes along without the names of code and of local files in it", list_names(stripped))

    def _reasons(self) -> Iterator[str]:
        """Yield clauses on the files that stay behind, and on why."""
        forms = {path.name for path in tokenizer_files(self.folder)}
        unread = [name for name in self.left if name in forms]
        others = [name for name in self.left if name not in forms]
        if unread:
            yield f"{list_names(unread, 10)} (its tokenizer is read from other files)"
        if others:
            yield f"{list_names(others, 10)} (no part of the model)"

    def _private(self, name: str, entries: dict[str, Any]) -> bool:
        """True if a config has entries that do not go along."""
        return public_entries(entries, self._runs(name)) != entries

    def _runs(self, name: str) -> bool:
        """True if the code that a config names goes along."""
        return bool(self.code) and needs_code(self.folder, name)


def copy_companions(folder: Path, target: Path, trust_remote_code: bool = False) -> None:
    """Copy the tokenizer, chat templates, generation config and licence of the model in `folder` to `target`."""
    companions(folder, trust_remote_code).copy(target)


def companions(folder: Path, trust_remote_code: bool = False) -> Companions:
    """Return the files that go with the model in `folder`; `trust_remote_code`: with the code that it needs.

    Raises InputError for one that transformers cannot read, that is a link out of the folder, or that is larger than
    any tokenizer.
    """
    there = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    known = {*TOKENIZER, *TEMPLATES, *PROCESSORS, GENERATION}
    code = code_files(folder) if trust_remote_code else ()
    wanted = set(code) | {name for name in there if name in known or VOCABULARY.fullmatch(name)}
    templates = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    there |= {f"{MORE_TEMPLATES}/{path.name}": path for path in templates if path.is_file()}
    wanted |= there.keys() & {f"{MORE_TEMPLATES}/{path.name}" for path in templates}
    for name in sorted(wanted):
        _check_file(there[name], folder)
    _check_configs(folder, wanted)
    tokenizer = _tokenizer(folder, wanted, trust_remote_code)
    for name in sorted(there.keys() & _vocabulary(tokenizer) - wanted):
        _check_file(there[name], folder)
        wanted.add(name)
    _check_templates(tokenizer, folder)
    licences = {name for name in there if LICENCE.fullmatch(name) and Path(name).suffix.lower() in TEXT}
    wanted |= {name for name in licences if not leads_out(there[name], folder) and _fits(there[name])}
    others = there.keys() - wanted - OURS
    left = {name for name in others if not (name.startswith(".") or Path(name).suffix == ".safetensors")}
    return Companions(folder, tuple(sorted(wanted)), tuple(sorted(left)), code)


def leads_out(path: Path, folder: Path) -> bool:
    """True if a file of `folder` is a link to anything outside, other than one of the Hub's cache to its own blobs."""
    inside = Path(os.path.realpath(folder))
    found = Path(os.path.realpath(path))
    if found.is_relative_to(inside):
        return False
    blobs = inside.parent.parent / "blobs"
    is_blob = inside.parent.name == "snapshots" and path.is_symlink() and BLOB.fullmatch(os.readlink(path)) is not None
    return not (is_blob and found.parent == blobs)


def _check_file(path: Path, folder: Path) -> None:
    if leads_out(path, folder):
        raise InputError(f"{path} is a link out of its folder, which is not followed; put the file itself there")
    if not _fits(path):
        raise InputError(
            f"{path} has {path.stat().st_size / 1e6:,.0f} MB, more than any tokenizer; put the right one there"
        )


def _fits(path: Path) -> bool:
    return path.stat().st_size <= LARGEST


def _tokenizer(folder: Path, wanted: set[str], trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer; None for a folder without one. Raises InputError for one that cannot be read."""
    try:
        return load_tokenizer(folder, trust_remote_code)
    except InputError:
        if any(name in TOKENIZER or VOCABULARY.fullmatch(name) for name in wanted):
            raise
        return None


def _vocabulary(tokenizer: PreTrainedTokenizerBase | None) -> set[str]:
    """Return the names of the files that a tokenizer is read from."""
    return set() if tokenizer is None else {name for name in tokenizer.vocab_files_names.values() if name}


def _check_templates(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Raise InputError for a chat template that is no template."""
    found = getattr(tokenizer, "chat_template", None) or {}
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols])
    for template in found.values() if isinstance(found, dict) else [found]:
        try:
            environment.compile(template)
        except (TemplateError, RecursionError, TypeError, ValueError) as error:
            raise InputError(
                f"a chat template in {folder} is broken ({first_line(error)}); correct or remove it"
            ) from error


class _Generation(Extension):
    """The tag of transformers around what the model says."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what is inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_configs(folder: Path, wanted: set[str]) -> None:
    """Raise InputError for a file of JSON, or a generation config, that transformers could not read."""
    from transformers import GenerationConfig

    for name in sorted(wanted.intersection((GENERATION, *PROCESSORS, *TOKENIZER, "chat_template.json"))):
        _entries(folder / name)
    if GENERATION in wanted:
        try:
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{folder / GENERATION} is broken ({first_line(error)}); correct or remove it") from error


def _entries(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises InputError for any other."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({first_line(error)}); correct or remove it") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path} holds no JSON object; correct or remove it")
    return entries


OURS = CARD | {
    "config.json",
    INDEX,
    MANIFEST,
    file_names.REPORT,
    file_names.RECIPE,
    file_names.SCORES,
    file_names.ALLOCATION,
    file_names.EXPERTS,
    file_names.NARROWED,
    file_names.DISTILLATION,
    file_names.DISTILLATION_RECIPE,
    file_names.DISTILLATION_PLOT,
    file_names.PASSPORT,
    file_names.GENERATIONS,
    file_names.METRICS,
}
