"""Statistics add: any way of cutting calibration into batches gives the moments of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.methods.layer import method
from llmcompress.methods.moments import STATISTICS, Moments, RunningMoments, add_in_tiles, capped_weights, mirror
from llmcompress.runtime import precision
from tests.builders import seeded

WIDTH = 12


def batch(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, the dense model's inputs, and token weights; integers, so that float32 sums are exact in any order."""
    random = seeded(seed)
    x = torch.randint(-9, 10, (tokens, WIDTH), generator=random).float()
    other = x + torch.randint(-2, 3, (tokens, WIDTH), generator=random)
    return x, other, torch.randint(0, 4, (tokens,), generator=random).float().square()


def same(a: Moments, b: Moments) -> None:
    assert a.tokens == b.tokens
    for name in STATISTICS:
        one, two = getattr(a, name), getattr(b, name)
        assert (one is None) == (two is None), f"{name} is there on one side only"
        assert one is None or torch.equal(one, two), f"{name} differs"


def test_moments_are_what_their_names_say() -> None:
    x, other, _ = batch(40)
    m = Moments.of(x, STATISTICS, dense_inputs=other)
    assert m.tokens == 40 and m.square is not None and m.outer is not None and m.cross is not None
    assert torch.equal(m.square, x.square().sum(0))
    assert torch.equal(m.outer, sum(torch.outer(row, row) for row in x))
    assert torch.equal(m.cross, sum(torch.outer(a, b) for a, b in zip(other, x, strict=True)))
    assert torch.equal(m.outer.diagonal(), m.square)


def test_tiles_and_their_mirror_give_the_whole_product() -> None:
    """Integers, so that sums are exact in any order; more columns than a tile has."""
    x = torch.randint(-9, 10, (40, 300), generator=seeded(0)).float()
    found = torch.ones(300, 300)
    add_in_tiles(found, x)
    mirror(found)
    assert torch.equal(found, 1 + x.double().T.mm(x.double()).float())


