"""The result of an export, and the loop over a checkpoint's layers for engines that hold some packed, others dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Generic, TypeVar

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.models.dense.companions import copy_companions
from llmcompress.models.dense.skeleton import transposed_linears
from llmcompress.models.files.checkpoint import Writer
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.progress import count_each
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Weight

ALLOW_DENSE = "allow dense layers (--allow-dense, or allow_dense=True), which hold it in 16-bit floats"
Form = TypeVar("Form")


@dataclass(frozen=True)
class ExportReport(JsonRecord):
    """Result of an export. `kept`, `changed`: sentences; bytes are those of the weights."""

    to: str
    output: str
    bytes_before: int
    bytes_after: int
    kept: tuple[str, ...]
    changed: tuple[str, ...]


class UnfitError(Exception):
    """A format cannot hold a matrix; the message says why, in a few words."""


@dataclass(frozen=True)
class EngineFiles(Generic[Form]):
    """The layers of a checkpoint as written for an engine: those that it holds packed, with their form, and others."""

    dtype: torch.dtype
    packed: dict[str, Form] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)

    def changes(self) -> tuple[str, ...]:
        """Return the sentence on matrices that became plain floats, if any."""
        dtype = str(self.dtype).removeprefix("torch.")
        return (f"{len(self.plain)} matrices became {dtype}, {self.plain[0]} first",) if self.plain else ()


def write_layers(
    opened: CompressedCheckpoint,
    writer: Writer,
    engine: str,
    pack: Callable[[str, Weight], tuple[Form, dict[str, Tensor]]],
    dtype: torch.dtype,
    allow_dense: bool,
    paths: Mapping[str, str] = MappingProxyType({}),
) -> EngineFiles[Form]:
    """Write all tensors of a checkpoint and the files beside them.

    `pack` returns a matrix's form, and its tensors by the ends of their names; where it raises UnfitError, the matrix
    is written in `dtype` with `allow_dense`, else that is an InputError. For an engine that computes in float16, that
    is the dtype of all other floats too. `paths`: those of modules in the files, where they are others.
    """
    turned = transposed_linears(opened.skeleton)
    files: EngineFiles[Form] = EngineFiles(dtype)
    copy_companions(opened.folder, writer.folder, opened.trust_remote_code)
    for layers, others in opened.parts():
        tensors = opened.read_plain(others)
        if dtype == torch.float16:
            tensors = {name: as_half(value, name) for name, value in tensors.items()}
        for layer in count_each(layers, "matrix converted"):
            weight = opened.expression(layer)
            try:
                if layer in turned:
                    raise UnfitError("it is no plain linear layer")
                files.packed[layer], stored = pack(layer, weight)
                tensors |= {f"{layer}.{key}": value for key, value in stored.items()}
            except UnfitError as error:
                if not allow_dense:
                    raise InputError(f"{layer} does not fit {engine} ({error}); {ALLOW_DENSE}") from error
                files.plain.append(layer)
                value = as_half(dense(weight), layer) if dtype == torch.float16 else dense(weight).to(dtype)
                tensors[f"{layer}.weight"] = value.T.contiguous() if layer in turned else value
        writer.add({stored_name(name, paths): value for name, value in tensors.items()})
    return files


def stored_name(name: str, paths: Mapping[str, str]) -> str:
    """Return the name of a tensor in the files; `paths`: those of modules, where they are others."""
    path, dot, leaf = name.rpartition(".")
    return f"{paths.get(path, path)}{dot}{leaf}"


def as_half(value: Tensor, name: str) -> Tensor:
    """Return floats as float16, all else as it is. Raises InputError for a number that float16 cannot hold."""
    if not value.is_floating_point():
        return value
    half = value.to(torch.float16)
    if not half.isfinite().all():
        raise InputError(f"{name} has numbers beyond float16, in which the engine would hold them; export to dense")
    return half
