"""Weights in files of `torch.save`, read as safetensors files are: headers, one tensor at a time, nothing that runs.

Such a file is a program. torch's reader for weights runs none but those that put tensors together, and maps the file,
so that memory holds what is copied out of it. What it would unpack before, and tensors beyond the file, are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.models.files.reading import MOST_HEADER, check_regular

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NAMES = {  # of dtypes, as safetensors has them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
# What torch's reader and zipfile raise for files that were damaged, or made to do damage
DAMAGES = (
    *(UnpicklingError, BadZipFile, EOFError, OSError, ValueError, TypeError, LookupError),
    *(AttributeError, ArithmeticError, RuntimeError, ImportError, MemoryError),
)
WAY_OUT = "take the model's safetensors files, or write them where you trust it"


@dataclass(frozen=True, eq=False)
class PickledSlice:
    """A tensor as safetensors' slices are: parts of it are copied when they are asked for."""

    tensor: Tensor

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        """Return safetensors' name of the dtype."""
        return NAMES.get(self.tensor.dtype, str(self.tensor.dtype))

    def __getitem__(self, place: int | slice) -> Tensor:
        return self.tensor[place].clone()


@dataclass(frozen=True, eq=False)
class PickledFile:
    """An open file of `torch.save`, as safetensors' files are."""

    tensors: dict[str, Tensor]

    def keys(self) -> Iterable[str]:
        """Return the names of the tensors."""
        return self.tensors.keys()

    def get_slice(self, key: str) -> PickledSlice:
        """Return a tensor to take parts of."""
        return PickledSlice(self.get_tensor(key))

    def get_tensor(self, key: str) -> Tensor:
        """Return a window into the file."""
        return self.tensors[key]


@contextmanager
def open_pickled(path: Path) -> Iterator[PickledFile]:
    """Open a file of `torch.save` that maps names to tensors. Raises InputError for any other, without running it."""
    check_regular(path)
    if not is_zipfile(path):
        raise InputError(f"{path} is damaged, or was saved by a torch before 1.6; {WAY_OUT}")
    try:
        with ZipFile(path) as parts:
            programs = [part.file_size for part in parts.infolist() if part.filename.endswith(".pkl")]
            is_plain = all(part.compress_type == ZIP_STORED for part in parts.infolist())
        if not is_plain or sum(programs) > MOST_HEADER:
            raise InputError(f"{path} is packed in a way in which torch saves no weights; {WAY_OUT}")
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DAMAGES as error:
        kind = "holds more than tensors, which may run code" if isinstance(error, UnpicklingError) else "is damaged"
        raise InputError(f"{path} {kind} ({type(error).__name__}), and is not read; {WAY_OUT}") from error
    if not isinstance(held, dict) or not held:
        raise InputError(f"{path} holds a {type(held).__name__} that maps no names to tensors; {WAY_OUT}")
    for name, value in held.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise InputError(f"{path} holds {str(name)[:80]!r}, which is no plain tensor; {WAY_OUT}")
    yield PickledFile(held)


def _is_plain(value: object) -> bool:
    """True for a tensor of numbers that lie in the file one by one: no more of them than it holds."""
    if type(value) not in (Tensor, nn.Parameter) or not isinstance(value, Tensor):
        return False
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
