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
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.models.files.file_names import MANIFEST, REPORT
from llmcompress.models.files.integrity import INDEX, MENDING, read_binding
from llmcompress.models.files.output import (
    MOUNTED,
    check_writable,
    claim_folder,
    clear_folder,
    disk_errors,
    lock_output,
    merge_mark,
    remove_folder,
    replace_bytes,
    replace_text,
    staging_of,
    sync,
)
from llmcompress.models.files.reading import check_regular, open_tensors, read_json
from llmcompress.models.files.tensor_files import data_bytes, merge_parts, part_file, shard_files, write_tensors
from llmcompress.runtime.progress import count_each, digest_file

FORMAT_VERSION = 3  # 2: digests in the weight files, every layout listed once; 3: a weight is one tensor
NEXT_MANIFEST = ".manifest.json.next"  # of a folder that gets one more file
UNFINISHED = ".*.partial"  # what `replace_file` stages
README = "README.md"
PLOT = "layers.png"
CARD = {README, PLOT}  # what a push adds beside the checkpoint
CHECKPOINT = "checkpoint"  # the folder of unfinished work that becomes the output
PART = 2**28  # bytes that are written at a time
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
MOUNTS = {errno.EBUSY, errno.EXDEV}  # also where `check_writable` sees none: a folder of the same disk


class Writer:
    """The files of a checkpoint, collected in a folder; `count`: the number of written parts."""

    def __init__(self, folder: Path, count: int = 0) -> None:
        self.folder = folder
        self.count = count
        self.mark = merge_mark(folder.parent)

    def add(self, tensors: dict[str, Tensor], layouts: Mapping[str, str] | None = None) -> None:
        """Write the tensors of one part of the model; `layouts`: of its payloads. Raises DiskError for a full disk."""
        write_tensors(part_file(self.folder, self.count), tensors, layouts or {})
        self.count += 1

    def write(self, name: str, text: str) -> None:
        """Write a text file. Raises DiskError for a full disk."""
        with disk_errors(self.folder / name):
            (self.folder / name).write_text(text, encoding="utf-8")

    def close(self, binding: Mapping[str, Any] | None = None) -> int:
        """Merge all parts into files as Hugging Face loaders expect them, and return their bytes.

        With a `binding`, each file says that it belongs to the others, and to the files that it names.
        """
        with disk_errors(self.folder):
            files = merge_parts(self.folder, self.mark, binding)
        if len(files) > 1:
            places: dict[str, str] = {}
            for path in files:
                with open_tensors(path) as file:
                    places |= dict.fromkeys(file.keys(), path.name)
            total = sum(data_bytes(path) for path in files)
            listing = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            self.write(INDEX, json.dumps(listing, indent=2))
        return sum(path.stat().st_size for path in files)


@contextmanager
def write_checkpoint(output: Path, needed: int = 0) -> Iterator[Writer]:
    """Yield a `Writer` whose files become the folder `output` if the context ends well, and vanish otherwise.

    Raises LockedError while another process writes there; DiskError as `check_writable` does with `needed`, for a
    folder that cannot be made or filled, and for an output that appeared meanwhile.
    """
    with lock_output(output, "output folder"):
        check_writable(output, needed)
        with make_checkpoint(output) as writer:
            yield writer


@contextmanager
def make_checkpoint(output: Path) -> Iterator[Writer]:
    """Do as `write_checkpoint` for a caller that holds the lock and has checked the output."""
    staging = staging_of(output)
    claim_folder(staging)
    try:
        clear_folder(staging)
        with publish_checkpoint(staging, output) as writer:
            yield writer
    finally:
        remove_folder(staging)


@contextmanager
def publish_checkpoint(staging: Path, output: Path, count: int = 0) -> Iterator[Writer]:
    """Yield a `Writer` in `staging`, which has `count` parts; its folder becomes `output` if the context ends well."""
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
    """Rename the complete `folder` to `output`. Raises DiskError for an output that appeared since it was checked, or
    where a disk is mounted."""
    try:
        folder.rename(output)  # an empty folder is replaced
    except OSError as error:
        if error.errno in TAKEN:
            raise DiskError(
                f"{output} has appeared while it was made; move it away, or choose another output folder"
            ) from error
        if error.errno in MOUNTS:
            raise DiskError(f"{output} {MOUNTED}") from error
        raise
    sync(output.parent)


def seal(folder: Path) -> None:
    """Write the manifest of the files in a folder, and wait until all of it is on the disk."""
    hashes = {name: digest_file(folder / name) for name in files_of(folder) if name != MANIFEST}
    if hashes:
        (folder / MANIFEST).write_text(manifest_text(hashes), encoding="utf-8")
    for path in count_each([*folder.rglob("*"), folder], "file on the disk"):
        sync(path)


def manifest_text(hashes: Mapping[str, str]) -> str:
    """Return the manifest of files with these SHA-256 by name."""
    return json.dumps({"format_version": FORMAT_VERSION, "sha256": dict(hashes)}, indent=2)


def files_of(folder: Path) -> list[str]:
    """Return the names of the files in a folder and in the folders inside it, in order.

    Names with a dot in front are left out: what is unfinished, and what Git and the Hub's client put beside a copy.
    """
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("."))


