"""The files of a run: the lock of its output, its finished blocks and its checkpoint. Only the first process uses them.

    OUT.partial/checkpoint/part-00000.safetensors   a block that will not change any more
    OUT.partial/finished/block-00000.json           the report of each finished block
    OUT.partial/finished/open-00007.safetensors     the last block, if it learns again together with the next
    OUT.partial/finished/importance.safetensors     weights of tokens and rows, if a backward pass gave them

A block is finished when its report is on the disk, which is after its tensors. A run that resumes runs the finished
blocks as they are stored, so its result is bit for bit that of an uninterrupted run. The reports stay until the
complete checkpoint has its final name on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from llmcompress.compression.job import Job
from llmcompress.compression.plan import Plan
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import DiskError, InputError
from llmcompress.models.dense.companions import Companions, companions
from llmcompress.models.dense.config import FUSED
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import CHECKPOINT, Writer, publish_checkpoint
from llmcompress.models.files.compressed import check_written
from llmcompress.models.files.identity import binding
from llmcompress.models.files.output import (
    check_writable,
    claim_folder,
    clear_folder,
    is_ours,
    lock_output,
    merge_mark,
    remove_folder,
)
from llmcompress.models.files.store import Store
from llmcompress.models.files.tensor_files import part_file, read_tensors
from llmcompress.models.transformers.hf_quantizer import table_entry
from llmcompress.recipe.read import dump, hide_folders
from llmcompress.reporting import report as reports
from llmcompress.reporting.report import LayerReport, Report
from llmcompress.runtime.facts import versions
from llmcompress.runtime.phases import phase
from llmcompress.runtime.precision import is_finite
from llmcompress.weight.layout import Layout, payload_texts

FINISHED = "finished"  # the folder of the reports
PARTS = "parts"  # a key of each report: digests of the headers of the parts written last, by number
ADVICE = "ask to start over (--no-resume), or choose another output folder"


@dataclass(eq=False)
class BlockEntry:
    """The report of a finished block.

    `layouts`: of everything stored since the entry before. `learned`, by path, and `fused`: as in the report.
    `unweighed`: paths of blocks whose tokens count alike against the recipe. `kv_scales`: as in the report. `seconds`
    and `phases`: of the whole run up to here; `peak`: the memory of the process, in bytes.
    """

    rows: list[LayerReport] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    learned: dict[str, dict[str, Any]] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    unweighed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    kv_scales: dict[str, list[float]] = field(default_factory=dict)
    peak: int = 0
    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields."""
        layouts = {name: layout.to_json() for name, layout in self.layouts.items()}
        return {**vars(self), "rows": [asdict(row) for row in self.rows], "layouts": layouts}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> BlockEntry:
        """Return the inverse of `to_json`. Raises KeyError, TypeError or ValueError for entries of another form."""
        layouts = {name: Layout.from_json(layout) for name, layout in entry["layouts"].items()}
        rows = [LayerReport.from_json(row) for row in entry["rows"]]
        notes = entry["fused"], entry["unweighed"]
        cost = int(entry.get("peak", 0)), entry.get("phases", {})  # blocks of an earlier version have none
        return BlockEntry(rows, layouts, entry["learned"], *notes, float(entry["seconds"]), entry["kv_scales"], *cost)


