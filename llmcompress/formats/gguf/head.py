"""The head of a GGUF file: the model, its origin, its vocabulary, and the list of tensors. It tells the file's size."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmcompress.errors import RecipeError
from llmcompress.formats.gguf.model import GGUFModel, gguf_model
from llmcompress.formats.gguf.tensor_types import TensorType
from llmcompress.formats.gguf.vocabulary import Vocabulary, read_vocabulary
from llmcompress.weight.nodes import Weight

if TYPE_CHECKING:
    from gguf import GGUFWriter, LlamaFileType

ALIGNMENT = 32  # bytes, of the list of tensors and of each tensor's numbers


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file. `weights`: functions that read its matrices, of which experts' tensors have several; memory
    need not hold more than one."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    weights: tuple[Callable[[], Weight], ...] = ()

    @property
    def bytes(self) -> int:
        """Its bytes in the file, without those before the next tensor."""
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True)
class FileOrigin:
    """Origin of the model in a file; `base`: a Hub id."""

    name: str
    base: str | None
    license: str | None

    def describe(self, writer: GGUFWriter) -> None:
        """Write the entries."""
        writer.add_type("model")
        writer.add_name((self.base or self.name).rpartition("/")[2])
        if self.license:
            writer.add_license(self.license)
        if self.base:
            owner, _, own = self.base.rpartition("/")
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, own)
            writer.add_base_model_organization(0, owner)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{self.base}")


@dataclass(frozen=True)
class FileHead:
    """All of a file but the numbers of its tensors."""

    model: GGUFModel
    vocabulary: Vocabulary
    origin: FileOrigin

    def writer(self, path: Path, tensors: Sequence[PlannedTensor]) -> GGUFWriter:
        """Return a writer of a file, which has all of the head, and nothing on the disk yet."""
        from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter

        writer = GGUFWriter(path, self.model.architecture)
        self.origin.describe(writer)
        writer.add_file_type(file_type(commonest_type(tensors)))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        self.model.describe(writer, len(self.vocabulary.tokens))
        self.vocabulary.describe(writer)
        byte = torch.empty(0, dtype=torch.uint8).numpy().dtype
        for tensor in tensors:
            rows = (*tensor.shape[:-1], tensor.type.row_bytes(tensor.shape[-1]))
            writer.add_tensor_info(tensor.name, rows, byte, tensor.bytes, GGMLQuantizationType[tensor.type.name])
        return writer

    def file_bytes(self, tensors: Sequence[PlannedTensor]) -> int:
        """Return the size of the file with these tensors."""
        with tempfile.TemporaryDirectory(prefix="llmcompress-") as place:
            writer = self.writer(Path(place) / "head.gguf", tensors)
            write_head(writer)
            writer.close()
            size = (Path(place) / "head.gguf").stat().st_size
        return pad(size) + sum(pad(tensor.bytes) for tensor in tensors)


def write_head(writer: GGUFWriter) -> None:
    """Write the head to the disk."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def read_head(folder: Path, config: dict[str, Any], origin: FileOrigin) -> FileHead:
    """Return the head of the file of a model.

    Raises InputError for a model that llama.cpp does not run alike, RecipeError if the package is missing.
    """
    if find_spec("gguf") is None:
        raise RecipeError('this export needs gguf; run pip install "llmcompress[export]"')
    model = gguf_model(folder, config)
    return FileHead(model, read_vocabulary(folder, model.config.vocab_size, config), origin)


def pad(size: int) -> int:
    """Return a number of bytes up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def commonest_type(tensors: Sequence[PlannedTensor]) -> str:
    """Return the tensor type of most weights."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type.name] += prod(tensor.shape)
    return weights.most_common(1)[0][0]


def file_type(tensor_type: str) -> LlamaFileType:
    """Return GGUF's type of a file whose weights mostly have a tensor type."""
    from gguf import LlamaFileType

    names = [f"ALL_{tensor_type}", *(f"MOSTLY_{tensor_type}{end}" for end in ("", "_S", "_MOE"))]
    return LlamaFileType[next(name for name in names if name in LlamaFileType.__members__)]
