"""Merging the files of a checkpoint's parts into shards, in place: no more of the disk is needed than one part again.

    part-00000.safetensors ... part-00031.safetensors  ->  model.safetensors, or model-00001-of-00003.safetensors ...

First every shard is made, with its header and no data; a mark says that this is done. Then the tensors of each part
are copied to their places, and waited for until they are on the disk, before the part is removed. So an interrupted
merge is resumed: a part that is still there is copied again, all others are in the shards already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmcompress.errors import DiskError, InputError
from llmcompress.models.files.integrity import BINDING, DIGESTS, SINGLE, digest, digests
from llmcompress.models.files.output import replace_bytes, replace_file, sync
from llmcompress.models.files.reading import open_tensors
from llmcompress.runtime.progress import count_each
from llmcompress.weight.layout import piece_level

SHARD = 5 * 10**9  # bytes of a weight file, as on the Hub, unless one tensor alone has more
PIECE = 1 << 24  # bytes that are copied at a time
ALIGNMENT = 8  # of the first tensor in a file
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Head:
    """The header of a safetensors file. tensors: name -> {dtype, shape, data_offsets}; start: of the data, in bytes."""

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int


def part_file(folder: Path, number: int) -> Path:
    """Return the file of a part."""
    return folder / f"part-{number:05}.safetensors"


def merge_parts(folder: Path, mark: Path, binding: Mapping[str, Any] | None = None) -> list[Path]:
    """Merge all parts in `folder` into shards, and return these.

    `mark`: the file that says that the shards have their headers; it stays. `binding`: as for `Writer.close`. Raises
    OSError for a full disk.
    """
    if not mark.is_file():
        for left in shard_files(folder):
            left.unlink()
        _make_shards(folder, binding)
        replace_bytes(mark, b"")
    files = {path: _head(path) for path in shard_files(folder)}
    places = {name: path for path, head in files.items() for name in head.tensors}
    for part in count_each(_parts(folder), "part merged"):
        _move(part, places, files)
    return list(files)


def shard_files(folder: Path) -> list[Path]:
    """Return the shards in a folder, in order."""
    return sorted(folder.glob("model*.safetensors"))


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.safetensors"))


def _make_shards(folder: Path, binding: Mapping[str, Any] | None) -> None:
    """Make a file for every shard, of its final size, with the header alone."""
    heads = [_head(part) for part in _parts(folder)]
    digests: dict[str, str] = {}
    for head in heads:
        digests |= json.loads(head.metadata[DIGESTS])
    tensors = {name: entry for head in heads for name, entry in head.tensors.items()}
    if len(tensors) < sum(len(head.tensors) for head in heads):
        raise ValueError("two parts hold a tensor of the same name, of which one would be lost")
    levels = sorted({piece_level(name) for name in tensors})  # what smaller sizes lack is in files of its own
    sizes = [{name: _size(tensors[name]) for name in tensors if piece_level(name) == level} for level in levels]
    groups = [names for of_level in sizes for names in shards(of_level)]
    common = {"format": "pt"}
    if binding is not None:
        root = sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        common[BINDING] = json.dumps({"id": root, **binding}, sort_keys=True)
    for number, names in enumerate(groups, start=1):
        path = folder / (SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors")
        known = {DIGESTS: json.dumps({name: digests[name] for name in names}, sort_keys=True)}
        start, size = _encode_header({name: tensors[name] for name in names}, common | known)
        with path.open("wb") as file:
            file.write(start)
            file.truncate(len(start) + size)
            os.fsync(file.fileno())


def shards(sizes: Mapping[str, int], most: int | None = None) -> Iterator[list[str]]:
    """Yield the names of tensors of these sizes in bytes, in order, at most `most` bytes (SHARD) at a time."""
    names: list[str] = []
    held, most = 0, SHARD if most is None else most
    for name, size in sizes.items():
        if names and held + size > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _encode_header(tensors: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Return the header of a file with these tensors, and the size of its data.

    Wide dtypes come first, so that every tensor starts at a multiple of its width.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    stop = 0
    for name in sorted(tensors, key=lambda name: (-WIDTHS.get(tensors[name]["dtype"], 1), name)):
        start, stop = stop, stop + _size(tensors[name])
        entries[name] = {**tensors[name], "data_offsets": [start, stop]}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8)
    return len(text).to_bytes(8, "little") + text, stop


def _head(path: Path) -> Head:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    metadata = entries.pop("__metadata__", {})
    return Head(entries, metadata, 8 + size)


def _size(entry: Mapping[str, Any]) -> int:
    start, stop = entry["data_offsets"]
    return int(stop) - int(start)


def _move(part: Path, places: Mapping[str, Path], files: Mapping[Path, Head]) -> None:
    """Copy the tensors of a part to their places in the shards, and remove it once they are on the disk."""
    head = _head(part)
    with part.open("rb") as source:
        for target in sorted({places[name] for name in head.tensors}):
            with target.open("r+b") as file:
                for name, entry in head.tensors.items():
                    if places[name] == target:
                        to = files[target]
                        source.seek(head.start + entry["data_offsets"][0])
                        file.seek(to.start + to.tensors[name]["data_offsets"][0])
                        _copy(source, file, _size(entry))
                file.flush()
                os.fsync(file.fileno())
    part.unlink()
    sync(part.parent)


def data_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a safetensors file."""
    return path.stat().st_size - _head(path).start


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        piece = source.read(min(size, PIECE))
        if not piece:
            raise OSError(f"{source.name} ends {size} bytes early")
        target.write(piece)
        size -= len(piece)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    layouts: Mapping[str, str] | None = None,
    header: Mapping[str, str] | None = None,
) -> None:
    """Replace a weight file, on the disk, with the digests of its tensors in its header.

    `layouts`: of payloads; `header`: further entries. Raises DiskError for a full disk.
    """
    entries = {"format": "pt", **(header or {})}
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        with replace_file(path) as staged:
            save_file(contiguous, staged, metadata=entries | digests(contiguous, layouts or {}))
            _sort_header(staged)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{path} could not be written ({error}); free some space and start again") from error


def read_tensors(path: Path, layouts: Mapping[str, str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of `write_tensors`, and the header. Raises InputError for a file that has changed."""
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
    """Bring a safetensors header into one order: the library writes metadata in another at every run."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))
