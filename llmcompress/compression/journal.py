"""The finished blocks of a run, kept so that the same command resumes after them when it was interrupted.

    OUT.partial/checkpoint/part-00000.safetensors   a block that nothing changes any more
    OUT.partial/finished/block-00000.json           the report of each finished block
    OUT.partial/finished/open-00007.safetensors     the last block, where it learns again together with the next
    OUT.partial/finished/importance.safetensors     what tokens and rows count, where a backward pass was asked

A block is finished when its report is on the disk, which is after its tensors. The blocks before the next one are run
again as they are stored, so the result is bit for bit that of an uninterrupted run. The reports stay until the complete
checkpoint has its final name on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from llmcompress.errors import DiskError, InputError
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.files.checkpoint import CHECKPOINT
from llmcompress.models.files.output import claim_folder, clear_folder, merge_mark, remove_folder
from llmcompress.models.files.store import Store
from llmcompress.models.files.tensor_files import part_file, read_tensors
from llmcompress.recipe.compression import Recipe
from llmcompress.reporting.report import LayerReport
from llmcompress.runtime.facts import versions
from llmcompress.weight.modules import Layout, payload_texts

FINISHED = "finished"  # the folder of the reports
PARTS = "parts"  # the entry of a report: number -> digest of the header of each part that was written last


def run_identity(source: DenseModel, recipe: Recipe, tokens: str | None, device: str) -> dict[str, Any]:
    """Return all that finished blocks depend on; `tokens`: their hash.

    Of equal identities they are equal, on one machine. The model counts by its content, not by its place. Gates judge
    what is there, and a distillation comes after it, so they do not count.
    """
    return {
        **source.content(),
        "recipe": recipe.model_dump(mode="json", exclude={"gates", "distill"}),
        "calibration tokens": tokens,
        "device": device,
        "versions": versions(),
    }


def run_name(identity: Mapping[str, Any]) -> str:
    """Return a digest of an identity, by which a report says of which run it is."""
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@dataclass(eq=False)
class Entry:
    """The report of a finished block. `rows`: of its layers; `layouts`: of what was stored since the entry before;
    `learned`, by path, and `fused`: as in the report; `unweighed`: paths of blocks whose tokens count alike against the
    recipe; `seconds`: of the whole run up to here."""

    rows: list[LayerReport] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    learned: dict[str, dict[str, Any]] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    unweighed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields."""
        plain = {"rows": [asdict(row) for row in self.rows], "learned": self.learned}
        plain |= {"fused": self.fused, "unweighed": self.unweighed}
        layouts = {name: layout.to_json() for name, layout in self.layouts.items()}
        return plain | {"layouts": layouts, "seconds": self.seconds}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Entry:
        """Return the inverse of `to_json`. Raises KeyError, TypeError or ValueError for entries of another form."""
        layouts = {name: Layout.from_json(one) for name, one in entry["layouts"].items()}
        rows = [LayerReport.from_json(row) for row in entry["rows"]]
        notes = entry["fused"], entry["unweighed"]
        return Entry(rows, layouts, entry["learned"], *notes, float(entry["seconds"]))


@dataclass(eq=False)
class Journal:
    """The finished blocks of a run, as a context. `found`: those of an earlier one; `count`: of these and those since.

    When the context ends badly and the folder is to `last`, it stays if a block is finished, and the error says so in
    a note. In all other cases it is gone.
    """

    store: Store
    folder: Path
    found: tuple[Entry, ...]
    last: bool
    parts: dict[str, str] = field(default_factory=dict)  # number of a part that was `found` -> digest of its header
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.found)

    @property
    def seconds(self) -> float:
        """The time that the blocks that were `found` took."""
        return self.found[-1].seconds if self.found else 0.0

    def closed(self) -> range:
        """Return the numbers of blocks that were `found` and will not change any more."""
        count = len(self.found)
        return range(count - 1 if count and self.store.path(_open(count - 1)) else count)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Return what is stored of a block that was `found`. Raises DiskError where that is damaged."""
        waiting = None if number in self.closed() else self.store.get(_open(number))
        if waiting is not None:
            return waiting.tensors
        layouts = {name: layout for entry in self.found for name, layout in entry.layouts.items()}
        path = part_file(self.folder / CHECKPOINT, number)
        try:
            if _part_digest(path) != self.parts.get(str(number)):
                raise InputError(f"{path} is not as it was written")
            return read_tensors(path, payload_texts(layouts))[0]
        except (InputError, OSError, ValueError) as error:
            raise self.store.damage(error) from error

    def kept(self, name: str, find: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors that blocks depend on: those of an earlier run, or what `find` gives, which is kept."""
        record = self.store.get(name)
        if record is not None:
            return record.tensors
        found = find()
        self.store.put(name, {}, found)
        return found

    def add(self, entry: Entry, pending: Mapping[str, Tensor]) -> None:
        """Note that the next block is finished; `pending`: its tensors, where they may still change. Raises DiskError
        when the disk is full."""
        if pending:
            self.store.put(_open(self.count), {}, pending)
        files = {str(number): part_file(self.folder / CHECKPOINT, number) for number in (self.count - 1, self.count)}
        parts = {number: _part_digest(path) for number, path in files.items() if path.is_file()}
        self.store.put(_block(self.count), entry.to_json() | {PARTS: parts})
        self.store.remove(_open(self.count - 1))
        self.count += 1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.last and self.count and self.store.path(_block(0)):
            blocks = "one finished block is" if self.count == 1 else f"{self.count} finished blocks are"
            error.add_note(f"{blocks} kept in {self.folder}, from where the same command resumes")
        else:
            remove_folder(self.folder)


def open_journal(folder: Path, identity: Mapping[str, Any], resume: bool = True, last: bool = True) -> Journal:
    """Open the journal in `folder`, which is emptied first unless it holds finished blocks of a run with this
    `identity` and `resume` is true; `last`: as of a `Journal`.

    Raises DiskError for finished blocks of another run, or damaged ones.
    """
    claim_folder(folder)
    advice = "ask to start over (--no-resume), or choose another output folder"
    store = Store(folder / FINISHED, identity, place=folder, advice=advice, error=DiskError)
    found, parts = _found(folder, store) if resume else ((), {})
    if not found:
        clear_folder(folder)
    return Journal(store, folder, found, last, parts)


def _found(folder: Path, store: Store) -> tuple[tuple[Entry, ...], dict[str, str]]:
    """Return the finished blocks, and the digests of their parts; none where tensors are missing."""
    entries: list[Entry] = []
    parts: dict[str, str] = {}
    while (record := store.get(_block(len(entries)))) is not None:
        try:
            parts |= record.entry[PARTS]
            entries.append(Entry.from_json(record.entry))
        except (ValueError, KeyError, TypeError) as error:
            raise store.damage(error) from error
    found = tuple(entries)
    if merge_mark(folder).is_file():  # then some parts may be gone
        return found, parts
    written = Journal(store, folder, found, last=True).closed()
    there = all(part_file(folder / CHECKPOINT, number).is_file() for number in written)
    return (found, parts) if there else ((), {})


def _part_digest(path: Path) -> str:
    """Return a digest of a part's header, which has the digests of its tensors."""
    with path.open("rb") as file:
        return sha256(file.read(int.from_bytes(file.read(8), "little"))).hexdigest()


def _block(number: int) -> str:
    return f"block-{number:05}"


def _open(number: int) -> str:
    return f"open-{number:05}"
