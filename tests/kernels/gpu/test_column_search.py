"""The search and the rounding of columns on GPUs against those on CPUs, bit for bit.

By Triton's interpreter here, on a GPU where there is one.

And what the compiler makes of it for GPUs that are not there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.kernels.column_block import ColumnBlock
from llmcompress.kernels.cpu.column_search import choose as choose_here
from llmcompress.kernels.cpu.grid_columns import round_columns as round_here
from llmcompress.methods.solvers.block_search import TrellisStreams, can_search, choose_columns
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.weight.trellis import Trellis
from tests.builders import seeded
from tests.kernels.gpu.searched import CASES, Case, found, rounded_on
from tests.methods.oracles.columns import numbers_of
from tests.rules.source_tree import ROOT
from tests.tiers import tier_of

pytestmark = [
    pytest.mark.slow,  # kernels interpreted in a process of their own; the search of CPUs is judged in fast tests
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is for Linux"),
]
on_a_gpu = pytest.mark.skipif(not can_search(torch.device("cuda")), reason="needs a GPU that Triton supports")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.trellis}-{case.kind}")
LONG = (0, 768, 1536, 1600)


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    names = ("states", "errors", "values", "ends")
    wrong = [name for name, a, b in zip(names, one, other, strict=True) if not torch.equal(a, b)]
    assert not wrong, f"other {' and '.join(wrong)}"


Answers = tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, Tensor]]]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """The interpreter's answers, a case after the other: of searches and of grids."""
    answers = tmp_path_factory.mktemp("interpreted") / "answers.pt"
    command = [sys.executable, "-m", "tests.kernels.gpu.searched", str(answers)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answered: Answers = torch.load(answers)
    return answered


@pytest.mark.nightly
@every_case
def test_interpreted_search_equals_the_cpu(case: Case, interpreted: Answers) -> None:
    assert_same(interpreted[0][CASES.index(case)], found(case, "cpu", choose_here))


@pytest.mark.nightly
def test_interpreted_grid_rounding_equals_the_cpu(interpreted: Answers) -> None:
    for one, other in zip(interpreted[1], rounded_on("cpu", round_here), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@on_a_gpu
def test_grid_rounding_on_a_gpu_equals_the_cpu() -> None:
    from llmcompress.kernels.gpu.grid_columns import round_columns

    for one, other in zip(rounded_on("cuda", round_columns), rounded_on("cpu", round_here), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "trellis, chip",
    [
        pytest.param(trellis, chip, marks=tier_of(chip == 90 and trellis.bits == 2))
        for trellis, chips in (
            (Trellis(2, 1, 12), (80, 90, 100)),
            (Trellis(1, 1, 12), (90,)),
            (Trellis(3, 1, 12), (90,)),
            (Trellis(5, 2, 12), (90,)),
            (Trellis(2, 1, 12, ring=True), (90,)),
        )
        for chip in chips
    ],
    ids=str,
)
def test_column_search_compiles_for_a_chip(
    trellis: Trellis, chip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into registers, without a division that is not exact, and with products fused as they are written."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmcompress.kernels.gpu.column_search import column_search, constants, launch_options, stored_codes

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = constants(trellis, 768, True, True)
    floats = "current before weights factors shares numbers errors terms"
    kinds: dict[str, Any] = dict.fromkeys(column_search.arg_names, "i32")
    kinds |= dict.fromkeys(floats.split(), "*fp32") | dict.fromkeys(["edges", "ends", "states", "keys"], "*i32")
    kinds |= {"origins": "*i16", "top": "fp32"}
    kinds["oldest"] = {torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32"}[stored_codes(trellis)[0]]
    source = ASTSource(column_search, kinds | dict.fromkeys(sizes, "constexpr"), sizes)
    done = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=launch_options(trellis))
    assert not re.search(r"\b(LDL|STL)\b", done.asm["sass"]), "numbers leave the registers"
    assert "div.full" not in done.asm["ptx"] and "fma.rn.f32" in done.asm["ptx"]
    assert done.metadata.shared <= 16 << 10


def test_a_block_of_columns_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error feedback asks for 64 columns at once, so 130 columns take three calls of the search."""
    asked = []

    def counted(block: ColumnBlock, numbers: Any) -> tuple[Tensor, Tensor]:
        asked.append(len(block.current))
        return choose_columns(block, numbers)

    monkeypatch.setattr("llmcompress.methods.solvers.block_search.choose_columns", counted)
    weight = torch.randn(48, 130, generator=seeded(1))
    scale = weight.square().mean(1, keepdim=True).sqrt().half()
    feedback(weight, torch.eye(130), TrellisStreams(scale, 130, Trellis(2, 1, 8), 16))
    assert asked == [64, 64, 2]


@on_a_gpu
@every_case
def test_search_on_a_gpu_equals_the_cpu(case: Case) -> None:
    from llmcompress.kernels.gpu.column_search import choose

    assert_same(found(case, "cuda", choose), found(case, "cpu", choose_here))


@on_a_gpu
@pytest.mark.parametrize(
    "trellis", [Trellis(2, 1, 12), Trellis(2, 1, 16), Trellis(1, 1, 16), Trellis(5, 2, 12)], ids=str
)
def test_search_of_long_streams_on_a_gpu_equals_the_cpu(trellis: Trellis) -> None:
    """Often enough that threads which did not wait for each other would show."""
    case = Case(trellis, "fed", LONG)
    expected = case.block("cpu")
    states, _ = choose_columns(expected, numbers_of(trellis))
    for _ in range(5):
        block = case.block("cuda")
        assert torch.equal(choose_columns(block, numbers_of(trellis, "cuda"))[0].cpu(), states)
        assert torch.equal(block.current.cpu(), expected.current)
