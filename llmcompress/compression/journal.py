"""What a run keeps of the blocks it has finished, so that the same command goes on behind them when it was cut.

    OUT.partial/journal.jsonl            what the run is of, then a line for each finished block
    OUT.partial/part-00000.safetensors   a block that nothing changes any more
    OUT.partial/open-00007.safetensors   the last one, where it is to learn again together with the next

A block is finished when its line is on the disk, which is after its tensors. The blocks before the one that comes next
are run again as they are stored, so the result is the one that an uncut run gives, bit for bit.
"""

from __future__ import annotations

import json
import os
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
from llmcompress.models.checkpoint import Writer, read_tensors, sync, write_tensors
from llmcompress.models.dense import DenseModel
from llmcompress.recipe.calibration import Calibration, is_file
from llmcompress.recipe.compression import Recipe
from llmcompress.runtime.versions import versions
from llmcompress.weight.modules import Layout, payload_texts

FILE = "journal.jsonl"


@dataclass(frozen=True)
class RunOrigin:
    """What finished blocks depend on: of equal origins they are equal, on one machine. Gates judge what is there."""

    model: str
    revision: str | None
    recipe: dict[str, Any]
    tokens: str | None  # their hash
    device: str
    versions: dict[str, str]

    @staticmethod
    def of(source: DenseModel, recipe: Recipe, tokens: str | None, device: str) -> RunOrigin:
        """That of a run which begins."""
        asked = recipe.model_dump(mode="json", exclude={"gates"})
        return RunOrigin(source.name, source.revision, asked, tokens, device, versions())

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What is not the same there, in words."""
        here = json.loads(json.dumps(asdict(self)))
        names = {"tokens": "calibration tokens"}
        return [f"other {names.get(name, name)}" for name in here if other.get(name) != here[name]]


@dataclass(eq=False)
class Entry:
    """What there is to say of a block. `rows`: of the report; `layouts`: of what was stored since the entry before;
    `learned`, by path, and `fused`: as in the report; `seconds`: that all of it took until here."""

    rows: list[LayerReport] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    learned: dict[str, dict[str, Any]] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values, keys as in the fields."""
        plain = {"rows": [asdict(row) for row in self.rows], "learned": self.learned, "fused": self.fused}
        layouts = {name: layout.to_json() for name, layout in self.layouts.items()}
        return plain | {"layouts": layouts, "seconds": self.seconds}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Entry:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for entries of another form."""
        layouts = {name: Layout.from_json(one) for name, one in entry["layouts"].items()}
        rows = [LayerReport.from_json(row) for row in entry["rows"]]
        return Entry(rows, layouts, entry["learned"], entry["fused"], float(entry["seconds"]))


@dataclass(eq=False)
class Journal:
    """The finished blocks of a run, as a context. `found`: those of an earlier one; `count`: of these and those since.

    When the context ends badly and the folder is to `last`, it stays if a block is finished, and the error says so in
    a note.
    """

    folder: Path
    found: tuple[Entry, ...]
    last: bool
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.found)

    @property
    def seconds(self) -> float:
        """What the blocks that were `found` took."""
        return self.found[-1].seconds if self.found else 0.0

    def closed(self) -> range:
        """The numbers of blocks that were `found` and are not to change any more."""
        count = len(self.found)
        return range(count - 1 if count and self._open(count - 1).is_file() else count)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """What is stored of a block that was `found`. Raises DiskError where that is damaged."""
        layouts = {name: layout for entry in self.found for name, layout in entry.layouts.items()}
        try:
            return read_tensors(self.stored(number), payload_texts(layouts))[0]
        except InputError as error:
            raise DiskError(f"{error}; remove {self.folder}, and all is done anew") from error

    def stored(self, number: int) -> Path:
        """The file with a block that was `found`."""
        return Writer(self.folder).part(number) if number in self.closed() else self._open(number)

    def add(self, entry: Entry, waiting: Mapping[str, Tensor]) -> None:
        """Notes that the next block is finished; `waiting`: its tensors, where they may still change. Raises DiskError
        when the disk is full."""
        if waiting:
            write_tensors(self._open(self.count), waiting, payload_texts(entry.layouts))
        _append(self.folder / FILE, entry.to_json())
        self._open(self.count - 1).unlink(missing_ok=True)
        self.count += 1

    def close(self) -> None:
        """Leaves nothing in the folder that is not of the checkpoint."""
        (self.folder / FILE).unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if self.last and self.count and (self.folder / FILE).is_file():
            blocks = "one finished block is" if self.count == 1 else f"{self.count} finished blocks are"
            error.add_note(f"{blocks} kept in {self.folder}, from where the same command goes on")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, number: int) -> Path:
        return self.folder / f"open-{number:05}.safetensors"


def open_journal(
    folder: Path, origin: RunOrigin, source: DenseModel, resume: bool = True, last: bool = True
) -> Journal:
    """The journal in `folder`, which is emptied first unless it holds finished blocks of `origin` and `resume` is true;
    `last`: as of a `Journal`.

    Raises DiskError for finished blocks of another origin, of an earlier state of the model, or damaged ones.
    """
    journal = Journal(folder, _found(folder, origin, source) if resume else (), last)
    if not journal.count:
        shutil.rmtree(folder)
        folder.mkdir()
        _append(folder / FILE, asdict(origin) | {"begun": time.time()})
    return journal


def is_older(then: float, source: DenseModel, text: Calibration | None = None) -> bool:
    """Whether a model on this disk, or a file of text, has changed since the time `then`."""
    files = {header.file for header in source.tensors.values() if source.revision is None}  # a commit does not change
    if text is not None and is_file(text.dataset):
        files.add(Path(text.dataset).expanduser())
    return any(path.stat().st_mtime > then for path in files if path.is_file())


def _found(folder: Path, origin: RunOrigin, source: DenseModel) -> tuple[Entry, ...]:
    """The finished blocks there; none where tensors are missing, as when the end came while files were renamed."""
    path = folder / FILE
    if not path.is_file():
        return ()
    lines = path.read_bytes().split(b"\n")[:-1]  # what comes after the last line's end was cut
    try:
        first, *rest = [json.loads(line) for line in lines] or [{}]
        entries = [Entry.from_json(line) for line in rest]
        different = origin.differences(first)
        different += ["an earlier state of the model"] if is_older(float(first.get("begun", 0)), source) else []
    except (ValueError, KeyError, TypeError) as error:
        raise DiskError(f"{path} cannot be read ({type(error).__name__}: {error}); remove {folder}") from error
    journal = Journal(folder, tuple(entries), last=True)
    if not all(journal.stored(number).is_file() for number in range(len(entries))):
        return ()
    if entries and different:
        raise DiskError(
            f"{folder} keeps finished blocks of a run with {' and '.join(different)}; remove it, ask to begin anew "
            f"(--no-resume), or choose another output folder"
        )
    os.truncate(path, sum(len(line) + 1 for line in lines))
    return tuple(entries)


def _append(path: Path, entry: dict[str, Any]) -> None:
    """Adds a line, and waits until it is on the disk. Raises DiskError when that is full."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        sync(path)
    except OSError as error:
        raise DiskError(f"{path} could not be written ({error}); free some space and start again") from error
