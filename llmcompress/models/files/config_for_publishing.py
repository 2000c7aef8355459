"""Configs as outputs may tell them: without code that is not there, and without paths of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmcompress.models.dense.remote_code import AUTO_MAP

# Python code in the folder or in another repository, and paths that older releases of transformers left there; it sets
# or looks up all of them anew.
PRIVATE = {
    AUTO_MAP,
    "custom_pipelines",
    "_name_or_path",
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
}


def public_entries(entries: Mapping[str, Any], code: bool = False) -> dict[str, Any]:
    """Return the entries of a config without those that are `PRIVATE`; `code`: True if its code goes along."""
    kept = {AUTO_MAP} if code else set()
    return {name: value for name, value in entries.items() if name in kept or name not in PRIVATE}
