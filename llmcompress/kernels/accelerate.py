"""Models whose compressed linears multiply by kernels made for the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmcompress.errors import RecipeError
from llmcompress.kernels import ops
from llmcompress.kernels.cpu.lookup import rows_of
from llmcompress.kernels.cpu.matmul import FEW, MODES, Mode
from llmcompress.kernels.cpu.prepare import Prepared
from llmcompress.weight.modules import CompressedEmbedding, Multiplying, multiplying

SWITCH = "LLMCOMPRESS_FAST"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of inputs that kernels take
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Accelerated:
    """The linears with kernels that `accelerate` found; and the others, decoded at every call, with their forms."""

    mode: Mode
    kernels: tuple[str, ...] = ()
    decoded: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{len(self.kernels)} linears multiply by kernels ({self.mode} inputs)"
        if not self.decoded:
            return text
        named = ", ".join(f"{name} ({form})" for name, form in self.decoded.items())
        return f"{text}; {len(self.decoded)} have none and are decoded at every call: {named}"


@dataclass(eq=False)
class Fast:
    """Multiplies in place of a compressed linear, by a kernel where it can."""

    mode: Mode
    kept: ops.KeptWeight | None = None  # of the payload that was prepared last

    def __call__(self, layer: Multiplying, x: Tensor) -> Tensor | None:
        """Return `x @ W.T`; None on other devices, for other dtypes or widths, and where gradients are wanted."""
        payload = layer._parameters["weight"]
        if payload is None or x.dtype not in DTYPES or x.device != payload.device or x.device.type not in DEVICES:
            return None
        if x.shape[-1] != layer.layout.size[1]:
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.compiler.is_compiling():
            return ops.operator(x, payload, layer.layout, self.mode)
        if not ops.multiplies(x.device):
            return None
        kept = self.kept
        if kept is None or not kept.holds(payload, x.dtype):
            kept = self.kept = ops.keep(payload, layer.layout, x.dtype)
        return ops.multiply(kept, x, self.mode)

    def __deepcopy__(self, memo: object) -> Fast:
        return Fast(self.mode)

    def __reduce__(self) -> tuple[type[Fast], tuple[Mode]]:
        return Fast, (self.mode,)


@dataclass(eq=False)
class Lookup:
    """Looks up rows in the table that a head has prepared for its products, which has the same payload."""

    head: Fast

    def __call__(self, table: CompressedEmbedding, ids: Tensor) -> Tensor | None:
        """Return rows `[..., width]` of a few tokens; None of many, and before the head was first used."""
        payload, kept = table._parameters["weight"], self.head.kept
        if torch.compiler.is_compiling() or kept is None or payload is None or not kept.holds(payload, torch.float32):
            return None
        if not isinstance(kept.prepared, Prepared):
            return None
        term, places = kept.prepared.plain, ids.flatten().tolist() if 0 < ids.numel() <= FEW else []
        if term is None or not places or min(places) < 0 or max(places) >= table.num_embeddings:
            return None
        return rows_of(term, places).view(*ids.shape, table.embedding_dim)


def accelerate(model: nn.Module, mode: str = "auto") -> Accelerated:
    """Let every compressed linear of a model multiply by kernels for the device where it is, a CPU or an NVIDIA GPU.

    `from_pretrained` does it by itself, unless the environment variable LLMCOMPRESS_FAST is 0; it may name a mode, too.
    Weights are repacked when they are first used. What is stored stays as it is, so the model saves and loads as
    before.
    Gradients, other devices and forms without a kernel are computed as they would be otherwise. GPUs need Triton.

    Args:
        model: any module; those without compressed linears stay as they are.
        mode: how CPUs take inputs of up to 16 tokens: `exact` as they are; `auto` as two int8 numbers, in blocks of 64
            with a scale each, which loses nothing that can be measured; `int8` as one.

    Returns:
        The linears with kernels, and the others with their forms.

    Raises:
        RecipeError: for an unknown mode.
    """
    if mode not in MODES:
        raise RecipeError(f"there is no mode {mode!r}; choose one of {', '.join(MODES)}")
    kernels: list[str] = []
    decoded: dict[str, str] = {}
    heads: dict[int, Fast] = {}  # by the identity of their payloads
    for name, layer in multiplying(model).items():
        if layer.layout.is_zero:
            continue
        form = ops.without_kernel(layer)
        if form is None:
            layer.fast = heads[id(layer.weight)] = Fast(MODES[mode])
            kernels.append(name)
        else:
            decoded[name] = form
    for table in _tables(model):
        head = heads.get(id(table.weight))
        table.fast = None if head is None else Lookup(head)
    return Accelerated(MODES[mode], tuple(kernels), decoded)


def accelerate_loaded(model: nn.Module) -> None:
    """Accelerate a model that was just loaded, unless the environment says otherwise.

    Raises RecipeError for a value of the variable that means nothing.
    """
    wanted = os.environ.get(SWITCH, "auto")
    if wanted == "0":
        return
    if wanted not in MODES:
        raise RecipeError(f"{SWITCH} is {wanted!r}; set it to 0, {' or '.join(MODES)}, or leave it out")
    accelerate(model, wanted)


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Let a model multiply without kernels while the context lasts."""
    layers = {layer: layer.fast for layer in multiplying(model).values()}
    tables = {table: table.fast for table in _tables(model)}
    try:
        for layer in layers:
            layer.fast = None
        for table in tables:
            table.fast = None
        yield
    finally:
        for layer, fast in layers.items():
            layer.fast = fast
        for table, lookup in tables.items():
            table.fast = lookup


def _tables(model: nn.Module) -> list[CompressedEmbedding]:
    return [module for module in model.modules() if isinstance(module, CompressedEmbedding)]
