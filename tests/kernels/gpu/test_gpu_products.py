"""Products on GPUs against the decoded weight in float64: by Triton's interpreter, and on a GPU where there is one.

Kernels are compiled for GPUs that are not there, too; and packed codes are read again by a slow reader.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from llmcompress.errors import InputError
from llmcompress.kernels.gpu.layouts import PLANES, GridRows, StreamRows, pack_grid, pack_salient, pack_streams
from llmcompress.kernels.gpu.prepare import is_supported, multiply, prepare, runs_on
from llmcompress.kernels.ops import call_operator
from llmcompress.weight.expression import describe
from llmcompress.weight.layout import pack_weight
from llmcompress.weight.nodes import (
    Bitmap,
    Dense,
    LowRank,
    RotatedInputs,
    Sum,
    Transpose,
    Weight,
    Where,
    Zero,
)
from llmcompress.weight.trellis import Trellis, matrix
from tests.builders import codebook, every_node, grid, random_nestings, seeded, streams
from tests.kernels.gpu.interpreted import Case, cases, on
from tests.rules.source_tree import ROOT
from tests.tiers import tiered_nightly

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which is for Linux")
on_a_gpu = pytest.mark.skipif(not runs_on(torch.device("cuda")), reason="needs a GPU that the kernels run on")
every_chip = pytest.mark.parametrize("chip", tiered_nightly((80, 90, 120), lambda chip: chip == 90))
TWO = Sum((grid((8, 32), 16, 16, 1, True), LowRank(Dense(torch.ones(8, 2)), Dense(torch.ones(2, 32)))))
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
}


# --- packing --------------------------------------------------------------------------------------------------------


def codes_of(rows: GridRows) -> list[list[int]]:
    """Read every code of packed rows, one after the other."""
    found = []
    for row in range(rows.size[0]):
        codes = []
        for column in range(rows.size[1]):
            group, inside = divmod(column, rows.group)
            field, word = divmod(inside, rows.span)
            code = low = 0
            for plane, width in zip(rows.planes, PLANES[rows.bits], strict=True):
                share = PLANES[rows.bits][0] // width
                place = group * rows.span + word
                first = (place % share * (32 // PLANES[rows.bits][0]) + field) * width
                code |= (int(plane[row, place // share]) >> first & ((1 << width) - 1)) << low
                low += width
            codes.append(code)
        found.append(codes)
    return found


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("width, group", [(70, 32), (33, 33), (5, 2), (64, 64)])
def test_pack_grid_places_every_code(levels: int, width: int, group: int) -> None:
    given = grid((2, width), levels, group, levels, True)
    assert codes_of(pack_grid(given)) == given.codes.tolist()


def states_of(rows: StreamRows) -> list[list[int]]:
    """Read the state of every step from the words of its unit, as one long number."""
    found: list[list[int]] = []
    for place, _, there in rows.units.tolist():
        unit = rows.words[place - 1 : place + rows.bits].long() & 0xFFFFFFFF
        whole = [sum(int(word) << (32 * (rows.bits - i)) for i, word in enumerate(column)) for column in unit.T]
        for step in range(there // rows.values):
            after = 32 * rows.bits - (step + 1) * rows.bits
            found.append([number >> after & ((1 << rows.memory) - 1) for number in whole])
    return found


@pytest.mark.parametrize("trellis", [Trellis(1, 1, 8), Trellis(3, 2, 9), Trellis(2, 1, 16), Trellis(7, 2, 14)], ids=str)
@pytest.mark.parametrize("steps, run", [(70, 40), (1, 1), (5, 2)])
def test_pack_streams_places_every_state(trellis: Trellis, steps: int, run: int) -> None:
    given = streams(trellis, steps, 6, run * trellis.values)
    rows = pack_streams(given)
    numbers = rows.numbers.float()[torch.tensor(states_of(rows))]  # [steps, columns, values]
    found = numbers.transpose(1, 2).reshape(-1, 6)
    assert torch.equal(found, matrix(given.codes, len(given.scale), trellis, given.run))


def test_a_layout_takes_hardly_more_than_the_codes() -> None:
    w = grid((64, 1024), 16, 64, 1, True)
    assert pack_grid(w).bytes() == 64 * 1024 // 2 + 64 * 16 * 2
    coded = streams(Trellis(2, 1, 12), 768, 1024, 768)
    numbers = 4096 * 2
    assert pack_streams(coded).bytes() - numbers < 1.04 * 768 * 1024 / 4


# --- forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "w",
    [
        Dense(torch.ones(4, 8)),
        Zero((4, 8)),
        codebook((4, 8), 16, 4, 0),
        Transpose(grid((8, 4), 16, 4, 1, True)),
        Sum((grid((4, 8), 16, 4, 1, True), codebook((4, 8), 16, 4, 0))),
        LowRank(Dense(torch.ones(4, 2)), Dense(torch.ones(2, 8))),
        Sum((grid((8, 32), 16, 16, 1, True), *TWO.parts[1:], *TWO.parts[1:])),
        Where(Bitmap(torch.ones(4, 8, dtype=torch.bool)), Dense(torch.ones(4, 8)), Zero((4, 8))),
    ],
    ids=lambda w: type(w).__name__,
)
def test_prepare_returns_none_without_a_kernel(w: Weight) -> None:
    assert prepare(w) is None


def test_support_is_told_without_packing() -> None:
    for w in every_node() + random_nestings(3, 60):
        assert is_supported(w) == (prepare(w) is not None), describe(w)


def test_multiply_refuses_inputs_that_want_a_gradient() -> None:
    weight = prepare(grid((4, 32), 16, 16, 1, True))
    assert weight is not None
    with pytest.raises(InputError, match=r"give no gradients; compute under torch\.no_grad\(\)"):
        multiply(weight, torch.ones(2, 32, requires_grad=True))


def test_runs_on_is_false_for_a_cpu() -> None:
    assert not runs_on(torch.device("cpu"))


@pytest.mark.slow
def test_a_product_can_be_traced_without_a_device() -> None:
    """Tensors without storage stand for those of a GPU, as `torch.compile` has them."""
    layout, payload = pack_weight(RotatedInputs(TWO, torch.ones(32, dtype=torch.bool), 8))
    with FakeTensorMode():
        held = torch.empty(payload.shape, dtype=torch.uint8, device="cuda")
        x = torch.empty(2, 3, 32, dtype=torch.bfloat16, device="cuda")
        traced = make_fx(lambda x: call_operator(x, held, layout, "auto"))(x)
        found = call_operator(x, held, layout, "auto")
    assert found.shape == (2, 3, 8) and found.dtype == torch.bfloat16 and found.device.type == "cuda"
    called = [str(node.target) for node in traced.graph.nodes if "llmcompress" in str(node.target)]
    assert called == ["llmcompress.linear.default"]


# --- products -------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.nightly
def test_interpreted_kernels_agree_with_the_decoded_weight(tmp_path: Path) -> None:
    found = tmp_path / "answers.json"
    command = [sys.executable, "-m", "tests.kernels.gpu.interpreted", str(found)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(found.read_text())
    wrong = {name: error for name, (error, limit) in errors.items() if not error <= limit}
    assert len(errors) >= 80 and not wrong


@on_a_gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", cases(on_a_gpu=True), ids=lambda case: case.name)
def test_on_a_gpu_kernels_agree_with_the_decoded_weight(case: Case) -> None:
    assert on("cuda", case) <= case.limit()


# --- compiled for GPUs that are not there ---------------------------------------------------------------------------


def compiled(kernel: Any, given: dict[str, Any], constants: dict[str, Any], chip: int) -> Any:
    """Compile a kernel for a chip, for tensors whose addresses are multiples of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": constants["num_warps"]}
    sizes = {name: value for name, value in constants.items() if name != "num_warps"}
    types = {name: _type(value) for name, value in given.items()} | dict.fromkeys(sizes, "constexpr")
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for place, value in enumerate(given.values()):
        inner = value if isinstance(value, tuple) else ()
        for path in [(place, i) for i in range(len(inner))] or ([(place,)] if isinstance(value, torch.Tensor) else []):
            attributes[path] = aligned
    source = ASTSource(kernel, types, sizes, attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_type(each) for each in value)
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"


