"""Optional packages that some recipes of a distillation require."""

from __future__ import annotations

from importlib.util import find_spec

from llmcompress.errors import RecipeError


def check_bitsandbytes(asked: str) -> None:
    """Raise RecipeError if bitsandbytes is missing. `asked`: the option of the recipe that requires it."""
    if find_spec("bitsandbytes") is None:
        raise RecipeError(f'{asked} requires bitsandbytes; run pip install "llmcompress[distill]"')
