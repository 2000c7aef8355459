"""Prices measured by independent jobs, as of a Slurm array or a shell loop: each writes a file, a run joins them.

    OUT.prices-1-of-8.json ... OUT.prices-8-of-8.json -> OUT.prices.json

Jobs need not run at the same time, nor know of each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import DiskError, InputError, RecipeError, list_names
from llmcompress.models.files.store import Store


@dataclass(frozen=True, order=True)
class Part:
    """The part `number`, from 1 on, of `count`."""

    number: int
    count: int

    @staticmethod
    def of(text: str) -> Part:
        """Return the part that a user writes as `3/8`. Raises RecipeError for anything else."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        part = Part(*map(int, found.groups())) if found else Part(0, 0)
        if not 1 <= part.number <= part.count:
            raise RecipeError(f"{text!r} is no part of the prices; write the third of eight as 3/8")
        return part

    def file(self, prices: Path) -> Path:
        """Return the file of this part of the price list `prices`."""
        return prices.with_name(f"{prices.stem}-{self.number}-of-{self.count}.json")


def part_store(prices: Path, part: Part, identity: Mapping[str, Any]) -> Store:
    """Return the store whose only record is a part of the price list `prices`."""
    return Store(prices.parent, identity, place=part.file(prices), error=DiskError)


def parts_of(prices: Path) -> list[Part]:
    """Return the parts of the price list `prices` that are there, in order."""
    form = re.compile(re.escape(prices.stem) + r"-([0-9]{1,6})-of-([0-9]{1,6})\.json")
    names = [path.name for path in prices.parent.iterdir()] if prices.parent.is_dir() else []
    return sorted(Part(int(found[1]), int(found[2])) for name in names if (found := form.fullmatch(name)))


def read_parts(prices: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of all parts of the price list `prices`; none where no part is there.

    Raises InputError where some are missing, DiskError for those of other jobs, and for damaged ones.
    """
    there = parts_of(prices)
    counts = sorted({part.count for part in there})
    if len(counts) > 1:
        raise DiskError(
            f"{prices.parent} has prices of {prices.stem} in {list_names(map(str, counts))} parts; remove all but one "
            f"kind"
        )
    count = counts[0] if counts else 0
    if missing := [str(number) for number in range(1, count + 1) if Part(number, count) not in there]:
        raise InputError(
            f"of {count} parts of the prices beside {prices}, {list_names(missing)} are missing; run their jobs "
            f"(--price-part {missing[0]}/{count}), or remove the others to measure all of them here"
        )
    return [_entry(prices, part, identity) for part in there]


def _entry(prices: Path, part: Part, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a part holds. Raises DiskError where it was removed just now, beside other faults."""
    record = part_store(prices, part, identity).get(part.file(prices).stem)
    if record is None:
        raise DiskError(f"{part.file(prices)} has vanished; start again")
    return record.entry


def discard_parts(prices: Path) -> None:
    """Remove the parts of the price list `prices`."""
    for part in parts_of(prices):
        part.file(prices).unlink(missing_ok=True)
