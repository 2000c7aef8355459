"""Instructions of processors beyond plain vectors: products of small integers, and looking up many numbers at once.

A `Tier` is a family of processors. Kernels are written once; the methods of `Instructions` write the instructions of a
tier where it has them, and plain vectors otherwise. Every operation gives the same numbers on every tier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import llvmlite.binding as llvm
from llvmlite import ir

from llmcompress.kernels.cpu.emit import F32, FLOATS, I8, I16, I32, I64, LANES, Value, vector

X86_PAIRS = {  # products of bytes added in pairs, and these added again
    "avx512": ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    "avx2": ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
}
TILE = 64  # bytes of a tile
IN_REGISTERS = 128  # numbers of a table up to which choosing among registers is faster than gathering
BIT = ir.IntType(1)  # LLVM's type of a flag
ARM = "aarch64"
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Tier:
    """A family of processors: the LLVM `triple` and `cpu`, its features, and the widest bytes that it shuffles."""

    name: str
    triple: str
    cpu: str
    needs: tuple[str, ...]  # features, in LLVM's names, that the host must have
    shuffle: int  # bytes of a register whose 16-byte lanes are shuffled at once; 0: none

    @property
    def fused(self) -> bool:
        """True if it multiplies and adds in one instruction, and reads float16."""
        return bool(self.needs)


TIERS = (
    Tier(
        "avx512-vbmi",
        "x86_64",
        "icelake-server",
        ("avx512vnni", "avx512vbmi", "gfni", "avx512bw", "avx512vl", "f16c"),
        64,
    ),
    Tier("avx512", "x86_64", "skylake-avx512", ("avx512f", "avx512bw", "avx512vl", "f16c"), 64),
    Tier("avx2", "x86_64", "haswell", ("avx2", "fma", "f16c"), 32),
    Tier("neon", ARM, "cortex-a76", ("dotprod", "neon"), 16),
    Tier("portable", "", "generic", (), 0),
)


def host_kind() -> str:
    """Return the beginning of this machine's triple as tiers have it: Apple says arm64 for aarch64."""
    triple: str = llvm.get_default_triple()
    return ARM if triple.startswith("arm64") else triple


def host_features() -> llvm.FeatureMap:
    """Return what this machine's processor has, with the products of small integers that LLVM does not tell on ARM."""
    features = llvm.get_host_cpu_features()
    if host_kind().startswith(ARM):
        if "apple" in llvm.get_default_triple():  # all of its 64-bit processors for Macs have both
            features |= {"neon": True, "dotprod": True}
        elif CPUINFO.is_file() and "asimddp" in CPUINFO.read_text(encoding="utf-8", errors="replace").split():
            features["dotprod"] = True
    return features


def host_tier() -> Tier:
    """Return the best tier of this machine; `portable` works everywhere."""
    kind, features = host_kind(), host_features()
    return next(tier for tier in TIERS if kind.startswith(tier.triple) and all(map(features.get, tier.needs)))


