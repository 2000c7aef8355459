"""Float32 products stay float32 whichever library computes them; the CPU decides which, and other products' dtype."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, Thread
from time import sleep
from typing import Any

import pytest
import torch

from llmcompress.runtime import precision
from llmcompress.runtime.precision import PRECISE, bfloat16_factors, fast_float32, product_dtype

AMD = {"cpu_name": "AMD EPYC 9R45", "avx512_bf16": True}
# what torch knows of a CPU, the dtype of products there, whether oneDNN has float32 products, and those of such factors
CPUS: dict[str, tuple[dict[str, Any], torch.dtype, bool, bool]] = {
    "Intel with matrix units": ({"cpu_name": "Intel Xeon", "amx_bf16": True}, torch.bfloat16, False, True),
    "Intel without": ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, torch.float32, False, False),
    "AMD": (AMD, torch.bfloat16, True, True),
    "AMD of old": ({"cpu_name": "AMD Ryzen 7 5800X", "avx512_bf16": False}, torch.float32, True, True),
    "another": ({"cpu_name": "Apple M2"}, torch.float32, False, False),
    "unknown": ({}, torch.float32, False, False),
}


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor whose float32 products go to oneDNN, if that is precise on the one that is there."""
    monkeypatch.setattr(precision, "cpu_features", lambda: AMD)


@pytest.fixture
def switch() -> Iterator[Any]:
    onednn: Any = torch.backends.mkldnn
    before = onednn.matmul.fp32_precision
    yield onednn.matmul
    onednn.matmul.fp32_precision = before


@pytest.mark.parametrize("name", CPUS)
def test_product_dtype_follows_the_cpu(name: str, switch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known, dtype, float32, factors = CPUS[name]
    monkeypatch.setattr(precision, "cpu_features", lambda: known)
    monkeypatch.setattr(precision, "_onednn_is_precise", lambda: "amx_bf16" not in known)
    switch.fp32_precision = "none"
    assert product_dtype("auto", torch.device("cpu")) == dtype
    for asked in (torch.float32, torch.bfloat16):
        assert product_dtype(str(asked).removeprefix("torch."), torch.device("cpu")) == asked
    with fast_float32():
        assert switch.fp32_precision == ("bf16" if float32 else "none")
    with bfloat16_factors():
        assert switch.fp32_precision == ("bf16" if factors else "none")
    assert switch.fp32_precision == "none"


@pytest.mark.usefixtures("amd")
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


@pytest.mark.usefixtures("amd")
def test_fast_float32_sets_the_switch_within_the_context(switch: Any) -> None:
    before = switch.fp32_precision
    outer = inside(switch)
    with fast_float32():
        assert inside(switch) == outer
        assert switch.fp32_precision == outer
    with pytest.raises(KeyError), fast_float32():
        raise KeyError
    assert switch.fp32_precision == before


def test_fast_float32_is_not_autocast() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16), fast_float32():
        assert (x @ x).dtype == torch.float32


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize("chosen", ["ieee", "bf16"])
def test_fast_float32_keeps_a_chosen_precision(chosen: str, switch: Any) -> None:
    switch.fp32_precision = chosen
    assert inside(switch) == chosen
    assert switch.fp32_precision == chosen


def test_fast_float32_holds_one_thread_at_a_time() -> None:
    inside, most = 0, 0
    start = Barrier(4)

    @fast_float32()
    def work() -> None:
        nonlocal inside, most
        with fast_float32():  # the same thread may enter again
            inside += 1
            most = max(most, inside)
            sleep(0.01)
            inside -= 1

    def thread() -> None:
        start.wait()
        work()

    threads = [Thread(target=thread) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert most == 1