@pytest.mark.parametrize("allowed", ["none", "tf32"])
def test_a_gpu_multiplies_in_full_float32(allowed: str) -> None:
    """Whatever the process allows; the switch is there without a GPU too, and is put back."""
    switch: Any = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = allowed
    try:
        with precision.full_float32(torch.device("cuda")):
            assert switch.fp32_precision == "ieee"
        with precision.full_float32(torch.device("cpu")):
            assert switch.fp32_precision == allowed
        assert switch.fp32_precision == allowed
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize("cuts", [(1, 39), (13, 13, 14), (40, 0), (1,) * 40], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_any_split_adds_up_to_the_whole(cuts: tuple[int, ...], weighted: bool) -> None:
    x, other, weights = batch(40)
    whole = Moments.of(x, STATISTICS, weights if weighted else None, other)
    parts = [
        Moments.of(a, STATISTICS, c if weighted else None, b)
        for a, b, c in zip(x.split(cuts), other.split(cuts), weights.split(cuts), strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    same(total, whole)
    backwards = parts[-1]
    for part in reversed(parts[:-1]):
        backwards = backwards + part
    same(backwards, whole)
    sums = RunningMoments(STATISTICS)
    for a, b, c in zip(x.split(cuts), other.split(cuts), weights.split(cuts), strict=True):
        sums.add(a, c if weighted else None, b)
    same(sums.moments(), whole)


def test_addition_associates_and_commutes() -> None:
    a, b, c = (Moments.of(batch(7, seed)[0], STATISTICS) for seed in range(3))
    same((a + b) + c, a + (b + c))
    same(a + b, b + a)


def test_a_token_weight_counts_as_repetition() -> None:
    x, other, weights = batch(20)
    times = weights.long()
    repeated = Moments.of(x.repeat_interleave(times, 0), STATISTICS, None, other.repeat_interleave(times, 0))
    same(Moments.of(x, STATISTICS, weights, other), repeated)


def test_only_requested_statistics_are_summed() -> None:
    x, other, _ = batch(5)
    for name in STATISTICS:
        m = Moments.of(x, frozenset({name}), dense_inputs=other)
        assert [s for s in sorted(STATISTICS) if getattr(m, s) is not None] == [name]
    assert Moments.of(x, frozenset({"cross"})).cross is None, "there is no cross moment without dense inputs"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_half_precision_inputs_are_summed_in_float32(dtype: torch.dtype, weighted: bool) -> None:
    """300 squared is beyond float16, and bfloat16 stops counting ones at 256."""
    x = torch.full((1000, WIDTH), 300.0, dtype=dtype)
    weights = torch.full((1000,), 4.0) if weighted else None
    m = Moments.of(x, STATISTICS, weights, dense_inputs=x)
    expected = 1000 * 300.0**2 * (4 if weighted else 1)
    for sums in (m.square, m.outer, m.cross):
        assert sums is not None and sums.dtype == torch.float32 and bool((sums == expected).all())


def test_memos_are_computed_once_and_not_added() -> None:
    m = Moments.of(batch(5)[0], STATISTICS)
    calls: list[int] = []
    for _ in range(3):
        assert m.memo("key", lambda: calls.append(1) or len(calls)) == 1
    assert m.memo("other", lambda: 7) == 7 and (m + m).derived == {}


def test_inputs_are_not_edited() -> None:
    x, other, weights = batch(9)
    before = [t.clone() for t in (x, other, weights)]
    Moments.of(x, STATISTICS, weights, other)
    capped_weights(x[None], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, other, weights), strict=True))


def test_a_method_that_needs_an_unknown_statistic_is_refused() -> None:
    with pytest.raises(ValueError, match="kurtosis"):
        method("nonsense", object, needs={"kurtosis"})  # type: ignore[arg-type]


# --- capped token weights -------------------------------------------------------------------------------------------


def test_a_loud_token_counts_as_one_of_cap_times_the_median_norm() -> None:
    x = torch.randn(3, 9, WIDTH, generator=seeded(0))
    x[:, 0] *= 1000
    weights = capped_weights(x, cap=4.0)
    assert weights.shape == (3, 9)
    norms = (x * weights.sqrt()[..., None]).norm(dim=-1)
    median = x.norm(dim=-1).median(dim=1).values
    torch.testing.assert_close(norms[:, 0], 4 * median)
    assert torch.equal(weights[:, 1:], torch.ones(3, 8)), "ordinary tokens keep their full weight"


def test_each_sequence_has_its_own_median_so_batching_does_not_matter() -> None:
    x = torch.randn(4, 9, WIDTH, generator=seeded(1)) * torch.tensor([1.0, 10.0, 100.0, 0.01])[:, None, None]
    together = capped_weights(x, cap=1.0)
    alone = torch.cat([capped_weights(x[i : i + 1], cap=1.0) for i in range(4)])
    assert torch.equal(together, alone)
    torch.testing.assert_close(capped_weights(x * 8, cap=1.0), together)  # whatever the scale


def test_all_zero_tokens_have_finite_weights() -> None:
    x = torch.zeros(2, 5, WIDTH)
    x[1, 0] = 1.0
    weights = capped_weights(x, cap=4.0)
    assert bool(weights.isfinite().all()) and float(weights.max()) <= 1.0


@pytest.mark.parametrize("maker", ["AMD", "another"])  # by oneDNN, or as torch does it
@pytest.mark.parametrize("width", [96, 700])
def test_bfloat16_inputs_are_multiplied_exactly_and_summed_in_float32(
    width: int, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_features", lambda: {"cpu_name": maker})
    x = torch.randn(500, width, generator=seeded(3)).bfloat16()
    other = torch.randn(500, width, generator=seeded(4)).bfloat16()
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    m = Moments.of(x, STATISTICS, dense_inputs=other)
    assert m.outer is not None and m.cross is not None and m.outer.dtype == m.cross.dtype == torch.float32
    torch.testing.assert_close(m.outer.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(m.cross.double(), other.double().T @ x.double(), rtol=1e-5, atol=1e-3)
    assert torch.equal(m.outer, m.outer.T)
    assert torch.backends.mkldnn.matmul.fp32_precision == before, "the setting is everyone's"  # type: ignore[attr-defined]
