"""The search on GPUs against the compiled one: the same states, by Triton's interpreter here and by a GPU where there
is one; and that the compiler leaves its arithmetic as it is written."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmcompress.methods.solvers.stream_search import searched_there
from llmcompress.methods.solvers.viterbi import search
from llmcompress.weight.trellis import Trellis
from tests.methods.oracles.interpreted import CASES, Case, codes, on
from tests.rules.source_tree import ROOT

pytestmark = [
    pytest.mark.slow,  # kernels interpreted in a process of their own; test_viterbi.py judges the search of CPUs
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is for Linux"),
]
on_a_gpu = pytest.mark.skipif(not searched_there(torch.device("cuda")), reason="needs a GPU that Triton supports")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.trellis}-{case.kind}")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[np.int32]]:
    """The interpreter's answers: `arr_0` for the first case, and so on, and `matrix`."""
    answers = tmp_path_factory.mktemp("interpreted") / "answers.npz"
    command = [sys.executable, "-m", "tests.methods.oracles.interpreted", str(answers)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(answers))


def compiled(case: Case) -> NDArray[np.int32]:
    """The states that the search on the CPU finds."""
    wanted, importance = (asked.numpy() for asked in case.wishes())
    find = search(case.trellis)
    ways = [find(wanted[first:last], importance[first:last], start, end) for first, last, start, end in case.ranges()]
    return np.concatenate(ways)


@every_case
def test_interpreted_it_finds_the_same_states(case: Case, interpreted: dict[str, NDArray[np.int32]]) -> None:
    assert np.array_equal(interpreted[f"arr_{CASES.index(case)}"], compiled(case))


def test_interpreted_it_chooses_the_same_columns(interpreted: dict[str, NDArray[np.int32]]) -> None:
    assert np.array_equal(interpreted["matrix"], codes("cpu"))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("trellis, chip", [(Trellis(2, 1, 12), 80), (Trellis(3, 2, 12), 90)])
def test_no_product_is_fused_with_a_sum(
    trellis: Trellis, chip: int, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the machine code, which takes no GPU to make; with fusion allowed, the check finds some."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmcompress.methods.solvers.viterbi_triton import constants, launch_options, way

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = constants(trellis)
    types = dict(zip(way.arg_names, 3 * ["*fp32"] + 3 * ["*i32"] + ["*fp32", "*u8", "*i32"], strict=False))
    source = ASTSource(way, types | dict.fromkeys(sizes, "constexpr"), sizes)
    options = launch_options(trellis) | ({"enable_fp_fusion": True} if fused else {})
    done = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    assert ("fma." in done.asm["ptx"]) == ("FFMA" in done.asm["sass"]) == fused
    assert "FADD" in done.asm["sass"] and ".FTZ" not in done.asm["sass"], "small numbers are not to become zeros"


@on_a_gpu
@every_case
def test_on_a_gpu_it_finds_the_same_states(case: Case) -> None:
    assert np.array_equal(on("cuda", case), compiled(case))


@on_a_gpu
@pytest.mark.parametrize(
    "trellis", [Trellis(2, 1, 12), Trellis(2, 1, 16), Trellis(1, 1, 16), Trellis(5, 2, 12)], ids=str
)
def test_on_a_gpu_it_finds_the_same_states_in_long_streams(trellis: Trellis) -> None:
    """Often enough that threads which did not wait for each other would show."""
    case = Case(trellis, "any", (0, 768, 1536, 1600))
    expected = compiled(case)
    assert all(np.array_equal(on("cuda", case), expected) for _ in range(5))


@on_a_gpu
def test_on_a_gpu_it_chooses_the_same_columns() -> None:
    assert np.array_equal(codes("cuda"), codes("cpu"))
