"""Numbers from places of their own: what kernels need that read lists of columns, or tables of floats."""

from __future__ import annotations

from llvmlite import ir

from llmcompress.kernels.cpu.emit import F32, I8, I32, I64, Function, Value, vector
from llmcompress.kernels.cpu.instruction_sets import Instructions, chosen, joined

LANES = 16
FLOATS = vector(F32, LANES)
IN_REGISTERS = 128  # numbers of a table up to which choosing among registers is faster than gathering
BIT = ir.IntType(1)  # LLVM's type of a flag


def gathered(target: Instructions, f: Function, start: Value, places: Value) -> Value:
    """Return the float32 at `places`, int32 `[16]`, of an array that begins at the address `start`."""
    if target.tier.name.startswith("avx512"):
        every = f.constant(vector(BIT, LANES), 1)
        name, bytes_each = "llvm.x86.avx512.mask.gather.dps.512", f.constant(I32, 4)
        return f.call(name, FLOATS, f.constant(FLOATS, 0.0), start, places, every, bytes_each)
    if target.tier.name == "avx2":
        half, name = vector(F32, 8), "llvm.x86.avx2.gather.d.ps.256"
        every = f.constant(vector(I32, 8), -1).as_type(half)
        parts = [places.shuffled(range(at, at + 8)) for at in (0, 8)]
        zero, bytes_each = f.constant(half, 0.0), f.constant(I8, 4)
        return joined([f.call(name, half, zero, start, part, every, bytes_each) for part in parts])
    found = f.constant(FLOATS, 0.0)
    for lane in range(LANES):
        one = f.load(start, F32, places.at(lane).wider(I64) * 4)
        found = with_lane(found, lane, one)
    return found


def entries_of(target: Instructions, f: Function, start: Value, places: Value, count: int) -> Value:
    """Return the float32 at the low bytes of `places`, int32 `[16]`, of a table at the address `start`.

    It has `count` numbers, 16 or a power of two beyond.
    """
    if not target.tier.name.startswith("avx512") or count > IN_REGISTERS:
        return gathered(target, f, start, places & 255)
    found = [f.load(start, FLOATS, 4 * at) for at in range(0, count, LANES)]
    if len(found) == 1:
        return f.call("llvm.x86.avx512.permvar.sf.512", FLOATS, found[0], places)
    name, bit = "llvm.x86.avx512.vpermi2var.ps.512", 2 * LANES
    found = [f.call(name, FLOATS, low, places, high) for low, high in zip(found[::2], found[1::2])]
    while len(found) > 1:  # halves by one bit of the place after the other
        found = [chosen(places & bit, low, high) for low, high in zip(found[::2], found[1::2])]
        bit *= 2
    return found[0]


def with_lane(values: Value, lane: int, one: Value) -> Value:
    """Return a vector with another number in one lane."""
    return Value(values.function, values.function.builder.insert_element(values.raw, one.raw, I32(lane)))
