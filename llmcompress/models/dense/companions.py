"""The files beside a model's weights that go with it: tokenizer, chat templates, generation config, processor, licence.

Only files that transformers names are copied, never other ones: keys, notes, adapters. Code is copied if the model
needs it and the user trusts it. All are read before work starts, so that a broken one is found then. A log message
tells the user what stays behind; no output does, since the names may be private too.
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
from typing import TYPE_CHECKING

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmcompress.errors import InputError, first_line, list_names
from llmcompress.models.dense.config import MODEL, PROCESSORS, code_files, needs_code, public_entries
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import CARD
from llmcompress.models.files.file_names import MANIFEST
from llmcompress.models.files.identity import tokenizer_files
from llmcompress.models.files.integrity import INDEX
from llmcompress.models.files.reading import read_json

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

LOG = logging.getLogger(__name__)
LARGEST = 500_000_000  # bytes; the largest known tokenizer has 40 MB
WAY_OUT = "correct or remove it"
GENERATION = "generation_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
MORE_TEMPLATES = "additional_chat_templates"  # a folder
CONFIGS = {"tokenizer_config.json", GENERATION, *PROCESSORS}
VOCABULARY = re.compile(r"tokenizer\.model(\.v\d+)?|tiktoken\.model|tekken\.json|tokenizer\.\d[\d.]*\.json")
LICENCE = re.compile(r"(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)([-_.][A-Za-z0-9.-]*)?", re.IGNORECASE)
TEXT = {"", ".txt", ".md", ".rst", ".pdf"}  # ends of a licence's name
BLOB = re.compile(r"(\.\./){2,3}blobs/[0-9a-f]{40,64}")  # a link in the snapshots of the Hub's cache
OURS = {  # written by llmcompress, or written anew
    *CARD,
    *("config.json", INDEX, MANIFEST, file_names.REPORT, file_names.RECIPE, file_names.SCORES, file_names.ALLOCATION),
    *(file_names.EXPERTS, file_names.NARROWED, file_names.DISTILLATION, file_names.DISTILLATION_RECIPE),
    *(
        file_names.DISTILLATION_PLOT,
        file_names.PASSPORT,
        file_names.GENERATIONS,
        file_names.METRICS,
        file_names.GGUF_SOURCE,
        file_names.ORIGIN,
    ),
}


@dataclass(frozen=True)
class Companions:
    """The files of `folder` that are copied, and the `left` ones, by name; `code`: the copied ones with Python code."""

    folder: Path
    names: tuple[str, ...]
    left: tuple[str, ...]
    code: tuple[str, ...] = ()

    def copy(self, target: Path) -> None:
        """Copy the files to `target` without private entries, and log what stays behind."""
        stripped = []
        for name in self.names:
            (target / name).parent.mkdir(exist_ok=True)
            if (public := self._public_text(name)) is None:
                shutil.copyfile(self.folder / name, target / name)
            else:
                stripped.append(name)
                (target / name).write_text(public, "utf-8")
        if self._public_text(MODEL) is not None:  # without which others write config.json
            stripped.append(MODEL)
        if self.left:
            LOG.warning("left behind in %s: %s", self.folder, "; ".join(self._reasons()))
        if stripped:
            LOG.warning("%s goes along without the names of code and of local files in it", list_names(stripped))

    def _public_text(self, name: str) -> str | None:
        """Return the text of a config without its private entries, None for a file without any."""
        path = self.folder / name
        if name not in {*CONFIGS, MODEL} or not path.is_file():
            return None
        entries = read_json(path, WAY_OUT, LARGEST)
        public = public_entries(entries, bool(self.code) and needs_code(self.folder, name))
        return None if public == entries else json.dumps(public, indent=2, ensure_ascii=False)

    def _reasons(self) -> Iterator[str]:
        """Yield clauses on the files that stay behind."""
        forms = {path.name for path in tokenizer_files(self.folder)}
        unread = [name for name in self.left if name in forms]
        others = [name for name in self.left if name not in forms]
        if unread:
            yield f"{list_names(unread, 10)} (its tokenizer is read from other files)"
        if others:
            yield f"{list_names(others, 10)} (no part of the model)"


def copy_companions(folder: Path, target: Path, trust_remote_code: bool = False) -> None:
    """Copy the tokenizer, chat templates, generation config and licence of the model in `folder` to `target`."""
    companions(folder, trust_remote_code).copy(target)


def companions(folder: Path, trust_remote_code: bool = False) -> Companions:
    """Return the files that go with the model in `folder`; `trust_remote_code`: with the code that it needs.

    Raises InputError for a file that transformers cannot read, a link out of the folder, or one larger than any
    tokenizer.
    """
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    code = code_files(folder) if trust_remote_code else ()
    wanted = set(code) | set(filter(is_named, files))
    templates = {f"{MORE_TEMPLATES}/{path.name}": path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    files |= {name: path for name, path in templates.items() if path.is_file()}
    wanted |= files.keys() & templates.keys()
    for name in sorted(wanted):
        _check_file(files[name], folder)
    for name in sorted(wanted.intersection((GENERATION, *PROCESSORS, *TOKENIZER, "chat_template.json"))):
        read_json(folder / name, WAY_OUT, LARGEST)
    read_generation_config(folder)
    tokenizer = _tokenizer(folder, wanted, trust_remote_code)
    vocabulary = set() if tokenizer is None else {name for name in tokenizer.vocab_files_names.values() if name}
    for name in sorted(files.keys() & vocabulary - wanted):
        _check_file(files[name], folder)
        wanted.add(name)
    _check_templates(tokenizer, folder)
    licences = {name for name in files if LICENCE.fullmatch(name) and Path(name).suffix.lower() in TEXT}
    wanted |= {name for name in licences if not leads_out(files[name], folder) and _fits(files[name])}
    others = files.keys() - wanted - OURS
    weights = ".safetensors" if any(name.endswith(".safetensors") for name in files) else (".bin", ".bin.index.json")
    left = {name for name in others if not (name.startswith(".") or name.endswith(weights))}
    return Companions(folder, tuple(sorted(wanted)), tuple(sorted(left)), code)


def is_named(name: str) -> bool:
    """True for the name of a file that transformers reads beside the weights, whatever the model."""
    return name in {*TOKENIZER, *TEMPLATES, *PROCESSORS, GENERATION} or VOCABULARY.fullmatch(name) is not None


def leads_out(path: Path, folder: Path) -> bool:
    """True if a file of `folder` is a link to anything outside, other than one of the Hub's cache to its own blobs."""
    inside = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))
    if target.is_relative_to(inside):
        return False
    blobs = inside.parent.parent / "blobs"
    is_blob = inside.parent.name == "snapshots" and path.is_symlink() and BLOB.fullmatch(os.readlink(path)) is not None
    return not (is_blob and target.parent == blobs)


