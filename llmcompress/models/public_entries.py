"""Configs as outputs may tell them: without code that would be run, and without paths of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Python code in the folder or in another repository, and paths that older releases of transformers left there; it sets
# or looks up all of them anew.
PRIVATE = {
    "auto_map",
    "custom_pipelines",
    "_name_or_path",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
}


def public_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a config without those that are `PRIVATE`."""
    return {name: value for name, value in entries.items() if name not in PRIVATE}