@dataclass(frozen=True)
class Instructions:
    """Writes the operations of a tier into a function."""

    tier: Tier

    def dot(self, total: Value, codes: Value, x: Value, wide: bool) -> Value:
        """Return int32 `[16]`, `total` plus the products of four codes each with those of `x`.

        `codes` uint8 `[64]`, below 128 unless `wide`; `x` int8 `[64]` from -127 on.
        """
        f = total.function
        if self.tier.name == "avx512-vbmi":
            bytes_typed = llvm.llvm_version_info[0] >= 21
            kind = vector(I8, 64) if bytes_typed else vector(I32, 16)
            return f.call("llvm.x86.avx512.vpdpbusd.512", total.type, total, codes.as_type(kind), x.as_type(kind))
        if not wide:
            return total + self._sums_of_four(codes, x)
        return total + self._sums_of_four(codes & 127, x) + (self._sums_of_four(codes >> 7, x) << 7)

    def _sums_of_four(self, codes: Value, x: Value) -> Value:
        """Return int32 `[16]`, sums of four products with codes below 128."""
        f, width = codes.function, self.tier.shuffle
        parts = [range(start, start + width) for start in range(0, TILE, width or TILE)]
        if self.tier.name == "neon":
            zero, name = f.constant(vector(I32, 4), 0), "llvm.aarch64.neon.sdot.v4i32.v16i8"
            return join([f.call(name, zero.type, zero, codes.shuffle(part), x.shuffle(part)) for part in parts])
        if self.tier.name not in X86_PAIRS:
            return _products(codes, x)
        first, second = X86_PAIRS[self.tier.name]
        ones = f.constant(vector(I16, width // 2), 1)
        pairs = [f.call(first, ones.type, codes.shuffle(part), x.shuffle(part)) for part in parts]
        return join([f.call(second, vector(I32, width // 4), pair, ones) for pair in pairs])  # 2 * 127^2 fit 16 bits

    def lookup(self, table: Sequence[Value], places: Value) -> Value:
        """Return the bytes at `places`, uint8 `[64]`, of a table of 64 to 256 bytes in vectors of 64.

        Places must be below the length of the table.
        """
        f = places.function
        if self.tier.name == "avx512-vbmi":
            if len(table) == 1:
                return f.call("llvm.x86.avx512.permvar.qi.512", places.type, table[0], places)
            name = "llvm.x86.avx512.vpermi2var.qi.512"
            halves = [f.call(name, places.type, table[at], places, table[at + 1]) for at in range(0, len(table), 2)]
            return _select_by_bits(places, 128, halves)
        rows = [part.shuffle(range(at, at + 16)) for part in table for at in range(0, 64, 16)]
        return _select_by_bits(places, 16, [self.lookup16(row, places & 15) for row in rows])

    def lookup16(self, table: Value, places: Value) -> Value:
        """Return the bytes at `places`, uint8 `[64]` below 16, of a table of 16 bytes."""
        f, width = places.function, self.tier.shuffle
        if not width:
            return _look_up_plainly(table, places)
        names = {64: "llvm.x86.avx512.pshuf.b.512", 32: "llvm.x86.avx2.pshuf.b", 16: "llvm.aarch64.neon.tbl1.v16i8"}
        everywhere = table.shuffle([at % 16 for at in range(width)])
        parts = [places.shuffle(range(at, at + width)) for at in range(0, TILE, width)]
        return join([f.call(names[width], part.type, everywhere, part) for part in parts])

    def sums_of_bits(self, parts: Sequence[tuple[Value, Sequence[int]]]) -> Value:
        """Return uint8 `[64]` whose bit k is the sum, mod 2, of the bits `rows[k]` of the bytes in all `parts`.

        A part is `(bytes, rows)`; bytes are uint8 `[64]`, rows 8-bit masks.
        """
        sums = []
        for part, rows in parts:
            f = part.function
            if self.tier.name == "avx512-vbmi" and any(rows):
                name = "llvm.x86.vgf2p8affineqb.512"
                matrix = f.constant(vector(I64, 8), sum(row << 8 * (7 - k) for k, row in enumerate(rows)))
                sums.append(f.call(name, part.type, part, matrix.as_type(part.type), f.constant(I8, 0)))
                continue
            for shift in (0, 4):
                if any(row >> shift & 15 for row in rows):
                    table = f.constant(vector(I8, 16), [_sums(number << shift, rows) for number in range(16)])
                    sums.append(self.lookup16(table, part >> shift & 15))
        return reduce(Value.__xor__, sums)

    def gather(self, start: Value, places: Value) -> Value:
        """Return the float32 at `places`, int32 `[16]`, of an array that begins at the address `start`."""
        f = places.function
        if self.tier.name.startswith("avx512"):
            every = f.constant(vector(BIT, LANES), 1)
            name, bytes_each = "llvm.x86.avx512.mask.gather.dps.512", f.constant(I32, 4)
            return f.call(name, FLOATS, f.constant(FLOATS, 0.0), start, places, every, bytes_each)
        if self.tier.name == "avx2":
            half, name = vector(F32, 8), "llvm.x86.avx2.gather.d.ps.256"
            every = f.constant(vector(I32, 8), -1).as_type(half)
            parts = [places.shuffle(range(at, at + 8)) for at in (0, 8)]
            zero, bytes_each = f.constant(half, 0.0), f.constant(I8, 4)
            return join([f.call(name, half, zero, start, part, every, bytes_each) for part in parts])
        numbers = f.constant(FLOATS, 0.0)
        for lane in range(LANES):
            number = f.load(start, F32, places.at(lane).wider(I64) * 4)
            numbers = numbers.with_lane(lane, number)
        return numbers

    def lookup_floats(self, start: Value, places: Value, count: int) -> Value:
        """Return the float32 at the low bytes of `places`, int32 `[16]`, of a table at the address `start`.

        It has `count` numbers, 16 or a power of two beyond.
        """
        f = places.function
        if not self.tier.name.startswith("avx512") or count > IN_REGISTERS:
            return self.gather(start, places & 255)
        parts = [f.load(start, FLOATS, 4 * at) for at in range(0, count, LANES)]
        if len(parts) == 1:
            return f.call("llvm.x86.avx512.permvar.sf.512", FLOATS, parts[0], places)
        name = "llvm.x86.avx512.vpermi2var.ps.512"
        pairs = [f.call(name, FLOATS, low, places, high) for low, high in zip(parts[::2], parts[1::2])]
        return _select_by_bits(places, 2 * LANES, pairs)


def _select_by_bits(places: Value, bit: int, parts: Sequence[Value]) -> Value:
    """Return the number of each place, whose bits from `bit` on tell which of the parts, a power of two, has it."""
    while len(parts) > 1:
        parts = [select(places & bit, low, high) for low, high in zip(parts[::2], parts[1::2])]
        bit *= 2
    return parts[0]


def _sums(number: int, masks: Sequence[int]) -> int:
    return sum(((number & mask).bit_count() & 1) << bit for bit, mask in enumerate(masks))


def _look_up_plainly(table: Value, places: Value) -> Value:
    """Look up bytes without an instruction for it, by 16 selections."""
    numbers = places ^ places
    for at in range(16):
        numbers = select(is_equal(places, at), numbers, table.shuffle([at] * places.length))
    return numbers


def _products(codes: Value, x: Value) -> Value:
    """Return the sums of four products beside each other, in 32 bits, by plain vectors."""
    products = codes.wider(I32, signed=False) * x.wider(I32)
    parts = [products.shuffle(range(start, products.length, 4)) for start in range(4)]
    return reduce(Value.__add__, parts)


def select(flags: Value, low: Value, high: Value) -> Value:
    """Return `high` where `flags` is not 0, else `low`."""
    builder = flags.function.builder
    zero = flags.function.constant(flags.type, 0)
    return Value(flags.function, builder.select(builder.icmp_unsigned("!=", flags.raw, zero.raw), high.raw, low.raw))


def is_equal(values: Value, number: int) -> Value:
    """Return all ones where `values` is `number`, else 0."""
    f = values.function
    same = f.builder.icmp_unsigned("==", values.raw, f.constant(values.type, number).raw)
    return Value(f, f.builder.sext(same, values.type))


def join(parts: Sequence[Value]) -> Value:
    """Return vectors of one length, a power of two of them, behind each other."""
    while len(parts) > 1:
        parts = [low.shuffle(range(2 * low.length), high) for low, high in zip(parts[::2], parts[1::2])]
    return parts[0]