def _check_file(path: Path, folder: Path) -> None:
    if leads_out(path, folder):
        raise InputError(f"{path} is a link out of its folder, which is not followed; put the file itself there")
    if not _fits(path):
        raise InputError(
            f"{path} has {path.stat().st_size / 1e6:,.0f} MB, more than any tokenizer; put the right one there"
        )


def _fits(path: Path) -> bool:
    return path.stat().st_size <= LARGEST


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Return the generation config in `folder`, if any. Raises InputError for one that transformers cannot read."""
    from transformers import GenerationConfig

    if not (folder / GENERATION).is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / GENERATION} is broken ({first_line(error)}); {WAY_OUT}") from error


def _tokenizer(folder: Path, wanted: set[str], trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer, None for a folder without one. Raises InputError for one that cannot be read."""
    try:
        return load_tokenizer(folder, trust_remote_code)
    except InputError:
        if any(name in TOKENIZER or VOCABULARY.fullmatch(name) for name in wanted):
            raise
        return None


def _check_templates(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Raise InputError for a chat template that is no template."""
    templates = getattr(tokenizer, "chat_template", None) or {}
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols])
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        try:
            if not isinstance(template, str):
                raise TypeError("it is no text")
            environment.parse(template)  # to compile it would compute its constants, as large as they may be
        except (TemplateError, RecursionError, TypeError, ValueError) as error:
            raise InputError(f"a chat template in {folder} is broken ({first_line(error)}); {WAY_OUT}") from error


class _Generation(Extension):
    """The tag of transformers around the assistant's words."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the nodes inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
