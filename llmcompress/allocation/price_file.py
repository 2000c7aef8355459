"""Price lists on disk: an interrupted run, or a sweep that gets more budgets, does not measure them again.

Independent jobs, such as those of a Slurm array, can measure parts of a list, each into a file; a run joins them:

    OUT.prices-1-of-8.json ... OUT.prices-8-of-8.json -> OUT.prices.json
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from llmcompress.allocation.allocate import (
    Allocation,
    PriceList,
    make_probe,
    measure_prices,
    priced_tokens,
    reachable_choices,
    target_of,
)
from llmcompress.allocation.choices import Choices, goes_low
from llmcompress.allocation.prices import MatrixPrices, Measurements, measure_matrices, prices_of
from llmcompress.allocation.sensitivity import probe_windows
from llmcompress.calibration.walk import Progress
from llmcompress.compression.job import Job
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import DiskError, InputError, RecipeError, first_line, list_names
from llmcompress.models.files.store import Store
from llmcompress.runtime.facts import versions
from llmcompress.runtime.ranks import ALONE, Ranks

KIND = "kind of budget"  # in the identity
TOKENS, OPTIONS = "calibration tokens", "options"  # in the entry: their hashes


@dataclass(frozen=True, order=True)
class Part:
    """The part `number`, from 1 on, of `count`."""

    number: int
    count: int

    @staticmethod
    def of(text: str) -> Part:
        """Return the part that a user writes as `3/8`. Raises RecipeError for anything else."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        part = Part(*map(int, match.groups())) if match else Part(0, 0)
        if not 1 <= part.number <= part.count:
            raise RecipeError(f"{text!r} is no part of the prices; write the third of eight as 3/8")
        return part

    def file(self, prices: Path) -> Path:
        """Return the file of this part of the price list `prices`."""
        return prices.with_name(f"{prices.stem}-{self.number}-of-{self.count}.json")


def allocate_by(
    path: Path, job: Job, *, device: str = "cpu", progress: Progress | None = None, ranks: Ranks = ALONE
) -> Allocation:
    """Run `allocate` with the price list in the file `path`. Also raises DiskError if that list is another job's."""
    with ranks.agree_on_errors():
        target = target_of(job)
        choices = reachable_choices(job, (target,))
    ranks.first(partial(check_prices, path, job))
    prices = price_list(path, job, choices, device, progress, ranks)
    with ranks.agree_on_errors():
        return prices.reaching(target)


def price_list(
    path: Path, job: Job, choices: Choices, device: str, progress: Progress | None, ranks: Ranks = ALONE
) -> PriceList:
    """Read the price list in the file `path`; if there is none, measure and write it.

    Of several processes, the first one reads and writes, and each measures a share. Raises DiskError for a list of
    another recipe, model or version, or one that cannot be written.
    """
    tokens = ranks.first(partial(priced_tokens, job))
    entry = ranks.first(lambda: _read_entry(path, job, choices, tokens) or _join_parts(path, job, choices, tokens))
    if entry is not None:
        ranks.first(partial(_remove_parts, path))  # here, since an earlier run may have ended before it
        with ranks.agree_on_errors():
            return _parse_entry(_store(path, job), entry, job, choices)
    ranks.compare(identity_of(job) | _origin(choices, tokens))
    prices = measure_prices(job, choices, tokens, device=device, progress=progress, ranks=ranks)
    ranks.first(lambda: _write_entry(path, prices, tokens))
    return prices


def measure_part(path: Path, part: Part, job: Job, *, device: str = "cpu", progress: Progress | None = None) -> Path:
    """Measure a part of the price list in the file `path`, and return the part's file.

    Raises RecipeError without a target, or for more parts than there are blocks and tables; also raises what
    `measure_prices` raises, and DiskError if nothing can be written.
    """
    choices = reachable_choices(job, (target_of(job),))
    most = len(job.arch.blocks) + sum(matrix.is_table for matrix in choices.matrices)
    if part.count > most:
        raise RecipeError(f"{part.count} parts are more than the {most} blocks and tables to price; take fewer")
    tokens, started = priced_tokens(job), time.monotonic()
    share = Ranks(device, part.number - 1, part.count)
    probe = make_probe(job, choices, tokens, device, share)
    measurements = measure_matrices(job, choices, tokens, probe, device, progress, share)
    entry = {"seconds": time.monotonic() - started, **_origin(choices, tokens), **measurements.to_json()}
    file = part.file(path)
    _store(file, job).put(file.stem, entry)
    return file


def _join_parts(path: Path, job: Job, choices: Choices, tokens: CalibrationTokens) -> dict[str, Any] | None:
    """Make the price list of its parts; None if there are none.

    Raises InputError if some are missing, DiskError for those of other jobs and for damaged ones.
    """
    store = _store(path, job)
    entries = _read_parts(path, job)
    if not entries:
        return None
    for entry in entries:
        _check_origin(store, entry, choices, tokens)
    try:
        prices = prices_of(choices, map(Measurements.from_json, entries))
    except (ValueError, KeyError, TypeError) as error:
        raise store.damage(error) from error
    seconds = sum(float(entry["seconds"]) for entry in entries)
    return _write_entry(path, PriceList(job, choices, prices, probe_windows(tokens), seconds), tokens)


