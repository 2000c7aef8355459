"""Writing a checkpoint so that it is either complete or not there.

Everything goes to `OUT.partial/checkpoint`, one safetensors file per part as soon as that part is done (so memory never
holds the whole model). At the end the parts are merged into shards, everything is fsynced, hashed into a manifest, and
renamed to OUT. A lock beside it keeps two runs from writing the same output, and a mark in `OUT.partial` keeps
somebody else's folder of that name from being removed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmcompress.errors import DiskError, InputError, LockedError
from llmcompress.models.file_names import check_output_name
from llmcompress.models.files import check_regular, open_tensors, read_object
from llmcompress.models.integrity import DIGESTS, INDEX, MENDING, digest, digests
from llmcompress.models.merge import data_bytes, merged, part_file
from llmcompress.models.replace import replace_bytes, replace_text, replacing, sync

FORMAT_VERSION = 3  # 2: digests in the weight files, every layout listed once; 3: a weight is one tensor
MANIFEST = "manifest.json"
README = "README.md"
PLOT = "layers.png"
CARD = {README, PLOT}  # what a push adds beside the checkpoint
MARK = ".llmcompress"  # a file in a folder of unfinished work, which says that it is ours
CHECKPOINT = "checkpoint"  # the folder of unfinished work that becomes the output
PART = 2**28  # bytes that are written at a time
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


def check_output(output: Path, needed: int) -> None:
    """Raise DiskError unless a folder with `needed` bytes can be made at `output`, which must not exist yet.

    Bytes in `<output>.partial` count as free: they will be resumed from or deleted.
    """
    check_output_name(output)
    if output.is_symlink():
        raise DiskError(f"{output} is a link; give the folder itself, or choose another output folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DiskError(f"{output} exists already; remove it or choose another output folder")
    parent = _parent(output)
    staging = _staging(output)
    is_ours(staging)
    free = shutil.disk_usage(parent).free + sum(path.stat().st_size for path in staging.rglob("*"))
    if free < needed:
        raise DiskError(f"{output} needs {megabytes(needed)} and its disk has {megabytes(free)} free; choose another")


def _parent(output: Path) -> Path:
    """Return the deepest folder above `output` that exists. Raises DiskError if nothing can be written there."""
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DiskError(f"{parent} is not a folder that can be written to; choose another output folder")
    return parent


def _staging(output: Path) -> Path:
    """Return the folder or file that will become `output`."""
    return output.with_name(output.name + ".partial")


def megabytes(count: int) -> str:
    """A byte count for people."""
    return f"{count / 1e6:.1f} MB"


class Writer:
    """The files of a checkpoint, collected in a folder. `count`: the number of parts that are written."""

    def __init__(self, folder: Path, count: int = 0) -> None:
        self.folder = folder
        self.count = count
        self.mark = merge_mark(folder.parent)

    def add(self, tensors: dict[str, Tensor], layouts: Mapping[str, str] | None = None) -> None:
        """Write the tensors of one part of the model, with the `layouts` of those that are payloads. Raises DiskError
        when the disk is full."""
        write_tensors(part_file(self.folder, self.count), tensors, layouts or {})
        self.count += 1

    def write(self, name: str, text: str) -> None:
        """Write a text file. Raises DiskError when the disk is full."""
        path = self.folder / name
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DiskError(f"{path} could not be written ({error}); free some space and start again") from error

    def close(self, binding: Mapping[str, Any] | None = None) -> int:
        """Merge all parts into files as Hugging Face loaders expect them; return the weights' bytes. With `binding`,
        each of the files says that it belongs to the others, and to what that names."""
        try:
            files = merged(self.folder, self.mark, binding)
        except OSError as error:
            raise DiskError(f"{self.folder} cannot be written ({error}); free some space and start again") from error
        if len(files) > 1:
            self._index(files)
        return sum(path.stat().st_size for path in files)

    def _index(self, files: Sequence[Path]) -> None:
        places: dict[str, str] = {}
        total = 0
        for path in files:
            with open_tensors(path) as file:
                places |= dict.fromkeys(file.keys(), path.name)
            total += data_bytes(path)
        listing = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        self.write(INDEX, json.dumps(listing, indent=2))


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    layouts: Mapping[str, str] | None = None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write a weight file with the digests of its tensors: the old file or the whole new one is there, on the disk.

    `layouts`: of those that are payloads; `header`: further entries. Raises DiskError when the disk is full.
    """
    entries = {"format": "pt", **(header or {})}
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        with replacing(path) as staged:
            save_file(contiguous, staged, metadata=entries | digests(contiguous, layouts or {}))
            _sort_header(staged)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{path} could not be written ({error}); free some space and start again") from error


