"""To GGUF, which llama.cpp runs: `model.gguf`, and `lora.gguf` for low-rank terms beside what is held exactly.

Grids stay value for value, in the smallest tensor type that allows it; what no type holds is refused, or stored in
bfloat16 where that is allowed, and listed. The checkpoint is read twice: to find every tensor's type, which the head of
the file must list, then to write them one at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.formats.exported import ALLOW_DENSE, Exported
from llmcompress.formats.gguf.model import GGUFModel, gguf_model
from llmcompress.formats.gguf.tensor_types import (
    FLOATS,
    ROUNDED,
    Inexact,
    TensorType,
    common_type,
    exact_type,
    nearest,
    packed,
)
from llmcompress.formats.gguf.vocabulary import read_vocabulary
from llmcompress.formats.peft import without_term
from llmcompress.models.dense.experts import experts_of
from llmcompress.models.dense.skeleton import folder_skeleton, transposed_linears
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.reporting import report
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import LIKE
from llmcompress.weight.nodes import Dense, Weight, shape

if TYPE_CHECKING:
    from gguf import GGUFWriter, LlamaFileType

MODEL, ADAPTER = "model.gguf", "lora.gguf"
TABLE = "token_embd.weight"
Factors = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]


@dataclass(frozen=True)
class Placed:
    """A tensor of the file to write. `weights`: read its matrices, of which experts' tensors have several; memory need
    not hold more than one."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    weights: tuple[Callable[[], Weight], ...]

    @property
    def bytes(self) -> int:
        """Its bytes in the file."""
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


@dataclass
class FilePlan:
    """Plan of a file: tensors in order, and low-rank factors by the name of the tensor that they are added to."""

    tensors: list[Placed] = field(default_factory=list)
    factors: dict[str, Factors] = field(default_factory=dict)
    exact: Counter[str] = field(default_factory=Counter)  # compressed matrices by tensor type
    rounded: dict[str, tuple[str, float]] = field(default_factory=dict)  # others: their type and relative error

    def place(self, name: str, weight: Weight, again: Callable[[], Weight], kind: TensorType | None = None) -> None:
        """Put a tensor last; `again` reads `weight` when it is written. Raises Inexact where no type holds it."""
        size = tuple(weight.values.shape) if isinstance(weight, Dense) else shape(weight)
        self.tensors.append(Placed(name, size, kind or exact_type(weight), (again,)))

    @property
    def mostly(self) -> str:
        """The tensor type of most weights."""
        weights: Counter[str] = Counter()
        for placed in self.tensors:
            weights[placed.type.name] += prod(placed.shape)
        return weights.most_common(1)[0][0]


def to_gguf(
    opened: CompressedCheckpoint, output: Path, allow_dense: bool = False, round_to: str | None = None
) -> Exported:
    """Write grids value for value; others are rounded to the type `round_to`, to bfloat16, or raise InputError."""
    if round_to is not None and round_to not in ROUNDED:
        raise RecipeError(f"nothing is rounded to {round_to!r} here; choose one of {', '.join(ROUNDED)}")
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise RecipeError('this export needs gguf; run pip install "llmcompress[export]"') from error
    folder = opened.folder
    model = gguf_model(folder, opened.config)
    vocabulary = read_vocabulary(folder, model.config.vocab_size, opened.config)
    with write_checkpoint(output, opened.dense_bytes) as staged:
        plan = planned(opened, model, Fallbacks(allow_dense, ROUNDED[round_to] if round_to else None))
        writer = GGUFWriter(staged.folder / MODEL, model.architecture)
        _introduce(writer, folder, plan.mostly)
        model.describe(writer, len(vocabulary.tokens))
        vocabulary.describe(writer)
        size = _write_model(writer, plan.tensors, model)
        if plan.factors:
            size += _write_adapter(GGUFWriter(staged.folder / ADAPTER, model.architecture), plan.factors, model)
    return Exported(
        to="gguf",
        output=str(output),
        bytes_before=opened.bytes,
        bytes_after=size,
        kept=(
            *_kept(plan),
            f"the vocabulary of {len(vocabulary.tokens)} tokens, as {vocabulary.model} ({vocabulary.pre})",
        ),
        changed=(*_changes(plan, output), *model.rotary.notes(), *vocabulary.notes),
    )


def _kept(plan: FilePlan) -> Iterator[str]:
    if plan.exact:
        types = ", ".join(f"{count} as {name}" for name, count in plan.exact.most_common())
        yield f"{plan.exact.total()} matrices, value for value ({types})"


