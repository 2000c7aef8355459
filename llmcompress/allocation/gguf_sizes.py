"""Sizes of compressed matrices in a GGUF file, and of the file: exact for steps of `gguf`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llmcompress.allocation.distortion import Steps
from llmcompress.compression.job import Job
from llmcompress.compression.plan import added_terms
from llmcompress.formats.engine_files import UnfitError
from llmcompress.formats.gguf.head import FileHead, FileOrigin, PlannedTensor, pad, read_head
from llmcompress.formats.gguf.tensor_types import FLOATS, TensorType, presumed_type, type_called
from llmcompress.formats.gguf.write import expert_stacks, write_adapter
from llmcompress.methods.grids.gguf import FORMS, GGUF, fitting
from llmcompress.methods.layer import sketch
from llmcompress.models.dense.headers import Header
from llmcompress.models.files.file_names import TERMS
from llmcompress.weight.nodes import Weight, shape

FACTOR = 4  # bytes of a number in the file beside the model for low-rank terms

Shape = tuple[int, int]


class GGUFSizes:
    """Sizes in the GGUF file that a checkpoint of the job becomes."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @cached_property
    def head(self) -> FileHead:
        """The head of the file. Raises InputError for a model that llama.cpp does not run alike."""
        source = self.job.source
        origin = FileOrigin(source.public_name, source.origin.base_model, source.license)
        return read_head(source.folder, source.config_entries(), origin)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The components that a distillation adds to linears, by name."""
        linears = self.job.arch.linears().items()
        terms = {name: added_terms(self.job, name, linear.shape) for name, linear in linears}
        return {name: sum(shape(term.left)[1] for term in own) for name, own in terms.items() if own}

    def form(self, name: str, size: Shape, steps: Steps) -> str:
        """See `FileSizes.form`: the tensor's type, and the rank of a term beside it."""
        kind = gguf_type(sketch(name, size, steps), steps).name
        return f"{kind} + rank {self.ranks[name]} (float32 | float32)" if name in self.ranks else kind

    def bits(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bits`: those of the tensor and of the factors beside it."""
        kind = gguf_type(sketch(name, size, steps), steps)
        return 8 * (size[0] * kind.row_bytes(size[1]) + sum(self._factor_bytes(name, size)))

    def bytes(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bytes`: also those before the next tensor."""
        kind = gguf_type(sketch(name, size, steps), steps)
        return pad(size[0] * kind.row_bytes(size[1])) + sum(map(pad, self._factor_bytes(name, size)))

    def _factor_bytes(self, name: str, size: Shape) -> Sequence[int]:
        """Return the bytes of each factor of a low-rank term in the file beside the model, where all have one rank."""
        return [FACTOR * max(self.ranks.values()) * side for side in size] if name in self.ranks else ()

    def around(self, compressed: Collection[str]) -> int:
        """See `FileSizes.around`: the head, and dense tensors."""
        model, tensors = self.head.model, self.job.source.tensors
        stacks = expert_stacks(self.job.source.skeleton())
        inside = {layer for layers in stacks.values() for layer in layers}
        planned = [
            PlannedTensor(name, tuple(factors.shape), FLOATS["F32"])
            for name, factors in model.rotary.divisors().items()
        ]
        for name, header in tensors.items():
            if name.removesuffix(".weight") not in inside:
                planned.append(PlannedTensor(model.name(name), header.shape, _plain_type(header)))
        for stack, layers in stacks.items():
            header = tensors[f"{layers[0]}.weight"]
            size = (len(layers), *header.shape)
            planned.append(PlannedTensor(model.name(f"{stack}.weight"), size, _plain_type(header)))
        dense = (tensors[f"{name}.weight"] for name in compressed)
        whole = self.head.file_bytes(planned) - sum(pad(_plain_bytes(header)) for header in dense)
        return whole + self._adapter_head([name for name in compressed if name in self.ranks])

    def _adapter_head(self, names: Sequence[str]) -> int:
        """Return the bytes of the file beside the model without its factors: of one with terms of rank 1."""
        sizes = {name: self.job.source.tensors[f"{name}.weight"].shape for name in names}
        if not sizes:
            return 0
        factors = {
            self.head.model.name(f"{name}.weight"): (torch.zeros(1, width), torch.zeros(out, 1))
            for name, (out, width) in sizes.items()
        }
        with TemporaryDirectory(prefix="llmcompress-") as place:
            size = write_adapter(Path(place) / TERMS, factors, self.head.model)
        return size - sum(pad(FACTOR * side) for sides in sizes.values() for side in sides)


def gguf_type(stored: Weight, steps: Steps) -> TensorType:
    """Return the tensor type of the outcome of steps, sketched as `stored`, in GGUF. Raises UnfitError if none is."""
    if not steps or not isinstance(steps[0], GGUF):
        return presumed_type(stored)
    width = shape(stored)[1]
    kind, later = fitting(steps[0].type, width), len(steps) > 1
    form = FORMS.get(kind)
    if later and kind == "IQ4_XS":
        kind = "IQ4_NL"  # `refine` leaves small multiples as scales
    elif later and form is not None and form.multiples:
        return presumed_type(stored)
    found = type_called(kind)
    if width % found.block:
        raise UnfitError(f"blocks of {found.block} columns do not fill the width {width}")
    return found


def _plain_type(header: Header) -> TensorType:
    """Return the type of a tensor that is not compressed: vectors are float32."""
    wide = len(header.shape) == 1 or header.bytes_of_numbers == 4 * prod(header.shape)
    return FLOATS["F32" if wide else "BF16"]


def _plain_bytes(header: Header) -> int:
    return prod(header.shape) * _plain_type(header).block_bytes
