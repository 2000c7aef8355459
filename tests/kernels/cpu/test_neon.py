"""Kernels for NEON, run by an emulator, give what the kernels of this machine give."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from llmcompress.kernels.cpu import build, calls, matmul
from llmcompress.kernels.cpu.calls import Argument
from llmcompress.kernels.cpu.prepare import prepare
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import RotatedInputs, Weight, shape
from llmcompress.weight.trellis import Trellis
from tests.builders import codebook, grid, minifloat, seeded, streams
from tests.kernels.cpu.emulated import STUBS, Emulated, emulated
from tests.tiers import tiered, tiered_nightly


def linear_streams(rows: int, width: int, bits: int, values: int) -> Weight:
    return streams(Trellis(bits, values, 12, "linear"), rows // values, width, 768)


def turned(w: Weight, block: int) -> Weight:
    return RotatedInputs(w, torch.rand(shape(w)[1], generator=seeded(7)) < 0.5, block)


FORMS = {
    "4 bits": grid((33, 100), 16, 64, 1, symmetric=True),
    "3 bits with zeros": grid((48, 96), 8, 32, 2, symmetric=False),
    "8 bits": grid((16, 64), 256, 64, 3, symmetric=True),
    "streams of 2 bits": linear_streams(64, 70, 2, 1),
    "streams of 1.5 bits": linear_streams(128, 70, 3, 2),
    "vectors": codebook((17, 40), 16, 4, 5),
    "floats of 4 bits": minifloat((33, 100), "e2m1", "e8m0", 32, 6),
    "rotated": turned(grid((16, 192), 16, 64, 4, symmetric=True), 64),
    "rotated rows": turned(linear_streams(64, 128, 2, 1), 128),
}


MODES = ("exact", "int8", "auto")
FAST = {("4 bits", "auto"), ("3 bits with zeros", "exact"), ("streams of 2 bits", "int8"), ("rotated", "auto")}
FAST |= {("vectors", "exact")}
CASES = [(name, mode) for name in FORMS for mode in MODES]


@pytest.fixture
def by_neon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    """`run.product` by emulated kernels."""

    def product(w: Weight, x: Tensor, mode: matmul.Mode) -> Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(build, "load_kernel", emulated)
            patched.setattr(calls, "WORTH_THREADS", 1 << 60)
            before = emulated.cache_info()
            found = matmul.multiply(prepare(w), x.clone(), mode)
            after = emulated.cache_info()
            assert after.hits + after.misses > before.hits + before.misses, "nothing was emulated"
            return found

    yield product


def here(w: Weight, x: Tensor, mode: matmul.Mode) -> Tensor:
    return matmul.multiply(prepare(w), x.clone(), mode)


@pytest.mark.parametrize("case", tiered_nightly(CASES, lambda case: case in FAST or case in CASES[::3]))
def test_neon_gives_what_this_machine_gives(case: tuple[str, matmul.Mode], by_neon: Callable[..., Tensor]) -> None:
    name, mode = case
    w = FORMS[name]
    for tokens, dtype in ((1, torch.float32), (1, torch.bfloat16), (3, torch.float32)):
        x = torch.randn(tokens, shape(w)[1], generator=seeded(tokens)).to(dtype)
        found = by_neon(w, x, mode)
        if mode == "exact" and dtype == torch.float32:
            torch.testing.assert_close(found, here(w, x, mode), rtol=1e-6, atol=1e-6 * float(found.abs().max()))
        else:
            assert torch.equal(found, here(w, x, mode)), (tokens, dtype)
        wanted = x.double() @ dense(w).double().T
        assert float((found.double() - wanted).norm() / wanted.norm()) < 2e-2, "no oracle is needed to see nonsense"


@pytest.mark.parametrize("name", tiered(FORMS, "4 bits".__eq__, slow=[*FORMS][::3].__contains__))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neon_decodes_as_this_machine(name: str, dtype: torch.dtype, by_neon: Callable[..., Tensor]) -> None:
    """Many tokens go through the decoded matrix."""
    x = torch.eye(shape(FORMS[name])[1], dtype=dtype)
    assert len(x) > matmul.FEW
    assert torch.equal(by_neon(FORMS[name], x, "auto"), here(FORMS[name], x, "auto"))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_of_aarch64_share_the_rows(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`parallel` asks the functions it is given how many threads there are and which one this is."""
    w, x = FORMS["4 bits"], torch.randn(1, 100, generator=seeded(1))

    def team(kernel: Emulated, values: ctypes.Array, blocks: int, weights: int) -> None:
        values[Argument.BLOCKS] = blocks
        values[Argument.THREADS], values[Argument.THREAD] = STUBS, STUBS + 8
        for thread in range(threads):
            kernel.call("parallel", [ctypes.addressof(values)], stubs=(threads, thread))

    wanted = here(w, x, "int8")
    monkeypatch.setattr(build, "load_kernel", emulated)
    monkeypatch.setattr(matmul, "launch", team)
    found = matmul.multiply(prepare(w), x.clone(), "int8")
    assert torch.equal(found, wanted)
