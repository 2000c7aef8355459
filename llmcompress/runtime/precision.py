"""Precision of matrix products: their dtype, and the library that computes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from llmcompress.runtime.attention import FasterAttention
from llmcompress.runtime.devices import alone, as_current

ONE_THREAD = RLock()  # held while a thread compresses, distils or scores
ONE_BUILDER = RLock()  # held while a thread makes a model: transformers' switches for that belong to the process
PRECISE = 1e-6  # largest relative error of a float32 product; rounding to bfloat16 gives 2e-3


def product_dtype(compute: str, device: torch.device) -> torch.dtype:
    """Return the dtype of `compute`; "auto" is bfloat16 if the device multiplies it faster, else float32."""
    if compute != "auto":
        return torch.bfloat16 if compute == "bfloat16" else torch.float32
    if device.type == "cuda":
        with as_current(device):
            faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = device.type == "cpu" and (_matrix_units() or pairs_are_fast())
    return torch.bfloat16 if faster else torch.float32


@contextmanager
def products(device: torch.device, dtype: torch.dtype, attention: bool = True) -> Iterator[None]:
    """Compute products in `dtype`, with its fastest attention, or torch's own without `attention`."""
    if dtype == torch.float32:
        yield
        return
    faster = attention and device.type == "cpu"
    with torch.autocast(device.type, dtype), FasterAttention() if faster else nullcontext():
        yield


@contextmanager
def fast_float32() -> Iterator[None]:
    """Compute float32 products by oneDNN on AMD's processors, where torch's MKL is half as fast; one thread at a time.

    Gradients are recorded, even where the caller has switched them off, and products are not autocast.

    torch asks oneDNN only where it may round to bfloat16. Nothing changes if it would round (a trial product tells),
    if a precision is chosen already, or on other processors, where MKL is faster.

    Other threads wait: torch's switch, and the default dtype that transformers sets while it loads a model, belong to
    the whole process.
    """
    plain = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with ONE_THREAD, torch.inference_mode(False), torch.enable_grad(), plain[0], plain[1]:
        wanted = _made_by_amd() and _onednn_is_precise() and _switch().fp32_precision == "none"
        with by_onednn() if wanted else nullcontext():
            yield


@contextmanager
def bfloat16_factors() -> Iterator[None]:
    """Round the factors of float32 products to bfloat16 where that is faster: on CPUs with matrix units, twice as fast.

    Exact for factors that were bfloat16; sums stay float32. Does nothing while other threads compute beside this one,
    since they share the switch.
    """
    with by_onednn() if alone() and (_matrix_units() or _made_by_amd()) else nullcontext():
        yield


def full_float32(device: torch.device) -> AbstractContextManager[None]:
    """Compute float32 products of a CUDA device without TF32, which keeps 10 bits of a factor."""
    return _set_precision(torch.backends.cuda.matmul, "ieee") if device.type == "cuda" else nullcontext()


def by_onednn() -> AbstractContextManager[None]:
    """Compute float32 products by oneDNN, which rounds factors to bfloat16 on CPUs with matrix units."""
    return _set_precision(_switch(), "bf16")


@contextmanager
def _set_precision(switch: Any, precision: str) -> Iterator[None]:
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before


def _switch() -> Any:
    """Return torch's switch for oneDNN's products, which its type stubs lack."""
    onednn: Any = torch.backends.mkldnn
    return onednn.matmul


def cpu_features() -> dict[str, Any]:
    """Return the name and the instruction sets of the CPU, as far as this version of torch knows them."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known


def pairs_are_fast() -> bool:
    """True if the CPU's fastest products are of pairs of bfloat16 numbers: AMD's from Zen 4 on."""
    return _made_by_amd() and not _matrix_units() and bool(cpu_features().get("avx512_bf16"))


def _matrix_units() -> bool:
    """True if the CPU multiplies bfloat16 matrices as such (AMX)."""
    return bool(cpu_features().get("amx_bf16"))


def _made_by_amd() -> bool:
    """True if the CPU is AMD's. Intel's without matrix units take 1.7 times as long for bfloat16 as for float32."""
    return str(cpu_features().get("cpu_name", "")).startswith("AMD")


@lru_cache(maxsize=1)
def _onednn_is_precise() -> bool:
    """True if float32 products stay float32 when oneDNN may round."""
    if not torch.backends.mkldnn.is_available():
        return False
    with by_onednn():
        return product_error() < PRECISE


def is_finite(x: Tensor) -> bool:
    """True if `x` holds neither NaN nor Inf. One pass without temporaries, unlike `x.isfinite().all()`."""
    if not x.numel():
        return True
    low, high = x.aminmax()  # NaN wins in both
    return bool(low.isfinite() and high.isfinite())


def product_error() -> float:
    """Return the relative error of a float32 product under the current settings."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, dtype=torch.float32, generator=generator)
    expected = left.double() @ right.double()
    return float((left @ right - expected).norm() / expected.norm())
