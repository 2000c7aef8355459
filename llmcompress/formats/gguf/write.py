"""To GGUF, which llama.cpp runs: `model.gguf`, and `lora.gguf` for low-rank terms beside exact tensors.

Grids stay value for value, in the smallest tensor type that allows it; other matrices are refused, or stored in
bfloat16 where that is allowed, and listed. The checkpoint is read twice: to find every tensor's type, which the head of
the file must list, then to write them one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.formats.engine_files import ALLOW_DENSE, ExportReport, UnfitError
from llmcompress.formats.gguf.head import FileHead, FileOrigin, PlannedTensor, read_head, write_head
from llmcompress.formats.gguf.model import GGUFModel
from llmcompress.formats.gguf.tensor_types import (
    FLOATS,
    ROUNDABLE,
    TensorType,
    common_type,
    exact_type,
    pack_tensor,
    round_to_type,
)
from llmcompress.formats.peft import split_low_rank
from llmcompress.models.dense.experts import experts_of
from llmcompress.models.dense.skeleton import transposed_linears
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.models.files.output import check_writable
from llmcompress.reporting import report
from llmcompress.runtime.progress import count_each
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import LIKE
from llmcompress.weight.nodes import Dense, Weight, shape

if TYPE_CHECKING:
    from gguf import GGUFWriter

MODEL = "model.gguf"
TABLE = "token_embd.weight"  # whose low-rank factors llama.cpp reads in another way
Factors = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]


@dataclass
class FilePlan:
    """Tensors of a file in order, and low-rank factors by the name of the tensor that they are added to.

    Matrices that no type holds are rounded to `fallback` where it fits, else to bfloat16 with `allow_dense`.
    """

    allow_dense: bool = False
    fallback: TensorType | None = None
    tensors: list[PlannedTensor] = field(default_factory=list)
    factors: dict[str, Factors] = field(default_factory=dict)
    exact: Counter[str] = field(default_factory=Counter)  # compressed matrices by tensor type
    rounded: dict[str, tuple[str, float]] = field(default_factory=dict)  # others: their type and relative error

    def add(self, name: str, weight: Weight, read: Callable[[], Weight], kind: TensorType | None = None) -> TensorType:
        """Put a tensor last, and return its type; `read` reads `weight` again when it is written.

        Raises UnfitError where no type holds it.
        """
        size = tuple(weight.values.shape) if isinstance(weight, Dense) else shape(weight)
        kind = kind or exact_type(weight)
        self.tensors.append(PlannedTensor(name, size, kind, (read,)))
        return kind

    def round_matrix(self, layer: str, values: Tensor, why: UnfitError) -> tuple[Weight, TensorType]:
        """Return rounded values and their type. Raises InputError where nothing is allowed."""
        kind, called = FLOATS["BF16"], "bfloat16"
        rounded: Weight | None = None
        if self.fallback is not None:
            try:
                rounded, kind, called = round_to_type(values, self.fallback), self.fallback, self.fallback.name
            except UnfitError as error:
                why = error
        if rounded is None:
            if not self.allow_dense:
                raise InputError(f"{layer} does not fit GGUF ({why}); {ALLOW_DENSE}") from why
            rounded = Dense(values.to(torch.bfloat16))
        distance = (dense(rounded) - values).norm() / values.norm().clamp_min(1e-30)
        self.rounded[layer] = called, float(distance)
        return rounded, kind


def to_gguf(
    opened: CompressedCheckpoint, output: Path, allow_dense: bool = False, round_to: str | None = None
) -> ExportReport:
    """Write grids value for value; others are rounded to the type `round_to`, to bfloat16, or raise InputError."""
    if round_to is not None and round_to not in ROUNDABLE:
        raise RecipeError(f"nothing is rounded to {round_to!r} here; choose one of {', '.join(ROUNDABLE)}")
    folder = opened.folder
    head = read_head(folder, opened.config, _origin(folder))
    model, vocabulary = head.model, head.vocabulary
    with write_checkpoint(output) as staged:
        plan = plan_file(opened, model, FilePlan(allow_dense, ROUNDABLE[round_to] if round_to else None))
        factors = sum(factor.numel() for pair in plan.factors.values() for factor in pair)
        check_writable(output, sum(tensor.bytes for tensor in plan.tensors) + 4 * factors)
        size = _write_model(staged.folder / MODEL, plan.tensors, head)
        if plan.factors:
            size += write_adapter(staged.folder / file_names.TERMS, plan.factors, model)
    held = f"the vocabulary of {len(vocabulary.tokens)} tokens, as {vocabulary.model} ({vocabulary.pre})"
    changed = (*_changes(plan, output), *model.rotary.notes(), *vocabulary.notes)
    return ExportReport("gguf", str(output), opened.bytes, size, (*_held_exactly(plan), held), changed)


def _held_exactly(plan: FilePlan) -> Iterator[str]:
    if plan.exact:
        types = ", ".join(f"{count} as {name}" for name, count in plan.exact.most_common())
        yield f"{plan.exact.total()} matrices, value for value ({types})"


def _changes(plan: FilePlan, output: Path) -> Iterator[str]:
    for kind in sorted({kind for kind, _ in plan.rounded.values()}):
        errors = {layer: error for layer, (other, error) in plan.rounded.items() if other == kind}
        most = f"rounded by at most {max(errors.values()):.1e} of their size"
        yield f"{len(errors)} matrices became {kind}, {next(iter(errors))} first, {most}"
    if plan.factors:
        yield f"{len(plan.factors)} low-rank terms became float32 LoRA factors in {output / file_names.TERMS}"


# --- the plan -------------------------------------------------------------------------------------------------------


def plan_file(opened: CompressedCheckpoint, model: GGUFModel, plan: FilePlan) -> FilePlan:
    """Return the plan with the type of every tensor. Raises InputError for a matrix that may not be rounded."""
    transposed = transposed_linears(opened.skeleton)
    for name, factors in model.rotary.divisors().items():
        plan.add(name, Dense(factors), partial(Dense, factors))
    stacks = expert_stacks(opened.skeleton)
    inside = {layer for layers in stacks.values() for layer in layers}
    for layers, others in opened.parts():
        for layer in count_each(layers, "matrix read"):
            if layer not in inside:
                _add_layer(plan, opened, layer, model.name(f"{layer}.weight"))
        for tensor in others:
            if not tensor.endswith(f".{LIKE}") and tensor.removesuffix(".weight") not in inside:
                read = partial(_read_plain, opened, model, tensor, tensor.removesuffix(".weight") in transposed)
                plan.add(model.name(tensor), read(), read)
    for stack, experts in stacks.items():
        _add_stack(plan, opened, model.name(f"{stack}.weight"), experts)
    return plan


def expert_stacks(model: nn.Module) -> dict[str, list[str]]:
    """Return the matrices of experts that are one tensor in GGUF, in order: by their common name, without a number."""
    stacks: dict[str, list[str]] = {}
    for path, each in experts_of(model).items():
        for number, expert in enumerate(each):
            for leaf, _ in expert.named_children():
                stacks.setdefault(f"{path}.{leaf}", []).append(f"{path}.{number}.{leaf}")
    return stacks


def _add_stack(plan: FilePlan, opened: CompressedCheckpoint, name: str, layers: list[str]) -> None:
    """Put a tensor `[experts, out, in]` last: in the type that holds all of them, else each rounded to one type."""
    reads: list[Callable[[], Weight]] = [partial(_read_matrix, opened, layer) for layer in layers]
    try:
        kind = common_type(reads)
        plan.exact[kind.name] += sum(layer in opened.layouts for layer in layers)
    except UnfitError as error:
        kind = FLOATS["BF16"]
        for number, layer in enumerate(layers):
            _, kind = plan.round_matrix(layer, dense(_read_matrix(opened, layer)), error)
            reads[number] = partial(_read_rounded, opened, layer, kind)
    plan.tensors.append(PlannedTensor(name, (len(layers), *shape(_read_matrix(opened, layers[0]))), kind, tuple(reads)))


def _add_layer(plan: FilePlan, opened: CompressedCheckpoint, layer: str, name: str) -> None:
    """Put a compressed matrix last: its base and its low-rank term where the base fits, else the whole, rounded."""
    whole = opened.expression(layer)
    base, term = (
        split_low_rank(whole) if name != TABLE else (whole, None)
    )  # llama.cpp reads a table's A and B otherwise
    try:
        kind = plan.add(name, base, partial(_read_base, opened, layer) if term else partial(opened.expression, layer))
    except UnfitError as error:
        rounded, kind = plan.round_matrix(layer, dense(whole), error)
        plan.add(name, rounded, partial(_read_rounded, opened, layer, kind), kind)
        return
    plan.exact[kind.name] += 1
    if term is not None:
        plan.factors[name] = term


def _read_matrix(opened: CompressedCheckpoint, layer: str) -> Weight:
    """Read a matrix that may be compressed."""
    return opened.expression(layer) if layer in opened.layouts else Dense(opened.read(f"{layer}.weight"))


def _read_plain(opened: CompressedCheckpoint, model: GGUFModel, tensor: str, transposed: bool) -> Weight:
    """Read a tensor that was never compressed, as it is in GGUF."""
    values = model.convert_plain(model.name(tensor), opened.read(tensor))
    return Dense(values.T.contiguous() if transposed else values)


def _read_base(opened: CompressedCheckpoint, layer: str) -> Weight:
    return split_low_rank(opened.expression(layer))[0]


def _read_rounded(opened: CompressedCheckpoint, layer: str, kind: TensorType) -> Weight:
    values = dense(_read_matrix(opened, layer))
    return round_to_type(values, kind) if kind.pack else Dense(values.to(torch.bfloat16))


# --- the files ------------------------------------------------------------------------------------------------------


def _origin(folder: Path) -> FileOrigin:
    """Return the origin of a checkpoint by its report."""
    known = report.read(folder) if (folder / file_names.REPORT).is_file() else None
    if known is None:
        return FileOrigin(folder.resolve().name, None, None)
    return FileOrigin(known.model, known.base_model, known.license)


def _write_model(path: Path, tensors: list[PlannedTensor], head: FileHead) -> int:
    """Write head and tensors; return the bytes of the file. Raises DiskError when they do not fit."""
    writer = head.writer(path, tensors)
    with _to_disk(writer):
        write_head(writer)
        for tensor in count_each(tensors, "tensor written"):
            rows_of_bytes = torch.cat([pack_tensor(read(), tensor.type) for read in tensor.weights])
            order = head.model.row_order(tensor.name)
            if order is not None:
                rows_of_bytes = rows_of_bytes.reshape(len(order), -1)[order]
            writer.write_tensor_data(rows_of_bytes.contiguous().numpy())
    return path.stat().st_size


def write_adapter(path: Path, factors: dict[str, Factors], model: GGUFModel) -> int:
    """Write the low-rank terms as a LoRA adapter; return the bytes of the file.

    llama.cpp multiplies by alpha / rank, one alpha for all: smaller ranks are padded with zeros.
    """
    from gguf import GGUFWriter, Keys

    writer = GGUFWriter(path, model.architecture)
    rank = max(len(a) for a, _ in factors.values())
    writer.add_type("adapter")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))
    for name, (a, b) in factors.items():
        order = model.row_order(name)
        padded = torch.zeros(rank, a.shape[1]), torch.zeros(len(b), rank)
        padded[0][: len(a)], padded[1][:, : len(a)] = a, b if order is None else b[order]
        writer.add_tensor(f"{name}.lora_a", padded[0].numpy())
        writer.add_tensor(f"{name}.lora_b", padded[1].numpy())
    with _to_disk(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path.stat().st_size


@contextmanager
def _to_disk(writer: GGUFWriter) -> Iterator[None]:
    """Close the file at the end. Raises DiskError for a write that fails."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{writer.path} could not be written ({error}); free some space and start again") from error
    finally:
        writer.close()
