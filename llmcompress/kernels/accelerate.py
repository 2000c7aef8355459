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
from llmcompress.kernels.cpu.matmul import FEW, MODES, Mode
from llmcompress.kernels.cpu.prefill import decode_rows
from llmcompress.kernels.cpu.prepare import PreparedWeight
from llmcompress.kernels.one_token import restore_blocks, shorten_blocks
from llmcompress.weight.modules import CompressedEmbedding, Multiplying, is_traced, multiplying

SWITCH = "LLMCOMPRESS_FAST"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of inputs that kernels take
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Acceleration:
    """The linears with kernels, and the forms of the others, which are decoded at every call."""

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
    """Multiplies in place of a compressed linear, by a kernel if there is one."""

    mode: Mode
    weight: ops.KeptWeight | None = None  # the last prepared one

    def __call__(self, layer: Multiplying, x: Tensor) -> Tensor | None:
        """Return `x @ W.T`; None on other devices, for other dtypes or widths, for what torch's transforms follow, and
        for a weight that accelerate reads anew at every call."""
        payload = layer._parameters["weight"]
        if payload is None or x.dtype not in DTYPES or x.device != payload.device or x.device.type not in DEVICES:
            return None
        if x.shape[-1] != layer.layout.size[1]:
            return None
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return ops.call_operator(x, payload, layer.layout, self.mode)
        if is_traced(x):
            return None
        if not ops.has_kernels(x.device):
            return None
        if _is_offloaded(layer):
            self.weight = None  # what was prepared before
            return None
        weight = self.weight
        if weight is None or not weight.holds(payload, x.dtype):
            weight = self.weight = ops.prepare_payload(payload, layer.layout, x.dtype)
        return ops.multiply(weight, x, self.mode)

    def __deepcopy__(self, memo: object) -> Fast:
        return Fast(self.mode)

    def __reduce__(self) -> tuple[type[Fast], tuple[Mode]]:
        return Fast, (self.mode,)


@dataclass(eq=False)
class Lookup:
    """Looks up rows in the weight that a head with the same payload has prepared for its products."""

    head: Fast

    def __call__(self, table: CompressedEmbedding, ids: Tensor) -> Tensor | None:
        """Return rows `[..., width]` of a few tokens; None for many tokens, and before the first use of the head."""
        payload, weight = table._parameters["weight"], self.head.weight
        if torch.compiler.is_compiling() or payload is None or weight is None:
            return None
        if not weight.holds(payload, torch.float32) or not isinstance(weight.prepared, PreparedWeight):
            return None
        term, places = weight.prepared.plain, ids.flatten().tolist() if 0 < ids.numel() <= FEW else []
        if term is None or not places or min(places) < 0 or max(places) >= table.num_embeddings:
            return None
        return decode_rows(term, places).view(*ids.shape, table.embedding_dim)


def accelerate(model: nn.Module, mode: str = "auto") -> Acceleration:
    """Let every compressed linear of a model multiply by kernels for its device, a CPU or an NVIDIA GPU.

    On a CPU, blocks of the Llama kind also take fewer steps around their linears for one token (`one_token`).
    `from_pretrained` calls this, unless the environment variable LLMCOMPRESS_FAST is 0; its value may also be a mode.
    Weights are repacked at their first use. The stored payloads stay, so the model saves and loads as before.
    Backward passes, other devices and forms without a kernel decode matrices one at a time. GPUs need Triton.

    Args:
        model: any module.
        mode: the precision of inputs of up to 16 tokens on CPUs: `exact`; `auto`, two int8 numbers each, in blocks of
            64 with a scale, without a measurable loss; `int8`, one number each.

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
        form = ops.unsupported_form(layer)
        if form is None:
            layer.fast = heads[id(layer.weight)] = Fast(MODES[mode])
            kernels.append(name)
        else:
            decoded[name] = form
    for table in _tables(model):
        head = heads.get(id(table.weight))
        table.fast = None if head is None else Lookup(head)
    shorten_blocks(model)
    return Acceleration(MODES[mode], tuple(kernels), decoded)


def accelerate_loaded(model: nn.Module) -> None:
    """Accelerate a model after loading, unless the environment variable LLMCOMPRESS_FAST is 0.

    Raises RecipeError for an unknown value of the variable.
    """
    wanted = os.environ.get(SWITCH, "auto")
    if wanted == "0":
        return
    if wanted not in MODES:
        raise RecipeError(f"{SWITCH} is {wanted!r}; set it to 0, {' or '.join(MODES)}, or leave it out")
    accelerate(model, wanted)


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Let a model multiply without kernels, and take all steps around, while the context lasts."""
    layers = {layer: layer.fast for layer in multiplying(model).values()}
    tables = {table: table.fast for table in _tables(model)}
    blocks = restore_blocks(model)
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
        for block, forward in blocks:
            vars(block)["forward"] = forward


def _is_offloaded(layer: nn.Module) -> bool:
    """True if accelerate holds the weights of a layer elsewhere between its calls."""
    hook = vars(layer).get("_hf_hook")
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))


def _tables(model: nn.Module) -> list[CompressedEmbedding]:
    return [module for module in model.modules() if isinstance(module, CompressedEmbedding)]
