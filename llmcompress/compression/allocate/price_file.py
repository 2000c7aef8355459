"""Price lists on disk: an interrupted run, or a sweep that gets more budgets, does not measure them again."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmcompress.calibrate.walk import Progress
from llmcompress.compression.allocate.choices import Choices
from llmcompress.compression.allocate.plan import Allocation, PriceList, price, priced_tokens, reachable, target_of
from llmcompress.compression.allocate.prices import Priced
from llmcompress.compression.allocate.sensitivity import DensePredictions, in_parts
from llmcompress.compression.plan import Job
from llmcompress.errors import DiskError, first_line
from llmcompress.evaluate.logits import OnDisk
from llmcompress.models.dense import DenseModel
from llmcompress.models.store import Store
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.runtime.versions import versions

KIND = "kind of budget"  # in the identity
TOKENS = "calibration tokens"  # in the entry: their hash


def allocate_by(
    path: Path, job: Job, *, device: str = "cpu", progress: Progress | None = None, ranks: Ranks = ALONE
) -> Allocation:
    """Run `allocate` with the price list in the file `path`. Also raises DiskError if that list is another job's."""
    with ranks.agreed():
        target = target_of(job)
        found = reachable(job, (target,))
    ranks.first(partial(check_prices, path, job))
    prices = price_list(path, job, found, device, progress, ranks)
    with ranks.agreed():
        return prices.reaching(target)


def price_list(
    path: Path, job: Job, found: Choices, device: str, progress: Progress | None, ranks: Ranks = ALONE
) -> PriceList:
    """Read the price list in the file `path`; where there is none, measure it and keep it there. Of several processes,
    the first one reads and writes it, and each measures a share.

    Raises DiskError for a list of another recipe, model or version, or one that cannot be written.
    """
    tokens = ranks.first(partial(priced_tokens, job))
    entry = ranks.first(lambda: _kept(_store(path, job), path.stem, tokens.hash))
    if entry is not None:
        with ranks.agreed():
            return _read(_store(path, job), entry, job, found, device)
    ranks.compare(identity_of(job) | {TOKENS: tokens.hash})
    made = price(job, found, tokens, device=device, progress=progress, ranks=ranks)
    matrices = [one.to_json() for one in made.prices]

    def keep() -> None:
        entry = {"seconds": made.seconds, "windows": made.dense().windows.tolist(), "matrices": matrices}
        _store(path, job).put(path.stem, entry | {TOKENS: tokens.hash})

    ranks.first(keep)
    return made


def _kept(store: Store, name: str, tokens: str) -> dict[str, Any] | None:
    """Return the price list in a store, None where there is none. Raises DiskError for that of another text."""
    kept = store.get(name)
    if kept is not None and kept.entry.get(TOKENS) != tokens:
        raise store.refusal([TOKENS])
    return None if kept is None else kept.entry


def check_prices(path: Path, job: Job) -> None:
    """Raise DiskError if `path` holds prices that are not this job's. Its text is compared when they are read."""
    _store(path, job).get(path.stem)


def discard_prices(path: Path) -> None:
    """Remove the price list in the file `path`, if there is one. Raises DiskError for a file that is none."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {KIND: []}
    except (OSError, ValueError) as error:
        raise DiskError(f"{path} is no price list ({first_line(error)}); move it, or choose another output") from error
    if not isinstance(entries, dict) or KIND not in entries:
        raise DiskError(f"{path} is no price list of llmcompress; move it, or choose another output")
    path.unlink(missing_ok=True)


def _store(path: Path, job: Job) -> Store:
    """Return the store whose only record is `path`, a JSON file."""
    return Store(path.parent, identity_of(job), place=path, error=DiskError)


def identity_of(job: Job) -> dict[str, Any]:
    """Return all that prices depend on, but for the text.

    Only the kind of the target counts: with a target in bytes, tables have prices too.
    """
    recipe = job.recipe.model_dump(mode="json", exclude={"gates", "distill"})
    kind = [key for key, value in recipe.pop("target").items() if value is not None]
    return {**job.source.content(), "recipe": recipe, KIND: kind, "versions": versions()}


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
    return DensePredictions(windows, in_parts(OnDisk(source, device), windows))
