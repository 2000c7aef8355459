"""The headers of a dense model's tensors on disk, and one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmcompress.errors import InputError, is_out_of_memory, list_names
from llmcompress.models.dense import pickled
from llmcompress.models.dense.config import MODEL, config_errors, read_entries
from llmcompress.models.files.integrity import INDEX, SINGLE
from llmcompress.models.files.reading import error_text, open_tensors
from llmcompress.weight.inputs import InputFormat

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' names of dense dtypes, bytes per value
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that models are loaded in
# dtypes that other tools pack weights in
PACKED = {"I8": 1, "I16": 2, "U16": 2, "U32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
COPY_AGAIN = "download or copy it again"
FILES = {(SINGLE, INDEX): "safetensors", (pickled.SINGLE, pickled.INDEX): "bin"}  # the first that is there counts
# What wrappers put into names: torch.compile, FSDP, recomputation and Lightning anywhere; several processes, PEFT and
# models that see before all of them.
INSIDE = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
BEFORE = ("module.", "base_model.model.")
OF_TEXT = re.compile(r"(model\.)?language_model\.")
WIDEST = 8  # bytes of a value of a dtype that no model has, which is refused where it is read
BUFFERS = {"I64": 8, "I32": 4, "U8": 1, "BOOL": 1}  # further dtypes of persistent buffers


@dataclass(frozen=True)
class Piece:
    """A matrix or bias inside a stored tensor.

    expert: its place in the first dimension of a tensor of all experts, None for rows of another tensor. rows: of the
    matrix `[out, in]`, None for all. transposed: True if stored as `[in, out]`.
    """

    expert: int | None
    rows: slice | None = None
    transposed: bool = False

    def of(self, stored: Any) -> Tensor:
        """Return a copy of the piece of a slice of safetensors; nothing else of it is read."""
        if self.expert is None:
            rows: Tensor = stored[self.rows]
            return rows
        return self.cut_out(stored[self.expert])

    def cut_out(self, matrix: Tensor) -> Tensor:
        """Return a copy of the piece of its expert's matrix, or of a tensor without experts."""
        turned = matrix.T if self.transposed else matrix
        return (turned if self.rows is None else turned[self.rows]).clone(memory_format=torch.contiguous_format)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the piece, unpacked, of a tensor of shape `stored`."""
        each = stored if self.expert is None else stored[1:]
        matrix = each[::-1] if self.transposed else each
        return matrix if self.rows is None else (len(range(matrix[0])[self.rows]), *matrix[1:])


@dataclass(frozen=True)
class Packing:
    """A tensor in few bits, as another library stores it: codes, scales and what belongs to them.

    form: for messages, as `MXFP4`. shape: of its numbers. parts: stored tensors by the names that `unpack` has for
    them; those of all experts of a block have the experts first. unpack: the library's own way to numbers. inputs: what
    the inputs of the linear are rounded to, `unknown` for a format without a name here; None where they stay.
    """

    form: str
    shape: tuple[int, ...]
    parts: Mapping[str, Header]
    unpack: Callable[[dict[str, Tensor]], Tensor]
    inputs: InputFormat | Literal["unknown"] | None = None

    def __str__(self) -> str:
        return self.form if self.inputs is None else f"{self.form}, whose rounding of inputs is left out"

    def read(self, dtype: str, expert: int | None) -> Tensor:
        """Return the numbers, those of one `expert` alone unless None. Raises InputError for what cannot be unpacked.

        dtype: safetensors' name.
        """
        first = next(iter(self.parts.values()))
        stored = {name: _read_slice(part, expert) for name, part in self.parts.items()}
        try:
            numbers = self.unpack(stored).to(DTYPES[dtype])
        except config_errors() as error:
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"{first.key} in {first.file} cannot be read as {self.form} ({error_text(error)}); {COPY_AGAIN}"
            ) from error
        if numbers.shape != (self.shape if expert is None else self.shape[1:]):
            raise InputError(f"{first.key} in {first.file} is not of the shape that is stored for it; {COPY_AGAIN}")
        return numbers


@dataclass(frozen=True)
class Header:
    """One stored tensor: its shape, its dtype by safetensors' name, its file, and its key there.

    Shape and dtype are those of the `piece`, or of the rows of all `parts`, if there are any; of a tensor with a
    `packing`, those of its numbers. wrapped: the key as the file has it, if names of a wrapper are in it.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    key: str
    piece: Piece | None = None
    parts: tuple[Header, ...] = ()
    packing: Packing | None = None
    wrapped: str = ""

    @property
    def sources(self) -> tuple[Header, ...]:
        """The stored tensors that it is read from."""
        if self.parts:
            return tuple(source for part in self.parts for source in part.sources)
        if self.packing is not None:
            return tuple(source for part in self.packing.parts.values() for source in part.sources)
        return (self,)

    @property
    def bytes(self) -> int:
        """Size of the values on disk."""
        if self.packing is not None:
            whole = sum(part.bytes for part in self.packing.parts.values())
            return whole * prod(self.shape) // prod(self.packing.shape)
        return self.bytes_of_numbers

    @property
    def bytes_of_numbers(self) -> int:
        """Size of the values in files that have nothing in few bits."""
        return prod(self.shape) * {**FLOATS, **BUFFERS, **PACKED}.get(self.dtype, WIDEST)


