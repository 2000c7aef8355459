"""Is a compressed checkpoint whole? Asked before every load, so that damage is one sentence and never a model that
looks fine.

Every safetensors file of ours carries in its own header the digest of each of its tensors, so a flipped bit, a
swapped file or an edited header shows wherever the file went: through `save_pretrained`, a copy, or the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmcompress.errors import InputError, listed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DIGESTS = "llmcompress_xxh3"  # the entry of a safetensors header: JSON, tensor name -> digest
FLOATS = {"F64", "F32", "F16", "BF16"}
EXPONENTS = {
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float32: (np.uint32, 0x7F800000),
    torch.float64: (np.uint64, 0x7FF0000000000000),
}
MENDING = "download or write it again"


@dataclass(frozen=True)
class Expected:
    """What the model needs of one stored tensor. `dtype`: in safetensors' words, None for any float. Of a payload, also
    `floats`, where numbers lie in it as (dtype, first byte, the byte after the last), and its `layout`."""

    shape: tuple[int, ...]
    dtype: str | None = None
    floats: tuple[tuple[torch.dtype, int, int], ...] = ()
    layout: str = ""


def digest(tensor: Tensor, layout: str = "") -> str:
    """The digest of a tensor: of its dtype, its shape, its bytes, and the layout that gives them a meaning.

    Against damage, not against forgers, and fast: it is taken of every tensor before every load.
    """
    return _digest(_bytes(tensor), tensor, layout)


def _digest(stored: NDArray[np.uint8], tensor: Tensor, layout: str) -> str:
    found = xxhash.xxh3_64(f"{tensor.dtype} {list(tensor.shape)} {layout} ".encode())
    found.update(stored.data)
    return found.hexdigest()


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return found


def _finite(stored: NDArray[np.uint8], places: Iterable[tuple[torch.dtype, int, int]]) -> bool:
    """Whether none of the numbers in these places (dtype, first byte, the byte after the last) is infinite or NaN.

    Those have all bits of their exponent set; numpy looks at them in a fraction of the time that torch takes.
    """
    for dtype, start, stop in places:
        kind, exponent = EXPONENTS[dtype]
        if ((stored[start:stop].view(kind) & exponent) == exponent).any():
            return False
    return True


def digests(tensors: Mapping[str, Tensor], layouts: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a safetensors file that holds `tensors`; `layouts`: of those that are payloads, by name."""
    found = {name: digest(tensor, layouts.get(name, "")) for name, tensor in tensors.items()}
    return {DIGESTS: json.dumps(found, sort_keys=True)}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights. Raises InputError where that is not clear."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise InputError(f"{folder} has both {SINGLE} and {INDEX}; remove the one that is not part of the checkpoint")
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}; {MENDING}")
    return [folder / name for name in sorted(set(weight_map(index).values()))]


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name, from an index. Raises InputError for names that lead out of its folder."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(file) for tensor, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} cannot be read ({type(error).__name__}: {error}); {MENDING}") from error
    for name in names.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(f"{index} names the file {name!r}, which is no safetensors file beside it; {MENDING}")
    return names


def check(files: Sequence[Path], expected: Mapping[str, Expected], optional: Iterable[str] = ()) -> None:
    """Raises InputError unless `files` hold exactly the `expected` tensors, undamaged; `optional` ones may be missing.

    `files` are one checkpoint's, in one folder; symbolic links are followed, as the Hub's cache is made of them.
    """
    folders = {path.parent for path in files}
    if len(folders) != 1 or any(path.suffix != ".safetensors" for path in files):
        raise InputError(
            f"the weights {listed(sorted(map(str, files)))} are not safetensors files of one folder; {MENDING}"
        )
    index = folders.pop() / INDEX
    placed = weight_map(index) if files[0].name != SINGLE and index.is_file() else None
    missing = set(expected).difference(optional)
    for path in files:
        names = _check_file(path, expected)
        strangers = names if placed is None else {name for name in names if placed.pop(name, None) != path.name}
        if placed is not None and strangers:
            raise InputError(f"{path} holds {listed(sorted(strangers))}, which {index.name} has elsewhere; {MENDING}")
        missing -= names
    if placed:
        raise InputError(f"{index} lists {listed(sorted(placed))}, which its files do not hold; {MENDING}")
    if missing:
        raise InputError(f"{files[0].parent} lacks the tensors {listed(sorted(missing))}; {MENDING}")


def _check_file(path: Path, expected: Mapping[str, Expected]) -> set[str]:
    """The names of the tensors in one file. Raises InputError unless each is as expected and as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            written = _written(path, file.metadata())
            names = set(file.keys())
            for name in sorted(names):
                wanted = _wanted(path, name, file.get_slice(name), expected)
                tensor = file.get_tensor(name)
                stored = _bytes(tensor)
                if _digest(stored, tensor, wanted.layout) != written.get(name):
                    raise InputError(f"{path}: {name} is not as it was written, so the file is damaged; {MENDING}")
                whole = [(tensor.dtype, 0, len(stored))] if tensor.is_floating_point() else []
                if not _finite(stored, wanted.floats or whole):
                    raise InputError(f"{path}: {name} holds NaN or Inf; compress or train the model again")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({reason}); {MENDING}") from error
    return names


def _written(path: Path, metadata: dict[str, str] | None) -> dict[str, str]:
    """The digests in a file's header."""
    try:
        found = json.loads((metadata or {})[DIGESTS])
        return {str(name): str(value) for name, value in found.items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} does not carry the digests that llmcompress writes, so it cannot be checked; {MENDING}"
        ) from error


def _wanted(path: Path, name: str, piece: Any, expected: Mapping[str, Expected]) -> Expected:
    """What is expected of a tensor. Raises InputError unless its header agrees."""
    if name not in expected:
        raise InputError(f"{path}: {name} is not part of the model that config.json describes; {MENDING}")
    wanted = expected[name]
    shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
    fits = dtype in FLOATS if wanted.dtype is None else dtype == wanted.dtype
    if shape != wanted.shape or not fits:
        asked = f"{wanted.dtype or 'a float type'} {list(wanted.shape)}"
        raise InputError(f"{path}: {name} is {dtype} {list(shape)} where config.json asks for {asked}; {MENDING}")
    return wanted
