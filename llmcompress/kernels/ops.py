"""Products with payloads, also as an operator of torch, which `torch.compile` and `torch.export` keep."""

from __future__ import annotations

import json
import mmap
import warnings
from ctypes import CDLL, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from llmcompress.kernels.cpu import matmul
from llmcompress.kernels.cpu.matmul import MODES, Mode
from llmcompress.kernels.cpu.prepare import PreparedWeight, is_supported, prepare
from llmcompress.kernels.gpu import prepare as gpu
from llmcompress.kernels.gpu.layouts import GpuWeight
from llmcompress.runtime.memory import trim_memory
from llmcompress.weight.encoding import decode
from llmcompress.weight.expression import describe
from llmcompress.weight.expression import matmul as multiply_decoded
from llmcompress.weight.layout import Layout
from llmcompress.weight.modules import Multiplying, multiply_back
from llmcompress.weight.nodes import Weight

PAGE_OUT = 21  # of madvise: give pages back, which are read again from their file when needed


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """A prepared weight, and a weak reference to its payload.

    After a change of a payload past torch's counter of changes (`.data.copy_`), call `accelerate` again.
    """

    payload: ReferenceType[Tensor]
    address: int
    version: int
    dtype: torch.dtype | None  # of its inputs; None: any
    prepared: PreparedWeight | GpuWeight | None  # None: the device has no kernel for it

    def holds(self, payload: Tensor, dtype: torch.dtype) -> bool:
        """True if the payload is the same, unchanged, and inputs have the expected dtype."""
        same = self.payload() is payload and self.address == payload.data_ptr()
        return same and self.version == _version(payload) and self.dtype in (None, dtype)


def has_kernels(device: torch.device) -> bool:
    """True if there are kernels for a device: CPUs, and NVIDIA GPUs where Triton is installed."""
    return device.type == "cpu" or gpu.runs_on(device)


def multiply(weight: KeptWeight, x: Tensor, mode: Mode) -> Tensor | None:
    """Return `x [..., in] @ W.T` in the dtype of `x`; None without a kernel. Only CPUs round inputs, as `mode` says."""
    match weight.prepared:
        case GpuWeight() as prepared:
            return gpu.multiply(prepared, x)
        case None:
            return None
        case prepared:
            return matmul.multiply(prepared, x, mode)


def call_operator(x: Tensor, payload: Tensor, layout: Layout, mode: Mode) -> Tensor:
    """Return `x [..., in] @ W.T` for a payload, in the dtype of `x`, by the operator of torch."""
    return torch.ops.llmcompress.linear(x, payload, layout.text, mode)


_KEPT: Any = WeakIdKeyDictionary()  # by payload, for the operator


@torch.library.custom_op("llmcompress::linear", mutates_args=(), device_types=("cpu", "cuda"))
def _operator(x: Tensor, payload: Tensor, layout: str, mode: str) -> Tensor:
    y = None
    if has_kernels(x.device):
        weight = _KEPT.get(payload)
        if weight is None or not weight.holds(payload, x.dtype):
            weight = _KEPT[payload] = prepare_payload(payload, _layout(layout), x.dtype)
        y = multiply(weight, x.detach(), MODES[mode])  # compilers write another tensor's numbers into the same object
    return multiply_decoded(x, _decode(payload, _layout(layout))) if y is None else y


@_operator.register_fake
def _(x: Tensor, payload: Tensor, layout: str, mode: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _layout(layout).size[0])


def _save_weight(ctx: Any, inputs: tuple[Tensor, Tensor, str, str], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.layout = inputs[2]


def _multiply_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    """Return the gradient of the operator's inputs."""
    (payload,) = ctx.saved_tensors
    return multiply_back(gradient, _decode(payload, _layout(ctx.layout))), None, None, None


_operator.register_autograd(_multiply_back, setup_context=_save_weight)


@lru_cache(maxsize=4096)
def _layout(text: str) -> Layout:
    return Layout.from_json(json.loads(text))


_FORMS: dict[tuple[str, str], str | None] = {}  # by the type of the device, and `Layout.text`


def unsupported_form(layer: Multiplying) -> str | None:
    """Return the form, in words, of a matrix without a kernel on its device; None if it has one."""
    if layer.weight.is_meta:
        return "not in memory"
    key = layer.get_parameter("weight").device.type, layer.layout.text
    if key not in _FORMS:
        w = layer.expression()
        known = is_supported(w) if key[0] == "cpu" else gpu.is_supported(w)
        _FORMS[key] = None if known else describe(w)
    return _FORMS[key]


def prepare_payload(payload: Tensor, layout: Layout, dtype: torch.dtype) -> KeptWeight:
    """Return the weight of a payload prepared for inputs of a dtype, on the payload's device.

    Raises TypeError for a form that CPUs have no kernel for; for GPUs this is a warning, once.
    """
    w = _decode(payload, layout)
    identity = ref(payload), payload.data_ptr(), _version(payload)
    if payload.device.type != "cpu":
        weight = gpu.prepare(w, dtype)
        if weight is None:
            _warn_once(describe(w))
        return KeptWeight(*identity, dtype, weight)
    prepared = prepare(w)
    if prepared is None:
        raise TypeError(f"no kernel reads {layout.header}")
    _page_out(payload.data_ptr(), payload.nbytes)
    trim_memory()
    return KeptWeight(*identity, None, prepared)


def _decode(payload: Tensor, layout: Layout) -> Weight:
    return decode(layout.header, layout.views(payload.detach()))


@lru_cache(maxsize=64)
def _warn_once(form: str) -> None:
    warnings.warn(f"no kernel for GPUs multiplies by {form}, so it is decoded at every call", stacklevel=2)


def _version(payload: Tensor) -> int:
    return -1 if payload.is_inference() else payload._version  # nobody counts changes of inference tensors


def _page_out(address: int, count: int) -> None:
    """Give back the memory of a payload that a file backs; it is read again when a model is saved."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + count - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0 and hasattr(CDLL(None), "madvise"):
        CDLL(None).madvise(c_void_p(first), length, PAGE_OUT)