Stored = Mapping[str, Header]
Packings = dict[str, Packing]  # by the name of the matrix, as a plain checkpoint has it


@dataclass(frozen=True)
class Folder:
    """A folder for a reader of packed matrices: its place, its tensors, and its settings of the quantization."""

    place: Path
    stored: Stored
    settings: Mapping[str, Any]

    def require(self, is_right: bool, key: str, form: str) -> None:
        """Raise InputError for a tensor unless it is right."""
        if not is_right:
            file = self.stored[key].file
            raise InputError(f"{key} in {file} and its scales are no matrices in {form}; download the model again")


def read_headers(folder: Path) -> dict[str, Header]:
    """Return the header of every tensor in the folder's weight files, by the names in the files without wrappers'.

    Raises InputError for files that are missing, damaged, or hold anything but tensors.
    """
    headers: list[Header] = []
    for path in model_files(folder):
        with open_weights(path) as file:
            for key in file.keys():  # noqa: SIM118 - an open file is not a mapping
                piece = file.get_slice(key)
                headers.append(Header(tuple(piece.get_shape()), piece.get_dtype(), path, key))
    stored: dict[str, Header] = {}
    names = _unwrap([header.key for header in headers], folder)
    for name, header in zip(names, headers, strict=True):
        if name in stored:
            raise InputError(
                f"tensor {name} is stored twice, in {stored[name].file.name} and {header.file.name} of {folder}; "
                f"remove the file that is not part of the model"
            )
        stored[name] = header if name == header.key else replace(header, key=name, wrapped=header.key)
    return stored


def _unwrap(keys: list[str], folder: Path) -> list[str]:
    """Return names of tensors without what wrappers put into them."""
    names = [INSIDE.sub("", key) for key in keys]
    while prefix := next((each for each in BEFORE if names and all(name.startswith(each) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    if any(OF_TEXT.match(name) for name in names):
        entries = read_entries(folder / MODEL, folder)
        if not any(
            isinstance(entries[name], dict)
            for name in entries
            if name.endswith("_config") and name != "quantization_config"
        ):
            names = [OF_TEXT.sub(r"\1", name, count=1) if OF_TEXT.match(name) else name for name in names]
    return names


def open_weights(path: Path) -> AbstractContextManager[Any]:
    """Open a file with weights, as safetensors' files are. Raises InputError for a damaged one."""
    return pickled.open_pickled(path) if path.suffix == ".bin" else open_tensors(path, COPY_AGAIN)


def has_model(folder: Path) -> bool:
    """True if a folder has the weights of a model, or an index of them."""
    return any((folder / name).is_file() for names in FILES for name in names)


def has_weights(folder: Path) -> bool:
    """True if a folder has weight files that are read here, or parts of them."""
    return has_model(folder) or any(folder.glob("*.safetensors*"))


def model_files(folder: Path) -> list[Path]:
    """Return the files that make up the model, chosen as transformers chooses them."""
    for (single, index), kind in FILES.items():
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _indexed_files(folder, index, kind)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise InputError(
            f"{folder} has its weights only as pickle files of other names than {pickled.SINGLE}; {pickled.WAY_OUT}"
        )
    raise InputError(f"{folder} has no {SINGLE} and no {INDEX}; give a folder with the model's weights")


def _indexed_files(folder: Path, index: str, kind: str) -> list[Path]:
    names = read_entries(folder / index, folder).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{folder / index} has no weight_map; download the model again")
    files = sorted({str(name) for name in names.values()})
    outside = [name for name in files if Path(name).name != name or not name.endswith(f".{kind}")]
    if outside:
        raise InputError(f"{folder / index} names {outside[0]!r}, which is no {kind} file of the folder; correct it")
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise InputError(f"{folder} lacks {list_names(absent)}, which {index} names; download the model again")
    return [folder / name for name in files]


def read_tensor(header: Header) -> Tensor:
    """Return a copy of one tensor; its file is closed again."""
    if header.parts:
        return torch.cat([read_tensor(part) for part in header.parts])
    if header.packing is not None:
        numbers = header.packing.read(header.dtype, None if header.piece is None else header.piece.expert)
        return numbers if header.piece is None else header.piece.cut_out(numbers)
    key = header.wrapped or header.key
    with open_weights(header.file) as file:
        if header.piece is not None:
            return header.piece.of(file.get_slice(key))
        tensor: Tensor = file.get_tensor(key)
        return tensor.clone()  # the original is a window into the mapped file


def _read_slice(header: Header, expert: int | None) -> Tensor:
    """Return a tensor, or what it holds of one expert."""
    return read_tensor(header if expert is None else replace(header, piece=Piece(expert)))


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype in which most floats of the folder's safetensors files are stored; float32 without any.

    A model that is loaded in it is a window into these files, which all processes of a machine share.
    """
    counts = dict.fromkeys(DTYPES, 0)
    for header in read_headers(folder).values() if has_weights(folder) else ():
        if header.dtype in counts:
            counts[header.dtype] += prod(header.shape)
    return DTYPES[max(counts, key=lambda name: counts[name])]
