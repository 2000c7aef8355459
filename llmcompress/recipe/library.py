"""The recipes that come with llmcompress, and the way from a name to a file.

A recipe is given as a path or as a name such as `gptq-4-g64`: a file that exists wins, else the name is looked up below
`configs/`, where every name stands once. The wheel carries that folder inside the package; a clone has it beside.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from llmcompress.errors import RecipeError
from llmcompress.recipe.user_file import expanded
from llmcompress.recipe.yaml import shortened

COMPRESSION = {
    "recommended": "start here",
    "methods": "one or two for every method, as its paper has it",
    "ablations": "variants, for comparisons",
}
DISTILLATION = {"distillation": "what a compressed or shortened model learns from the dense one"}
GROUPS = COMPRESSION | DISTILLATION
PACKAGE = Path(__file__).parent.parent
PROTOCOL = (
    "bpw, size and perplexity are those of SmolLM2-135M-Instruct on 8x1024 tokens of WikiText-2, after calibration on "
    "16x1024 other tokens of it for recipes that calibrate"
)
MEASURED = Path(__file__).with_name("measured.json")  # written by research/measured.py


@dataclass(frozen=True)
class Measurement:
    """Numbers of one recipe: stored bits per weight of the decoder's linears, millions of bytes of all weight files,
    and perplexity."""

    bpw: float
    megabytes: float
    perplexity: float


@dataclass(frozen=True)
class LibraryRecipe:
    """A recipe that comes with llmcompress. `purpose` is the first sentence of its file."""

    name: str
    group: str
    path: Path
    purpose: str
    measured: Measurement | None


def library_folder() -> Path:
    """Return the folder `configs` of the installed package, or that of the clone."""
    packaged = PACKAGE / "configs"
    return packaged if packaged.is_dir() else PACKAGE.parent / "configs"


def measurements() -> dict[str, Measurement]:
    """Return what was measured, by the names of recipes; `dense` is the model as it is."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {name: Measurement(**numbers) for name, numbers in found.items()}


def library() -> tuple[LibraryRecipe, ...]:
    """Return all recipes that come with llmcompress, group by group."""
    measured = measurements()
    return tuple(
        LibraryRecipe(name, path.parent.name, path, _purpose(path), measured.get(name))
        for name, path in _paths().items()
    )


def find_recipe(given: str | Path, distillation: bool = False) -> Path:
    """Return the file of a recipe that is given by its path or its name.

    With `distillation`, names are those of distillations, else those of compressions. A path that nobody knows is
    returned as it is. Raises RecipeError for an unknown name, one of the other kind, and a path that has moved.
    """
    name = str(given)
    try:
        path = expanded(given)
        there = path.exists()
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise RecipeError(
            f"{shortened(name)!r} cannot be the path of a recipe ({reason}); give a YAML file, or a name that "
            "`llmcompress recipes` lists"
        ) from error
    if there and not path.is_dir():
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
            f"there is no file {given}; the recipe {path.stem} is configs/{known[path.stem].parent.name}/"
            f"{path.stem}.yaml: give that path in a clone, or the name {path.stem} anywhere"
        )
    if there or path.suffix or len(path.parts) > 1:
        return path
    near = get_close_matches(name, [one for one, file in known.items() if file.parent.name in groups], n=1)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    raise RecipeError(
        f'there is no file and no recipe "{shortened(name, 100)}"; {hint}`llmcompress recipes` lists all names'
    )


@lru_cache(maxsize=1)
def _paths() -> dict[str, Path]:
    """Return the files by name, in the order of the groups."""
    folder = library_folder()
    return {path.stem: path for group in GROUPS for path in sorted((folder / group).glob("*.yaml"))}


def _purpose(path: Path) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return re.split(r"(?<=[.])\s", " ".join(comment), maxsplit=1)[0]
