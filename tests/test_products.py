"""Float32 products stay float32, whichever library computes them, and the switch is left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmcompress.products import PRECISE, fast_float32


@pytest.fixture
def switch() -> Iterator[Any]:
    onednn: Any = torch.backends.mkldnn
    before = onednn.matmul.fp32_precision
    yield onednn.matmul
    onednn.matmul.fp32_precision = before


@pytest.mark.parametrize("sizes", [(1, 576, 1536), (64, 64, 64), (512, 576, 1536), (1536, 4096, 1536), (300, 1, 17)])
def test_products_are_precise(sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    expected = left.double() @ right.double().T
    with fast_float32():
        for found in (left @ right.T, torch.nn.functional.linear(left, right), torch.bmm(left[None], right.T[None])[0]):
            assert float((found - expected).norm() / expected.norm()) < PRECISE


@fast_float32()
def inside(switch: Any) -> str:
    return str(switch.fp32_precision)


def test_the_switch_is_set_meanwhile_alone(switch: Any) -> None:
    before = switch.fp32_precision
    outer = inside(switch)
    with fast_float32():
        assert inside(switch) == outer
        assert switch.fp32_precision == outer
    with pytest.raises(KeyError), fast_float32():
        raise KeyError
    assert switch.fp32_precision == before


@pytest.mark.parametrize("chosen", ["ieee", "bf16"])
def test_what_somebody_has_chosen_stays(chosen: str, switch: Any) -> None:
    switch.fp32_precision = chosen
    assert inside(switch) == chosen
    assert switch.fp32_precision == chosen
