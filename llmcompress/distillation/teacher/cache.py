"""A teacher's predictions on disk: written once, read back in every epoch by every run on the same tokens.

Of each token the k likeliest classes: their ids in the smallest integers that hold them, their log-probabilities and
that of all other classes in float16 (off by at most 0.004 nats for probabilities above 1e-6). One record a token in
one numpy file, which is mapped and not loaded. It is written a chunk of sequences at a time into `<folder>.partial`,
beside the number of finished ones, so an interrupted writing resumes there and ends with the same bytes. The folder
itself appears when everything is on disk.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from llmcompress.data.batch import Batch
from llmcompress.distillation.context import DistillationJob, TrainContext
from llmcompress.distillation.held_out import POSITIONS
from llmcompress.distillation.objective.chunked_loss import LOGITS
from llmcompress.distillation.objective.forward import head_of, hidden_states
from llmcompress.distillation.teacher.predictions import Likeliest
from llmcompress.errors import DiskError, InputError, LLMCompressError, NumericsError, Termination
from llmcompress.losses.forward_kl import ForwardKL
from llmcompress.losses.loss import Predictions, measure
from llmcompress.models.files.identity import teacher_digest
from llmcompress.models.files.output import check_writable, claim_folder, lock_output, sync
from llmcompress.models.files.store import Store
from llmcompress.recipe.distillation import Teacher
from llmcompress.runtime.signals import stop_requests
from llmcompress.weight.modules import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORDS, DONE = "predictions.npy", "cache"  # a file of numbers, and the record of those that are done
CHUNK = 4096  # tokens that the teacher reads between two writes of that record; a cache's bytes depend on it

# numbers of sequences -> logits [tokens, vocabulary] of all predictions in them, in order, a part at a time
Logits = Callable[[slice], Iterable[Tensor]]


@dataclass(frozen=True)
class CacheOrigin:
    """The identity of a cache. Equal origins give equal bytes on one machine and library version."""

    teacher: str  # digest of its files
    tokens: str  # digest of the token ids, of which of them count, and of documents
    k: int
    dtype: str  # in which the teacher computes
    bits: int | None = None  # to which the teacher was quantized


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
    """An opened cache, a `TeacherSource`. `starts` int64 [sequences + 1]: the first record of each sequence."""

    records: np.ndarray
    starts: Tensor
    vocabulary: int

    def predictions(self, batch: Batch) -> Likeliest:
        """See `TeacherSource.predictions`. Raises ValueError for sequences without their numbers."""
        if batch.numbers is None:
            raise ValueError("a cache is read by the numbers of sequences, and these have none")
        return self.of(batch.numbers.tolist(), batch.ids.device)

    def of(self, numbers: Sequence[int], device: torch.device | str = "cpu") -> Likeliest:
        """Return the predictions of the sequences with these numbers, one after the other."""
        records = np.concatenate([self.records[self.starts[number] : self.starts[number + 1]] for number in numbers])
        return _likeliest(records, self.vocabulary, device)


def cache_teacher(job: DistillationJob, model: PreTrainedModel) -> Cache:
    """Return the cache of the predictions of `model`, the job's teacher, which writes it if it is missing.

    Raises, in every process, what `write_cache` and `open_cache` raise.
    """
    settings, sequences = job.recipe.teacher, job.data.sequences
    folder, dtype = _folder(settings, job.output), str(model.dtype).removeprefix("torch.")
    origin = CacheOrigin(
        teacher_digest(job.teacher_place.folder, job.teacher_place.adapter),
        tokens_digest(sequences),
        settings.k,
        dtype,
        settings.bits,
    )
    failure: list[LLMCompressError | None] = [None]
    if job.accelerator.is_main_process:
        try:
            with job.autocast():
                vocabulary = head_of(model)(hidden_states(model, sequences[:1].to(model.device))).shape[-1]
                write_cache(folder, origin, sequences.counted, ModelLogits(model, sequences, vocabulary), vocabulary)
        except LLMCompressError as error:
            failure = [error]
    broadcast_object_list(failure)  # the others wait here
    if failure[0] is not None:
        raise failure[0]
    return open_cache(folder, origin, sequences.counted)


def remove_cache(teacher: Teacher, output: Path) -> None:
    """Remove the cache of a finished run, unless the recipe gave it a folder."""
    if teacher.folder is None:
        shutil.rmtree(_folder(teacher, output))


def _folder(teacher: Teacher, output: Path) -> Path:
    beside = output.with_name(output.name + ".teacher")
    return beside if teacher.folder is None else Path(os.path.expanduser(teacher.folder))


@dataclass(frozen=True, eq=False)
class ModelLogits:
    """The logits of a model for `write_cache`, as many tokens at once as LOGITS allows."""

    model: PreTrainedModel
    sequences: Batch
    vocabulary: int

    @torch.no_grad()
    def __call__(self, rows: slice) -> Iterator[Tensor]:
        """Yield the logits of all predictions in the sequences `rows`."""
        batch = self.sequences[rows].trim().to(self.model.device)
        hidden, head = hidden_states(self.model, batch)[batch.predicting], head_of(self.model)
        for part in hidden.split(max(1, LOGITS // self.vocabulary)):
            yield head(part)


@torch.no_grad()
def measure_cache_bias(run: TrainContext) -> dict[str, float]:
    """Measure how a cache changes what the student in `run` learns from: means over tokens of held-out sequences.

    tail_mass: the teacher's probability of all classes but the k likeliest. kl: KL(teacher || student) in nats;
    kl_with_tail: the same over k + 1 symbols as they are cached, the lower bound that a student trains on.
    """
    loss, totals, tokens = ForwardKL(), torch.zeros(3, dtype=torch.float64), 0
    models = (run.teacher, run.student.model)
    with run.autocast(), decoded(run.teacher), decoded(run.student.model):
        heads = [head_of(model) for model in models]
        for sequence in chain.from_iterable(part.chunks(1) for part in run.data.held_out):
            batch = sequence.trim().to(run.accelerator.device)
            hidden = [hidden_states(model, batch)[batch.predicting].split(POSITIONS) for model in models]
            targets = batch.ids[batch.counted].split(POSITIONS)
            for of_teacher, of_student, chunk in zip(*hidden, targets, strict=True):
                teacher, student = heads[0](of_teacher), heads[1](of_student)
                known = round_to_disk(Likeliest.of(teacher, run.recipe.teacher.k))
                merged = known.beside(student, chunk, slice(None))["merged"]
                bounds = [measure(each, loss)[0] for each in (Predictions(student, teacher, chunk), merged)]
                totals += torch.stack([known.log_tail.exp().sum(), *bounds]).double().cpu()
                tokens += len(chunk)
    return dict(zip(("tail_mass", "kl", "kl_with_tail"), (totals / tokens).tolist()))


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
    """Write the predictions of the tokens for which `counted` bool [sequences, length] is true, unless `folder` exists.

    A signal to stop ends it after the chunk at hand. Raises InputError for a folder of another origin, DiskError if the
    disk is full, LockedError while another process writes there, NumericsError if the teacher's predictions are NaN.
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
    with stop_requests() as stopping, _open_records(staged / RECORDS, record, counted, done) as file:
        for start in range(done, len(counted), size):
            rows = slice(start, start + size)
            for part in logits(rows):
                file.write(_records(Likeliest.of(part, origin.k), record).tobytes())
            file.flush()
            os.fsync(file.fileno())
            done = min(rows.stop, len(counted))
            store.put(DONE, {"vocabulary": vocabulary, "sequences": done})
            if stopping:
                stop = KeyboardInterrupt if signal.SIGINT in stopping else Termination
                raise stop(
                    f"the teacher's predictions of {done} of {len(counted)} sequences are kept in {staged}, from where "
                    f"the same command resumes"
                )


