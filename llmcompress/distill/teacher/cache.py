"""A teacher's predictions on disk: written once, read back in every epoch by every run on the same tokens.

Of each token the k likeliest classes: their ids in the smallest integers that hold them, their log-probabilities and
that of all other classes in float16 (off by at most 0.004 nats for probabilities above 1e-6). One record a token in
one numpy file, which is mapped and not loaded. It is written in runs of sequences into `<folder>.partial`, with a
journal of how many are done, so that a writing which was cut goes on there and ends with the same bytes; the folder
itself appears when all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcompress.data.batch import Batch
from llmcompress.distill.teacher.top_k import Likeliest
from llmcompress.errors import DiskError, InputError, NumericsError, Terminated
from llmcompress.models.checkpoint import check_output, locked, read_json, replace_text
from llmcompress.runtime.signals import stop_requests

RECORDS, JOURNAL = "predictions.npy", "cache.json"
RUN = 4096  # tokens that the teacher reads between two entries of the journal; part of what a cache's bytes depend on

Logits = Callable[[slice], Iterable[Tensor]]  # which sequences -> logits [tokens, vocabulary] of all that is predicted
# in them, in order, bit by bit


@dataclass(frozen=True)
class CacheOrigin:
    """What a cache is a cache of. Of equal origins the bytes are equal, on one machine and library version."""

    teacher: str  # digest of its files
    tokens: str  # digest of the token ids, of which of them count, and of documents
    k: int
    dtype: str  # in which the teacher computes
    bits: int | None = None  # to which it was quantized as it was read

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What is not the same there, in words."""
        words = {"teacher": "another teacher", "tokens": "other tokens", "k": "another k", "dtype": "another dtype"}
        words["bits"] = "a teacher of other bits"
        return [word for name, word in words.items() if other.get(name) != getattr(self, name)]