def _changes(plan: FilePlan, output: Path) -> Iterator[str]:
    for kind in sorted({kind for kind, _ in plan.rounded.values()}):
        errors = {layer: error for layer, (other, error) in plan.rounded.items() if other == kind}
        most = f"rounded by at most {max(errors.values()):.1e} of their size"
        yield f"{len(errors)} matrices became {kind}, {next(iter(errors))} first, {most}"
    if plan.factors:
        yield f"{len(plan.factors)} low-rank terms became float32 LoRA factors in {output / ADAPTER}"


# --- what goes where ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fallbacks:
    """Types for what no type holds: `kind` where it fits, else bfloat16 where that is allowed."""

    allow_dense: bool = False
    kind: TensorType | None = None

    def of(self, layer: str, values: Tensor, why: Inexact) -> tuple[Weight, TensorType, str]:
        """Return rounded values, their type and its name. Raises InputError where nothing is allowed."""
        if self.kind is not None:
            try:
                return nearest(values, self.kind), self.kind, self.kind.name
            except Inexact as error:
                why = error
        if not self.allow_dense:
            raise InputError(f"{layer} does not fit GGUF ({why}); {ALLOW_DENSE}") from why
        return Dense(values.to(torch.bfloat16)), FLOATS["BF16"], "bfloat16"


def planned(opened: CompressedCheckpoint, model: GGUFModel, fallbacks: Fallbacks) -> FilePlan:
    """The type of every tensor. Raises InputError for what GGUF cannot hold, unless it may be rounded."""
    plan = FilePlan()
    transposed = transposed_linears(opened.folder)
    for name, factors in model.rotary.divisors().items():
        plan.place(name, Dense(factors), partial(Dense, factors))
    stacks = stacked(opened)
    inside = {layer for layers in stacks.values() for layer in layers}
    for layers, others in opened.parts():
        for layer in layers:
            if layer not in inside:
                _place_layer(plan, opened, layer, model.name(f"{layer}.weight"), fallbacks)
        for tensor in others:
            if not tensor.endswith(f".{LIKE}") and tensor.removesuffix(".weight") not in inside:
                stored = partial(_stored, opened, model, tensor, tensor.removesuffix(".weight") in transposed)
                plan.place(model.name(tensor), stored(), stored)
    for stack, experts in stacks.items():
        _place_stack(plan, opened, model.name(f"{stack}.weight"), experts, fallbacks)
    return plan


def stacked(opened: CompressedCheckpoint) -> dict[str, list[str]]:
    """Return the matrices of experts that are one tensor in GGUF, in order: by their common name, without a number."""
    found: dict[str, list[str]] = {}
    experts = experts_of(folder_skeleton(opened.folder, trust_remote_code=opened.trust_remote_code))
    for path, each in experts.items():
        for number, expert in enumerate(each):
            for leaf, _ in expert.named_children():
                found.setdefault(f"{path}.{leaf}", []).append(f"{path}.{number}.{leaf}")
    return found


def _place_stack(
    plan: FilePlan, opened: CompressedCheckpoint, name: str, layers: list[str], fallbacks: Fallbacks
) -> None:
    """Put a tensor `[experts, out, in]` last: in the type that holds all of them, else each rounded to one type."""
    reads: list[Callable[[], Weight]] = [partial(_matrix, opened, layer) for layer in layers]
    try:
        kind = common_type(reads)
        plan.exact[kind.name] += sum(layer in opened.layouts for layer in layers)
    except Inexact as error:
        kind = FLOATS["BF16"]
        for number, layer in enumerate(layers):
            values = dense(_matrix(opened, layer))
            stored, kind, called = fallbacks.of(layer, values, error)
            lost = (dense(stored) - values).norm() / values.norm().clamp_min(1e-30)
            plan.rounded[layer] = called, float(lost)
            reads[number] = partial(_rounded, opened, layer, kind)
    plan.tensors.append(Placed(name, (len(layers), *shape(_matrix(opened, layers[0]))), kind, tuple(reads)))


def _matrix(opened: CompressedCheckpoint, layer: str) -> Weight:
    """Read a matrix that may be compressed."""
    return opened.expression(layer) if layer in opened.layouts else Dense(opened.read(f"{layer}.weight"))


