"""The kernels of a format: its product with one or a few tokens, and its decoding to columns of floats."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from llmcompress.kernels.cpu.calls import Argument, KernelFunction
from llmcompress.kernels.cpu.emit import F16, F32, FLOATS, I8, I32, I64, INTEGERS, LANES, Value, Variable, vector
from llmcompress.kernels.cpu.formats import FloatCodes, Format
from llmcompress.kernels.cpu.instruction_sets import join
from llmcompress.kernels.cpu.quantize_inputs import FINER


@dataclass(frozen=True)
class Product:
    """`y += x @ W.T` for so many tokens with inputs of `Inputs`, so many `numbers` each.

    `y` is float32; with `bfloat16` it is that, and set rather than added to.
    """

    form: Format
    tokens: int
    numbers: int
    bfloat16: bool = False

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of row blocks."""
        with f.loop(f.first, f.last) as rows:
            totals = [f.variable(f.constant(FLOATS, 0.0)) for _ in range(self.tokens * self._tiles)]
            with f.loop(0, f.size(Argument.GROUPS)) as group:
                self._add_group(f, rows, group, totals)
            self._store(f, rows, totals)

    @property
    def _tiles(self) -> int:
        return tiles_of(self.form)

    def _add_group(self, f: KernelFunction, rows: Value, group: Value, totals: list[Variable]) -> None:
        """Write the sum over the columns that share a scale."""
        sums = [f.variable(f.constant(FLOATS, 0.0)) for _ in totals]
        offsets = [f.variable(f.constant(F32, 0.0)) for _ in range(self.tokens)]
        size = block_size(self.form)
        blocks = f.size(Argument.COLUMNS) // size
        first, last = f.constant(I64, 0), blocks
        if self.form.group:
            first = group * (self.form.group // size)
            last = first + self.form.group // size
            last = Value(f, f.builder.select(f.builder.icmp_signed("<", last.raw, blocks.raw), last.raw, blocks.raw))
        with f.loop(first, last) as block:
            for token, offset in enumerate(offsets):
                place = (blocks * token + block) * 4
                offset.set(offset.get() + f.load(f.pointer(Argument.X_SUM), F32, place))
            (self._add_integers if self.numbers else self._add_floats)(f, rows, block, sums)
        for tile in range(self._tiles):
            scale, centre = _scale_and_centre(f, self.form, rows * self._tiles + tile, group)
            for token in range(self.tokens):
                at = token * self._tiles + tile
                shifted = sums[at].get() - centre * (offsets[token].get() * (1 / shares(self.form))).splat(LANES)
                totals[at].set(shifted.fma(scale, totals[at].get()))

    def _add_integers(self, f: KernelFunction, rows: Value, block: Value, sums: list[Variable]) -> None:
        """Write the products of a block of int8 inputs, those of high and of low numbers side by side."""
        size, columns = block_size(self.form), f.size(Argument.COLUMNS)
        chains = [[f.variable(f.constant(INTEGERS, 0)) for _ in range(2)] for _ in sums]  # two, to run side by side
        x, start = f.pointer(Argument.X), block * size
        with f.loop(0, size, self.form.step) as inner:
            for tile, parts in enumerate(self.form.tiles(f, rows, start + inner)):
                for part, codes in enumerate(parts):
                    for token in range(self.tokens):
                        pair = chains[token * self._tiles + tile]
                        for number in range(self.numbers):
                            shift = size * number + self.form.columns * part
                            place = (columns * token + start) * self.numbers + inner + shift
                            few = f.load(x, vector(I32, shares(self.form)), place)
                            spread = few.shuffle([lane % shares(self.form) for lane in range(LANES)])
                            chain = pair[number if self.numbers == 2 else part % 2]
                            chain.set(f.target.dot(chain.get(), codes, spread.as_type(codes.type), self.form.wide))
        for token in range(self.tokens):
            place = (columns // size * token + block) * 4
            scale = f.load(f.pointer(Argument.X_SCALE), F32, place).splat(LANES)
            for tile in range(self._tiles):
                at = token * self._tiles + tile
                high, low = (chain.get().to_float() for chain in chains[at])
                both = high + low * (1 / FINER) if self.numbers == 2 else high + low
                sums[at].set(both.fma(scale, sums[at].get()))

    def _add_floats(self, f: KernelFunction, rows: Value, block: Value, sums: list[Variable]) -> None:
        """Write the products of a block of float32 inputs."""
        size, columns = block_size(self.form), f.size(Argument.COLUMNS)
        x, start = f.pointer(Argument.X), block * size
        with f.loop(0, size, self.form.step) as inner:
            column = start + inner
            for tile, parts in enumerate(self.form.tiles(f, rows, column)):
                for part, codes in enumerate(parts):
                    for token in range(self.tokens):
                        at = token * self._tiles + tile
                        place = (columns * token + column + self.form.columns * part) * 4
                        few = f.load(x, vector(F32, self.form.columns), place)
                        for byte, integers in enumerate(bytes_of(codes)):
                            spread = [4 * (lane % shares(self.form)) + byte for lane in range(LANES)]
                            sums[at].set(integers.fma(few.shuffle(spread), sums[at].get()))

    def _store(self, f: KernelFunction, rows: Value, totals: list[Variable]) -> None:
        """Write the sums to their rows."""
        for token in range(self.tokens):
            parts = join([total.get() for total in totals[token * self._tiles :][: self._tiles]])
            count = shares(self.form)
            sums = [parts.shuffle(range(share, parts.length, count)) for share in range(count)]
            whole = reduce(Value.__add__, sums).shuffle(places_of_rows(self.form))
            store_sums(f, whole, f.size(Argument.ROWS) * token + rows * self.form.block_rows, self.bfloat16)


@dataclass(frozen=True)
class Decoding:
    """The matrix itself, transposed: `y [columns, rows]`, float32 or bfloat16."""

    form: Format
    bfloat16: bool

    def write(self, f: KernelFunction) -> None:
        """Write the kernel, for a range of row blocks."""
        size = block_size(self.form)
        columns, stride, block_rows = f.size(Argument.COLUMNS), f.size(Argument.ROWS), self.form.block_rows
        with f.loop(f.first, f.last) as rows, f.loop(0, columns // size) as block:
            group = block * size // self.form.group if self.form.group else f.constant(I64, 0)
            count = tiles_of(self.form)
            scales = [_scale_and_centre(f, self.form, rows * count + tile, group) for tile in range(count)]
            with f.loop(0, size, self.form.step) as inner:
                column = block * size + inner
                tiles = self.form.tiles(f, rows, column)
                for part in range(self.form.step // self.form.columns):
                    start = column + part * self.form.columns
                    place = start * stride + rows * block_rows
                    self._store(f, [parts[part] for parts in tiles], scales, place, stride)

    def _store(
        self, f: KernelFunction, tiles: list[Value], scales: list[tuple[Value, Value]], first: Value, stride: Value
    ) -> None:
        """Write some columns of a block, the `first` number's place and then numbers `stride` apart."""
        count, order = shares(self.form), places_of_rows(self.form)
        size = 2 if self.bfloat16 else 4
        for byte, integers in enumerate(zip(*map(bytes_of, tiles))):
            values = [(part - centre) * scale for part, (scale, centre) in zip(integers, scales)]
            whole = join([value.to_bfloat16() if self.bfloat16 else value for value in values])
            for share in range(count):
                column = whole.shuffle([place * count + share for place in order])
                f.store(column, f.pointer(Argument.Y), (first + stride * (4 * share + byte)) * size)


def _scale_and_centre(f: KernelFunction, form: Format, tile: Value, group: Value) -> tuple[Value, Value]:
    """Write the scales and the centres of the rows of a tile in a group of columns."""
    place = (tile * f.size(Argument.GROUPS) + group) * LANES
    scale = scales_of(f, form, place)
    if form.zeros:
        return scale, f.load(f.pointer(Argument.ZEROS), vector(I8, LANES), place).wider(I32, False).to_float()
    return scale, f.constant(FLOATS, form.centre)


def block_size(form: Format) -> int:
    """Return the columns that share a scale of int8 inputs: 64, or 32 where weights change theirs after 32."""
    return 32 if form.group % 64 else 64


def tiles_of(form: Format) -> int:
    """Return the tiles of a block in `columns` columns."""
    return form.block_rows * form.columns // 64


def shares(form: Format) -> int:
    """Return the number of neighbouring lanes with the sums of a row, four columns each."""
    return form.columns // 4


def places_of_rows(form: Format) -> list[int]:
    """Return the place of each row of a block in its tiles."""
    return sorted(range(form.block_rows), key=form.order.__getitem__)


def scales_of(f: KernelFunction, form: Format, place: Value) -> Value:
    """Write the scales of the rows of a tile, from number `place` on, times the unit of the form: float32 `[16]`."""
    start = f.pointer(Argument.SCALES)
    if isinstance(form, FloatCodes):
        return f.load_bfloat16(start, LANES, place) * form.unit
    return f.load(start, vector(F16, LANES), place * 2).to_float() * form.unit


def store_sums(f: KernelFunction, sums: Value, place: Value, bfloat16: bool) -> None:
    """Write float32 sums to number `place` of `y`: added to it, or as bfloat16 in its place."""
    y = f.pointer(Argument.Y)
    if bfloat16:
        f.store(sums.to_bfloat16(), y, place * 2)
    else:
        f.store(f.load(y, sums.type, place * 4) + sums, y, place * 4)


def bytes_of(codes: Value) -> list[Value]:
    """Return every fourth number of a tile, float32 `[16]`, from the first, the second and so on."""
    words = codes.as_type(INTEGERS)
    return [(words >> 8 * byte & 255).to_float() for byte in range(4)]
