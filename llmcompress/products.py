"""How products of matrices are computed: in which dtype, and by which library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from llmcompress.attention import FasterAttention

PRECISE = 1e-6  # relative error of a product that was computed in float32, of rounding to bfloat16 it is 2e-3


def product_dtype(compute: str, device: torch.device) -> torch.dtype:
    """What a recipe's `compute` means; "auto" is bfloat16 where the device multiplies it natively, else float32."""
    if compute != "auto":
        return torch.bfloat16 if compute == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch from 2.10 on
        native = device.type == "cpu" and bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


@contextmanager
def products(device: torch.device, dtype: torch.dtype, attention: bool = True) -> Iterator[None]:
    """Products in `dtype`, with the attention that is fastest at it; without `attention`, with torch's own."""
    if dtype == torch.float32:
        yield
        return
    faster = attention and device.type == "cpu"
    with torch.autocast(device.type, dtype), FasterAttention() if faster else nullcontext():
        yield


@contextmanager
def fast_float32() -> Iterator[None]:
    """Float32 products on the CPU by oneDNN where that is as precise as MKL, which on AMD's processors is half as fast.

    torch asks oneDNN only where it may round to bfloat16. Where it does so (on CPUs with matrix units for bfloat16),
    and where somebody has chosen a precision already, nothing changes.
    """
    with _may_round() if _onednn_is_precise() and _switch().fp32_precision == "none" else nullcontext():
        yield


@contextmanager
def _may_round() -> Iterator[None]:
    """Float32 products by oneDNN, rounded to bfloat16 where that is faster."""
    switch = _switch()
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _switch() -> Any:
    """torch's switch for oneDNN's products, which its type stubs lack."""
    onednn: Any = torch.backends.mkldnn
    return onednn.matmul


@lru_cache(maxsize=1)
def _onednn_is_precise() -> bool:
    """Whether float32 products stay float32 when oneDNN may round."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator)
    with _may_round():
        found = left @ right
    expected = left.double() @ right.double()
    return float((found - expected).norm() / expected.norm()) < PRECISE
