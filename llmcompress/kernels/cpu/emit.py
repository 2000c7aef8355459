"""A small language of vectors: Python that writes LLVM's intermediate code.

`Value` is a number or a vector with Python's operators; `Function` writes a function, with loops as context managers
and variables that LLVM turns into registers. LLVM cuts vectors of any length to the registers of the processor.
Instructions of certain processors are in `instruction_sets.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32 = ir.HalfType(), ir.FloatType()
ADDRESS = I8.as_pointer()
LANES = 16  # numbers in the vectors of most kernels
Type = Any  # llvmlite has no types of its own
Number = int | float


class BFloat16(ir.Type):
    """LLVM's type of bfloat16, which llvmlite lacks. Its numbers only go into intrinsics."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16)

    def __hash__(self) -> int:
        return hash(BFloat16)


def vector(element: Type, length: int) -> Type:
    """Return the type of so many numbers."""
    return ir.VectorType(element, length)


FLOATS, INTEGERS = vector(F32, LANES), vector(I32, LANES)


@dataclass(frozen=True, eq=False)
class Value:
    """A number, a vector or an address. Integers wrap around and are unsigned where that matters: in `>>`."""

    function: Function
    raw: Any

    @property
    def type(self) -> Type:
        """LLVM's type."""
        return self.raw.type

    @property
    def element(self) -> Type:
        """The type of one number."""
        return self.type.element if isinstance(self.type, ir.VectorType) else self.type

    @property
    def length(self) -> int:
        """The number of numbers in a vector."""
        return int(self.type.count)

    def __add__(self, other: Value | Number) -> Value:
        return self._binary("add", "fadd", other)

    def __sub__(self, other: Value | Number) -> Value:
        return self._binary("sub", "fsub", other)

    def __mul__(self, other: Value | Number) -> Value:
        return self._binary("mul", "fmul", other)

    def __and__(self, other: Value | Number) -> Value:
        return self._binary("and_", None, other)

    def __or__(self, other: Value | Number) -> Value:
        return self._binary("or_", None, other)

    def __xor__(self, other: Value | Number) -> Value:
        return self._binary("xor", None, other)

    def __lshift__(self, other: Value | Number) -> Value:
        return self._binary("shl", None, other)

    def __rshift__(self, other: Value | Number) -> Value:
        return self._binary("lshr", None, other)

    def __floordiv__(self, other: Value | Number) -> Value:
        return self._binary("sdiv", None, other)

    def over(self, divisor: Value) -> Value:
        """Floats divided by others."""
        return Value(self.function, self.function.builder.fdiv(self.raw, divisor.raw))

    def fma(self, factor: Value, addend: Value) -> Value:
        """`self * factor + addend`, rounded once where the processor can."""
        if not self.function.fused:
            return self * factor + addend
        return self.function.call("llvm.fma", addend.type, self, factor, addend, overloads=(addend.type,))

    def magnitude(self) -> Value:
        """Floats without their signs."""
        return self.function.call("llvm.fabs", self.type, self, overloads=(self.type,))

    def larger(self, other: Value) -> Value:
        """The larger of two floats, place by place."""
        return self.function.call("llvm.maxnum", self.type, self, other, overloads=(self.type,))

    def smaller(self, other: Value) -> Value:
        """The smaller of two floats, place by place."""
        return self.function.call("llvm.minnum", self.type, self, other, overloads=(self.type,))

    def least(self, other: Value) -> Value:
        """The lower of two signed integers, place by place."""
        return self.function.call("llvm.smin", self.type, self, other, overloads=(self.type,))

    def as_type(self, wanted: Type) -> Value:
        """The same bits as another type, or an address as one of that type."""
        return Value(self.function, self.function.builder.bitcast(self.raw, wanted))

    def to_float(self, signed: bool = True) -> Value:
        """Integers, or short floats, as float32."""
        builder = self.function.builder
        if self.element == F16 and not self.function.fused:
            return self._half_to_float()
        convert = builder.fpext if self.element == F16 else builder.sitofp if signed else builder.uitofp
        return Value(self.function, convert(self.raw, self._like(F32)))

    def to_bfloat16(self) -> Value:
        """Float32 rounded to bfloat16, to even, as int16."""
        bits = self.as_type(vector(I32, self.length))
        return ((bits + ((bits >> 16 & 1) + 0x7FFF)) >> 16).narrower(I16)

    def wider(self, element: Type, signed: bool = True) -> Value:
        """Integers in a wider type."""
        builder = self.function.builder
        return Value(self.function, (builder.sext if signed else builder.zext)(self.raw, self._like(element)))

    def narrower(self, element: Type) -> Value:
        """The low bits of integers."""
        return Value(self.function, self.function.builder.trunc(self.raw, self._like(element)))

    def shuffle(self, order: Sequence[int], other: Value | None = None) -> Value:
        """The numbers at these places of this vector, or of this and `other` behind it."""
        second = ir.Constant(self.type, ir.Undefined) if other is None else other.raw
        places = ir.Constant(vector(I32, len(order)), [I32(place) for place in order])
        return Value(self.function, self.function.builder.shuffle_vector(self.raw, second, places))

    def splat(self, length: int) -> Value:
        """A vector of this number everywhere."""
        empty = ir.Constant(vector(self.type, length), ir.Undefined)
        first = Value(self.function, self.function.builder.insert_element(empty, self.raw, I32(0)))
        return first.shuffle([0] * length)

    def at(self, place: int) -> Value:
        """One number of a vector."""
        return Value(self.function, self.function.builder.extract_element(self.raw, I32(place)))

    def with_lane(self, place: int, number: Value) -> Value:
        """This vector with another number in one place."""
        return Value(self.function, self.function.builder.insert_element(self.raw, number.raw, I32(place)))

    def _half_to_float(self) -> Value:
        """Finite float16 as float32, by integers: the exponents differ by 112."""
        whole = self.as_type(self._like(I16)).wider(I32, signed=False)
        magnitude = ((whole & 0x7FFF) << 13).as_type(self._like(F32)) * 2.0**112
        return (magnitude.as_type(whole.type) | ((whole & 0x8000) << 16)).as_type(self._like(F32))

    def _like(self, element: Type) -> Type:
        return vector(element, self.length) if isinstance(self.type, ir.VectorType) else element

    def _binary(self, integer: str, floating: str | None, other: Value | Number) -> Value:
        second = other.raw if isinstance(other, Value) else self.function.constant(self.type, other).raw
        name = floating if floating and self.element in (F32, F16) else integer
        return Value(self.function, getattr(self.function.builder, name)(self.raw, second))