def _read_parts(prices: Path, job: Job) -> list[dict[str, Any]]:
    """Return the entries of all parts of the price list `prices`, in order; none if no part is there."""
    parts = _parts(prices)
    counts = sorted({part.count for part in parts})
    if len(counts) > 1:
        raise DiskError(
            f"{prices.parent} has prices of {prices.stem} in {list_names(map(str, counts))} parts; remove all but one "
            f"kind"
        )
    count = counts[0] if counts else 0
    if missing := [str(number) for number in range(1, count + 1) if Part(number, count) not in parts]:
        raise InputError(
            f"of {count} parts of the prices beside {prices}, {list_names(missing)} are missing; run their jobs "
            f"(--price-part {missing[0]}/{count}), or remove the others to measure all of them here"
        )
    entries = []
    for file in (part.file(prices) for part in parts):
        if (record := _store(file, job).get(file.stem)) is None:
            raise DiskError(f"{file} has vanished; start again")
        entries.append(record.entry)
    return entries


def _parts(prices: Path) -> list[Part]:
    """Return the parts of the price list `prices` that are on the disk, in order."""
    form = re.compile(re.escape(prices.stem) + r"-([0-9]{1,6})-of-([0-9]{1,6})\.json")
    names = [path.name for path in prices.parent.iterdir()] if prices.parent.is_dir() else []
    return sorted(Part(int(match[1]), int(match[2])) for name in names if (match := form.fullmatch(name)))


def _remove_parts(prices: Path) -> None:
    for part in _parts(prices):
        part.file(prices).unlink(missing_ok=True)


def _write_entry(path: Path, prices: PriceList, tokens: CalibrationTokens) -> dict[str, Any]:
    """Write a price list, and return it as its file holds it."""
    matrices = [matrix.to_json() for matrix in prices.prices]
    entry = {"seconds": prices.seconds, "windows": prices.windows.tolist(), "matrices": matrices}
    _store(path, prices.job).put(path.stem, entry | _origin(prices.choices, tokens))
    return entry


def _read_entry(path: Path, job: Job, choices: Choices, tokens: CalibrationTokens) -> dict[str, Any] | None:
    """Return the price list in the file `path`, None if there is none. Raises what `_check_origin` raises."""
    store = _store(path, job)
    if (record := store.get(path.stem)) is None:
        return None
    _check_origin(store, record.entry, choices, tokens)
    return record.entry


def _origin(choices: Choices, tokens: CalibrationTokens) -> dict[str, str]:
    """Return hashes of the text and of the options that prices are of: earlier versions had others by default."""
    options = repr([(matrix.name, matrix.options) for matrix in choices.matrices])
    return {TOKENS: tokens.hash, OPTIONS: sha256(options.encode()).hexdigest()}


def _check_origin(store: Store, entry: Mapping[str, Any], choices: Choices, tokens: CalibrationTokens) -> None:
    """Raise DiskError for prices of another text, or of other options."""
    if changed := [key for key, value in _origin(choices, tokens).items() if entry.get(key) != value]:
        raise store.refusal(changed)


def _parse_entry(store: Store, entry: Mapping[str, Any], job: Job, choices: Choices) -> PriceList:
    try:
        matrices = tuple(MatrixPrices.from_json(matrix) for matrix in entry["matrices"])
        windows = torch.tensor(entry["windows"], dtype=torch.int64)
        return PriceList(job, choices, matrices, windows, float(entry["seconds"]))
    except (ValueError, KeyError, TypeError) as error:
        raise store.damage(error) from error


def check_prices(path: Path, job: Job) -> None:
    """Raise DiskError if `path` holds another job's prices. Their text is compared when they are read."""
    _store(path, job).get(path.stem)


def discard_prices(path: Path) -> None:
    """Remove the price list in the file `path`, if there is one, and its parts.

    Raises DiskError for a file that is no price list.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {KIND: []}
    except (OSError, ValueError) as error:
        raise DiskError(f"{path} is no price list ({first_line(error)}); move it, or choose another output") from error
    if not isinstance(entries, dict) or KIND not in entries:
        raise DiskError(f"{path} is no price list of llmcompress; move it, or choose another output")
    path.unlink(missing_ok=True)
    _remove_parts(path)


def _store(path: Path, job: Job) -> Store:
    """Return the store whose only record is `path`, a JSON file."""
    return Store(path.parent, identity_of(job), place=path, error=DiskError)


def identity_of(job: Job) -> dict[str, Any]:
    """Return everything that prices depend on, but for the text.

    Of the target, only its kind and engine count: with a target in bytes, tables have prices too; with a low one, there
    are more options; with one in zeros, options around it.
    """
    recipe = job.recipe.model_dump(mode="json", exclude={"gates", "distill"})
    target = recipe.pop("target")
    kind = [value if key == "engine" else key for key, value in target.items() if value is not None]
    kind += ["low"] if goes_low(job) else []
    kind += [repr(target["sparsity"])] if target["sparsity"] is not None and recipe["options"] is None else []
    return {**job.source.content(), "recipe": recipe, KIND: kind, "versions": versions()}
