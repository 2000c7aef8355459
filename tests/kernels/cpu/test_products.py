"""Products by CPU kernels against the dense matrix in float64, on every tier that this machine can run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmcompress.kernels.cpu import build, calls, matmul
from llmcompress.kernels.cpu.build import load_kernel
from llmcompress.kernels.cpu.instruction_sets import TIERS, Tier, host_tier
from llmcompress.kernels.cpu.layouts import form_of, pack_matrix
from llmcompress.kernels.cpu.prepare import is_supported, prepare
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import (
    Bitmap,
    Columns,
    Dense,
    Grid,
    LowRank,
    RotatedInputs,
    ScaledInputs,
    Sum,
    TrellisCodes,
    Weight,
    Where,
    Zero,
    shape,
)
from llmcompress.weight.trellis import Trellis
from tests.builders import (
    codebook,
    grid,
    minifloat,
    pattern,
    seeded,
    streams,
    tensor_bytes,
)
from tests.tiers import expressions, first_of_each, tier_of, tiered

HERE = TIERS[TIERS.index(host_tier()) :]  # this machine's tier, and those below
RUNNABLE = [tier for tier in HERE if tier.name != "neon" or host_tier().name == "neon"]


def signs(width: int, seed: int = 0) -> Tensor:
    return torch.rand(width, generator=seeded(seed)) < 0.5


def linear_streams(rows: int, width: int, bits: int, values: int, memory: int, run: int = 768) -> TrellisCodes:
    return streams(Trellis(bits, values, memory, "linear"), rows // values, width, run)


GRIDS = [
    grid((33, 100), 16, 64, 1, symmetric=True),
    grid((64, 192), 16, 32, 2, symmetric=False),
    grid((48, 128), 8, 64, 3, symmetric=False),
    grid((48, 128), 32, 128, 4, symmetric=True),
    grid((40, 130), 256, 128, 5, symmetric=False),
    grid((48, 100), 2, 1000, 6, symmetric=True),
    grid((48, 100), 3, 1000, 7, symmetric=True, one_row=True),
    grid((40, 100), 64, 64, 8, symmetric=True),
    grid((16, 64), 100, 64, 9, symmetric=False),
]
STREAMS = [
    linear_streams(192, 100, 2, 1, 12, 128),
    linear_streams(200, 64, 1, 1, 12),
    linear_streams(320, 70, 3, 1, 12, 256),
    linear_streams(130, 70, 4, 1, 12),
    linear_streams(128, 70, 3, 2, 12),
    linear_streams(576, 40, 5, 2, 12),
    linear_streams(128, 70, 7, 2, 14),
    linear_streams(64, 10, 2, 1, 16),
    linear_streams(100, 33, 6, 1, 12),
]
TURNED = [
    RotatedInputs(STREAMS[0], signs(100), 4),
    RotatedInputs(grid((64, 256), 16, 64, 10, symmetric=True), signs(256), 256),
    RotatedInputs(grid((64, 192), 16, 64, 11, symmetric=True), signs(192), 64),
    ScaledInputs(RotatedInputs(GRIDS[1], signs(192), 64), (torch.rand(192, generator=seeded(1)) + 0.5).half()),
    Sum((GRIDS[0], LowRank(Dense(torch.randn(33, 3, generator=seeded(2)).half()), grid((3, 100), 16, 32, 12, True)))),
    LowRank(
        grid((33, 40), 2, 40, 16, symmetric=True),
        ScaledInputs(grid((40, 100), 2, 100, 17, symmetric=True), (torch.rand(100, generator=seeded(6)) + 0.5).half()),
    ),
    Where(Columns(signs(192)), grid((64, 192), 256, 1000, 13, symmetric=True), grid((64, 192), 2, 64, 14, True)),
    Where(Columns(signs(192)), GRIDS[1], Zero((64, 192))),
    Dense(torch.randn(7, 9, generator=seeded(3)).bfloat16()),
    Zero((5, 6)),
]


def some(size: tuple[int, int], share: float, seed: int) -> Bitmap:
    return Bitmap(torch.rand(size, generator=seeded(seed)) < share)


def far_apart() -> Bitmap:
    """Columns so far apart that lists have to jump, the first and the last one, all of them, and rows without any."""
    inside = torch.zeros(20, 900, dtype=torch.bool)
    inside[3, [0, 254, 255, 510, 899]] = True
    inside[4, 0] = inside[5, 899] = inside[6] = inside[7, ::10] = True
    return Bitmap(inside)


SIZE = (50, 200)
ELEMENTS = [
    Where(some(SIZE, 0.1, 1), grid(SIZE, 256, 1000, 1, symmetric=True), grid(SIZE, 2, 64, 2, symmetric=True)),
    Where(some(SIZE, 0.1, 2), grid(SIZE, 256, 1000, 3, symmetric=False), grid(SIZE, 16, 64, 4, symmetric=False)),
    Where(some(SIZE, 0.02, 3), Dense(torch.randn(SIZE, generator=seeded(1)).bfloat16()), grid(SIZE, 3, 64, 5, True)),
    Where(some(SIZE, 0.01, 4), Dense(torch.randn(SIZE, generator=seeded(2)).half()), Zero(SIZE)),
    Where(some(SIZE, 0.005, 5), Zero(SIZE), Dense(torch.randn(SIZE, generator=seeded(3)))),
    Where(pattern(SIZE, 2, 4, 1), grid(SIZE, 16, 1000, 6, symmetric=True), grid(SIZE, 256, 40, 7, symmetric=True)),
    Where(far_apart(), grid((20, 900), 256, 1000, 8, symmetric=True), Zero((20, 900))),
    Where(
        Columns(signs(200)),
        Where(some(SIZE, 0.2, 6), grid(SIZE, 8, 32, 3, False), Zero(SIZE)),
        grid(SIZE, 2, 64, 9, symmetric=True),
    ),
    RotatedInputs(Where(some(SIZE, 0.2, 7), grid(SIZE, 2, 32, 9, True), grid(SIZE, 2, 96, 10, True)), signs(200), 8),
]


def table_streams(rows: int, width: int, bits: int, values: int, memory: int, run: int = 768) -> TrellisCodes:
    return streams(Trellis(bits, values, memory), rows // values, width, run)


TABLES = [
    table_streams(192, 100, 2, 1, 12, 128),
    table_streams(130, 70, 3, 2, 12),
    table_streams(128, 40, 4, 1, 12),
    table_streams(64, 10, 2, 1, 16),
]
VECTORS = [
    codebook((33, 300), 256, 4, 1),
    codebook((17, 1100), 16, 1, 2),
    codebook((50, 77), 5, 3, 3),
    codebook((40, 90), 64, 8, 4),
    codebook((40, 101), 256, 2, 5),
    codebook((40, 70), 200, 1, 6),
    codebook((48, 66), 2, 1, 7),
    Sum((codebook((33, 100), 256, 4, 8), codebook((33, 100), 16, 4, 9))),
    RotatedInputs(Sum((codebook((33, 96), 32, 2, 10), codebook((33, 96), 100, 2, 11))), signs(96), 32),
    ScaledInputs(codebook((50, 103), 128, 4, 12), (torch.rand(103, generator=seeded(4)) + 0.5).half()),
    Where(Columns(signs(100)), grid((33, 100), 256, 1000, 13, symmetric=True), codebook((33, 100), 16, 4, 14)),
    LowRank(Dense(torch.randn(33, 5, generator=seeded(5)).half()), codebook((5, 100), 16, 4, 15)),
]
FLOATS = [
    minifloat((33, 100), "e2m1", "e8m0", 32, 1),
    minifloat((33, 100), "e2m3", "e8m0", 32, 2),
    minifloat((20, 70), "e2m3", "e8m0", 64, 3),
    minifloat((20, 70), "e2m1", "e8m0", 70, 4),
    RotatedInputs(minifloat((33, 96), "e2m1", "e8m0", 32, 5), signs(96), 32),
    Where(pattern((33, 100), 2, 4, 2), minifloat((33, 100), "e2m1", "e8m0", 32, 6), Zero((33, 100))),
    Where(
        some((33, 100), 0.1, 8),
        Dense(torch.randn(33, 100, generator=seeded(6)).half()),
        minifloat((33, 100), "e2m3", "e8m0", 32, 7),
    ),
]
FORMS = GRIDS + STREAMS + TURNED + ELEMENTS + TABLES + VECTORS + FLOATS
every_tier = pytest.mark.parametrize(
    "tier", tiered(RUNNABLE, host_tier().__eq__, lambda tier: tier.name, slow=lambda tier: tier.name != "portable")
)
SLOW_TO_COMPILE = (STREAMS[0], TABLES[0], *VECTORS[:2], FLOATS[0])  # for processors without vectors
SLOW = (GRIDS[0], ELEMENTS[0], STREAMS[0], TABLES[0], VECTORS[0], FLOATS[0])  # one of each kind


def tier_of_form(tier: Tier, w: Weight) -> pytest.MarkDecorator:
    """Return the mark of a form on a tier below this machine's."""
    return tier_of(w in SLOW and (tier.name != "portable" or w not in SLOW_TO_COMPILE))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.fixture