@dataclass(frozen=True, eq=False)
class Variable:
    """A value that changes in loops."""

    function: Function
    place: Any

    def get(self) -> Value:
        """The value now."""
        return Value(self.function, self.function.builder.load(self.place))

    def set(self, value: Value) -> None:
        """Change the value."""
        self.function.builder.store(value.raw, self.place)


class Function:
    """A function `name(arguments...)` in the module `module`, which returns nothing.

    `fused`: the processor multiplies and adds in one instruction and reads float16; without it that is spelled out.
    """

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[Type], fused: bool = True) -> None:
        self.module = module
        self.fused = fused
        self.raw = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        self.entry = self.raw.append_basic_block("entry")
        self.builder = ir.IRBuilder(self.entry)
        self.arguments = [Value(self, argument) for argument in self.raw.args]

    def constant(self, kind: Type, number: Number | Sequence[Number]) -> Value:
        """A number, or one everywhere in a vector, or a vector of these."""
        if not isinstance(kind, ir.VectorType):
            return Value(self, ir.Constant(kind, number))
        numbers = number if isinstance(number, Sequence) else [number] * kind.count
        return Value(self, ir.Constant(kind, [ir.Constant(kind.element, each) for each in numbers]))

    def load(self, address: Value, kind: Type, offset: Value | int = 0) -> Value:
        """Read what lies `offset` bytes behind an address, aligned or not."""
        loaded = self.builder.load(self._at(address, offset).as_type(kind.as_pointer()).raw, align=1)
        return Value(self, loaded)

    def load_bfloat16(self, address: Value, count: int, place: Value | int = 0) -> Value:
        """Read so many bfloat16 numbers, from number `place` on, as a vector of float32."""
        return (self.load(address, vector(I16, count), place * 2).wider(I32, False) << 16).as_type(vector(F32, count))

    def store(self, value: Value, address: Value, offset: Value | int = 0) -> None:
        """Write a value `offset` bytes behind an address."""
        self.builder.store(value.raw, self._at(address, offset).as_type(value.type.as_pointer()).raw, align=1)

    def prefetch(self, address: Value, offset: int) -> None:
        """Ask for the memory `offset` bytes behind an address, which is read soon."""
        kinds = [ADDRESS, I32, I32, I32]
        name = "llvm.prefetch.p0"
        called = self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(ir.VoidType(), kinds), name)
        read, keep, data = I32(0), I32(3), I32(1)
        self.builder.call(called, [self._at(address, offset).raw, read, keep, data])

    def address(self, number: Value) -> Value:
        """An address of bytes from an integer."""
        return Value(self, self.builder.inttoptr(number.raw, ADDRESS))

    def behind(self, address: Value, offset: Value | int) -> Value:
        """The address `offset` bytes behind another."""
        return self._at(address, offset)

    def call(self, name: str, returned: Type, *arguments: Value, overloads: Sequence[Type] = ()) -> Value:
        """Call an intrinsic of LLVM; `overloads`: the types that its full name ends in."""
        full = ".".join([name, *map(_suffix, overloads)])
        kinds = [argument.type for argument in arguments]
        function = self.module.globals.get(full) or ir.Function(self.module, ir.FunctionType(returned, kinds), full)
        return Value(self, self.builder.call(function, [argument.raw for argument in arguments]))

    def variable(self, initial: Value) -> Variable:
        """A variable with this value to begin with."""
        with self.builder.goto_block(self.entry):
            place = self.builder.alloca(initial.type)
        variable = Variable(self, place)
        variable.set(initial)
        return variable

    def room(self, kind: Type, count: int) -> Value:
        """The address of so many numbers or vectors in the stack, of any values."""
        with self.builder.goto_block(self.entry):
            place = Value(self, self.builder.alloca(ir.ArrayType(kind, count)))
            return place.as_type(ADDRESS)

    @contextmanager
    def loop(self, start: Value | int, stop: Value | int, step: int = 1) -> Iterator[Value]:
        """Repeat the body for an int64 that counts from `start` to below `stop`."""
        at = self.variable(self._count(start))
        head, body, rest = (self.raw.append_basic_block(name) for name in ("head", "body", "rest"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        place = at.get()
        self.builder.cbranch(self.builder.icmp_signed("<", place.raw, self._count(stop).raw), body, rest)
        self.builder.position_at_end(body)
        yield place
        at.set(at.get() + step)
        self.builder.branch(head)
        self.builder.position_at_end(rest)

    def each(self, count: Value, write: Callable[[Value, int], None]) -> None:
        """Call `write(place, lanes)` for so many numbers: in whole vectors, then one by one."""
        whole = count - (count & (LANES - 1))
        with self.loop(0, whole, LANES) as place:
            write(place, LANES)
        with self.loop(whole, count) as place:
            write(place, 1)

    def finish(self) -> None:
        """End the function."""
        self.builder.ret_void()

    def _count(self, number: Value | int) -> Value:
        return self.constant(I64, number) if isinstance(number, int) else number

    def _at(self, address: Value, offset: Value | int) -> Value:
        return Value(self, self.builder.gep(address.raw, [self._count(offset).raw]))


def _suffix(kind: Type) -> str:
    """Return a type as LLVM spells it in the name of an intrinsic."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_suffix(kind.element)}"
    return {F16: "f16", F32: "f32"}.get(kind) or f"i{kind.width}"
