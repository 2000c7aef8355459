"""The books of a run: the lock of its output, its journal and its checkpoint. Of several processes, the first has them.

    begin -> open -> (tensors of finished blocks, add) ... -> close

Every process may have the object; only the first one calls these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from torch import Tensor

from llmcompress.compression.block import BlockResult
from llmcompress.compression.job import Job
from llmcompress.compression.journal import Entry, Journal, open_journal, run_identity, run_name
from llmcompress.compression.plan import Plan
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import DiskError, InputError
from llmcompress.models.dense.companions import Companions, companions
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import Writer, publish_checkpoint
from llmcompress.models.files.compressed import check_written
from llmcompress.models.files.identity import binding
from llmcompress.models.files.output import check_writable, is_ours, lock_output, remove_folder
from llmcompress.models.transformers.hf_quantizer import table_entry
from llmcompress.recipe.read import dump, hide_folders
from llmcompress.reporting import report as reports
from llmcompress.reporting.report import Report
from llmcompress.runtime.facts import versions
from llmcompress.runtime.precision import is_finite
from llmcompress.weight.modules import Layout, payload_texts

T = TypeVar("T")


@dataclass(eq=False)
class Books:
    """The books of a job that writes `output`, as a context. `device`: as the job was asked for; `last`: whether
    finished blocks stay when the context ends badly."""

    job: Job
    planned: Plan
    output: Path
    device: str
    resume: bool
    last: bool
    identity: Mapping[str, Any] = field(default_factory=dict)
    _held: ExitStack = field(default_factory=ExitStack)
    _staging: Path | None = None
    _journal: Journal | None = None
    _writer: Writer | None = None
    _beside: Companions | None = None

    def begin(self) -> Report | None:
        """Lock the output, and return its report if this very job has completed it before.

        Raises LockedError, DiskError, and InputError for a model that cannot be copied from.
        """
        self._staging = staging = self._held.enter_context(lock_output(self.output, "output folder"))
        if self.resume and is_ours(staging) and is_complete(self.output, self.job, self.device):
            remove_folder(staging)
            return reports.read(self.output)
        check_writable(self.output, self.planned.bytes + self.planned.bytes // 20)
        _check_rest(self.job)
        self._beside = companions(self.job.source.folder, self.job.source.trust_remote_code)
        return None

    def open(self, identity: Mapping[str, Any]) -> tuple[Entry, ...]:
        """Open journal and checkpoint; return the blocks that an earlier run of this `identity` has finished. Raises
        DiskError for those of another run."""
        staging = _there(self._staging)
        self.identity = identity
        self._journal = self._held.enter_context(open_journal(staging, identity, self.resume, self.last))
        count = len(self._journal.closed())
        self._writer = self._held.enter_context(publish_checkpoint(staging, self.output, count))
        return self._journal.found

    def kept(self, name: str, find: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what `find` gives, now or in an earlier run: see `Journal.kept`."""
        return _there(self._journal).kept(name, find)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """Return what is stored of a block that an earlier run has finished."""
        return _there(self._journal).tensors(number)

    def add(self, result: BlockResult, entry: Entry) -> None:
        """Write a block that is finished now."""
        for tensors in result.closed:
            _there(self._writer).add(tensors, payload_texts(entry.layouts))
        _there(self._journal).add(entry, result.pending)

    def write_rest(self, layouts: dict[str, Layout], ties: Mapping[str, str]) -> int:
        """Write all but the decoder blocks: embeddings, head, config, tokenizer, and other files of the dense folder.

        `ties`: the names of what linears have in common, by linear.

        Returns the bytes of all weights. Raises InputError if the model's files are no longer those that the run began
        with.
        """
        job, writer = self.job, _there(self._writer)
        if not writer.mark.is_file():
            writer.add({name: job.source.read(name) for name in _rest(job)})
        config = job.source.config_entries()
        config["quantization_config"] = table_entry(layouts, job.source.sizes, ties) | {"versions": versions()}
        writer.write("config.json", json.dumps(config, indent=1))
        _there(self._beside).copy(writer.folder)
        size = writer.close(binding(writer.folder))
        _check_unchanged(job, self.identity)
        return size

    def close(self, report: Report) -> Report:
        """Write the report and the recipe, and give the checkpoint its name. Returns the report with the run's name."""
        writer, report = _there(self._writer), replace(report, run=run_name(self.identity))
        writer.write(file_names.REPORT, json.dumps(report.to_json(), indent=2))
        writer.write(file_names.RECIPE, dump(hide_folders(self.job.recipe)))
        check_written(writer.folder, self.job.source.trust_remote_code)
        self._held.close()
        return report

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)


def identity_of(job: Job, tokens: CalibrationTokens | None, device: str) -> dict[str, Any]:
    """Return all that a run's finished blocks depend on: see `run_identity`."""
    return run_identity(job.source, job.recipe, None if tokens is None else tokens.hash, device)


def is_complete(output: Path, job: Job, device: str) -> bool:
    """True if this very job has completed `output` before, but for its distillation; False if nothing is there.

    Raises DiskError for what another job made, and InputError for what none made.
    """
    if not output.is_dir() or not any(output.iterdir()):
        return False
    found = reports.read(output)
    if found.run != run_name(identity_of(job, job.tokens, device)):
        raise DiskError(
            f"{output} was left by a run with another recipe, model, text, device or version; remove it, or choose "
            f"another output folder"
        )
    return True


def _there(part: T | None) -> T:
    """Return a part of the books. Raises ValueError where they are not open."""
    if part is None:
        raise ValueError("books are kept by the first process, from begin and open on")
    return part


def _check_rest(job: Job) -> None:
    """Raise InputError for NaN or Inf in what is not compressed: embeddings, head and last norm."""
    for name in _rest(job):
        if not is_finite(job.source.read(name)):
            raise InputError(f"{job.source.name}: {name} holds NaN or Inf; use an undamaged checkpoint")


def _rest(job: Job) -> list[str]:
    """Return the names of the stored tensors that are in no decoder block and not compressed."""
    inside = tuple(f"{layout.path}." for layout in job.arch.blocks)
    tables = {f"{name}.weight" for name in job.tables}
    return [name for name in job.source.tensors if not name.startswith(inside) and name not in tables]


def _check_unchanged(job: Job, identity: Mapping[str, Any]) -> None:
    """Raise InputError if the model's files are no longer those that the run began with."""
    changed = [what for what, digest in job.source.content().items() if identity[what] != digest]
    if changed:
        raise InputError(
            f"{job.source.name} was replaced while it was compressed ({' and '.join(changed)} changed); start over "
            f"(--no-resume)"
        )