def on_tier(monkeypatch: pytest.MonkeyPatch, tier: Tier) -> Iterator[Tier]:
    monkeypatch.setattr(build, "load_kernel", lambda kernel: load_kernel(kernel, tier))
    yield tier


@pytest.mark.parametrize(
    "tier, w",
    [
        pytest.param(tier, w, id=f"{tier.name}-{type(w).__name__}", marks=tier_of_form(tier, w))
        for tier in RUNNABLE[1:]  # the first one multiplies every form below
        for w in (*GRIDS[:3], TURNED[1], *ELEMENTS[:3], *SLOW_TO_COMPILE)
    ],
)
def test_every_tier_multiplies_as_the_dense_matrix(on_tier: Tier, w: Weight) -> None:
    check(w)


def kind(w: Weight) -> tuple[object, ...]:
    """Return what a form is an example of: its node, and whether it splits columns, shifts levels or needs a table."""
    code = w.trellis.code if isinstance(w, TrellisCodes) else None
    return type(w), isinstance(w, Where) and isinstance(w.index, Columns), getattr(w, "zero", None) is None, code


is_first = first_of_each(FORMS, kind)


@pytest.mark.parametrize("at", tiered(range(len(FORMS)), lambda at: is_first(FORMS[at]), slow=lambda at: at % 4 == 3))
def test_every_form_multiplies_as_the_dense_matrix(at: int) -> None:
    check(FORMS[at])


