"""Packages that a distillation can do without until its recipe asks for them."""

from __future__ import annotations

from importlib.util import find_spec

from llmcompress.errors import RecipeError


def check_bitsandbytes(asked: str) -> None:
    """Raises RecipeError where bitsandbytes is missing, which what is `asked` in a recipe needs."""
    if find_spec("bitsandbytes") is None:
        raise RecipeError(f'{asked} needs bitsandbytes; run pip install "llmcompress[distill]"')