def read_tensors(path: Path, layouts: Mapping[str, str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that `write_tensors` wrote, and the header. Raises InputError for a file that has changed."""
    try:
        with open_tensors(path) as file:
            header = file.metadata() or {}
            written = json.loads(header[DIGESTS])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    if {name: digest(tensor, (layouts or {}).get(name, "")) for name, tensor in tensors.items()} != written:
        raise InputError(f"{path} is not as it was written")
    return tensors, header


def _sort_header(path: Path) -> None:
    """Brings a safetensors header into one order: the library writes metadata in another at every run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


@contextmanager
def writing(output: Path, needed: int = 0) -> Iterator[Writer]:
    """A `Writer` whose files become the folder `output` when the context ends well, and vanish when it does not.

    Raises LockedError while another process writes there, and DiskError as `check_output` does with `needed`, for a
    folder that cannot be made or filled, and for an output that appeared meanwhile.
    """
    with locked(output, "output folder"):
        check_output(output, needed)
        with making(output) as writer:
            yield writer


@contextmanager
def making(output: Path) -> Iterator[Writer]:
    """See `writing`, for a caller that holds the lock and has checked the output."""
    staging = _staging(output)
    claim(staging)
    try:
        clear(staging)
        with publishing(staging, output) as writer:
            yield writer
    finally:
        remove(staging)


@contextmanager
def publishing(staging: Path, output: Path, count: int = 0) -> Iterator[Writer]:
    """A `Writer` in `staging`, which has `count` parts; its folder becomes `output` when the context ends well."""
    folder = staging / CHECKPOINT
    try:
        folder.mkdir(exist_ok=True)
        yield Writer(folder, count)
        seal(folder)
        _publish(folder, output)
    except OSError as error:
        if error.errno in DISK_FAULTS:
            raise DiskError(
                f"{output} cannot be written ({error.strerror}); free some space and start again"
            ) from error
        raise


def _publish(folder: Path, output: Path) -> None:
    """Rename the complete `folder` to `output`. Raises DiskError for an output that appeared since it was checked."""
    try:
        folder.rename(output)  # an empty folder is replaced
    except OSError as error:
        if error.errno in TAKEN:
            raise DiskError(
                f"{output} has appeared while it was made; move it away, or choose another output folder"
            ) from error
        raise
    sync(output.parent)


def merge_mark(staging: Path) -> Path:
    """Return the file in `staging` that says that the parts of the checkpoint there are being merged, or are."""
    return staging / "merging"


def claim(staging: Path) -> None:
    """Make the folder `staging`, and mark it as one of ours. Raises DiskError for one that somebody else made."""
    try:
        if not is_ours(staging):
            staging.mkdir()
            (staging / MARK).write_text("unfinished work of llmcompress; it may be removed\n", encoding="utf-8")
            sync(staging)
    except OSError as error:
        raise DiskError(
            f"{staging} cannot be written ({error.strerror}); free some space, or choose another output folder"
        ) from error


def is_ours(staging: Path) -> bool:
    """True if `staging` is a folder that llmcompress left, False if there is nothing.

    Raises DiskError for a file, a link or a folder that somebody else made.
    """
    if staging.is_dir() and not staging.is_symlink():
        if (staging / MARK).is_file():
            return True
        if not any(staging.iterdir()):  # the end came before the mark
            staging.rmdir()
            return False
    elif not os.path.lexists(staging):
        return False
    raise DiskError(f"{staging} is in the way and was not made by llmcompress; move it, or choose another output")


def clear(staging: Path) -> None:
    """Remove everything from a folder of ours, except its mark."""
    for path in staging.iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove(staging: Path) -> None:
    """Remove a folder of ours, its mark last, so that it is ours until it is gone."""
    clear(staging)
    (staging / MARK).unlink(missing_ok=True)
    staging.rmdir()


@contextmanager
def locked(output: Path, kind: str) -> Iterator[Path]:
    """Keep other processes from writing `output`, a "folder" or "file", while it lasts; give the path beside it where
    what becomes it is made.

    Raises LockedError while another process writes there, DiskError where nothing can be written.
    """
    staging = _staging(output)
    lock = FileLock(staging.with_name(staging.name + ".lock"), timeout=0)
    _parent(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise LockedError(f"{output} is being written by another process; wait, or choose another {kind}") from error
    except OSError as error:
        raise DiskError(f"{output} cannot be written ({error.strerror}); choose another {kind}") from error
    try:
        yield staging
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Write the manifest of what a folder holds, and wait until all of it is on the disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    hashes = {path.name: _digest(path) for path in files}
    if hashes:
        entries = {"format_version": FORMAT_VERSION, "sha256": hashes}
        (folder / MANIFEST).write_text(json.dumps(entries, indent=2), encoding="utf-8")
    for path in folder.iterdir():
        sync(path)


def add_file(folder: Path, name: str, text: str) -> None:
    """Put a text file into a finished checkpoint, and into its manifest. Raises DiskError if it cannot be written."""
    hashes = (manifest(folder) or {}) | {name: sha256(text.encode()).hexdigest()}
    entries = {MANIFEST: json.dumps({"format_version": FORMAT_VERSION, "sha256": hashes}, indent=2), name: text}
    try:
        for target, content in reversed(entries.items()):
            replace_text(folder / target, content)
    except OSError as error:
        raise DiskError(f"{folder / name} cannot be written ({error.strerror}); make the folder writable") from error


def holds(folder: Path, name: str) -> bool:
    """True if a finished checkpoint has the file `name`, as its manifest says; not if `add_file` was interrupted."""
    return (folder / name).is_file() and (manifest(folder) or {}).get(name) == _digest(folder / name)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files, by name, into `folder`, which is made if need be. Raises DiskError where that cannot be."""
    for name, content in contents.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_bytes(folder / name, content)
        except OSError as error:
            raise DiskError(
                f"{folder / name} cannot be written ({error.strerror}); free some space and start again"
            ) from error


def copy_folder(source: Path, target: Path) -> None:
    """Copy a finished checkpoint to `target`, all or nothing. Raises DiskError as `check_output` does."""
    size = sum(path.stat().st_size for path in source.iterdir())
    with writing(target, size) as writer:
        for path in source.iterdir():
            if path.name != MANIFEST:
                shutil.copyfile(path, writer.folder / path.name)


def check_manifest(folder: Path) -> bool:
    """Raise InputError unless the folder holds exactly the files that were written, as they were written.

    The files of a card may have come. False where there is no manifest to go by.
    """
    written = manifest(folder)
    if written is None:
        return False
    there = {path.name for path in folder.iterdir()} - {MANIFEST} - CARD
    for name in sorted(written.keys() - CARD | there):
        if name not in written:
            raise InputError(f"{folder / name} is not part of the checkpoint; remove it")
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}, which {MANIFEST} lists; {MENDING}")
        if _digest(folder / name) != written[name]:
            raise InputError(f"{folder / name} is not as it was written; {MENDING}")
    return True


def check_config(folder: Path) -> None:
    """Raise InputError where config.json was changed beside the weights it was written for.

    A folder that others than llmcompress have filled since has no say.
    """
    written = manifest(folder) or {}
    complete = all((folder / name).is_file() for name in written if name.endswith(".safetensors"))
    if complete and "config.json" in written and _digest(folder / "config.json") != written["config.json"]:
        raise InputError(f"{folder / 'config.json'} is not as it was written beside its weights; {MENDING}")


def manifest(folder: Path) -> dict[str, str] | None:
    """File name to SHA-256, from the folder's manifest; None without one. Raises InputError if it cannot be read."""
    path = folder / MANIFEST
    check_regular(path)
    if not path.is_file():
        return None
    try:
        return {str(name): str(value) for name, value in read_json(path)["sha256"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); {MENDING}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of ours. Raises OSError or ValueError where there is none."""
    return read_object(path)


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