def check_can_add(folder: Path) -> None:
    """Raise RecipeError for a folder that is not as `compress` writes it, DiskError for one that is read-only."""
    if manifest(folder) is None or not (folder / REPORT).is_file():
        raise RecipeError(
            f"{folder} is no folder with {MANIFEST} and {REPORT}, as compress writes it, and results are kept in no "
            f"other; give such a folder, or leave out --save"
        )
    if not os.access(folder, os.W_OK):
        raise DiskError(f"{folder} cannot be written to; make the folder writable, or leave out --save")


def add_file(folder: Path, name: str, text: str) -> None:
    """Put a text file into a finished checkpoint, and into its manifest, even if the power fails in between.

    Raises DiskError if it cannot be written.
    """
    hashes = (manifest(folder) or {}) | {name: sha256(text.encode()).hexdigest()}
    with disk_errors(folder / name, "make the folder writable"):
        remove_unfinished(folder)
        replace_text(folder / NEXT_MANIFEST, manifest_text(hashes))  # which `manifest` reads once the file is there
        replace_text(folder / name, text)
        (folder / NEXT_MANIFEST).replace(folder / MANIFEST)
        sync(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove what an interrupted `add_file` left in a finished checkpoint. Raises OSError."""
    following = folder / NEXT_MANIFEST
    if following.is_file():
        following.replace(folder / MANIFEST) if _is_next(folder) else following.unlink()
    for path in folder.glob(UNFINISHED):
        path.unlink()


def has_file(folder: Path, name: str) -> bool:
    """True if a finished checkpoint has the file `name`, as its manifest says; not if `add_file` was interrupted."""
    return (folder / name).is_file() and (manifest(folder) or {}).get(name) == digest_file(folder / name)


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files, by name, into `folder`, which is made if need be. Raises DiskError if that fails."""
    for name, content in contents.items():
        with disk_errors(folder / name):
            folder.mkdir(parents=True, exist_ok=True)
            replace_bytes(folder / name, content)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a finished checkpoint to `target`, all or nothing. Raises DiskError as `check_writable` does."""
    names = files_of(source)
    with write_checkpoint(target, sum((source / name).stat().st_size for name in names)) as writer:
        for name in names:
            if name != MANIFEST:
                (writer.folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, writer.folder / name)


def check_manifest(folder: Path, unread: Set[str] = frozenset()) -> bool:
    """Raise InputError unless the folder holds exactly the files of its manifest, unchanged, and perhaps a card.

    `unread`: names of files that may be missing. Returns False for a folder without a manifest.
    """
    written = manifest(folder)
    if written is None:
        return False
    written = {name: value for name, value in written.items() if name not in unread}
    folders = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    empty = {path.name for path in folders if not any(path.iterdir())}
    present = {*files_of(folder), *empty} - {MANIFEST} - CARD - unread
    for name in sorted(written.keys() - CARD | present):
        if name not in written:
            raise InputError(f"{folder / name} is not part of the checkpoint; remove it")
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}, which {MANIFEST} lists; {MENDING}")
        if digest_file(folder / name) != written[name]:
            raise InputError(f"{folder / name} is not as it was written; {MENDING}")
    return True


def check_config(folder: Path) -> None:
    """Raise InputError if config.json was changed beside the weights that it was written for.

    A folder that other tools have filled since is not judged.
    """
    written = manifest(folder) or {}
    complete = all((folder / name).is_file() for name in written if name.endswith(".safetensors"))
    if complete and "config.json" in written and digest_file(folder / "config.json") != written["config.json"]:
        raise InputError(f"{folder / 'config.json'} is not as it was written beside its weights; {MENDING}")


def manifest(folder: Path) -> dict[str, str] | None:
    """Return SHA-256 by file name from the folder's manifest; None without one of these weights.

    Raises InputError for a broken one.
    """
    written = _read_manifest(folder / (NEXT_MANIFEST if _is_next(folder) else MANIFEST))
    return None if written is None or _is_saved_since(folder) else written


def _is_saved_since(folder: Path) -> bool:
    """True if transformers has put its weights beside a manifest, as `push_to_hub` does; these name no tokenizer."""
    try:
        entries = [read_binding(path) for path in shard_files(folder)[:1]]
    except InputError:  # the manifest tells of the damage
        return False
    return any("config" in entry and "tokenizer" not in entry for entry in entries)


def _is_next(folder: Path) -> bool:
    """True if an interrupted `add_file` left a file and the manifest that lists it, but the old one in its place."""
    following = _read_manifest(folder / NEXT_MANIFEST) or {}
    before = (_read_manifest(folder / MANIFEST) or {}) if following else {}
    changed = {name: value for name, value in following.items() if before.get(name) != value}
    whole = ((folder / name).is_file() and digest_file(folder / name) == value for name, value in changed.items())
    return bool(changed) and all(whole)


def _read_manifest(path: Path) -> dict[str, str] | None:
    check_regular(path)
    if not path.is_file():
        return None
    try:
        written = {str(name): str(value) for name, value in read_json(path)["sha256"].items()}
        outside = [name for name in written if "\n" in name or not {"", ".", ".."}.isdisjoint(name.split("/"))]
        if outside:
            raise ValueError(f"it lists {outside[0][:80]!r}, which is no file in its folder")
        return written
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); {MENDING}") from error
