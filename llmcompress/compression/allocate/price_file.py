"""Price lists on disk: a run that was cut, or a sweep that gets more budgets, does not measure them again."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmcompress.compression.allocate.choices import Choices
from llmcompress.compression.allocate.plan import Allocation, PriceList, price, reachable, target_of
from llmcompress.compression.allocate.prices import Priced
from llmcompress.compression.allocate.sensitivity import DensePredictions, in_parts
from llmcompress.compression.journal import is_older
from llmcompress.compression.plan import Job
from llmcompress.errors import DiskError
from llmcompress.models.checkpoint import read_json, write_files
from llmcompress.models.dense import DenseModel
from llmcompress.runtime.versions import versions

Progress = Callable[[int, int, float], None]  # (blocks done, blocks, tokens per second)


def allocate_by(path: Path, job: Job, *, device: str = "cpu", progress: Progress | None = None) -> Allocation:
    """`allocate` with the price list in the file `path`. Also raises DiskError if that is of another job."""
    target = target_of(job)
    found = reachable(job, (target,))
    check_prices(path, job)
    return price_list(path, job, found, device, progress).reaching(target)


def price_list(path: Path, job: Job, found: Choices, device: str, progress: Progress | None) -> PriceList:
    """The price list in the file `path`; where there is none it is measured, and kept there.

    Raises DiskError for a list of another recipe, model or version, or that cannot be written.
    """
    if path.is_file():
        return _read(path, job, found, device)
    made = price(job, found, device=device, progress=progress)
    dense = made.dense()
    entries = {
        "of": _identity(job),
        "seconds": made.seconds,
        "windows": dense.windows.tolist(),
        "matrices": [one.to_json() for one in made.prices],
    }
    write_files(path.parent, {path.name: json.dumps(entries).encode()})
    return made


def check_prices(path: Path, job: Job) -> None:
    """Raises DiskError where `path` holds prices that are not this job's, or are older than its model or text."""
    if not path.is_file():
        return
    try:
        kept = read_json(path)["of"] == json.loads(json.dumps(_identity(job)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiskError(f"{path} cannot be read ({error}); remove it") from error
    if not kept or is_older(path.stat().st_mtime, job.source, job.recipe.calibration):
        raise DiskError(
            f"{path} was left by a run with another recipe, model, text, version or kind of budget; remove it, or "
            f"choose another output folder"
        )


def _identity(job: Job) -> dict[str, Any]:
    """What prices depend on. Of the target only its kind: with bytes, tables have prices too."""
    recipe = job.recipe.model_dump(mode="json")
    target = recipe.pop("target")
    kind = [key for key, value in target.items() if value is not None]
    source = job.source
    return {
        "model": source.name,
        "revision": source.revision,
        "versions": versions(),
        "kind": kind,
        "recipe": recipe,
    }


def _read(path: Path, job: Job, found: Choices, device: str) -> PriceList:
    try:
        entries = read_json(path)
        matrices = tuple(Priced.from_json(one) for one in entries["matrices"])
        windows = torch.tensor(entries["windows"], dtype=torch.int64)
        dense = functools.cache(functools.partial(_dense, job.source, windows, device))
        return PriceList(job, found, matrices, dense, float(entries["seconds"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiskError(f"{path} cannot be read ({error}); remove it") from error


def _dense(source: DenseModel, windows: torch.Tensor, device: str) -> DensePredictions:
    """What the dense model predicts on the probing tokens, anew."""
    model = source.load(device)
    here = windows.to(model.device)
    return DensePredictions(here, in_parts(model, here))
