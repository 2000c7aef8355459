"""Checks of a compressed checkpoint before every load: damage is an error, never a model that looks fine.

The header of every safetensors file has the digest of each of its tensors. A flipped bit, a swapped file or an edited
header is found wherever the file went: through `save_pretrained`, a copy, or the Hub.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.errors import InputError, list_names
from llmcompress.models.files.reading import MENDING, error_text, open_tensors, read_json
from llmcompress.weight.layout import piece_level

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DIGESTS = "llmcompress_xxh3"  # the entry of a safetensors header: JSON, tensor name -> digest
BINDING = "llmcompress_checkpoint"  # another entry: JSON, digests of what the file belongs to
FLOATS = {"F64", "F32", "F16", "BF16"}
EXPONENTS = {
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float32: (np.uint32, 0x7F800000),
    torch.float64: (np.uint64, 0x7FF0000000000000),
}
RANK: ContextVar[int | None] = ContextVar("rank", default=None)  # of the model that transformers is about to fetch
DIGITS = 10  # more than any number of components has


@dataclass(frozen=True)
class TensorSpec:
    """The requirements of a model on one stored tensor. dtype: safetensors' name, None for any float.

    floats: the places of numbers in a payload as (dtype, first byte, byte after the last). layout: of a payload.
    """

    shape: tuple[int, ...]
    dtype: str | None = None
    floats: tuple[tuple[torch.dtype, int, int], ...] = ()
    layout: str = ""


def digest(tensor: Tensor, layout: str = "", stored: NDArray[np.uint8] | None = None) -> str:
    """Return the digest of a tensor's dtype, shape, bytes, and layout; `stored`: its bytes, if they are known.

    It protects against damage, not against forgery; it is fast, since every load computes it.
    """
    state = xxhash.xxh3_64(f"{tensor.dtype} {list(tensor.shape)} {layout} ".encode())
    state.update((_bytes(tensor) if stored is None else stored).data)
    return state.hexdigest()


def all_finite(tensor: Tensor, wanted: TensorSpec, stored: NDArray[np.uint8] | None = None) -> bool:
    """True if no float of a tensor, or in a payload, is infinite or NaN; `stored`: its bytes, if they are known.

    Such numbers have all bits of their exponent set. numpy checks that in a fraction of torch's time.
    """
    stored = _bytes(tensor) if stored is None else stored
    whole = [(tensor.dtype, 0, len(stored))] if tensor.is_floating_point() else []
    for dtype, start, stop in wanted.floats or whole:
        kind, exponent = EXPONENTS[dtype]
        if ((stored[start:stop].view(kind) & exponent) == exponent).any():
            return False
    return True


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    values: NDArray[np.uint8] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return values


def digests(tensors: Mapping[str, Tensor], layouts: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a safetensors file with `tensors`; `layouts`: of payloads by name."""
    by_name = {name: digest(tensor, layouts.get(name, "")) for name, tensor in tensors.items()}
    return {DIGESTS: json.dumps(by_name, sort_keys=True)}


def size_level(nested: Iterable[str], rank: int | None) -> int:
    """Return the number of the smallest size with `rank` components, of those that a config records, and the whole.

    Raises InputError for a size that is no number of components.
    """
    if not all(size.isdecimal() and len(size) < DIGITS for size in nested):
        raise InputError(f"config.json records sizes that are none in its quantization_config; {MENDING}")
    ranks = sorted(map(int, nested))
    return len(ranks) if rank is None else bisect_left(ranks, rank)


def files_beyond(folder: Path, rank: int | None) -> set[str]:
    """Return the names of weight files that a model with `rank` components of its low-rank terms does not need.

    Raises InputError for a config.json or an index that cannot be read.
    """
    entries = read_json(config, MENDING) if (config := folder / "config.json").is_file() else {}
    nested = (entries.get("quantization_config") or {}).get("nested")
    if rank is None or not isinstance(nested, dict) or not (folder / INDEX).is_file():
        return set()
    level, placed = size_level(nested, rank), weight_map(folder / INDEX)
    return set(placed.values()) - {file for name, file in placed.items() if piece_level(name) <= level}


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's weights. Raises InputError if there are none or two sets."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise InputError(f"{folder} has both {SINGLE} and {INDEX}; remove the one that is not part of the checkpoint")
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}; {MENDING}")
    return [folder / name for name in sorted(set(weight_map(index).values()))]


def weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor in an index. Raises InputError for names that lead out of its folder."""
    try:
        names = {str(tensor): str(file) for tensor, file in read_json(index)["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} cannot be read ({type(error).__name__}: {error}); {MENDING}") from error
    for name in names.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(f"{index} names the file {name!r}, which is no safetensors file beside it; {MENDING}")
    return names


def check_tensors(files: Sequence[Path], expected: Mapping[str, TensorSpec], optional: Iterable[str] = ()) -> None:
    """Raise InputError unless `files` of one folder hold exactly the `expected` tensors, undamaged.

    `optional` ones may be missing. Symbolic links are followed, since the Hub's cache consists of them.
    """
    folders = {path.parent for path in files}
    if len(folders) != 1 or any(path.suffix != ".safetensors" for path in files):
        raise InputError(
            f"the weights {list_names(sorted(map(str, files)))} are not safetensors files of one folder; {MENDING}"
        )
    index, given = folders.pop() / INDEX, {path.name for path in files}
    placed = None
    if files[0].name != SINGLE and index.is_file():
        placed = {name: file for name, file in weight_map(index).items() if file in given}
    missing = set(expected).difference(optional)
    for path in files:
        names = _check_file(path, expected)
        strangers = names if placed is None else {name for name in names if placed.pop(name, None) != path.name}
        if placed is not None and strangers:
            raise InputError(
                f"{path} holds {list_names(sorted(strangers))}, which {index.name} has elsewhere; {MENDING}"
            )
        missing -= names
    if placed:
        raise InputError(f"{index} lists {list_names(sorted(placed))}, which its files do not hold; {MENDING}")
    if missing:
        raise InputError(f"{files[0].parent} lacks the tensors {list_names(sorted(missing))}; {MENDING}")


def _check_file(path: Path, expected: Mapping[str, TensorSpec]) -> set[str]:
    """Return the names of the tensors in one file. Raises InputError unless each is expected and undamaged."""
    with open_tensors(path, MENDING) as file:
        written = read_digests(path, file.metadata())
        names = set(file.keys())
        for name in sorted(names):
            wanted = _requirement(path, name, file.get_slice(name), expected)
            tensor = file.get_tensor(name)
            stored = _bytes(tensor)
            if digest(tensor, wanted.layout, stored) != written.get(name):
                raise InputError(f"{path}: {name} is not as it was written, so the file is damaged; {MENDING}")
            if not all_finite(tensor, wanted, stored):
                raise InputError(f"{path}: {name} holds NaN or Inf; compress or train the model again")
    return names


def read_binding(path: Path) -> dict[str, str]:
    """Return the entry BINDING of a weight file; empty for one without. Raises InputError for a damaged file."""
    with open_tensors(path, MENDING) as file:
        text = (file.metadata() or {}).get(BINDING, "{}")
    try:
        return {str(key): str(value) for key, value in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error_text(error)}); {MENDING}") from error


def read_digests(path: Path, metadata: dict[str, str] | None) -> dict[str, str]:
    """Return the digests in a file's header. Raises InputError for one without."""
    try:
        return {str(name): str(value) for name, value in json.loads((metadata or {})[DIGESTS]).items()}
    except (KeyError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} does not carry the digests that llmcompress writes, so it cannot be checked; {MENDING}"
        ) from error


def _requirement(path: Path, name: str, piece: Any, expected: Mapping[str, TensorSpec]) -> TensorSpec:
    """Return the requirements on a tensor. Raises InputError unless its header meets them."""
    if name not in expected:
        raise InputError(f"{path}: {name} is not part of the model that config.json describes; {MENDING}")
    wanted = expected[name]
    shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
    fits = dtype in FLOATS if wanted.dtype is None else dtype == wanted.dtype
    if shape != wanted.shape or not fits:
        required = f"{wanted.dtype or 'a float type'} {list(wanted.shape)}"
        raise InputError(f"{path}: {name} is {dtype} {list(shape)} where config.json requires {required}; {MENDING}")
    return wanted
