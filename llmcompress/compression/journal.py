"""The finished blocks of a run, kept so that the same command resumes after them when it was interrupted.

    OUT.partial/part-00000.safetensors            a block that nothing changes any more
    OUT.partial/finished/block-00000.json         the report of each finished block
    OUT.partial/finished/open-00007.safetensors   the last block, where it learns again together with the next

A block is finished when its report is on the disk, which is after its tensors. The blocks before the next one are run
again as they are stored, so the result is bit for bit that of an uninterrupted run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from llmcompress.errors import DiskError, InputError
from llmcompress.evaluate.report import LayerReport
from llmcompress.models.checkpoint import Writer, read_tensors
from llmcompress.models.dense import DenseModel
from llmcompress.models.store import Store
from llmcompress.recipe.calibration import Calibration, is_file
from llmcompress.recipe.compression import Recipe
from llmcompress.runtime.versions import versions
from llmcompress.weight.modules import Layout, payload_texts

FINISHED = "finished"  # the folder of the reports
BEGUN = "begun"  # the record of when the run began


def run_identity(source: DenseModel, recipe: Recipe, tokens: str | None, device: str) -> dict[str, Any]:
    """Return all that finished blocks depend on; `tokens`: their hash.

    Of equal identities they are equal, on one machine. Gates judge what is there, so they do not count.
    """
    return {
        "model": source.name,
        "revision": source.revision,
        "recipe": recipe.model_dump(mode="json", exclude={"gates"}),
        "calibration tokens": tokens,
        "device": device,
        "versions": versions(),
    }


@dataclass(eq=False)
class Entry:
    """The report of a finished block. `rows`: of its layers; `layouts`: of what was stored since the entry before;
    `learned`, by path, and `fused`: as in the report; `seconds`: of the whole run up to here."""

    rows: list[LayerReport] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    learned: dict[str, dict[str, Any]] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields."""
        plain = {"rows": [asdict(row) for row in self.rows], "learned": self.learned, "fused": self.fused}
        layouts = {name: layout.to_json() for name, layout in self.layouts.items()}
        return plain | {"layouts": layouts, "seconds": self.seconds}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Entry:
        """Return the inverse of `to_json`. Raises KeyError, TypeError or ValueError for entries of another form."""
        layouts = {name: Layout.from_json(one) for name, one in entry["layouts"].items()}
        rows = [LayerReport.from_json(row) for row in entry["rows"]]
        return Entry(rows, layouts, entry["learned"], entry["fused"], float(entry["seconds"]))


@dataclass(eq=False)
class Journal:
    """The finished blocks of a run, as a context. `found`: those of an earlier one; `count`: of these and those since.

    When the context ends badly and the folder is to `last`, it stays if a block is finished, and the error says so in
    a note.
    """

    store: Store
    folder: Path
    found: tuple[Entry, ...]
    last: bool
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
        try:
            return read_tensors(Writer(self.folder).part(number), payload_texts(layouts))[0]
        except InputError as error:
            raise self.store.damage(error) from error

    def add(self, entry: Entry, pending: Mapping[str, Tensor]) -> None:
        """Note that the next block is finished; `pending`: its tensors, where they may still change. Raises DiskError
        when the disk is full."""
        if pending:
            self.store.put(_open(self.count), {}, pending)
        self.store.put(_block(self.count), entry.to_json())
        self.store.remove(_open(self.count - 1))
        self.count += 1

    def close(self) -> None:
        """Remove everything from the folder that is not part of the checkpoint."""
        self.store.clear()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if self.last and self.count and self.store.path(_block(0)):
            blocks = "one finished block is" if self.count == 1 else f"{self.count} finished blocks are"
            error.add_note(f"{blocks} kept in {self.folder}, from where the same command resumes")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def open_journal(
    folder: Path, identity: Mapping[str, Any], source: DenseModel, resume: bool = True, last: bool = True
) -> Journal:
    """Open the journal in `folder`, which is emptied first unless it holds finished blocks of a run with this
    `identity` and `resume` is true; `last`: as of a `Journal`.

    Raises DiskError for finished blocks of another run, of an earlier state of the model, or damaged ones.
    """
    advice = "ask to start over (--no-resume), or choose another output folder"
    store = Store(folder / FINISHED, identity, place=folder, advice=advice, error=DiskError)
    journal = Journal(store, folder, _found(folder, store, source) if resume else (), last)
    if not journal.count:
        shutil.rmtree(folder)
        folder.mkdir()
        store.put(BEGUN, {"time": time.time()})
    return journal


def is_older(then: float, source: DenseModel, text: Calibration | None = None) -> bool:
    """True if a model on this disk, or a file of text, has changed since the time `then`."""
    files = {header.file for header in source.tensors.values() if source.revision is None}  # a commit does not change
    if text is not None and is_file(text.dataset):
        files.add(Path(text.dataset).expanduser())
    return any(path.stat().st_mtime > then for path in files if path.is_file())


def _found(folder: Path, store: Store, source: DenseModel) -> tuple[Entry, ...]:
    """Return the finished blocks; none where tensors are missing, as when the end came while files were renamed."""
    entries: list[Entry] = []
    while (record := store.get(_block(len(entries)))) is not None:
        try:
            entries.append(Entry.from_json(record.entry))
        except (ValueError, KeyError, TypeError) as error:
            raise store.damage(error) from error
    begun = store.get(BEGUN)
    if entries and (begun is None or is_older(float(begun.entry["time"]), source)):
        raise store.refusal(["model files"])
    written = Journal(store, folder, tuple(entries), last=True).closed()
    return tuple(entries) if all(Writer(folder).part(number).is_file() for number in written) else ()


def _block(number: int) -> str:
    return f"block-{number:05}"


def _open(number: int) -> str:
    return f"open-{number:05}"
