"""A model by its name, scored: quality beside size, for `llmcompress eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmcompress import report as reports
from llmcompress.architecture import architecture
from llmcompress.checkpoint import add_file
from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluate import compare_models, evaluate
from llmcompress.locate import Place, locate
from llmcompress.source import Source, load_model, load_tokenizer, open_source


@dataclass(frozen=True)
class Size:
    """What a model takes. `bpw`: bits per weight of the decoder's linears, None where they cannot be told apart."""

    bytes: int
    bpw: float | None
    model_bpw: float


def score(
    model: str | Path,
    *,
    revision: str | None = None,
    against: str | None = None,
    text: Path | None = None,
    windows: int = 32,
    length: int = 1024,
    tasks: Sequence[str] = (),
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    seed: int = 0,
    save: bool = False,
) -> dict[str, Any]:
    """What `evaluate` finds of a dense or compressed model, in float32, with its bytes, bpw and model_bpw.

    `against` is the dense model that KL and top-1 agreement are measured from. `save` scores that one too and keeps
    both in the compressed folder, for its card. Raises InputError for a model that cannot be loaded, RecipeError where
    there is nothing to save.
    """
    place = locate(str(model), revision)
    if save and (against is None or not (place.folder / reports.FILE).is_file()):
        raise RecipeError("saving scores needs a folder that compress wrote, and the dense model to compare it with")
    teacher = None if against is None else load_model(locate(against), device)
    size = size_of(place)
    loaded, tokenizer = load_model(place, device), load_tokenizer(place.folder)
    options: dict[str, Any] = {
        "windows": windows,
        "length": length,
        "tasks": tasks,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "seed": seed,
    }
    if save and teacher is not None:
        both = compare_models(teacher, loaded, tokenizer, text, **options)
        source = "Python's documentation" if text is None else text.name
        entries = {"text": source, **options, "versions": reports.versions(), **both}
        add_file(place.folder, reports.SCORES, json.dumps(entries, indent=2))
        found = both["compressed"]
    else:
        found = evaluate(loaded, tokenizer, text, against=teacher, **options)
    return found | {"bytes": size.bytes, "bpw": size.bpw, "model_bpw": size.model_bpw}


def size_of(place: Place) -> Size:
    """From the report of a compressed checkpoint, else from the headers of a dense one, which is checked thereby."""
    if (place.folder / reports.FILE).is_file():
        report = reports.read(place.folder)
        return Size(report.bytes, report.bpw, report.model_bpw)
    source = open_source(place)
    return Size(source.bytes, _dense_bpw(source), source.bytes * 8 / source.parameters)


def _dense_bpw(source: Source) -> float | None:
    try:
        linears = architecture(source.config, source.skeleton()).linears()
    except InputError:  # it can be scored all the same
        return None
    headers = [source.tensors[f"{name}.weight"] for name in linears]
    values = sum(torch.Size(header.shape).numel() for header in headers)
    return sum(header.bytes for header in headers) * 8 / values
