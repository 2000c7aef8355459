"""Sizes of compressed matrices, and of the files that they will be in: ours, or those of an engine.

Both are predicted from headers and sketches alone. Of safetensors files: at most a few bytes a tensor too many, never
too few, since a file must not exceed its target. Of a GGUF file: exactly, for steps of `gguf`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from math import prod
from typing import ClassVar, Protocol

import torch

from llmcompress.allocation.distortion import Steps
from llmcompress.compression.job import Job
from llmcompress.compression.plan import Plan
from llmcompress.formats.engine_files import UnfitError
from llmcompress.formats.gguf.head import FileHead, FileOrigin, PlannedTensor, pad, read_head
from llmcompress.formats.gguf.tensor_types import FLOATS, TensorType, presumed_type, type_called
from llmcompress.formats.gguf.write import expert_stacks
from llmcompress.formats.mlx import form_of
from llmcompress.methods.grids.gguf import FORMS, GGUF, fitting
from llmcompress.methods.layer import sketch
from llmcompress.models.dense.headers import Header
from llmcompress.models.files.integrity import BINDING, DIGESTS, digest
from llmcompress.models.files.tensor_files import SHARD
from llmcompress.weight.expression import bits, describe, tensor_bits
from llmcompress.weight.layout import ALIGNMENT
from llmcompress.weight.modules import LIKE
from llmcompress.weight.nodes import LowRank, Sum, Tiles, Weight, shape

PADDING = 8  # bytes of a weight file's header, at most
HALF = 2  # bytes of a float16
MARK = 4  # bytes of the number that names the codebook of EXL3
FACTOR = 4  # bytes of a number in the file beside it for low-rank terms

Shape = tuple[int, int]


class FileSizes(Protocol):
    """Sizes in some files."""

    def form(self, name: str, size: Shape, steps: Steps) -> str:
        """Return what a matrix is stored as, for people."""

    def bits(self, name: str, size: Shape, steps: Steps) -> int:
        """Return what a matrix counts for in bits per weight."""

    def bytes(self, name: str, size: Shape, steps: Steps) -> int:
        """Return what a matrix takes of the files."""

    def around(self, compressed: Collection[str]) -> int:
        """Return the bytes of the files without the `bytes` of the matrices `compressed`."""


def file_sizes(job: Job) -> FileSizes:
    """Return the sizes that the job's target counts: ours where those of its engine are not known.

    Raises InputError for a model that its engine does not run.
    """
    target = job.recipe.target
    return SIZED.get(str(target and target.engine), OurSizes)(job)


def plan_in_files(planned: Plan, job: Job, sizes: FileSizes) -> Plan:
    """Return a plan of the job with its sizes in some files."""
    steps = job.all_steps
    rows = []
    for row in planned.layers:
        matrix = row.name, row.shape, steps[row.name]
        count = sizes.bits(*matrix)
        rows.append(replace(row, bits=count, bpw=count / prod(row.shape), description=sizes.form(*matrix)))
    size = sizes.around({row.name for row in rows}) + sum(
        sizes.bytes(row.name, row.shape, steps[row.name]) for row in rows
    )
    linears = [row for row in rows if row.name in job.steps]
    return replace(
        planned,
        layers=tuple(rows),
        bytes=size,
        bpw=sum(row.bits for row in linears) / sum(prod(row.shape) for row in linears),
        model_bpw=size * 8 / job.source.parameters,
    )


class OurSizes:
    """Sizes in weight files of ours."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def form(self, name: str, size: Shape, steps: Steps) -> str:
        """See `FileSizes.form`."""
        return describe(sketch(name, size, steps))

    def bits(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bits`."""
        return bits(sketch(name, size, steps))

    def bytes(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bytes`."""
        return payload_bytes(sketch(name, size, steps))

    def around(self, compressed: Collection[str]) -> int:
        """See `FileSizes.around`: dense tensors and headers."""
        payloads, table = {f"{name}.weight" for name in compressed}, self.job.arch.embedding
        stored = self.job.source.tensors
        tensors = dict(stored)
        if table in compressed:
            tensors[f"{table}.{LIKE}"] = tensors[f"{table}.weight"]
        dense = sum(header.bytes_of_numbers for name, header in stored.items() if name not in payloads)
        entries = {
            name: ("U8", [header.bytes]) if name in payloads else (header.dtype, [*header.shape])
            for name, header in tensors.items()
        }
        return dense + _header_bytes(entries, sum(header.bytes_of_numbers for header in tensors.values()))


def payload_bytes(w: Weight) -> int:
    """Return the bytes of a module's payload, in which each stored tensor is padded to a multiple of 8 bytes."""
    return sum(-(-count // (8 * ALIGNMENT)) * ALIGNMENT for count in tensor_bits(w))


def _header_bytes(tensors: Mapping[str, tuple[str, list[int]]], most: int) -> int:
    """Return an upper bound of the bytes of all headers in weight files of at most so many bytes.

    `tensors`: dtype and shape by name.
    """
    entries = {
        name: {"data_offsets": [max(most, 1)] * 2, "dtype": dtype, "shape": size}
        for name, (dtype, size) in tensors.items()
    }
    sample = digest(torch.empty(0))
    bound = json.dumps(dict.fromkeys(("id", "config", "tokenizer"), sha256().hexdigest()))
    metadata = {DIGESTS: json.dumps(dict.fromkeys(tensors, sample)), "format": "pt"}
    each = len(json.dumps({"__metadata__": {BINDING: bound, DIGESTS: "{}", "format": "pt"}})) + 8 + PADDING
    text = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode()) + each * (1 + most // SHARD)


# --- MLX and ExLlamaV3 ------------------------------------------------------------------------------------------------


class HalfSizes:
    """Sizes in weight files whose other tensors are float16. `parts`: dtypes of the tensors of a matrix, by name."""

    parts: ClassVar[dict[str, str]]

    def __init__(self, job: Job) -> None:
        self.job = job

    def around(self, compressed: Collection[str]) -> int:
        """See `FileSizes.around`: dense tensors in float16, and headers."""
        packed, stored = {f"{name}.weight" for name in compressed}, self.job.source.tensors
        entries = {name: ("BF16", [*header.shape]) for name, header in stored.items()}
        for name in compressed:
            size = [max(stored[f"{name}.weight"].shape)] * 3
            entries |= {f"{name}.{part}": (dtype, size) for part, dtype in self.parts.items()}
        dense = HALF * sum(prod(header.shape) for name, header in stored.items() if name not in packed)
        return dense + _header_bytes(entries, HALF * self.job.source.parameters)


class MLXSizes(HalfSizes):
    """Sizes in the weight files of an MLX folder."""

    parts: ClassVar[dict[str, str]] = {"weight": "U32", "scales": "F16", "biases": "F16"}

    def form(self, name: str, size: Shape, steps: Steps) -> str:
        """See `FileSizes.form`."""
        form = form_of(sketch(name, size, steps))
        return f"{form.bits}-bit g{form.group_size} {form.mode}"

    def bits(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bits`."""
        return 8 * self.bytes(name, size, steps)

    def bytes(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bytes`: codes, and a scale and a bias for each group."""
        form, (rows, width) = form_of(sketch(name, size, steps)), size
        of_a_group = 2 * HALF if form.mode == "affine" else 1
        return rows * (width * form.bits // 8 + width // form.group_size * of_a_group)


class EXL3Sizes(HalfSizes):
    """Sizes in the weight files of an EXL3 folder."""

    parts: ClassVar[dict[str, str]] = {"trellis": "I16", "suh": "F16", "svh": "F16", "mul1": "I32"}

    def form(self, name: str, size: Shape, steps: Steps) -> str:
        """See `FileSizes.form`."""
        return f"{_tiles(name, size, steps).bits} bits EXL3"

    def bits(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bits`."""
        return 8 * self.bytes(name, size, steps)

    def bytes(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bytes`: codes, a factor of each input and output, and the mark of the codebook."""
        return prod(size) * _tiles(name, size, steps).bits // 8 + HALF * sum(size) + MARK


def _tiles(name: str, size: Shape, steps: Steps) -> Tiles:
    """Return the tiles that steps will leave. Raises UnfitError for other expressions."""
    stored = sketch(name, size, steps)
    if not isinstance(stored, Tiles):
        raise UnfitError(f"{describe(stored)}, no tiles")
    return stored


# --- GGUF -------------------------------------------------------------------------------------------------------------


class GGUFSizes:
    """Sizes in the GGUF file that a checkpoint of the job becomes."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @cached_property
    def head(self) -> FileHead:
        """The head of the file. Raises InputError for a model that llama.cpp does not run alike."""
        source = self.job.source
        origin = FileOrigin(source.public_name, source.hub_id, source.license)
        return read_head(source.folder, source.config_entries(), origin)

    def form(self, name: str, size: Shape, steps: Steps) -> str:
        """See `FileSizes.form`: the tensor's type."""
        return gguf_type(sketch(name, size, steps), steps).name

    def bits(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bits`: those of the tensor."""
        return 8 * size[0] * gguf_type(sketch(name, size, steps), steps).row_bytes(size[1])

    def bytes(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bytes`: also those before the next tensor, and factors of a low-rank term."""
        stored = sketch(name, size, steps)
        return pad(size[0] * gguf_type(stored, steps).row_bytes(size[1])) + _factor_bytes(stored, steps)

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
        return self.head.file_bytes(planned) - sum(pad(_plain_bytes(header)) for header in dense)


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


def _factor_bytes(stored: Weight, steps: Steps) -> int:
    """Return the bytes of a low-rank term in the file beside the model; offsets of a type are in the type."""
    first = steps[0] if steps else None
    form = FORMS.get(first.type) if isinstance(first, GGUF) else None
    if form is None or form.offsets is None:
        match stored:
            case Sum((LowRank(left, right), _)):
                return FACTOR * (prod(shape(left)) + prod(shape(right)))
    return 0


def _plain_type(header: Header) -> TensorType:
    """Return the type of a tensor that is not compressed: vectors are float32."""
    wide = len(header.shape) == 1 or header.bytes_of_numbers == 4 * prod(header.shape)
    return FLOATS["F32" if wide else "BF16"]


def _plain_bytes(header: Header) -> int:
    return prod(header.shape) * _plain_type(header).block_bytes


# By engine, where sizes of its files are known beforehand
SIZED: dict[str, Callable[[Job], FileSizes]] = {"llama.cpp": GGUFSizes, "mlx": MLXSizes, "exllamav3": EXL3Sizes}
