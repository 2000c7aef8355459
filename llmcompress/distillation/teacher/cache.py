"""A teacher's predictions on disk: written once, read back in every epoch by every run on the same tokens.

Of each token the k likeliest classes: their ids in the smallest integers that hold them, their log-probabilities and
that of all other classes in float16 (off by at most 0.004 nats for probabilities above 1e-6). One record a token in
one numpy file, which is mapped and not loaded. It is written a chunk of sequences at a time into `<folder>.partial`,
beside a record of how many are done, so an interrupted writing resumes there and ends with the same bytes; the folder
itself appears when all of it is on the disk.
"""

from __future__ import annotations

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
from llmcompress.distillation.teacher.top_k import Likeliest
from llmcompress.errors import DiskError, InputError, NumericsError, Termination
from llmcompress.models.files.output import check_writable, claim_folder, lock_output, sync
from llmcompress.models.files.store import Store
from llmcompress.runtime.signals import stop_requests

RECORDS, DONE = "predictions.npy", "cache"  # a file of numbers, and the record of those that are done
CHUNK = 4096  # tokens that the teacher reads between two writes of that record; a cache's bytes depend on it

# numbers of sequences -> logits [tokens, vocabulary] of all predictions in them, in order, a part at a time
Logits = Callable[[slice], Iterable[Tensor]]


@dataclass(frozen=True)
class CacheOrigin:
    """The identity of a cache. Equal origins give equal bytes, on one machine and library version."""

    teacher: str  # digest of its files
    tokens: str  # digest of the token ids, of which of them count, and of documents
    k: int
    dtype: str  # in which the teacher computes
    bits: int | None = None  # to which it was quantized as it was read


def tokens_digest(sequences: Batch) -> str:
    """Return the digest of the token ids, of those that count, and of where documents begin."""
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
        """Return the predictions of the sequences with these numbers, one after the other."""
        found = np.concatenate([self.records[self.starts[number] : self.starts[number + 1]] for number in numbers])
        return _likeliest(found, self.vocabulary, device)


def open_cache(folder: Path, origin: CacheOrigin, counted: Tensor) -> Cache:
    """Open the cache in `folder`. Raises InputError for one that is damaged, or of another origin."""
    done = _done(_store(folder, origin))
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counted.sum(1).cumsum(0)))
    try:
        records = np.load(folder / RECORDS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be read ({error}); remove it to write it again") from error
    return Cache(records, starts, int(done["vocabulary"]))


def write_cache(folder: Path, origin: CacheOrigin, counted: Tensor, logits: Logits, vocabulary: int) -> None:
    """Write the predictions of the tokens for which `counted` bool [sequences, length] is true.

    Nothing happens where the folder has them. A signal to stop ends it after the chunk at hand. Raises
    InputError for a folder of another origin, DiskError where the disk is full, LockedError while another process
    writes there, NumericsError where the teacher's predictions are NaN.
    """
    if folder.exists():
        _done(_store(folder, origin))
        return
    with lock_output(folder, "folder") as staged:
        try:
            _write(staged, folder, origin, counted, logits, vocabulary)
            staged.rename(folder)
            sync(folder.parent)
        except OSError as error:
            raise DiskError(f"{folder} cannot be written ({error}); free some space and rerun") from error


def _write(staged: Path, folder: Path, origin: CacheOrigin, counted: Tensor, logits: Logits, vocabulary: int) -> None:
    """Write all chunks that are not in `staged` yet."""
    store, record = _store(staged, origin), record_type(min(origin.k, vocabulary), vocabulary)
    done = 0 if store.path(DONE) is None else int(_done(store)["sequences"])
    claim_folder(staged)
    check_writable(folder, int(counted[done:].sum()) * record.itemsize)
    size = max(1, CHUNK // counted.shape[1])
    with stop_requests() as stopping, _opened(staged / RECORDS, record, counted, done) as file:
        for start in range(done, len(counted), size):
            rows = slice(start, start + size)
            for part in logits(rows):
                file.write(_records(Likeliest.of(part, origin.k), record).tobytes())
            file.flush()
            os.fsync(file.fileno())
            done = min(rows.stop, len(counted))
            store.put(DONE, {"vocabulary": vocabulary, "sequences": done})
            if stopping:
                kept = f"{done} of {len(counted)} sequences are kept in {staged}, from where the same command resumes"
                stop = KeyboardInterrupt if signal.SIGINT in stopping else Termination
                raise stop(f"the teacher's predictions of {kept}")


def record_type(k: int, vocabulary: int) -> np.dtype:
    """Return the type of one token on disk."""
    integer = np.min_scalar_type(vocabulary - 1).newbyteorder("<")
    return np.dtype([("ids", integer, (k,)), ("log_p", "<f2", (k,)), ("log_tail", "<f2")])


def rounded(known: Likeliest) -> Likeliest:
    """Return predictions as they come back from the disk."""
    record = record_type(known.ids.shape[1], known.classes)
    return _likeliest(_records(known, record), known.classes, known.ids.device)


def _opened(path: Path, record: np.dtype, counted: Tensor, done: int) -> Any:
    """Open the file at the place after the first `done` sequences."""
    file = path.open("r+b" if done else "wb")
    header = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (int(counted.sum()),)}
    np.lib.format.write_array_header_1_0(file, header)
    file.seek(int(counted[:done].sum()) * record.itemsize, os.SEEK_CUR)
    file.truncate()  # what an interrupted run wrote after its last record
    return file


def _store(folder: Path, origin: CacheOrigin) -> Store:
    return Store(folder, asdict(origin), advice="or name another folder as `teacher: {folder: ...}`")


def _done(store: Store) -> dict[str, Any]:
    """Return the size of the vocabulary and the number of sequences that are done. Raises InputError for no cache."""
    done = store.get(DONE)
    if done is None or not {"sequences", "vocabulary"} <= done.entry.keys():
        raise InputError(f"{store.folder} is not a cache of a teacher's predictions; choose another folder")
    return done.entry


def _records(known: Likeliest, record: np.dtype) -> np.ndarray:
    if bool(known.log_p.isnan().any()):
        raise NumericsError("the teacher's predictions are NaN; check its weights, or compute in float32")
    found = np.empty(len(known), record)
    found["ids"] = known.ids.cpu().numpy()
    with np.errstate(over="ignore"):  # probabilities below float16's range count as 0
        found["log_p"], found["log_tail"] = known.log_p.cpu().numpy(), known.log_tail.cpu().numpy()
    return found


def _likeliest(records: np.ndarray, vocabulary: int, device: torch.device | str) -> Likeliest:
    ids = torch.from_numpy(records["ids"].astype(np.int64)).to(device)
    log_p, log_tail = (torch.from_numpy(records[name].astype(np.float32)).to(device) for name in ("log_p", "log_tail"))
    return Likeliest(ids, log_p, log_tail, vocabulary)
