"""Tiles of 16 x 16 in tail-biting trellises: how ExLlamaV3 stores a matrix (EXL3), after QTIP (arXiv 2406.11235).

A tile has 256 steps, which go round: a step's state is made of the last 16 bits of codes up to it, so the first steps
continue the last ones. A number is a function of its state: the bytes of `state * 0x83DCD12D` added up, less their mean
and over their spread, in float16 (ExLlamaV3 1.4.1 calls this codebook `mul1`). In its other two, which are only read,
it is the sum of two float16 numbers of few exponents, made of the bits of a product. A tile's steps lie in the order in
which a tensor core holds the right side of a product of 16 x 16: see `order`.

The matrix of all tiles, `[in, out]`, is meant between orthonormal Hadamard transforms of 128 consecutive inputs and
outputs, and factors with signs for each input and output.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmcompress.weight.constants import constant
from llmcompress.weight.hadamard import SYLVESTER

Codebook = Literal["mul1", "mcg", "3inst"]
SIDE = 16  # of a tile
STEPS = SIDE * SIDE
MEMORY = 16  # bits of a state
BLOCK = 128  # channels of a Hadamard transform
MULTIPLIER = 0x83DCD12D
SUMMED = {"mcg": (0xCBAC1FED, 0), "3inst": (89226354, 64248484)}  # multiplier and summand of other codebooks
VARYING, EXPONENTS = 0x8FFF8FFF, 0x3B603B60  # bits that are taken, and turned over, in two float16 numbers
FACTOR, OFFSET = 0x1EEE, 0xC931  # bits of float16 numbers, about 1 / 147.8 and -10.38


@constant
def numbers() -> Tensor:
    """Return the numbers of every state, float32 `[2^16]`, each one that float16 can hold: mean 0, spread 1."""
    product = (torch.arange(1 << MEMORY) * MULTIPLIER) & 0xFFFFFFFF
    total = sum((product >> shift & 255 for shift in (0, 8, 16, 24)), torch.tensor(1024))
    factor, offset = torch.tensor([FACTOR, OFFSET - (1 << 16)], dtype=torch.int16).view(torch.float16).float()
    return (total.float() * factor + offset).half().float()  # exact before it is rounded to float16


@constant
def sums(codebook: str) -> Tensor:
    """Return the numbers of every state, float32 `[2^16]`, of one of the other codebooks, a key of SUMMED."""
    factor, summand = SUMMED[codebook]
    pairs = (torch.arange(1 << MEMORY) * factor + summand) & VARYING ^ EXPONENTS
    halves = torch.stack([pairs & 0xFFFF, pairs >> 16])
    return (halves - ((halves >> 15) << 16)).to(torch.int16).view(torch.float16).float().sum(0).half().float()


@constant
def order() -> Tensor:
    """Return the place `16 * input + output` in a tile of each step, int64 `[256]`.

    Eight steps make the fragment of one of a tensor core's 32 lanes: inputs 2 l, 2 l + 1, 2 l + 8 and 2 l + 9 of the
    output m, then those of the output m + 8, where l is the lane modulo 4 and m a quarter of it.
    """
    lane = torch.arange(32)[:, None, None]
    inputs = 2 * (lane % 4) + torch.tensor([0, 1, 8, 9])
    outputs = lane // 4 + torch.tensor([0, 8])[:, None]
    return (SIDE * inputs + outputs).flatten()


def states(codes: Tensor, bits: int) -> Tensor:
    """Return the state at each step of tiles, int32, for their codes, uint8 `[..., 256]`."""
    window = torch.zeros(codes.shape, dtype=torch.int32, device=codes.device)
    for back in range(-(-MEMORY // bits)):
        window |= codes.roll(back, -1).int() << (bits * back)
    return window & ((1 << MEMORY) - 1)


def from_tiles(steps: Tensor) -> Tensor:
    """Return the matrix `[in, out]` of tiles' numbers by step, `[in / 16, out / 16, 256]`."""
    down, across = steps.shape[:2]
    places = torch.empty_like(steps)
    places[..., order().to(steps.device)] = steps
    return places.reshape(down, across, SIDE, SIDE).transpose(1, 2).reshape(down * SIDE, across * SIDE)


def to_tiles(matrix: Tensor) -> Tensor:
    """Return the numbers of a matrix `[in, out]` by step, `[in / 16, out / 16, 256]`: the inverse of `from_tiles`."""
    down, across = matrix.shape[0] // SIDE, matrix.shape[1] // SIDE
    places = matrix.reshape(down, SIDE, across, SIDE).transpose(1, 2).reshape(down, across, STEPS)
    return places[..., order().to(matrix.device)]


def turn_blocks(x: Tensor) -> Tensor:
    """Return `x [..., n]` after a Hadamard transform of every 128 consecutive columns; its own inverse."""
    small = SYLVESTER.to(x)
    matrix = torch.cat([torch.cat([small, small], 1), torch.cat([small, -small], 1)]) * BLOCK**-0.5
    return (x.reshape(-1, BLOCK) @ matrix).reshape(x.shape)


def matrix(codes: Tensor, bits: int, inputs: Tensor, outputs: Tensor, codebook: Codebook = "mul1") -> Tensor:
    """Decode codes, uint8 `[in / 16, out / 16, 256]`, under factors `[in]` and `[out]`, to float32 `[out, in]`."""
    table = sums(codebook) if codebook in SUMMED else numbers()
    tiles = from_tiles(table.to(codes.device)[states(codes, bits)])
    turned = turn_blocks(turn_blocks(tiles).T) * inputs.float()
    return turned * outputs.float()[:, None]
