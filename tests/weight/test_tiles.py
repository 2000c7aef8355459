"""Tiles of EXL3 against a reader of single bits in float64, and their laws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from llmcompress.weight.tiles import (
    BLOCK,
    STEPS,
    from_tiles,
    matrix,
    numbers,
    order,
    states,
    sums,
    to_tiles,
    turn_blocks,
)
from tests.builders import seeded

BITS = (1, 2, 3, 4, 5, 6, 7, 8)


def half(bits: int) -> float:
    """The float16 number of these bits: sign, five of exponent, ten of mantissa."""
    sign, exponent, mantissa = -1.0 if bits >> 15 else 1.0, bits >> 10 & 31, bits & 1023
    return sign * 2.0 ** (exponent - 25) * (1024 + mantissa)


def number(state: int) -> float:
    """The number of a state: a fused product and sum in float16, rounded once."""
    product = state * 0x83DCD12D % 2**32
    total = 1024 + sum(product.to_bytes(4, "little"))
    return float(np.float64(total * half(0x1EEE) + half(0xC931)).astype(np.float16))


def place(step: int) -> tuple[int, int]:
    """Input and output within a tile of a step, as the layout of `mma.m16n8k16` has them in a lane's registers."""
    lane, register = divmod(step, 8)
    group, thread = divmod(lane, 4)
    half_tile, element = divmod(register, 4)
    return 2 * thread + element % 2 + 8 * (element // 2), group + 8 * half_tile


def read(codes: NDArray[np.uint8], bits: int, inputs: NDArray[np.float64], outputs: NDArray[np.float64]) -> np.ndarray:
    """The matrix `[out, in]`, one number at a time, its transforms as sums with signs by common set bits."""
    down, across = codes.shape[:2]
    found = np.zeros((16 * down, 16 * across))
    for i, j in itertools.product(range(down), range(across)):
        stream = "".join(f"{code:0{bits}b}" for code in codes[i, j])  # highest bits first
        for step in range(STEPS):
            end = (step + 1) * bits
            window = (stream + stream)[len(stream) + end - 16 : len(stream) + end]
            k, n = place(step)
            found[16 * i + k, 16 * j + n] = number(int(window, 2))
    signs = np.array([[(-1.0) ** (a & b).bit_count() for b in range(128)] for a in range(128)]) / np.sqrt(128)
    for axis in (0, 1):
        parts = np.split(found, found.shape[axis] // 128, axis)
        found = np.concatenate([signs @ part if axis == 0 else part @ signs for part in parts], axis)
    return (inputs[:, None] * found * outputs).T


@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_is_what_its_bits_say(bits: int) -> None:
    random = seeded(bits)
    codes = torch.randint(1 << bits, (8, 8, STEPS), generator=random, dtype=torch.uint8)
    inputs, outputs = (torch.randn(128, generator=random).half() for _ in range(2))
    found = matrix(codes, bits, inputs, outputs)
    expected = read(codes.numpy(), bits, inputs.double().numpy(), outputs.double().numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_every_number_is_that_of_its_bytes() -> None:
    every = range(0, 1 << 16, 7)
    assert torch.equal(numbers()[::7].double(), torch.tensor([number(state) for state in every], dtype=torch.float64))
    assert abs(float(numbers().mean())) < 0.01 and abs(float(numbers().std()) - 1) < 0.01


@pytest.mark.parametrize(("codebook", "factor", "summand"), [("mcg", 0xCBAC1FED, 0), ("3inst", 89226354, 64248484)])
def test_numbers_of_other_codebooks_are_sums_of_two(codebook: str, factor: int, summand: int) -> None:
    """Sign, two bits of the exponent and the mantissa of each come from the product."""
    for state in range(0, 1 << 16, 97):
        bits = f"{(state * factor + summand) % 2**32:032b}"
        parts = [
            (-1.0) ** int(bits[start])
            * 2.0 ** (12 + (int(bits[start + 4 : start + 6], 2) ^ 2) - 15)
            * (1 + (int(bits[start + 6 : start + 16], 2) ^ 0x360) / 1024)
            for start in (0, 16)
        ]
        assert float(sums(codebook)[state]) == float(np.float16(sum(parts)))


def test_states_go_round() -> None:
    codes = torch.randint(4, (3, STEPS), generator=seeded(0), dtype=torch.uint8)
    for turn in (1, 100):
        assert torch.equal(states(codes.roll(turn, -1), 2), states(codes, 2).roll(turn, -1))


def test_tiles_and_matrices_are_one() -> None:
    given = torch.arange(256 * 384).reshape(256, 384)
    assert torch.equal(from_tiles(to_tiles(given)), given)
    assert torch.equal(order().sort().values, torch.arange(STEPS))


def test_a_transform_is_its_own_inverse_and_stays_within_its_block() -> None:
    x = torch.randn(5, 3 * BLOCK, generator=seeded(1))
    torch.testing.assert_close(turn_blocks(turn_blocks(x)), x)
    assert bool((turn_blocks(torch.eye(3 * BLOCK))[0, BLOCK:] == 0).all())
