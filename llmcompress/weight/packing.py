"""Integer codes <-> bytes.

Codes with `levels` values are stored in one of two ways, whichever is smaller:
a bit stream of `ceil(log2 levels)` bits a code (lowest bits first), or as many base-`levels` digits as fit in
one byte (5 ternary digits: 1.6 bits a code; 3 digits of the six 2:4 patterns: 2.67 bits).
"""

import torch
from torch import Tensor

RUNS = 1 << 17  # of whole bytes that are packed at a time: packing works in words of eight times a code's own size


def stream_bits(levels: int) -> int:
    """Return the bits of a code in a bit stream."""
    return max(1, (levels - 1).bit_length())


def digits_per_byte(levels: int) -> int:
    """Return the number of base-`levels` digits in a byte; 0 if a bit stream is at least as small."""
    digits = 1
    while levels ** (digits + 1) <= 256:
        digits += 1
    return digits if digits * stream_bits(levels) > 8 else 0


def packed_bits(levels: int, count: int) -> int:
    """Return the stored bits of `count` codes, before the last byte is padded."""
    digits = digits_per_byte(levels)
    return 8 * -(-count // digits) if digits else count * stream_bits(levels)


def packed_bytes(levels: int, count: int) -> int:
    """Return the stored bytes of `count` codes."""
    return -(-packed_bits(levels, count) // 8)


def codes_in_bytes(levels: int, octets: int) -> tuple[int, int]:
    """Return the fewest and the most codes in so many bytes; for impossible numbers the fewest are more."""
    digits, bits = digits_per_byte(levels), stream_bits(levels)
    if digits:
        return (octets - 1) * digits + 1, octets * digits
    return 8 * (octets - 1) // bits + 1, 8 * octets // bits


def pack(codes: Tensor, levels: int) -> Tensor:
    """Pack codes of any shape, each in [0, levels), to flat uint8. Raises ValueError for a code out of range."""
    flat = codes.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < levels:
        raise ValueError(f"codes {int(flat.min())}..{int(flat.max())} do not fit in {levels} levels")
    digits = digits_per_byte(levels)
    packed = flat.new_empty(packed_bytes(levels, flat.numel()), dtype=torch.uint8)  # pieces would lie between words
    places = packed.split((1 if digits else stream_bits(levels)) * RUNS)
    for run, place in zip(flat.split((digits or 8) * RUNS), places):
        place.copy_(_pack(run, levels))
    return packed


def _pack(flat: Tensor, levels: int) -> Tensor:
    digits = digits_per_byte(levels)
    if digits:
        powers = torch.tensor([levels**k for k in range(digits)], dtype=torch.int32, device=flat.device)
        return (_rows(flat, digits).to(torch.int32) * powers).sum(1).to(torch.uint8)
    bits = stream_bits(levels)
    # eight codes fill exactly `bits` bytes; a 64-bit word carries them across
    places = torch.arange(8, device=flat.device)
    word = (_rows(flat, 8).to(torch.int64) << (bits * places)).sum(1)
    octets = ((word[:, None] >> (8 * places[:bits])) & 255).to(torch.uint8)
    return octets.reshape(-1)[: -(-flat.numel() * bits // 8)]


def unpack(packed: Tensor, levels: int, count: int) -> Tensor:
    """Unpack the first `count` codes to flat uint8."""
    digits, codes = digits_per_byte(levels), packed.new_empty(count)
    runs = packed.split((1 if digits else stream_bits(levels)) * RUNS)
    for run, place in zip(runs, codes.split((digits or 8) * RUNS)):
        place.copy_(_unpack(run, levels)[: len(place)])
    return codes


def _unpack(packed: Tensor, levels: int) -> Tensor:
    digits = digits_per_byte(levels)
    if digits:
        octets = torch.arange(256, device=packed.device)
        table = torch.stack([(octets // levels**k) % levels for k in range(digits)], 1).to(torch.uint8)
        return table[packed.long()].reshape(-1)
    bits = stream_bits(levels)
    if 8 % bits == 0:  # whole codes to a byte
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, None] >> places) & ((1 << bits) - 1)).reshape(-1)
    shifts = torch.arange(8, device=packed.device)
    word = (_rows(packed, bits).to(torch.int64) << (8 * shifts[:bits])).sum(1)
    return ((word[:, None] >> (bits * shifts)) & ((1 << bits) - 1)).to(torch.uint8).reshape(-1)


def unpack_rows(packed: Tensor, levels: int, width: int, rows: Tensor) -> Tensor:
    """Unpack rows `rows [n]` of a matrix of `width` columns to uint8 `[n, width]`; only their bytes are read."""
    if torch.compiler.is_compiling():  # what follows is for memory, and takes `n` for a number
        places = rows[:, None] * width + torch.arange(width, device=rows.device)
        return unpack_at(packed, levels, places.flatten()).view(-1, width)
    codes = digits_per_byte(levels) or 8  # that a run of whole bytes holds
    octets = 1 if digits_per_byte(levels) else stream_bits(levels)
    first, inside = rows * width // codes, rows * width % codes
    runs = first[:, None] + torch.arange(-(-(width + codes - 1) // codes), device=rows.device)
    places = runs[..., None] * octets + torch.arange(octets, device=rows.device)
    own = packed[places.flatten().clamp_max(len(packed) - 1)]  # codes beyond the end are dropped below
    unpacked = unpack(own, levels, runs.numel() * codes).reshape(len(rows), runs.shape[1] * codes)
    return unpacked.gather(1, inside[:, None] + torch.arange(width, device=rows.device))


def unpack_at(packed: Tensor, levels: int, places: Tensor) -> Tensor:
    """Unpack the codes at `places` (int64, flat) to uint8; only their bytes are read."""
    digits = digits_per_byte(levels)
    if digits:
        powers = levels ** torch.arange(digits, device=packed.device)
        return (packed[places // digits] // powers[places % digits] % levels).to(torch.uint8)
    bits = stream_bits(levels)
    first, shift = places * bits // 8, places * bits % 8
    beyond = packed[(first + 1).clamp_max(len(packed) - 1)]  # a code lies in two bytes at most
    word = packed[first].long() | beyond.long() << 8
    return ((word >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def ones_before(packed: Tensor, places: Tensor) -> Tensor:
    """Return the number of set bits before each of `places` (int64, flat) in a packed row of bits."""
    before = torch.nn.functional.pad(ones(packed).cumsum(0), (1, 0))
    octet, rest = places // 8, places % 8
    mask = ((1 << rest) - 1).to(torch.uint8)
    return before[octet] + ones(packed[octet.clamp_max(len(packed) - 1)] & mask)


def ones(octets: Tensor) -> Tensor:
    """Return the number of set bits of each byte."""
    pairs = octets - ((octets >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (fours + (fours >> 4)) & 0x0F


def _rows(flat: Tensor, width: int) -> Tensor:
    """Return `flat` as rows of `width`, the last row padded with zeros."""
    missing = -flat.numel() % width
    return torch.nn.functional.pad(flat, (0, missing)).reshape(-1, width)