def _place_layer(plan: FilePlan, opened: CompressedCheckpoint, layer: str, name: str, fallbacks: Fallbacks) -> None:
    """A compressed matrix: its base and its low-rank term where the base fits, else the whole, rounded."""
    whole = opened.expression(layer)
    base, term = without_term(whole) if name != TABLE else (whole, None)  # llama.cpp reads A and B of a table otherwise
    try:
        plan.place(name, base, partial(_base, opened, layer) if term else partial(opened.expression, layer))
    except Inexact as error:
        values = dense(whole)
        stored, kind, called = fallbacks.of(layer, values, error)
        lost = (dense(stored) - values).norm() / values.norm().clamp_min(1e-30)
        plan.rounded[layer] = called, float(lost)
        plan.place(name, stored, partial(_rounded, opened, layer, kind), kind)
        return
    plan.exact[plan.tensors[-1].type.name] += 1
    if term is not None:
        plan.factors[name] = term


def _stored(opened: CompressedCheckpoint, model: GGUFModel, tensor: str, transposed: bool) -> Weight:
    """Read a tensor that was never compressed, as it is in GGUF."""
    values = model.stored(model.name(tensor), opened.read(tensor))
    return Dense(values.T.contiguous() if transposed else values)


def _base(opened: CompressedCheckpoint, layer: str) -> Weight:
    return without_term(opened.expression(layer))[0]


def _rounded(opened: CompressedCheckpoint, layer: str, kind: TensorType) -> Weight:
    values = dense(_matrix(opened, layer))
    return nearest(values, kind) if kind.pack else Dense(values.to(torch.bfloat16))


# --- the files ------------------------------------------------------------------------------------------------------


def _introduce(writer: GGUFWriter, folder: Path, mostly: str) -> None:
    """Write the name, licence and base model of the file."""
    from gguf import GGML_QUANT_VERSION

    known = report.read(folder) if (folder / file_names.REPORT).is_file() else None
    base = known.base_model if known else None
    writer.add_type("model")
    writer.add_name((base or folder.resolve().name).rpartition("/")[2])
    if known and known.license:
        writer.add_license(known.license)
    if base:
        owner, _, name = base.rpartition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        writer.add_base_model_organization(0, owner)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_file_type(file_type(mostly))
    writer.add_quantization_version(GGML_QUANT_VERSION)


def file_type(mostly: str) -> LlamaFileType:
    """Return GGUF's type of a file whose weights mostly have a tensor type."""
    from gguf import LlamaFileType

    names = [f"ALL_{mostly}", f"MOSTLY_{mostly}", f"MOSTLY_{mostly}_S", f"MOSTLY_{mostly}_MOE"]
    return LlamaFileType[next(name for name in names if name in LlamaFileType.__members__)]


def _write_model(writer: GGUFWriter, tensors: list[Placed], model: GGUFModel) -> int:
    """Write head and tensors; returns the bytes of the file. Raises DiskError when they do not fit."""
    from gguf import GGMLQuantizationType

    byte = torch.empty(0, dtype=torch.uint8).numpy().dtype
    for placed in tensors:
        rows = (*placed.shape[:-1], placed.type.row_bytes(placed.shape[-1]))
        writer.add_tensor_info(placed.name, rows, byte, placed.bytes, GGMLQuantizationType[placed.type.name])
    with _to_disk(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for placed in tensors:
            written = torch.cat([packed(read(), placed.type) for read in placed.weights])
            order = model.row_order(placed.name)
            if order is not None:
                written = written.reshape(len(order), -1)[order]
            writer.write_tensor_data(written.contiguous().numpy())
    return _bytes(writer)


def _write_adapter(writer: GGUFWriter, factors: dict[str, Factors], model: GGUFModel) -> int:
    """Write the low-rank terms as a LoRA adapter; returns the bytes of the file.

    llama.cpp multiplies by alpha / rank, one alpha for all: smaller ranks are filled up with zeros.
    """
    from gguf import Keys

    rank = max(len(a) for a, _ in factors.values())
    writer.add_type("adapter")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))
    for name, (a, b) in factors.items():
        order = model.row_order(name)
        rows = b if order is None else b[order]
        filled = torch.zeros(rank, a.shape[1]), torch.zeros(len(b), rank)
        filled[0][: len(a)], filled[1][:, : len(a)] = a, rows
        writer.add_tensor(f"{name}.lora_a", filled[0].numpy())
        writer.add_tensor(f"{name}.lora_b", filled[1].numpy())
    with _to_disk(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return _bytes(writer)


@contextmanager
def _to_disk(writer: GGUFWriter) -> Iterator[None]:
    """Close the file; a write that fails is a DiskError."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{writer.path} could not be written ({error}); free some space and start again") from error
    finally:
        writer.close()


def _bytes(writer: GGUFWriter) -> int:
    return Path(str(writer.path)).stat().st_size
