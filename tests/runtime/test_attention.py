"""The attention of calibration against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llmcompress.runtime.attention import QUERIES, FasterAttention, causal_attention
from tests.builders import seeded


@pytest.mark.parametrize("length", [1, QUERIES - 1, QUERIES, 2 * QUERIES + 5])
@pytest.mark.parametrize(("heads", "groups", "scale"), [(4, 4, None), (6, 2, None), (6, 1, 0.3)])
def test_every_query_sees_the_keys_up_to_its_own(length: int, heads: int, groups: int, scale: float | None) -> None:
    random = seeded(length + heads)
    query = torch.randn(2, heads, length, 8, generator=random, dtype=torch.float64)
    key, value = torch.randn(2, 2, groups, length, 8, generator=random, dtype=torch.float64)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    torch.testing.assert_close(causal_attention(query, key, value, scale), expected)


@pytest.mark.parametrize("length", [1, QUERIES, 2 * QUERIES + 5])
@pytest.mark.parametrize(("heads", "groups", "scale"), [(4, 4, None), (6, 2, None), (6, 1, 0.3)])
def test_gradients_are_those_of_torch(length: int, heads: int, groups: int, scale: float | None) -> None:
    random = seeded(length + heads)
    shapes = [(2, heads, length, 8), (2, groups, length, 8), (2, groups, length, 8)]
    query, key, value = (
        torch.randn(*size, generator=random, dtype=torch.float64, requires_grad=True) for size in shapes
    )
    slopes = torch.randn(*shapes[0], generator=random, dtype=torch.float64)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    wanted = torch.autograd.grad((expected * slopes).sum(), (query, key, value))
    found = torch.autograd.grad((causal_attention(query, key, value, scale) * slopes).sum(), (query, key, value))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    query, key, value = half = [tensor.detach().bfloat16().requires_grad_() for tensor in (query, key, value)]
    rounded = torch.autograd.grad((causal_attention(query, key, value, scale) * slopes.bfloat16()).sum(), half)
    for one, other in zip(rounded, wanted, strict=True):
        assert (one.double() - other).norm() <= 0.02 * (1 + other.norm())


def test_plain_causal_calls_are_taken_over_and_no_others() -> None:
    random = seeded(1)
    query, key, value = torch.randn(3, 1, 4, 100, 8, generator=random)
    mask = torch.ones(100, 100, dtype=torch.bool).tril(3)
    calls = (
        {"is_causal": True},
        {"attn_mask": mask},
        {"is_causal": False},
        {"is_causal": True, "scale": 0.5},
    )
    for arguments in calls:
        expected = scaled_dot_product_attention(query, key, value, **arguments)
        with FasterAttention():
            found = scaled_dot_product_attention(query, key, value, **arguments)
        assert (found.dtype == torch.bfloat16) == bool(arguments.get("is_causal"))
        torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)
    with FasterAttention():  # one query after many keys, as in generation
        found = scaled_dot_product_attention(query[:, :, :1], key, value, is_causal=True)
    assert torch.equal(found, scaled_dot_product_attention(query[:, :, :1], key, value, is_causal=True))
