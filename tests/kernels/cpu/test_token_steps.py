"""Kernels around the linears of a block at one token, beside float64 and beside torch."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.kernels.cpu.build import load_kernel
from llmcompress.kernels.cpu.calls import address_of, own_values
from llmcompress.kernels.cpu.instruction_sets import Tier
from llmcompress.kernels.cpu.sequence import CallSequence
from llmcompress.kernels.cpu.token_steps import Attend, Norm
from llmcompress.kernels.cpu.vectors import Combine, CombineArgument, exponential
from tests.kernels.cpu.test_products import every_tier

ULP = 2.0**-8  # largest relative change of a number rounded to bfloat16


def call(kernel: Any, values: list[int], blocks: int = 1, tier: Tier | None = None) -> None:
    """Run a kernel in this thread."""
    arguments = own_values(values)
    load_kernel(kernel, tier).serial(ctypes.addressof(arguments), 0, blocks)


def random(*size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return bfloat16 numbers."""
    return (torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def addresses(*tensors: Tensor | None) -> list[int]:
    return [address_of(tensor) for tensor in tensors]


@pytest.mark.parametrize("width", [16, 30, 576])
@pytest.mark.parametrize("addition", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_norm_is_that_of_float64(width: int, addition: bool, shifted: bool) -> None:
    hidden, more, weight = (random(width, seed=seed) for seed in range(3))
    total, x = torch.empty(2, width, dtype=torch.bfloat16)
    call(Norm(width, 1e-5, shifted, addition), addresses(hidden, more, total, weight, x))
    read = hidden + more if addition else hidden
    if addition:
        assert torch.equal(total, read)
    exact = read.double() / (read.double().square().mean() + 1e-5).sqrt()
    scaled = exact * (weight.double() + 1) if shifted else exact.bfloat16().double() * weight.double()
    torch.testing.assert_close(x.double(), scaled, rtol=1.01 * ULP, atol=0)


@pytest.mark.parametrize("width", [16, 30, 1536])
def test_sums_and_gates_are_those_of_torch(width: int) -> None:
    first, second = random(width, seed=3, scale=8), random(width, seed=4)
    result = torch.empty_like(first)
    call(Combine(width, None), addresses(first, second, result))
    assert torch.equal(result, first + second)
    silu = torch.nn.functional.silu(first.double()) * second.double()
    gelu = torch.nn.functional.gelu(first.double(), approximate="tanh") * second.double()
    call(Combine(width, "gelu"), addresses(first, second, result))
    torch.testing.assert_close(result.double(), gelu, rtol=2.1 * ULP, atol=1e-9)
    call(Combine(width, "silu"), addresses(first, second, first))  # in place, as blocks have it
    torch.testing.assert_close(first.double(), silu, rtol=2.1 * ULP, atol=1e-30)


@pytest.mark.parametrize("gate", ["silu", "gelu"])
def test_gates_of_large_numbers_are_their_limits(gate: Any) -> None:
    first = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, 3e38] * 2).bfloat16()
    second, result = torch.ones(16).bfloat16(), torch.empty(16).bfloat16()
    call(Combine(16, gate), addresses(first, second, result))
    torch.testing.assert_close(result, torch.where(first > 0, first, 0.0).bfloat16(), rtol=0, atol=1e-30)


class Exponentials:
    """A kernel of exponentials of float32 numbers."""

    def write(self, f: Any) -> None:
        """Write the kernel, for a range of 16 numbers each."""
        from llmcompress.kernels.cpu.emit import FLOATS

        with f.loop(f.first, f.last) as block:
            x = f.load(f.pointer(CombineArgument.FIRST), FLOATS, block * 64)
            f.store(exponential(x), f.pointer(CombineArgument.RESULT), block * 64)


def test_exponentials_have_seven_digits() -> None:
    x = torch.linspace(-87, 88, 16 * 4000)
    result = torch.empty_like(x)
    call(Exponentials(), [x.data_ptr(), 0, result.data_ptr()], 4000)
    torch.testing.assert_close(result.double(), x.double().exp(), rtol=3e-7, atol=0)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cosines + turned * sines


