"""Products with payloads, as an operator of torch, so that `torch.compile` and `torch.export` pass it on."""

from __future__ import annotations

import json
import mmap
from ctypes import CDLL, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from llmcompress.kernels.cpu.prepare import Prepared, prepare, supported
from llmcompress.kernels.cpu.run import MODES, Mode, product
from llmcompress.weight.encoding import decode
from llmcompress.weight.expression import describe
from llmcompress.weight.modules import Layout

PAGE_OUT = 21  # of madvise: give pages back, which are read again from their file when somebody wants them


@dataclass(frozen=True, eq=False)
class _Kept:
    """A prepared weight, and the version of the payload that it was made of."""

    version: int
    prepared: Prepared


_PREPARED: Any = WeakIdKeyDictionary()  # _Kept by payload


def linear(x: Tensor, payload: Tensor, layout: Layout, mode: Mode) -> Tensor:
    """Return `x [..., in] @ W.T` for a payload on the CPU, in the dtype of `x`."""
    if torch.compiler.is_compiling():
        return torch.ops.llmcompress.linear(x, payload, layout.text, mode)  # type: ignore[no-any-return]
    return _linear(x, payload, layout, mode)


def _linear(x: Tensor, payload: Tensor, layout: Layout, mode: Mode) -> Tensor:
    with torch.no_grad():
        return product(_prepared(payload, layout), x, mode)


@torch.library.custom_op("llmcompress::linear", mutates_args=(), device_types="cpu")
def _operator(x: Tensor, payload: Tensor, layout: str, mode: str) -> Tensor:
    return _linear(x, payload, _layout(layout), MODES[mode])


@_operator.register_fake
def _(x: Tensor, payload: Tensor, layout: str, mode: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _layout(layout).size[0])


@lru_cache(maxsize=4096)
def _layout(text: str) -> Layout:
    return Layout.from_json(json.loads(text))


@lru_cache(maxsize=4096)
def without_kernel(layout: str) -> str | None:
    """Return the form, in words, of a weight that no kernel multiplies by, from `Layout.text`; None if one does."""
    read = _layout(layout)
    zeros = decode(read.header, read.views(torch.zeros(read.bytes(), dtype=torch.uint8)))
    return None if supported(zeros) else describe(zeros)


def _prepared(payload: Tensor, layout: Layout) -> Prepared:
    """Return the weight of a payload prepared, made when it is first asked for and when the payload has changed."""
    version = -1 if payload.is_inference() else payload._version
    kept = _PREPARED.get(payload)
    if kept is None or kept.version != version:
        found = prepare(decode(layout.header, layout.views(payload.detach())))
        if found is None:
            raise TypeError(f"no kernel reads {layout.header}")
        kept = _PREPARED[payload] = _Kept(version, found)
        _page_out(payload.data_ptr(), payload.nbytes)
    return kept.prepared


def _page_out(address: int, count: int) -> None:
    """Give the memory of a payload back where it is a file's; it is read again when a model is saved."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + count - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0 and hasattr(CDLL(None), "madvise"):
        CDLL(None).madvise(c_void_p(first), length, PAGE_OUT)
