"""Kernels for aarch64 on any machine: object files linked here, and run by an emulator on this process's memory."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest

from llmcompress.kernels.cpu.build import Kernel, compile_kernel
from llmcompress.kernels.cpu.instruction_sets import TIERS

unicorn = pytest.importorskip("unicorn")
arm64 = pytest.importorskip("unicorn.arm64_const")

NEON = next(tier for tier in TIERS if tier.name == "neon")
PAGE = 4096
CODE = 0x10_0000_0000  # far from what this process has mapped
STACK, STACK_BYTES = 0x11_0000_0000, 1 << 18
STUBS = 0x12_0000_0000  # functions that return a number
END = 0x13_0000_0000  # where a function returns to
ALLOCATED, SYMBOLS, RELOCATIONS = 2, 2, 4  # of ELF: a flag of sections, and two kinds of them


@dataclass(frozen=True)
class Image:
    """Linked code, to be placed at `CODE`, and the addresses of its functions."""

    code: bytes
    functions: dict[str, int]


@dataclass(frozen=True)
class Section:
    """A header of an ELF object."""

    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int


def linked(obj: bytes) -> Image:
    """Return the code of an ELF object whose sections refer to nothing but each other."""
    assert obj[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    start, count = struct.unpack_from("<Q", obj, 40)[0], struct.unpack_from("<H", obj, 60)[0]
    headers = [struct.unpack_from("<IIQQQQIIQQ", obj, start + 64 * at) for at in range(count)]
    sections = [Section(h[1], h[2], h[4], h[5], h[6], h[7], h[8]) for h in headers]
    image, places = bytearray(), {}
    for number, section in enumerate(sections):
        if section.flags & ALLOCATED:
            image += bytes(-len(image) % max(section.alignment, 1))
            places[number] = CODE + len(image)
            image += obj[section.offset : section.offset + section.size]
    table = next(section for section in sections if section.kind == SYMBOLS)
    names = sections[table.link].offset
    symbols: list[tuple[str, int | None]] = []
    for at in range(table.offset, table.offset + table.size, 24):
        name, _, _, home, value, _ = struct.unpack_from("<IBBHQQ", obj, at)
        text = obj[names + name : obj.index(b"\0", names + name)].decode()
        symbols.append((text, places[home] + value if home in places else None))
    for section in sections:
        if section.kind == RELOCATIONS and section.info in places:
            for at in range(section.offset, section.offset + section.size, 24):
                place, info, addend = struct.unpack_from("<QQq", obj, at)
                name, address = symbols[info >> 32]
                assert address is not None, f"{name} is not in the object"
                relocate(image, places[section.info] + place, info & 0xFFFFFFFF, address + addend)
    return Image(bytes(image), {name: address for name, address in symbols if name and address is not None})


def relocate(image: bytearray, place: int, kind: int, target: int) -> None:
    """Write an address into an instruction, as the ABI of aarch64 says for this kind of relocation."""
    at = place - CODE
    word = struct.unpack_from("<I", image, at)[0]
    scales = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}  # ADD and LDST 8 to 128: the log of what they count in
    if kind in scales:
        word |= (target & 0xFFF) >> scales[kind] << 10
    elif kind == 275:  # ADR_PREL_PG_HI21
        pages = (target >> 12) - (place >> 12) & 0x1FFFFF
        word |= (pages & 3) << 29 | pages >> 2 << 5
    elif kind in (282, 283):  # JUMP26, CALL26
        word |= target - place >> 2 & 0x3FFFFFF
    elif kind == 261:  # PREL32, of frames, which nobody unwinds here
        word = target - place & 0xFFFFFFFF
    else:
        raise AssertionError(f"relocation {kind}")
    struct.pack_into("<I", image, at, word)


@dataclass(frozen=True)
class Emulated:
    """Stands in for `LoadedKernel`."""

    image: Image

    def serial(self, arguments: int, first: int, last: int) -> None:
        """Run `kernel` on addresses of this process."""
        self.call("kernel", (arguments, first, last))

    def call(self, name: str, arguments: Iterable[int], stubs: Iterable[int] = ()) -> None:
        """Run a function. Stub number n, at `STUBS + 8 * n`, returns the n-th of the numbers."""
        machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM, cpu=arm64.UC_CPU_ARM64_MAX)
        machine.mem_map(CODE, -(-len(self.image.code) // PAGE) * PAGE)
        machine.mem_write(CODE, self.image.code)
        machine.mem_map(STACK, STACK_BYTES)
        machine.mem_map(STUBS, PAGE)
        for number, returned in enumerate(stubs):  # movz w0, #returned; ret
            machine.mem_write(STUBS + 8 * number, struct.pack("<II", 0x52800000 | returned << 5, 0xD65F03C0))
        machine.mem_map(END, PAGE)
        machine.hook_add(unicorn.UC_HOOK_MEM_READ_UNMAPPED | unicorn.UC_HOOK_MEM_WRITE_UNMAPPED, borrow)
        for register, value in zip((arm64.UC_ARM64_REG_X0, arm64.UC_ARM64_REG_X1, arm64.UC_ARM64_REG_X2), arguments):
            machine.reg_write(register, value)
        machine.reg_write(arm64.UC_ARM64_REG_SP, STACK + STACK_BYTES)
        machine.reg_write(arm64.UC_ARM64_REG_LR, END)
        machine.reg_write(arm64.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vectors are allowed
        machine.emu_start(self.image.functions[name], END)
        assert machine.reg_read(arm64.UC_ARM64_REG_PC) == END


def borrow(machine: Any, access: int, address: int, size: int, value: int, data: object) -> bool:
    """Show the emulator the pages of this process that it asks for, at their own addresses."""
    for page in range(address // PAGE * PAGE, address + size, PAGE):
        if all(page < first or page > last for first, last, _ in machine.mem_regions()):
            machine.mem_map_ptr(page, PAGE, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE, page)
    return True


@lru_cache(maxsize=256)
def emulated(kernel: Kernel) -> Emulated:
    """Return a kernel for NEON, as `build.load_kernel` returns one for this machine."""
    return Emulated(linked(compile_kernel(kernel, NEON)))
