"""Price lists on disk: an interrupted run, or a sweep that gets more budgets, does not measure them again."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmcompress.allocation.allocate import (
    Allocation,
    PriceList,
    price,
    priced_tokens,
    probe_of,
    reachable,
    target_of,
)
from llmcompress.allocation.choices import Choices, goes_low
from llmcompress.allocation.price_shards import Part, discard_parts, part_store, read_parts
from llmcompress.allocation.prices import Measurements, Priced, listed, measured
from llmcompress.allocation.sensitivity import DensePredictions, in_parts, probe_windows
from llmcompress.calibration.walk import Progress
from llmcompress.compression.job import Job
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import DiskError, RecipeError, first_line
from llmcompress.evaluation.logits import OnDisk
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.files.store import Store
from llmcompress.runtime.facts import versions
from llmcompress.runtime.ranks import ALONE, Ranks

KIND = "kind of budget"  # in the identity
TOKENS = "calibration tokens"  # in the entry: their hash


def allocate_by(
    path: Path, job: Job, *, device: str = "cpu", progress: Progress | None = None, ranks: Ranks = ALONE
) -> Allocation:
    """Run `allocate` with the price list in the file `path`. Also raises DiskError if that list is another job's."""
    with ranks.agree_on_errors():
        target = target_of(job)
        found = reachable(job, (target,))
    ranks.first(partial(check_prices, path, job))
    prices = price_list(path, job, found, device, progress, ranks)
    with ranks.agree_on_errors():
        return prices.reaching(target)


def price_list(
    path: Path, job: Job, found: Choices, device: str, progress: Progress | None, ranks: Ranks = ALONE
) -> PriceList:
    """Read the price list in the file `path`; where there is none, measure it and keep it there. Of several processes,
    the first one reads and writes it, and each measures a share.

    Raises DiskError for a list of another recipe, model or version, or one that cannot be written.
    """
    tokens = ranks.first(partial(priced_tokens, job))
    entry = ranks.first(lambda: _kept(path, job, tokens.hash) or _put_together(path, job, found, tokens))
    if entry is not None:
        with ranks.agree_on_errors():
            return _read(_store(path, job), entry, job, found, device)
    ranks.compare(identity_of(job) | {TOKENS: tokens.hash})
    made = price(job, found, tokens, device=device, progress=progress, ranks=ranks)
    ranks.first(lambda: _keep(path, job, made.prices, made.dense().windows, made.seconds, tokens.hash))
    return made


def measure_part(path: Path, part: Part, job: Job, *, device: str = "cpu", progress: Progress | None = None) -> Path:
    """Measure a part of the price list in the file `path`, and return its own file: see `price_shards`.

    Raises RecipeError where there is no target, or a part more than there are blocks and tables; also raises what
    `price` raises, and DiskError where nothing can be written.
    """
    found = reachable(job, (target_of(job),))
    if part.count > (most := len(job.arch.blocks) + sum(one.is_table for one in found.matrices)):
        raise RecipeError(f"{part.count} parts are more than the {most} blocks and tables to price; take fewer")
    tokens, started = priced_tokens(job), time.monotonic()
    share = Ranks(device, part.number - 1, part.count)
    made = measured(job, found, tokens, probe_of(job, found, tokens, device, share), device, progress, share)
    entry = {"seconds": time.monotonic() - started, TOKENS: tokens.hash, **made.to_json()}
    part_store(path, part, identity_of(job)).put(part.file(path).stem, entry)
    return part.file(path)


def _put_together(path: Path, job: Job, found: Choices, tokens: CalibrationTokens) -> dict[str, Any] | None:
    """Make the price list of its parts, and remove them; None where there are none. Raises InputError where some are
    missing."""
    entries = read_parts(path, identity_of(job))
    if not entries:
        return None
    if any(entry.get(TOKENS) != tokens.hash for entry in entries):
        raise _store(path, job).refusal([TOKENS])
    try:
        prices = listed(found, map(Measurements.from_json, entries))
    except (ValueError, KeyError, TypeError) as error:
        raise _store(path, job).damage(error) from error
    windows = probe_windows(tokens.sequences[tokens.obtained - tokens.held_out :])
    entry = _keep(path, job, prices, windows, sum(float(entry["seconds"]) for entry in entries), tokens.hash)
    discard_parts(path)
    return entry


def _keep(
    path: Path, job: Job, prices: Sequence[Priced], windows: torch.Tensor, seconds: float, tokens: str
) -> dict[str, Any]:
    """Write a price list, and return what the file holds."""
    entry = {"seconds": seconds, "windows": windows.tolist(), "matrices": [one.to_json() for one in prices]}
    _store(path, job).put(path.stem, entry | {TOKENS: tokens})
    return entry


def _kept(path: Path, job: Job, tokens: str) -> dict[str, Any] | None:
    """Return the price list in the file `path`, None where there is none. Raises DiskError for that of another text."""
    store = _store(path, job)
    kept = store.get(path.stem)
    if kept is not None and kept.entry.get(TOKENS) != tokens:
        raise store.refusal([TOKENS])
    return None if kept is None else kept.entry


def check_prices(path: Path, job: Job) -> None:
    """Raise DiskError if `path` holds prices that are not this job's. Its text is compared when they are read."""
    _store(path, job).get(path.stem)


def discard_prices(path: Path) -> None:
    """Remove the price list in the file `path`, if there is one, and its parts. Raises DiskError for a file that is
    none."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {KIND: []}
    except (OSError, ValueError) as error:
        raise DiskError(f"{path} is no price list ({first_line(error)}); move it, or choose another output") from error
    if not isinstance(entries, dict) or KIND not in entries:
        raise DiskError(f"{path} is no price list of llmcompress; move it, or choose another output")
    path.unlink(missing_ok=True)
    discard_parts(path)


def _store(path: Path, job: Job) -> Store:
    """Return the store whose only record is `path`, a JSON file."""
    return Store(path.parent, identity_of(job), place=path, error=DiskError)


def identity_of(job: Job) -> dict[str, Any]:
    """Return all that prices depend on, but for the text.

    Only the kind of the target counts, and its engine: with a target in bytes, tables have prices too; with a low one,
    more options; with one in zeros, options around it.
    """
    recipe = job.recipe.model_dump(mode="json", exclude={"gates", "distill"})
    target = recipe.pop("target")
    kind = [value if key == "engine" else key for key, value in target.items() if value is not None]
    kind += ["low"] if goes_low(job) else []
    kind += [repr(target["sparsity"])] if target["sparsity"] is not None and recipe["options"] is None else []
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
