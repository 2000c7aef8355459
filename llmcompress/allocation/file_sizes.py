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
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch

from llmcompress.allocation.distortion import Steps
from llmcompress.allocation.gguf_sizes import GGUFSizes, Shape
from llmcompress.compression.job import Job
from llmcompress.compression.layers import describe_rounded
from llmcompress.compression.plan import Plan
from llmcompress.formats.compressed_tensors import planned_tensors
from llmcompress.formats.engine_configs import MLX
from llmcompress.formats.engine_files import UnfitError, stored_name
from llmcompress.formats.mlx import form_of
from llmcompress.methods.layer import sketch
from llmcompress.models.dense.experts import experts_of
from llmcompress.models.dense.headers import Header
from llmcompress.models.dense.skeleton import folder_skeleton
from llmcompress.models.dense.stored_names import hub_paths
from llmcompress.models.files.integrity import BINDING, DIGESTS, digest
from llmcompress.models.files.tensor_files import SHARD
from llmcompress.weight.expression import bits, describe, tensor_bits
from llmcompress.weight.layout import ALIGNMENT
from llmcompress.weight.modules import LIKE
from llmcompress.weight.nodes import Grid, Tiles, Weight
from llmcompress.weight.runtime_formats import integer_bits

PADDING = 8  # bytes of a weight file's header, at most
HALF = 2  # bytes of a float16
MARK = 4  # bytes of the number that names the codebook of EXL3
SCALE = 4  # bytes of a scale of keys or values for vLLM


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
    """Return the sizes that the job's target counts: those of its engine's files, ours without one.

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


# --- MLX, ExLlamaV3 and vLLM ------------------------------------------------------------------------------------------


class SeveralSizes:
    """Sizes in weight files that have several tensors for a matrix. `parts`: their dtypes, by name."""

    parts: ClassVar[dict[str, str]]
    paths: Mapping[str, str] = MappingProxyType({})  # of modules that have others in the files

    def __init__(self, job: Job) -> None:
        self.job = job

    def dense_bytes(self, header: Header) -> int:
        """Return the bytes of a tensor that is not compressed: by default, in float16."""
        return HALF * prod(header.shape)

    def parts_of(self, name: str) -> dict[str, tuple[str, list[int]]]:
        """Return dtypes and shapes, at most, of the tensors of a matrix, by their names."""
        size = [max(self.job.source.tensors[f"{name}.weight"].shape)] * 3
        return {f"{name}.{part}": (dtype, size) for part, dtype in self.parts.items()}

    def scales(self) -> list[str]:
        """Return the names of further tensors, one float32 each."""
        return []

    def around(self, compressed: Collection[str]) -> int:
        """See `FileSizes.around`: dense tensors and headers."""
        packed, stored = {f"{name}.weight" for name in compressed}, self.job.source.tensors
        entries = {name: (header.dtype, [*header.shape]) for name, header in stored.items() if name not in packed}
        for name in compressed:
            entries |= self.parts_of(name)
        entries = {stored_name(name, self.paths): entry for name, entry in entries.items()}
        scales = self.scales()
        sizes = {name: self.dense_bytes(header) for name, header in stored.items()}
        dense = sum(size for name, size in sizes.items() if name not in packed) + SCALE * len(scales)
        return dense + _header_bytes(entries | dict.fromkeys(scales, ("F32", [1])), sum(sizes.values()))


class MLXSizes(SeveralSizes):
    """Sizes in the weight files of an MLX folder."""

    parts: ClassVar[dict[str, str]] = {"weight": "U32", "scales": "F16", "biases": "F16"}

    @cached_property
    def is_wide(self) -> bool:
        """True if dense tensors stay as they are."""
        return MLX.families[self.job.source.config_entries()["model_type"]].wide

    def dense_bytes(self, header: Header) -> int:
        """See `SeveralSizes.dense_bytes`."""
        return header.bytes_of_numbers if self.is_wide else super().dense_bytes(header)

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


class EXL3Sizes(SeveralSizes):
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


class VLLMSizes(SeveralSizes):
    """Sizes in the weight files of a compressed-tensors folder."""

    parts: ClassVar[dict[str, str]] = {"weight_packed": "I32", "weight_scale": "F16", "weight_global_scale": "F32"}

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        source, experts = job.source, experts_of(job.source.skeleton())
        if experts:
            plain = folder_skeleton(source.folder, unfused=False, trust_remote_code=source.trust_remote_code)
            own = (name.removesuffix(".weight") for name in source.tensors if name.endswith(".weight"))
            self.paths = hub_paths(plain, experts, own)

    def dense_bytes(self, header: Header) -> int:
        """See `SeveralSizes.dense_bytes`: as it is."""
        return header.bytes_of_numbers

    def parts_of(self, name: str) -> dict[str, tuple[str, list[int]]]:
        """See `SeveralSizes.parts_of`."""
        inputs = self.job.inputs.get(name)
        scale = {f"{name}.input_global_scale": ("F32", [1])} if inputs and inputs.is_calibrated else {}
        return super().parts_of(name) | scale

    def scales(self) -> list[str]:
        """See `SeveralSizes.scales`: those of keys and values."""
        if self.job.recipe.kv_cache is None:
            return []
        modules = self.job.source.skeleton().named_modules()
        attention = (name for name, module in modules if type(module).__name__.endswith("Attention"))
        return [f"{name}.{letter}_scale" for name in attention for letter in "kv"]

    def form(self, name: str, size: Shape, steps: Steps) -> str:
        """See `FileSizes.form`."""
        stored, inputs = sketch(name, size, steps), self.job.inputs.get(name)
        if not isinstance(stored, Grid):
            return describe_rounded(stored, inputs)
        group = "row" if stored.group_size >= size[1] else f"g{stored.group_size}"
        text = f"{integer_bits(stored)}-bit integers {group}"
        if inputs is None:
            return text
        return f"{text}{' in bytes' if inputs.format == 'int8' and integer_bits(stored) < 8 else ''}, {inputs}"

    def bits(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bits`."""
        return 8 * self.bytes(name, size, steps)

    def bytes(self, name: str, size: Shape, steps: Steps) -> int:
        """See `FileSizes.bytes`: all tensors of the matrix."""
        inputs = self.job.inputs.get(name)
        rounding = (None, False) if inputs is None else (inputs.format, inputs.is_calibrated)
        return sum(tensor.nbytes for tensor in planned_tensors(sketch(name, size, steps), *rounding).values())


# By engine that reads files of its own
SIZED: dict[str, Callable[[Job], FileSizes]] = {
    "llama.cpp": GGUFSizes,
    "mlx": MLXSizes,
    "exllamav3": EXL3Sizes,
    "vllm": VLLMSizes,
}