@needs_triton
@every_chip
@pytest.mark.parametrize("tokens", [1, pytest.param(16, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("form", ["4 bits", "7 bits", "3 bits, zero points, low rank", "signs and salient weights"])
def test_grids_compile_for_a_chip(
    form: str, tokens: int, chip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.kernels.gpu.grid_triton import grid_constants, grid_product

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    levels = {"4 bits": 16, "7 bits": 128, "signs and salient weights": 2}.get(form, 8)
    packed, salient = pack_grid(grid((8, 2048), levels, 128, 1, "zero" not in form)), None
    if levels == 2:
        inside = Bitmap(torch.rand(8, 2048, generator=seeded(0)) < 0.1)
        w = Where(inside, grid((8, 2048), 256, 2048, 1, True), grid((8, 2048), 2, 128, 2, True))
        packed, salient = pack_salient(w, torch.bfloat16) or (packed, None)
        assert salient is not None
    number, place = torch.empty(0, dtype=torch.bfloat16), torch.empty(0, dtype=torch.int32)
    entries = (place,) * 4 if salient is None else (salient.starts, salient.columns, salient.numbers, salient.scale)
    given = {
        "x": number,
        "planes": packed.planes,
        "scale": packed.scale,
        "zero": packed.scale if packed.zero is None else packed.zero,
        "salient": entries,
        "low_rank": (number, number),
        "onto": torch.empty(0),
        "y": number,
    } | dict.fromkeys(("tokens", "out", "inside_groups"), 0)
    constants = grid_constants(packed, salient, 24 if "rank" in form else 0, tokens > 1, tokens)
    done = compiled(grid_product, given, constants, chip)
    check_machine_code(done, chip)
    if form == "4 bits" and tokens == 1:
        assert re.search(r"LDG\.E\.(EF\.)?128|LDG\.E\.128", done.asm["sass"]), "words are not read 16 bytes at a time"


@needs_triton
@every_chip
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("trellis, rank", [(Trellis(2, 1, 12), 0), (Trellis(3, 2, 12, "linear"), 24)], ids=str)
def test_trellises_compile_for_a_chip(
    trellis: Trellis, rank: int, tokens: int, chip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.kernels.gpu.trellis_triton import stream_constants, stream_product

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    packed = pack_streams(streams(trellis, 32, 2048, 768))
    number = torch.empty(0, dtype=torch.bfloat16)
    given = {
        "x": number,
        "words": packed.words,
        "units": packed.units,
        "scale": packed.scale,
        "numbers": packed.numbers,
        "low_rank": (number, number),
        "onto": torch.empty(0),
        "y": number,
    } | dict.fromkeys(("tokens", "out"), 0)
    constants = stream_constants(packed, rank, tokens > 1, tokens)
    check_machine_code(compiled(stream_product, given, constants, chip), chip)


@needs_triton
@every_chip
@pytest.mark.parametrize("block", [1, 4096])
def test_changes_of_inputs_compile_for_a_chip(
    block: int, chip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.kernels.gpu.turn_triton import multiply, turn

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    number = torch.empty(0, dtype=torch.bfloat16)
    given = {"x": number, "factors": torch.empty(0), "y": number, "width": 0}
    constants = {"COLUMNS": 1024} if block == 1 else {"BLOCK": block, "LEVELS": block.bit_length() - 1}
    check_machine_code(compiled(multiply if block == 1 else turn, given, constants | {"num_warps": 4}, chip), chip)


def check_machine_code(done: Any, chip: int) -> None:
    """Raise AssertionError unless a kernel became machine code of the chip that keeps its numbers in registers."""
    assert f".target sm_{chip}" in done.asm["ptx"] and done.asm["cubin"].startswith(b"\x7fELF")
    assert done.metadata.shared <= 99 * 1024, "more shared memory than the smallest of these chips has"
    assert done.asm["sass"].count("STL") <= 8, "registers are spilled"