@dataclass(eq=False)
class RunFiles:
    """The files of a job that writes `output`, as a context: begin, open, then add each block, write_rest, close.

    `device`: as the job was asked for. `resumable`: True if finished blocks stay when the context ends in an error; a
    note on the error says so. In all other cases unfinished work is removed.
    """

    job: Job
    planned: Plan
    output: Path
    device: str
    resume: bool
    resumable: bool
    finished: tuple[BlockEntry, ...] = ()  # blocks of an earlier run
    count: int = 0  # of finished blocks
    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _staging: Path = field(init=False)  # from begin on, as the next one
    _beside: Companions = field(init=False)
    _identity: Mapping[str, Any] = field(init=False)  # from open on, as the following
    _store: Store = field(init=False)
    _digests: dict[str, str] = field(init=False)  # of the headers of parts of an earlier run, by number
    _writer: Writer = field(init=False)

    def begin(self) -> Report | None:
        """Lock the output, and return its report if this very job has completed it before.

        Raises LockedError, DiskError, and InputError for a model that cannot be copied from.
        """
        self._staging = staging = self._stack.enter_context(lock_output(self.output, "output folder"))
        if self.resume and is_ours(staging) and is_complete(self.output, self.job, self.device):
            remove_folder(staging)
            return reports.read(self.output)
        rest = _names_outside_blocks(self.job)  # one part, of which merging holds a second copy
        copy = max(self.planned.bytes // 20, sum(self.job.source.tensors[name].bytes_of_numbers for name in rest))
        check_writable(self.output, self.planned.bytes + copy)
        for name in rest:
            if not is_finite(self.job.source.read(name)):
                raise InputError(f"{self.job.source.name}: {name} holds NaN or Inf; use an undamaged checkpoint")
        self._beside = companions(self.job.source.folder, self.job.source.trust_remote_code)
        return None

    def open(self, identity: Mapping[str, Any]) -> tuple[BlockEntry, ...]:
        """Open the checkpoint; return the blocks that an earlier run of this `identity` has finished.

        Other unfinished work is removed. Raises DiskError for finished blocks of another run, or damaged ones.
        """
        claim_folder(self._staging)
        self._identity = identity
        self._store = Store(self._staging / FINISHED, identity, place=self._staging, advice=ADVICE, error=DiskError)
        self.finished, self._digests = self._read_finished() if self.resume else ((), {})
        if not self.finished:
            self._store.remove(_block(0))  # first, since without it nothing is taken up from the rest
            clear_folder(self._staging)
        self.count = len(self.finished)
        self._stack.push(self._leave)
        self._writer = self._stack.enter_context(publish_checkpoint(self._staging, self.output, self._count_closed()))
        return self.finished

    def compute_once(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors that blocks depend on: those of an earlier run, or what `compute` returns, which is stored."""
        record = self._store.get(name)
        if record is not None:
            return record.tensors
        tensors = compute()
        self._store.put(name, {}, tensors)
        return tensors

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Return the stored tensors of a block of an earlier run. Raises DiskError for damaged ones."""
        waiting = None if number < self._count_closed() else self._store.get(_open(number))
        if waiting is not None:
            return waiting.tensors
        layouts = {name: layout for entry in self.finished for name, layout in entry.layouts.items()}
        path = part_file(self._staging / CHECKPOINT, number)
        try:
            if _header_digest(path) != self._digests.get(str(number)):
                raise InputError(f"{path} is not as it was written")
            return read_tensors(path, payload_texts(layouts))[0]
        except (InputError, OSError, ValueError) as error:
            raise self._store.damage(error) from error

    @phase("write")
    def add(self, entry: BlockEntry, closed: Sequence[dict[str, Tensor]], pending: Mapping[str, Tensor]) -> None:
        """Write a finished block.

        `closed`: the tensors of each block that will not change any more; `pending`: those of a block that may. Raises
        DiskError when the disk is full.
        """
        for tensors in closed:
            self._writer.add(tensors, payload_texts(entry.layouts))
        if pending:
            self._store.put(_open(self.count), {}, pending)
        folder = self._staging / CHECKPOINT
        files = {str(number): part_file(folder, number) for number in (self.count - 1, self.count)}
        parts = {number: _header_digest(path) for number, path in files.items() if path.is_file()}
        self._store.put(_block(self.count), entry.to_json() | {PARTS: parts})
        self._store.remove(_open(self.count - 1))
        self.count += 1

    @phase("write")
    def write_rest(self, layouts: dict[str, Layout], ties: Mapping[str, str]) -> int:
        """Write everything outside of the blocks: embeddings, head, config, tokenizer, other files of the dense folder.

        `ties`: the names of common matrices, by linear. Returns the bytes of all weights. Raises InputError if the
        model's files changed since the run began.
        """
        source, writer = self.job.source, self._writer
        if not writer.mark.is_file():
            writer.add({name: source.read(name) for name in _names_outside_blocks(self.job)})
        config = source.config_entries()
        config["quantization_config"] = table_entry(layouts, source.sizes, ties) | {"versions": versions()}
        if (fuse := self.job.recipe.fuse) is not None:
            config[FUSED] = fuse.model_dump()
        writer.write("config.json", json.dumps(config, indent=1))
        self._beside.copy(writer.folder)
        size = writer.close(binding(writer.folder))
        if changed := [what for what, digest in source.content().items() if self._identity[what] != digest]:
            raise InputError(
                f"{source.name} was replaced while it was compressed ({' and '.join(changed)} changed); start over "
                f"(--no-resume)"
            )
        return size

    def close(self, report: Report) -> Report:
        """Write the report and the recipe, and give the checkpoint its name. Returns the report with the run's name."""
        report = replace(report, run=run_name(self._identity))
        self._writer.write(file_names.REPORT, json.dumps(report.to_json(), indent=2))
        self._writer.write(file_names.RECIPE, dump(hide_folders(self.job.recipe)))
        check_written(self._writer.folder, self.job.source.trust_remote_code)
        self._stack.close()
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _leave(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Remove unfinished work, unless an error ends a `resumable` run that has finished blocks."""
        if error is not None and self.resumable and self.count and self._store.path(_block(0)):
            blocks = "one finished block is" if self.count == 1 else f"{self.count} finished blocks are"
            error.add_note(f"{blocks} kept in {self._staging}, from where the same command resumes")
        else:
            self._store.remove(_block(0))
            remove_folder(self._staging)

    def _count_closed(self, count: int | None = None) -> int:
        """Return how many of `count` blocks of an earlier run will not change any more; None for all `finished`."""
        count = len(self.finished) if count is None else count
        return count - 1 if count and self._store.path(_open(count - 1)) else count

    def _read_finished(self) -> tuple[tuple[BlockEntry, ...], dict[str, str]]:
        """Return the finished blocks and the digests of their parts; none if tensors are missing."""
        entries: list[BlockEntry] = []
        digests: dict[str, str] = {}
        while (record := self._store.get(_block(len(entries)))) is not None:
            try:
                digests |= record.entry[PARTS]
                entries.append(BlockEntry.from_json(record.entry))
            except (ValueError, KeyError, TypeError) as error:
                raise self._store.damage(error) from error
        if not merge_mark(self._staging).is_file():  # else some parts may be gone
            folder, closed = self._staging / CHECKPOINT, range(self._count_closed(len(entries)))
            if not all(part_file(folder, number).is_file() for number in closed):
                return (), {}
        return tuple(entries), digests


def identity_of(job: Job, tokens: CalibrationTokens | None, device: str) -> dict[str, Any]:
    """Return everything that a run's finished blocks depend on; equal identities give equal blocks on one machine.

    The model counts by its content, not by its place. Gates and a distillation do not count, since they come later.
    """
    return {
        **job.source.content(),
        "recipe": job.recipe.model_dump(mode="json", exclude={"gates", "distill"}),
        "calibration tokens": None if tokens is None else tokens.hash,
        "device": device,
        "versions": versions(),
    }


def run_name(identity: Mapping[str, Any]) -> str:
    """Return a digest of an identity, which a report has as the name of its run."""
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def is_complete(output: Path, job: Job, device: str) -> bool:
    """True if this very job has completed `output` before, but for its distillation; False if nothing is there.

    Raises DiskError for the output of another job, InputError for a folder that is no checkpoint.
    """
    if not output.is_dir() or not any(output.iterdir()):
        return False
    if not is_of(output, job, device):
        raise DiskError(
            f"{output} was left by a run with another recipe, model, text, device or version; remove it, or choose "
            f"another output folder"
        )
    return True


def is_of(output: Path, job: Job, device: str) -> bool:
    """True if this very job, but for its distillation, wrote the checkpoint `output`."""
    return reports.read(output).run == run_name(identity_of(job, job.tokens, device))


def _names_outside_blocks(job: Job) -> list[str]:
    """Return the names of the stored tensors that are in no decoder block and not compressed."""
    inside = tuple(f"{layout.path}." for layout in job.arch.blocks)
    tables = {f"{name}.weight" for name in job.tables}
    return [name for name in job.source.tensors if not name.startswith(inside) and name not in tables]


def _header_digest(path: Path) -> str:
    """Return a digest of a part's header, which has the digests of its tensors."""
    with path.open("rb") as file:
        return sha256(file.read(int.from_bytes(file.read(8), "little"))).hexdigest()


def _block(number: int) -> str:
    return f"block-{number:05}"


def _open(number: int) -> str:
    return f"open-{number:05}"
