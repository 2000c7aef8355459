"""Sums of products of bfloat16 inputs, against the same in float64."""

from __future__ import annotations

import pytest
import torch

from llmcompress.kernels.cpu import gram
from llmcompress.methods.moments import STATISTICS, RunningMoments
from tests.builders import seeded

needs_pairs = pytest.mark.skipif(
    not gram.supports_width(gram.PANEL), reason="this processor does not multiply pairs of bfloat16"
)
LENGTHS = [1, 2, 255, 256, 257, 700]  # one token alone, half a pair, the edges of what stays in registers


@needs_pairs
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("width", [64, 576])
@pytest.mark.parametrize("threads", [1, 2])
def test_add_gram_equals_float64(tokens: int, width: int, threads: int) -> None:
    """Added to what is there; below the panels' diagonal nothing changes."""
    x, left = torch.randn(2, tokens, width, generator=seeded(tokens)).bfloat16()
    before = torch.randn(width, width, generator=seeded(1))
    symmetric, both = before.clone(), before.clone()
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gram.add_gram(symmetric, x)
        gram.add_gram(both, x, left)
    finally:
        torch.set_num_threads(used)
    torch.testing.assert_close(both.double(), before.double() + left.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    panel = torch.arange(width) // gram.PANEL
    upper = panel[:, None] <= panel
    expected = before.double() + x.double().T @ x.double()
    torch.testing.assert_close(symmetric.double()[upper], expected[upper], rtol=1e-5, atol=1e-4)
    assert torch.equal(symmetric[~upper], before[~upper])


@needs_pairs
def test_add_gram_of_many_tokens_is_as_precise_as_of_few() -> None:
    """Ones, of which a float32 sum that grows one by one would be exact only up to 2^24, and numbers that round."""
    x = torch.randn(1 << 15, 64, generator=seeded(0)).bfloat16()
    found = torch.zeros(64, 64)
    gram.add_gram(found, x)
    expected = x.double().T @ x.double()
    assert float((found - expected).abs().max() / expected.diagonal().mean()) < 1e-6


@needs_pairs
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_as_good_as_without_the_kernel(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted inputs are rounded to bfloat16 again, and the moments stay positive."""
    x = torch.randn(3, 200, 128, generator=seeded(0)).bfloat16()
    weights = torch.rand(3, 200, generator=seeded(1)) if weighted else None
    found = []
    for supported in (True, False):
        monkeypatch.setattr(gram, "supports_width", lambda width, supported=supported: supported)
        sums = RunningMoments(STATISTICS)
        for index, batch in enumerate(x):
            sums.add(batch, None if weights is None else weights[index], batch.flip(0))
        found.append(sums.moments())
    fast, slow = found
    assert fast.outer is not None and slow.outer is not None and fast.cross is not None and slow.cross is not None
    scale = float(slow.outer.diagonal().mean())
    close = 2e-3 if weighted else 1e-6
    assert fast.tokens == slow.tokens and torch.equal(fast.outer, fast.outer.T)
    assert float((fast.outer - slow.outer).abs().max()) < close * scale
    assert float((fast.cross - slow.cross).abs().max()) < close * scale
    assert float(torch.linalg.eigvalsh(fast.outer.double()).min()) > 0.01 * scale


def test_supports_width_is_false_on_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a width of other than whole panels have the kernel."""
    assert not gram.supports_width(gram.PANEL + 1)
    monkeypatch.setattr(gram, "pairs_are_fast", lambda: False)
    assert not gram.supports_width(gram.PANEL)