def tokens_digest(sequences: Batch) -> str:
    """Of the token ids, of which of them count, and of where documents begin."""
    digest = sha256(str(tuple(sequences.ids.shape)).encode())
    digest.update(sequences.ids.contiguous().numpy().astype("<i8").tobytes())
    digest.update(np.packbits(sequences.counted.numpy()).tobytes())
    if sequences.documents is not None:
        digest.update(sequences.documents.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Cache:
    """An opened cache. `starts` int64 [sequences + 1]: the record at which each sequence's predictions start."""

    records: np.ndarray
    starts: Tensor
    vocabulary: int

    def of(self, numbers: Sequence[int], device: torch.device | str = "cpu") -> Likeliest:
        """The predictions of the sequences with these numbers, one after the other."""
        found = np.concatenate([self.records[self.starts[number] : self.starts[number + 1]] for number in numbers])
        return _likeliest(found, self.vocabulary, device)


def open_cache(folder: Path, origin: CacheOrigin, counted: Tensor) -> Cache:
    """The cache in `folder`. Raises InputError for one that is damaged, or of another origin."""
    entries = _journal(folder, origin)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counted.sum(1).cumsum(0)))
    try:
        records = np.load(folder / RECORDS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be read ({error}); remove it, and it is written again") from error
    return Cache(records, starts, int(entries["vocabulary"]))


def write_cache(folder: Path, origin: CacheOrigin, counted: Tensor, logits: Logits, vocabulary: int) -> None:
    """Writes the predictions of the tokens for which `counted` bool [sequences, length] is true.

    Nothing happens where the folder has them. Asked to stop by a signal, it ends after the run at hand. Raises
    InputError for a folder of another origin, DiskError where the disk is full, LockedError while another process
    writes there, NumericsError where the teacher's predictions are NaN.
    """
    if folder.exists():
        _journal(folder, origin)
        return
    with locked(folder, "folder") as staged:
        try:
            _write(staged, folder, origin, counted, logits, vocabulary)
            staged.rename(folder)
        except OSError as error:
            raise DiskError(f"{folder} cannot be written ({error}); free some space and start again") from error


def _write(staged: Path, folder: Path, origin: CacheOrigin, counted: Tensor, logits: Logits, vocabulary: int) -> None:
    """All runs that the journal in `staged` does not know of yet."""
    record = record_type(min(origin.k, vocabulary), vocabulary)
    done = int(_journal(staged, origin)["sequences"]) if (staged / JOURNAL).is_file() else 0
    check_output(folder, int(counted[done:].sum()) * record.itemsize)
    staged.mkdir(exist_ok=True)
    size = max(1, RUN // counted.shape[1])
    with stop_requests() as stopping, _opened(staged / RECORDS, record, counted, done) as file:
        for start in range(done, len(counted), size):
            rows = slice(start, start + size)
            for part in logits(rows):
                file.write(_records(Likeliest.of(part, origin.k), record).tobytes())
            file.flush()
            os.fsync(file.fileno())
            done = min(rows.stop, len(counted))
            entries = asdict(origin) | {"vocabulary": vocabulary, "sequences": done}
            replace_text(staged / JOURNAL, json.dumps(entries))
            if stopping:
                kept = f"{done} of {len(counted)} sequences are kept in {staged}, from where the same command goes on"
                stop = KeyboardInterrupt if signal.SIGINT in stopping else Terminated
                raise stop(f"the teacher's predictions of {kept}")


def record_type(k: int, vocabulary: int) -> np.dtype:
    """What one token takes on disk."""
    integer = np.min_scalar_type(vocabulary - 1).newbyteorder("<")
    return np.dtype([("ids", integer, (k,)), ("log_p", "<f2", (k,)), ("log_tail", "<f2")])


def rounded(known: Likeliest) -> Likeliest:
    """As it comes back from the disk."""
    record = record_type(known.ids.shape[1], known.classes)
    return _likeliest(_records(known, record), known.classes, known.ids.device)


def _opened(path: Path, record: np.dtype, counted: Tensor, done: int) -> Any:
    """The file at the place behind the first `done` sequences."""
    file = path.open("r+b" if done else "wb")
    header = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (int(counted.sum()),)}
    np.lib.format.write_array_header_1_0(file, header)
    file.seek(int(counted[:done].sum()) * record.itemsize, os.SEEK_CUR)
    file.truncate()  # what a run that was cut wrote behind its last entry
    return file


def _journal(folder: Path, origin: CacheOrigin) -> dict[str, Any]:
    """What is written there about the records. Raises InputError unless it is about those of `origin`."""
    try:
        entries = read_json(folder / JOURNAL)
        differences = origin.differences(entries)
        if not differences and not {"sequences", "vocabulary"} <= entries.keys():
            raise ValueError("entries are missing")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} is no cache of a teacher's predictions ({error}); choose another folder") from error
    if differences:
        raise InputError(
            f"{folder} holds predictions of {' and '.join(differences)}; remove it, or name another folder as "
            f"`teacher: {{folder: ...}}`"
        )
    return entries


def _records(known: Likeliest, record: np.dtype) -> np.ndarray:
    if bool(known.log_p.isnan().any()):
        raise NumericsError("the teacher's predictions are NaN; check its weights, or compute in float32")
    found = np.empty(len(known), record)
    found["ids"] = known.ids.cpu().numpy()
    with np.errstate(over="ignore"):  # what is too small for float16 is as good as never
        found["log_p"], found["log_tail"] = known.log_p.cpu().numpy(), known.log_tail.cpu().numpy()
    return found


def _likeliest(records: np.ndarray, vocabulary: int, device: torch.device | str) -> Likeliest:
    ids = torch.from_numpy(records["ids"].astype(np.int64)).to(device)
    log_p, log_tail = (torch.from_numpy(records[name].astype(np.float32)).to(device) for name in ("log_p", "log_tail"))
    return Likeliest(ids, log_p, log_tail, vocabulary)
