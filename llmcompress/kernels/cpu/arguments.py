"""The arguments of kernels: one array of int64, addresses and sizes, each with its place."""

from __future__ import annotations

from enum import IntEnum

from llmcompress.kernels.cpu.emit import I64, Function, Value


class Argument(IntEnum):
    """The place of an argument. Sizes count numbers unless they say bytes."""

    CODES = 0
    SCALES = 1  # of weights, float16 or bfloat16 [row tiles, groups, 16]
    ZEROS = 2  # uint8, alike; or nothing
    X = 3  # [tokens, columns]: int8, or float32 in exact products
    X_SCALE = 4  # float32 [tokens, blocks]: of a block of int8 inputs
    X_SUM = 5  # float32 [tokens, blocks]: sums of the inputs
    Y = 6  # float32 [tokens, rows], added to
    COLUMNS = 7  # rounded up to whole blocks
    ROWS = 8  # rounded up to whole blocks
    GROUPS = 9
    TABLE = 10  # float32 [length, entries]: of a codebook; or nothing
    BLOCKS = 11  # of rows, which threads share
    THREADS = 12  # address of the function that says how many there are
    THREAD = 13  # address of the function that says which one this is


def read(f: Function, argument: Argument) -> Value:
    """Return an int64 argument inside a function whose first argument is the array."""
    return f.load(f.arguments[0], I64, 8 * argument)


def address(f: Function, argument: Argument) -> Value:
    """Return an argument as an address."""
    return f.address(read(f, argument))