@pytest.mark.parametrize("count", [0, 1, 15, 16, 100])
@pytest.mark.parametrize(
    ("size", "group", "heads", "bias", "norm", "shifted"),
    [
        (8, 2, 2, False, None, False),
        (64, 3, 3, False, None, False),
        (64, 7, 2, True, None, False),
        (128, 4, 2, False, 1e-6, False),
        (256, 4, 1, False, 1e-6, True),
        (96, 1, 2, True, 1e-6, False),
    ],
)
def test_attention_is_that_of_float64(
    size: int, group: int, heads: int, bias: bool, norm: float | None, shifted: bool, count: int
) -> None:
    queries, key, value = random(heads * group, size, seed=1), random(heads, size, seed=2), random(heads, size, seed=3)
    biases = [random(heads * g, size, seed=4 + n) for n, g in enumerate((group, 1, 1))] if bias else [None] * 3
    norms = [random(size, seed=seed) for seed in (7, 8)] if norm is not None else [None] * 2
    angle = torch.rand(size // 2, generator=torch.Generator().manual_seed(9)) * 6
    cosines, sines = torch.cat([angle, angle]).cos().bfloat16(), torch.cat([angle, angle]).sin().bfloat16()
    room = count + 5
    keys, values = random(heads, room, size, seed=10), random(heads, room, size, seed=11)
    before = keys.clone(), values.clone()
    attend = Attend(size, group, size**-0.5, bias, norm, shifted)
    needed = attend.scores_room(count + 1)
    scores, mixed = torch.full((heads * needed + 8,), 77.0), torch.empty_like(queries)
    call(
        attend,
        [
            *addresses(queries, key, value, *biases, *norms, cosines, sines, keys, values),
            room * size,
            count,
            scores.data_ptr(),
            needed,
            mixed.data_ptr(),
        ],
        heads,
    )
    assert (scores[heads * needed :] == 77.0).all()

    def head(x: Tensor, added: Tensor | None, weight: Tensor | None) -> Tensor:
        x = x if added is None else x + added
        if weight is not None and norm is not None:
            scale = x.double().square().mean(-1, keepdim=True) + norm
            normal = x.double() / scale.sqrt()
            x = (normal * (weight.double() + 1)).bfloat16() if shifted else normal.bfloat16() * weight
        return x

    turned = [rotated(head(x, b, w), cosines, sines) for x, b, w in zip((queries, key), biases, norms)]
    torch.testing.assert_close(keys[:, count].float(), turned[1].float(), rtol=3 * ULP, atol=0.03)
    assert torch.equal(values[:, count], head(value, biases[2], None))
    for now, then in zip((keys, values), before):
        assert torch.equal(now[:, :count], then[:, :count]) and torch.equal(now[:, count + 1 :], then[:, count + 1 :])
    q = turned[0].double().view(heads, group, size)
    shares = (q @ keys[:, : count + 1].double().mT / math.sqrt(size)).softmax(-1)
    exact = (shares @ values[:, : count + 1].double()).view(heads * group, size)
    torch.testing.assert_close(mixed.double(), exact, rtol=2 * ULP, atol=0.01)


@every_tier
def test_every_tier_gives_alike(tier: Tier) -> None:
    """Up to sums in another order."""
    hidden, weight = random(96, seed=1), random(96, seed=2)
    queries, keys, values = random(4, 24, seed=3), random(2, 9, 24, seed=4), random(2, 9, 24, seed=5)
    attend = Attend(24, 2, 0.2, False, None)
    results = []
    for way in (tier, None):
        x, gated, mixed = torch.empty_like(hidden), torch.empty_like(hidden), torch.empty_like(queries)
        call(Norm(96, 1e-5, False, False), addresses(hidden, None, None, weight, x), 1, way)
        call(Combine(96, "gelu"), addresses(x, weight, gated), 1, way)
        scores, needed = torch.empty(2 * attend.scores_room(9)), attend.scores_room(9)
        read = addresses(queries, queries[:2], queries[2:], *[None] * 5, keys[0, 0], keys[0, 1], keys, values)
        call(attend, [*read, 9 * 24, 8, scores.data_ptr(), needed, mixed.data_ptr()], 2, way)
        results.append((x, gated, mixed))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2 * ULP, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_calls_in_sequence_read_what_was_written_before(threads: int) -> None:
    """Sums that double a vector, which threads may not begin before the one before has ended."""
    width, steps = 4096, 40
    vectors = torch.zeros(steps + 1, width).bfloat16()
    vectors[0] = random(width)
    calls = CallSequence()
    for step in range(steps):
        values = own_values([vectors[step].data_ptr(), vectors[step].data_ptr(), vectors[step + 1].data_ptr()])
        calls.add(Combine(width, None), values, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(5):
            vectors[1:] = 0
            calls.run()
            assert torch.equal(vectors[-1], vectors[0] * 2.0**steps)
    finally:
        torch.set_num_threads(before)
