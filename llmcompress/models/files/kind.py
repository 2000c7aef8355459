"""The test of a folder for being a checkpoint of llmcompress."""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import InputError
from llmcompress.models.files.checkpoint import read_json
from llmcompress.models.files.file_names import check_folder
from llmcompress.models.transformers.hf_quantizer import NAME


def check_kind(folder: Path) -> None:
    """Raise InputError for a folder without a checkpoint of llmcompress."""
    check_folder(folder)
    try:
        config = read_json(folder / "config.json")
        kind = (config.get("quantization_config") or {}).get("quant_method")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read ({error}); give a compressed checkpoint") from error
    if kind != NAME:
        raise InputError(f"{folder} holds no model compressed by llmcompress; give the folder that compress wrote")