def record_type(k: int, vocabulary: int) -> np.dtype:
    """Return the type of one token on disk."""
    integer = np.min_scalar_type(vocabulary - 1).newbyteorder("<")
    return np.dtype([("ids", integer, (k,)), ("log_p", "<f2", (k,)), ("log_tail", "<f2")])


def round_to_disk(known: Likeliest) -> Likeliest:
    """Return predictions as they come back from the disk."""
    record = record_type(known.ids.shape[1], known.classes)
    return _likeliest(_records(known, record), known.classes, known.ids.device)


def _open_records(path: Path, record: np.dtype, counted: Tensor, done: int) -> Any:
    """Open the file for writing after the first `done` sequences."""
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
    records = np.empty(len(known), record)
    records["ids"] = known.ids.cpu().numpy()
    with np.errstate(over="ignore"):  # probabilities below float16's range count as 0
        records["log_p"], records["log_tail"] = known.log_p.cpu().numpy(), known.log_tail.cpu().numpy()
    return records


def _likeliest(records: np.ndarray, vocabulary: int, device: torch.device | str) -> Likeliest:
    ids = torch.from_numpy(records["ids"].astype(np.int64)).to(device)
    log_p, log_tail = (torch.from_numpy(records[name].astype(np.float32)).to(device) for name in ("log_p", "log_tail"))
    return Likeliest(ids, log_p, log_tail, vocabulary)