def check(w: Weight) -> None:
    assert is_supported(w)
    prepared, matrix = prepare(w), dense(w).double()
    for tokens, mode, dtype, tolerance in (
        (1, "exact", torch.float32, 1e-5),
        (1, "exact", torch.bfloat16, 4e-3),
        (6, "exact", torch.float32, 1e-5),
        (1, "auto", torch.float32, 1e-4),
        (1, "auto", torch.bfloat16, 4e-3),
        (1, "int8", torch.bfloat16, 1.3e-2),
        (5, "auto", torch.bfloat16, 5e-3),
        (3, "int8", torch.float32, 1.3e-2),
        (matmul.FEW + 3, "auto", torch.float32, 1e-5),
        (matmul.FEW + 3, "auto", torch.bfloat16, 9e-3),
    ):
        x = torch.randn(tokens, matrix.shape[1], generator=seeded(tokens)).to(dtype)
        found = matmul.multiply(prepared, x, mode)
        assert found.dtype == dtype and found.shape == (tokens, len(matrix))
        assert distance(found, x.double() @ matrix.T) <= tolerance, (tokens, mode, dtype)


@every_tier
def test_every_tier_rounds_and_adds_the_same_integers(on_tier: Tier) -> None:
    """Inputs that are whole numbers with 127 in each block are rounded to themselves, so sums are exact."""
    for w in (GRIDS[0], STREAMS[0], STREAMS[5]):
        whole = torch.randint(-127, 128, (2, shape(w)[1]), generator=seeded(4)).float()
        whole[:, ::32] = 127.0
        ones = w.__class__(**{**vars(w), "scale": torch.ones_like(w.scale)})
        found = matmul.multiply(prepare(ones), whole, "int8")
        assert torch.equal(found, matmul.multiply(prepare(ones), whole, "auto"))
        torch.testing.assert_close(found.double(), whole.double() @ dense(ones).double().T, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("mode", ["auto", "int8"])
def test_blocks_of_tiny_inputs_are_zeros_beside_others(mode: str) -> None:
    """127 divided by their largest number would be infinite."""
    w = GRIDS[1]  # [rows, 192]
    x = torch.randn(2, shape(w)[1], generator=seeded(5))
    x[0, :64] = 1e-37
    x[1, 64:128] = torch.finfo(torch.float32).tiny
    found = matmul.multiply(prepare(w), x, mode)
    assert distance(found, x.double() @ dense(w).double().T) <= 1.3e-2


@pytest.mark.parametrize("w", expressions(5, 30))
def test_is_supported_agrees_with_prepare(w: Weight) -> None:
    prepared = prepare(w)
    assert (prepared is not None) == is_supported(w)
    if prepared is not None:
        x = torch.randn(3, shape(w)[1], generator=seeded(1))
        assert distance(matmul.multiply(prepared, x, "exact"), x.double() @ dense(w).double().T) < 1e-4


def test_inputs_are_prepared_once_for_the_layers_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    prepare_inputs = matmul.input_values
    monkeypatch.setattr(matmul, "input_values", lambda *given: made.append(given) or prepare_inputs(*given))
    turned = signs(192)
    one, other = (prepare(RotatedInputs(grid((64, 192), 16, 64, seed, True), turned, 64)) for seed in (1, 2))
    x = torch.randn(1, 192, generator=seeded(6))
    first, second = matmul.multiply(one, x, "exact"), matmul.multiply(other, x, "exact")
    assert len(made) == 1
    x.mul_(2)
    torch.testing.assert_close(matmul.multiply(one, x, "exact"), 2 * first)
    assert len(made) == 2, "changed in place"
    torch.testing.assert_close(matmul.multiply(other, x.clone(), "exact"), 2 * second)
    assert len(made) == 3, "another tensor"
    with torch.inference_mode():
        x, made[:] = x * 1, []
        matmul.multiply(one, x, "exact")
        matmul.multiply(other, x, "exact")
        assert len(made) == 1
        x.mul_(2)
        torch.testing.assert_close(matmul.multiply(one, x, "exact"), 4 * first)


def test_low_rank_factors_do_not_reuse_inputs_of_the_matrix() -> None:
    """Give each factor its own inputs: what lies between two factors has the width of the inputs here."""
    left, right, beside = (grid((64, 64), 16, 64, seed, symmetric=True) for seed in (1, 2, 3))
    check(Sum((LowRank(left, right), beside)))
    x = torch.randn(1, 64, generator=seeded(7))
    matmul.multiply(prepare(LowRank(left, right)), x, "exact")
    torch.testing.assert_close(matmul.multiply(prepare(beside), x, "exact"), x @ dense(beside).T, rtol=1e-5, atol=3e-5)


def test_layers_with_other_buffers_prepare_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may have the number of one that ended, whose layers have their room from then."""
    w = grid((64, 64), 16, 64, 1, symmetric=True)
    one, other = prepare(w), prepare(w)
    x = torch.randn(1, 64, generator=seeded(8)).bfloat16()
    first = matmul.multiply(one, x, "exact")
    monkeypatch.setattr(matmul._TOKENS, "inputs", {})
    assert torch.equal(matmul.multiply(other, x, "exact"), first)


@pytest.mark.parametrize(
    "w",
    [grid((1, 1), 16, 64, 3, symmetric=True), codebook((1, 1), 200, 4, 3), minifloat((1, 1), "e2m3", "e8m0", 32, 3)],
    ids=lambda w: type(w).__name__,
)
def test_padding_rows_change_nothing(w: Weight) -> None:
    """A matrix of one row and one column multiplies like any other, and no tokens at all give no rows."""
    x = torch.tensor([[2.0]])
    torch.testing.assert_close(matmul.multiply(prepare(w), x, "exact"), 2 * dense(w))
    empty = matmul.multiply(prepare(w), torch.empty(0, 1), "exact")
    assert empty.shape == (0, 1)


@pytest.mark.parametrize("w, few", [(TABLES[0], matmul.FEW_FLOATS), (STREAMS[0], matmul.FEW), (GRIDS[0], matmul.FEW)])
def test_many_tokens_are_multiplied_by_torch(w: Weight, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    many = matmul.multiply_many
    monkeypatch.setattr(matmul, "multiply_many", lambda w, x, turned: seen.append(len(x)) or many(w, x, turned))
    prepared = prepare(w)
    for tokens in (few, few + 1):
        matmul.multiply(prepared, torch.randn(tokens, shape(w)[1], generator=seeded(tokens)), "auto")
    assert seen == [few + 1]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_rows(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "WORTH_THREADS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(STREAMS[0])
        check(GRIDS[0])
        check(VECTORS[0])
    finally:
        torch.set_num_threads(before)


def test_doubled_levels_keep_small_scales() -> None:
    """The least positive float16 has no half."""
    signs_alone = grid(SIZE, 2, 1000, 1, symmetric=True)
    least = replace(signs_alone, scale=torch.full_like(signs_alone.scale, 2.0**-24))
    w = Where(some(SIZE, 0.5, 1), least, Zero(SIZE))
    x = torch.ones(1, 200)
    assert torch.equal(matmul.multiply(prepare(w), x, "exact"), x @ dense(w).T)


def test_element_lists_take_little_more_memory_than_on_disk() -> None:
    size = (512, 1024)
    w = Where(some(size, 0.1, 1), grid(size, 256, 1024, 1, symmetric=True), Zero(size))
    assert 8 * tensor_bytes(prepare(w)) < 1.25 * (0.1 * 8 + 1) * 512 * 1024


def test_factors_behind_a_rotation_have_no_kernel() -> None:
    inner = ScaledInputs(GRIDS[5], torch.ones(100).half())
    for w in (
        RotatedInputs(Sum((inner, inner)), signs(100), 4),
        RotatedInputs(Where(Columns(signs(100)), inner, inner), signs(100), 4),
    ):
        assert prepare(w) is None and not is_supported(w)


def test_a_run_that_blocks_do_not_divide_has_no_kernel() -> None:
    w = linear_streams(160, 8, 2, 1, 8, run=80)
    assert form_of(w) is None and pack_matrix(w) is None and not is_supported(w)
    assert isinstance(w, TrellisCodes | Grid)
