"""A hash of numbers, in place of random draws that differ between versions of a library."""

from torch import Tensor


def scramble(numbers: Tensor) -> Tensor:
    """Numbers below 2^31 that look random, of int64 numbers below 2^31; the same everywhere."""
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
        numbers = (numbers ^ (numbers >> shift)) * factor % (1 << 31)
    return numbers
