"""Price lists on disk: an interrupted run, or a sweep that gets more budgets, does not measure them again."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmcompress.calibrate.walk import Progress
from llmcompress.compression.allocate.choices import Choices
from llmcompress.compression.allocate.plan import Allocation, PriceList, price, reachable, target_of
from llmcompress.compression.allocate.prices import Priced
from llmcompress.compression.allocate.sensitivity import DensePredictions, in_parts
from llmcompress.compression.journal import is_older
from llmcompress.compression.plan import Job
from llmcompress.errors import DiskError
from llmcompress.models.dense import DenseModel
from llmcompress.models.store import Store
from llmcompress.runtime.versions import versions


def allocate_by(path: Path, job: Job, *, device: str = "cpu", progress: Progress | None = None) -> Allocation:
    """Run `allocate` with the price list in the file `path`. Also raises DiskError if that list is another job's."""
    target = target_of(job)
    found = reachable(job, (target,))
    check_prices(path, job)
    return price_list(path, job, found, device, progress).reaching(target)


def price_list(path: Path, job: Job, found: Choices, device: str, progress: Progress | None) -> PriceList:
    """Read the price list in the file `path`; where there is none, measure it and keep it there.

    Raises DiskError for a list of another recipe, model or version, or one that cannot be written.
    """
    store = _store(path, job)
    kept = store.get(path.stem)
    if kept is not None:
        return _read(store, kept.entry, job, found, device)
    made = price(job, found, device=device, progress=progress)
    matrices = [one.to_json() for one in made.prices]
    entry = {"seconds": made.seconds, "windows": made.dense().windows.tolist(), "matrices": matrices}
    store.put(path.stem, entry)
    return made


def check_prices(path: Path, job: Job) -> None:
    """Raise DiskError if `path` holds prices that are not this job's, or are older than its model or text."""
    store = _store(path, job)
    if store.get(path.stem) is not None and is_older(path.stat().st_mtime, job.source, job.recipe.calibration):
        raise store.refusal(["files of the model or the text"])


def _store(path: Path, job: Job) -> Store:
    """Return the store whose only record is `path`, a JSON file.

    Only the kind of the target counts: with a target in bytes, tables have prices too.
    """
    recipe, source = job.recipe.model_dump(mode="json"), job.source
    kind = [key for key, value in recipe.pop("target").items() if value is not None]
    identity: dict[str, Any] = {"model": source.name, "revision": source.revision, "recipe": recipe}
    identity |= {"kind of budget": kind, "versions": versions()}
    return Store(path.parent, identity, place=path, error=DiskError)


def _read(store: Store, entry: Mapping[str, Any], job: Job, found: Choices, device: str) -> PriceList:
    try:
        matrices = tuple(Priced.from_json(one) for one in entry["matrices"])
        windows = torch.tensor(entry["windows"], dtype=torch.int64)
        dense = functools.cache(functools.partial(_dense, job.source, windows, device))
        return PriceList(job, found, matrices, dense, float(entry["seconds"]))
    except (ValueError, KeyError, TypeError) as error:
        raise store.damage(error) from error


def _dense(source: DenseModel, windows: torch.Tensor, device: str) -> DensePredictions:
    """Compute the dense model's predictions on the probing tokens again."""
    model = source.load(device)
    here = windows.to(model.device)
    return DensePredictions(here, in_parts(model, here))
