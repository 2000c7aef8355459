"""The recipes that come with llmcompress, and the way from a name such as `gptq-4-g64` to a file.

They are the files below `configs/`, where every name occurs once. The wheel has that folder inside the package, a clone
beside it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

from llmcompress.errors import RecipeError
from llmcompress.recipe.yaml import shorten

COMPRESSION = {
    "recommended": "start here",
    "engines": "for the engine that will run the model, as --for takes them",
    "methods": "one or two for every method, as in its paper",
    "ablations": "variants, for comparisons",
}
DISTILLATION = {"distillation": "for training a compressed or shortened model on the dense one"}
GROUPS = COMPRESSION | DISTILLATION
PACKAGE = Path(__file__).parent.parent
PROTOCOL = (
    "bpw, size and perplexity are those of SmolLM2-135M-Instruct on 8x1024 tokens of WikiText-2, after calibration on "
    "16x1024 other tokens of it for recipes that calibrate"
)
MEASURED = Path(__file__).with_name("measured.json")  # written by research/measured.py


@dataclass(frozen=True)
class Measurement:
    """The measured result of one recipe."""

    bpw: float  # stored bits per weight of the decoder's linear layers
    megabytes: float  # of all weight files
    perplexity: float


@dataclass(frozen=True)
class LibraryRecipe:
    """A recipe that comes with llmcompress."""

    name: str
    group: str
    path: Path
    purpose: str  # the first sentence of its file
    measured: Measurement | None


def library_folder() -> Path:
    """Return the folder `configs` of the installed package, or of the clone."""
    packaged = PACKAGE / "configs"
    return packaged if packaged.is_dir() else PACKAGE.parent / "configs"


def measurements() -> dict[str, Measurement]:
    """Return the measured results by the names of recipes; `dense` is the uncompressed model."""
    results = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {name: Measurement(**numbers) for name, numbers in results.items()}


def library() -> tuple[LibraryRecipe, ...]:
    """Return all recipes that come with llmcompress, group by group."""
    measured = measurements()
    return tuple(
        LibraryRecipe(name, path.parent.name, path, _purpose(path), measured.get(name))
        for name, path in _paths().items()
    )


def find_recipe(source: str | Path, distillation: bool = False) -> Path:
    """Return the file of a recipe that is given by its path or its name. A file that exists goes before a name.

    Names are those of distillations if `distillation` is true, else of compressions. A path that does not exist is
    returned as it is. Raises RecipeError for an unknown name, one of the other kind, and a path that has moved.
    """
    name, path = str(source), Path(os.path.expanduser(source))
    if os.path.exists(path) and not os.path.isdir(path):
        return path
    known, groups = _paths(), DISTILLATION if distillation else COMPRESSION
    if name in known:
        if known[name].parent.name not in groups:
            wanted, other = ("distillation", "compression") if distillation else ("compression", "distillation")
            raise RecipeError(
                f"{name} is a recipe of {other}, and a recipe of {wanted} is required; `llmcompress recipes` lists them"
            )
        return known[name]
    if path.stem in known and path.suffix in (".yaml", ".yml"):
        raise RecipeError(
            f"there is no file {source}; the recipe {path.stem} is configs/{known[path.stem].parent.name}/"
            f"{path.stem}.yaml: give that path in a clone, or the name {path.stem} anywhere"
        )
    if path.suffix or len(path.parts) > 1 or os.path.isdir(path):
        return path
    near = get_close_matches(name, [entry for entry, file in known.items() if file.parent.name in groups], n=1)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    raise RecipeError(
        f'there is no file and no recipe "{shorten(name, 100)}"; {hint}`llmcompress recipes` lists all names'
    )


@lru_cache(maxsize=1)
def _paths() -> dict[str, Path]:
    """Return the files by name, group by group."""
    folder = library_folder()
    return {path.stem: path for group in GROUPS for path in sorted((folder / group).glob("*.yaml"))}


def _purpose(path: Path) -> str:
    """Return the first sentence of the comment at the beginning of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=[.])\s", comment, maxsplit=1)[0]
