"""Writing a checkpoint so that it is either complete or not there.

Everything goes to `OUT.partial`, one safetensors file per part as soon as that part is done (so memory never holds
the whole model), is fsynced, hashed into a manifest, and renamed to OUT at the end. A lock beside it keeps two runs
from writing the same output.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmcompress.errors import DiskError, InputError, LockedError
from llmcompress.models.integrity import DIGESTS, INDEX, MENDING, digest, digests

FORMAT_VERSION = 3  # 2: digests in the weight files, every layout listed once; 3: a weight is one tensor
MANIFEST = "manifest.json"
README = "README.md"
PLOT = "layers.png"
CARD = {README, PLOT}  # what a push adds beside the checkpoint
SHARD = 2**31  # bytes of a weight file, unless one tensor alone has more
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_output(output: Path, needed: int) -> None:
    """Raise DiskError unless a folder with `needed` bytes can be made at `output`, which must not exist yet.

    Bytes in `<output>.partial` count as free: they will be resumed from or deleted.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DiskError(f"{output} exists already; remove it or choose another output folder")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DiskError(f"{parent} is not a folder that can be written to; choose another output folder")
    free = shutil.disk_usage(parent).free + sum(path.stat().st_size for path in _staging(output).rglob("*"))
    if free < needed:
        raise DiskError(f"{output} needs {megabytes(needed)} and its disk has {megabytes(free)} free; choose another")


def _staging(output: Path) -> Path:
    """Return the folder or file that will become `output`."""
    return output.with_name(output.name + ".partial")


def megabytes(count: int) -> str:
    """A byte count for people."""
    return f"{count / 1e6:.1f} MB"


def shards(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names of tensors with these sizes in bytes, in order, as many at a time as a weight file holds."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > SHARD:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


class Writer:
    """The files of a checkpoint, collected in its staging folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[dict[str, int]] = []  # per shard: tensor name -> bytes

    def add(self, tensors: dict[str, Tensor], layouts: Mapping[str, str] | None = None) -> None:
        """Write the tensors of one part of the model, with the `layouts` of those that are payloads. Raises DiskError
        when the disk is full."""
        write_tensors(self.part(len(self.parts)), tensors, layouts or {})
        self.count(tensors)

    def count(self, tensors: Mapping[str, Tensor]) -> None:
        """Count the next part as written, with these tensors."""
        self.parts.append({name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()})

    def write(self, name: str, text: str) -> None:
        """Write a text file. Raises DiskError when the disk is full."""
        path = self.folder / name
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DiskError(f"{path} could not be written ({error}); free some space and start again") from error

    def part(self, index: int) -> Path:
        """The file of a part, until all are there."""
        return self.folder / f"part-{index:05}.safetensors"

    def close(self) -> int:
        """Name the shards as Hugging Face loaders expect them and write their index; return the weights' bytes."""
        names = [f"model-{index + 1:05}-of-{len(self.parts):05}.safetensors" for index in range(len(self.parts))]
        for index, name in enumerate(names):
            self.part(index).rename(self.folder / name)
        total = sum(sum(part.values()) for part in self.parts)
        weight_map = {key: name for name, part in zip(names, self.parts, strict=True) for key in part}
        listing = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self.write(INDEX, json.dumps(listing, indent=2))
        return sum((self.folder / name).stat().st_size for name in names)


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
        with _replacing(path) as staged:
            save_file(contiguous, staged, metadata=entries | digests(contiguous, layouts or {}))
            _sort_header(staged)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{path} could not be written ({error}); free some space and start again") from error


def read_tensors(path: Path, layouts: Mapping[str, str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that `write_tensors` wrote, and the header. Raises InputError for a file that has changed."""
    try:
        with safe_open(path, "pt") as file:
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
def writing(output: Path, keep: bool = False) -> Iterator[Writer]:
    """A `Writer` whose files become the folder `output` when the context ends well, and vanish when it does not.

    `keep`: what an earlier run left is the caller's, and so is what this one leaves when it ends badly. Raises
    LockedError while another process writes there, DiskError when the folder cannot be made or filled.
    """
    with locked(output, "output folder") as staging:
        try:
            if not keep:
                shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
            staging.mkdir(exist_ok=keep)
            yield Writer(staging)
            _publish(staging, output)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskError(f"{output}: the disk is full; free some space and start again") from error
            raise
        finally:
            if not keep:
                shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def locked(output: Path, kind: str) -> Iterator[Path]:
    """Keep other processes from writing `output`, a "folder" or "file", while it lasts; give the path beside it where
    what becomes it is made.

    Raises LockedError while another process writes there, DiskError where nothing can be written.
    """
    staging = _staging(output)
    lock = FileLock(staging.with_name(staging.name + ".lock"), timeout=0)
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
    hashes = {name: _digest(folder / name) for name in files_of(folder)}
    if hashes:
        entries = {"format_version": FORMAT_VERSION, "sha256": hashes}
        (folder / MANIFEST).write_text(json.dumps(entries, indent=2), encoding="utf-8")
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def files_of(folder: Path) -> list[str]:
    """Return the names of the files in a folder and in the folders inside it, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _publish(staging: Path, output: Path) -> None:
    seal(staging)
    if output.exists():
        output.rmdir()  # empty, or check_output would have refused it
    staging.rename(output)
    sync(output.parent)


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


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that the old one or the new one is there, on the disk, never half of it. Raises OSError."""
    with _replacing(path) as staged:
        staged.write_bytes(content)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, which takes its place, on the disk, when the context ends well."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        yield staged
        sync(staged)
        staged.rename(path)
        sync(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a finished checkpoint to `target`, all or nothing. Raises DiskError as `check_output` does."""
    names = files_of(source)
    size = sum((source / name).stat().st_size for name in names)
    check_output(target, size)
    with writing(target) as writer:
        for name in names:
            if name != MANIFEST:
                (writer.folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, writer.folder / name)


def check_manifest(folder: Path) -> bool:
    """Raise InputError unless the folder holds exactly the files that were written, as they were written.

    The files of a card may have come. False where there is no manifest to go by.
    """
    written = manifest(folder)
    if written is None:
        return False
    empty = {path.name for path in folder.iterdir() if path.is_dir() and not any(path.iterdir())}
    there = {*files_of(folder), *empty} - {MANIFEST} - CARD
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
    if not path.is_file():
        return None
    try:
        return {str(name): str(value) for name, value in read_json(path)["sha256"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); {MENDING}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of ours."""
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
