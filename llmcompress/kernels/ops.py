"""Products with payloads, as an operator of torch, so that `torch.compile` and `torch.export` pass it on."""

from __future__ import annotations

import json
import mmap
from ctypes import CDLL, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from llmcompress.kernels.cpu.matmul import MODES, Mode, product
from llmcompress.kernels.cpu.prepare import Prepared, prepare, supported
from llmcompress.runtime.memory import trim_memory
from llmcompress.weight.encoding import decode
from llmcompress.weight.expression import describe
from llmcompress.weight.modules import Layout, Multiplying

PAGE_OUT = 21  # of madvise: give pages back, which are read again from their file when somebody wants them


@dataclass(frozen=True, eq=False)
class KeptWeight:
    """A prepared weight, and the payload that it was made of, without keeping it alive.

    Whoever writes into a payload past torch's counter of changes (`.data.copy_`) has to call `accelerate` again.
    """

    payload: ReferenceType[Tensor]
    address: int
    version: int
    prepared: Prepared

    def holds(self, payload: Tensor) -> bool:
        """Return True if the payload is still the same."""
        known = self.payload() is payload and self.address == payload.data_ptr()
        return known and self.version == _version(payload)


def operator(x: Tensor, payload: Tensor, layout: Layout, mode: Mode) -> Tensor:
    """Return `x [..., in] @ W.T` for a payload on the CPU, in the dtype of `x`, by the operator of torch."""
    return torch.ops.llmcompress.linear(x, payload, layout.text, mode)


_KEPT: Any = WeakIdKeyDictionary()  # by payload, for the operator


@torch.library.custom_op("llmcompress::linear", mutates_args=(), device_types="cpu")
def _operator(x: Tensor, payload: Tensor, layout: str, mode: str) -> Tensor:
    kept = _KEPT.get(payload)
    if kept is None or not kept.holds(payload):
        kept = _KEPT[payload] = keep(payload, _layout(layout))
    return product(kept.prepared, x, MODES[mode])


@_operator.register_fake
def _(x: Tensor, payload: Tensor, layout: str, mode: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _layout(layout).size[0])


@lru_cache(maxsize=4096)
def _layout(text: str) -> Layout:
    return Layout.from_json(json.loads(text))


_FORMS: dict[str, str | None] = {}  # by `Layout.text`


def without_kernel(layer: Multiplying) -> str | None:
    """Return the form, in words, of a matrix that no kernel multiplies by; None if one does."""
    if layer.layout.text not in _FORMS:
        if layer.weight.is_meta:
            return "not in memory"
        w = layer.expression()
        _FORMS[layer.layout.text] = None if supported(w) else describe(w)
    return _FORMS[layer.layout.text]


def keep(payload: Tensor, layout: Layout) -> KeptWeight:
    """Return the weight of a payload prepared. Raises TypeError for a form without kernels."""
    found = prepare(decode(layout.header, layout.views(payload.detach())))
    if found is None:
        raise TypeError(f"no kernel reads {layout.header}")
    _page_out(payload.data_ptr(), payload.nbytes)
    trim_memory()
    return KeptWeight(ref(payload), payload.data_ptr(), _version(payload), found)


def _version(payload: Tensor) -> int:
    return -1 if payload.is_inference() else payload._version  # nobody counts changes of inference tensors


def _page_out(address: int, count: int) -> None:
    """Give the memory of a payload back where it is a file's; it is read again when a model is saved."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + count - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0 and hasattr(CDLL(None), "madvise"):
        CDLL(None).madvise(c_void_p(first), length, PAGE_OUT)
