"""The way back through a searched stream, for the kernel of `column_search.py`: codes written, and read again.

Only programs that search import this file: Triton comes with torch for GPUs.
"""

import triton
import triton.language as tl

from llmcompress.kernels import column_block

HIGH = tl.constexpr((1 << 32) - (1 << column_block.COST))


@triton.jit
def record_codes(low, oldest, BITS: tl.constexpr, MEMORY: tl.constexpr, ORIGINS: tl.constexpr):
    """Write the oldest codes: those of a butterfly in one number if they fit 32 bits, else a byte each."""
    PARTS: tl.constexpr = 1 << BITS
    J: tl.constexpr = 1 << (MEMORY - 2 * BITS)
    CODE: tl.constexpr = (MEMORY - BITS) if ORIGINS else 0
    code = ((low >> CODE) & (PARTS - 1)).to(tl.int32)
    newest = tl.arange(0, PARTS)
    if BITS <= 3:
        packed = tl.sum(code << (newest[None, :] * BITS), 1)
        tl.store(oldest + tl.arange(0, J), packed.to(oldest.dtype.element_ty))
    else:
        at = tl.arange(0, J)[:, None] * PARTS + newest[None, :]
        tl.store(oldest + at, code.to(oldest.dtype.element_ty))


@triton.jit
def oldest_code(oldest, step, place, mask, BITS: tl.constexpr, MEMORY: tl.constexpr):
    """Read the oldest code of states, given the other codes, after a step."""
    PARTS: tl.constexpr = 1 << BITS
    if BITS <= 3:
        word = tl.load(oldest + step * (1 << (MEMORY - 2 * BITS)) + (place >> BITS), mask=mask, other=0).to(tl.int32)
        code = (word >> (place & (PARTS - 1)) * BITS) & (PARTS - 1)
    else:
        code = tl.load(oldest + step * (1 << (MEMORY - BITS)) + place, mask=mask, other=0).to(tl.int32) & (PARTS - 1)
    return code


@triton.jit
def last_place(key, end, REST: tl.constexpr):
    """Return the last state of the stream without its oldest code, and the state before its last chunk."""
    rest = tl.arange(0, REST)
    lowest = tl.min(key & HIGH, 0)
    best = tl.min(tl.where((key & HIGH) == lowest, rest, REST), 0)
    place = tl.where(end < 0, best, end & (REST - 1))
    return place, tl.sum(tl.where(rest == place, (key & (REST - 1)).to(tl.int32), 0), 0)


@triton.jit
def trace(states, oldest, steps, place, BITS: tl.constexpr, MEMORY: tl.constexpr):
    """Write the states, last first."""
    for back in range(steps):
        step = steps - 1 - back
        state = (oldest_code(oldest, step, place, step >= 0, BITS, MEMORY) << (MEMORY - BITS)) + place
        tl.store(states + step, state)
        place = state >> BITS


@triton.jit
def trace_chunks(
    states, oldest, origins, steps, place, origin, BITS: tl.constexpr, MEMORY: tl.constexpr, CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Write the states: from the end of a chunk to that of the one before, then all chunks at once."""
    REST: tl.constexpr = 1 << (MEMORY - BITS)
    lane = tl.arange(0, LANES)
    chunk = (steps - 1) // CHUNK
    ending = tl.where(lane == chunk, place, 0)
    if steps % CHUNK != 0:
        place = origin
        chunk -= 1
        ending = tl.where(lane == chunk, place, ending)
    for back in range(chunk):
        place = tl.load(origins + (chunk - back) * REST + place).to(tl.int32) & (REST - 1)
        ending = tl.where(lane == chunk - back - 1, place, ending)
    place = ending
    for back in range(CHUNK):
        step = tl.minimum((lane + 1) * CHUNK, steps) - 1 - back
        mask = (step >= lane * CHUNK) & (lane * CHUNK < steps)
        state = (oldest_code(oldest, step, place, mask, BITS, MEMORY) << (MEMORY - BITS)) + place
        tl.store(states + step, state, mask=mask)
        place = tl.where(mask, state >> BITS, place)
