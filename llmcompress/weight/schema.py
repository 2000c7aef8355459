"""The schema of layouts: the entries of each node's header, and the tensors that the node then stores.

`check` compares numbers alone, so nothing is built or allocated for a damaged layout. Two things depend on the payload:
how much a selection selects, and whether codes are below their limit. `check` tests them if it is given the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from llmcompress.weight.encoding import decode_index, trellis_of
from llmcompress.weight.inputs import GROUPS, InputName
from llmcompress.weight.nodes import FloatFormat, ScaleFormat, float_codes
from llmcompress.weight.packing import codes_in_bytes, digits_per_byte, ones, packed_bytes, stream_bits, unpack
from llmcompress.weight.superblocks import LAYOUTS, SUPERBLOCK, SuperblockForm
from llmcompress.weight.tiles import BLOCK

LARGEST = 2**24  # rows, columns and groups; four times the largest vocabulary
DEEPEST = 64  # nodes within each other
GROUP = 16  # columns of a pattern
CODES = ("U8",)
FLOATS = ("F16", "BF16", "F32")

Dimension = Annotated[int, Field(ge=1, le=LARGEST)]
Size = Annotated[list[Dimension], Field(min_length=2, max_length=2)]
Count = Annotated[int, Field(ge=0, le=LARGEST**2)]
Dtype = Literal["U8", "F16", "BF16", "F32"]
Levels = Annotated[int, Field(ge=2, le=256)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Matrix(_Entry):
    shape: Size


class _Zero(_Matrix):
    node: Literal["zero"]


class _Dense(_Matrix):
    node: Literal["dense"]


class _Grid(_Matrix):
    node: Literal["grid"]
    levels: Levels
    group_size: Dimension
    scale: Size
    asymmetric: bool


class _Trellis(_Matrix):
    node: Literal["trellis", "linear_trellis"]
    run: Dimension
    bits: int
    values: int
    memory: int
    ring: bool = False


class _Tiles(_Matrix):
    node: Literal["tiles"]
    bits: Annotated[int, Field(ge=1, le=8)]


class _Superblocks(_Matrix):
    node: Literal["superblocks"]
    form: SuperblockForm


class _Codebook(_Matrix):
    node: Literal["codebook"]
    entries: Levels
    length: Dimension


class _Minifloat(_Matrix):
    node: Literal["minifloat"]
    form: FloatFormat
    scales: ScaleFormat
    group_size: Dimension
    tensor_scale: bool
    scale: Size | None = None  # where all rows share their scales


class _LowRank(_Entry):
    node: Literal["low_rank"]
    left: Node
    right: Node


class _Bits(_Entry):
    kind: Literal["columns", "bitmap"]


class _Pattern(_Entry):
    kind: Literal["pattern"]
    keep: Annotated[int, Field(ge=1, le=GROUP, alias="kept")]
    group: Annotated[int, Field(ge=1, le=GROUP)]


class _Where(_Matrix):
    node: Literal["where"]
    index: Annotated[_Bits | _Pattern, Field(discriminator="kind")]
    inside: Node
    outside: Node


class _RotatedInputs(_Entry):
    node: Literal["rotated"]
    block: Dimension
    inner: Node


class _ScaledInputs(_Entry):
    node: Literal["scaled"]
    inner: Node


class _Transpose(_Matrix):
    node: Literal["transposed"]
    inner: Node


class _Sum(_Entry):
    node: Literal["sum"]
    parts: Annotated[list[Node], Field(min_length=1)]


Node = Annotated[
    _Zero
    | _Dense
    | _Grid
    | _Trellis
    | _Tiles
    | _Superblocks
    | _Codebook
    | _Minifloat
    | _LowRank
    | _Where
    | _RotatedInputs
    | _ScaledInputs
    | _Transpose
    | _Sum,
    Field(discriminator="node"),
]


def _row(value: Any) -> Any:
    """Return a list as a tuple, which JSON does not have."""
    return tuple(value) if isinstance(value, list) else value


class _Inputs(_Entry):
    format: InputName
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class _Layout(_Entry):
    size: Size
    header: Node
    tensors: list[Annotated[tuple[str, Dtype, Count], BeforeValidator(_row)]]
    inputs: _Inputs | None = None


for _class in (_LowRank, _Where, _RotatedInputs, _ScaledInputs, _Transpose, _Sum, _Layout):
    _class.model_rebuild()
_LAYOUT = TypeAdapter(_Layout)


def check(entry: Any, payload: Mapping[str, Tensor] | None = None) -> None:
    """Raise ValueError, with a reason for people, unless `entry` is a layout of a weight that can be decoded.

    `payload`: the tensors by their paths, whose numbers are then checked too.
    """
    layout = _parse(entry)
    listed: dict[str, tuple[str, int]] = {path: (dtype, count) for path, dtype, count in layout.tensors}
    _demand(len(listed) == len(layout.tensors), "", "a tensor is listed twice")
    size = _Checker(listed, payload).node(layout.header, "", None)
    _demand(list(size) == layout.size, "", f"its size is {layout.size}, that of its header {list(size)}")
    _demand(not listed, "", f"no node stores {next(iter(listed), '')!r}")
    if layout.inputs is not None:
        _check_inputs(layout.inputs, size[1])


def _check_inputs(inputs: _Inputs, width: int) -> None:
    name, group = inputs.format, GROUPS.get(inputs.format, 1)
    _demand(width % group == 0, "inputs", f"groups of {group} do not divide the width {width}")
    if name in GROUPS:
        _demand((inputs.scale is None) == (name != "nvfp4"), "inputs", f"the scale {inputs.scale} does not fit {name}")


def _parse(entry: Any) -> _Layout:
    try:
        return _LAYOUT.validate_python(entry)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[-100:]  # of a node deep down, the end
        raise ValueError(f"{place or 'the layout'}: {first['msg']}") from error


def _demand(met: bool, path: str, otherwise: str) -> None:
    if not met:
        raise ValueError(f"{path.rstrip('_') or 'the layout'}: {otherwise}")


@dataclass
class _Selection:
    """The number of stored elements of a node, at least `low`, at most `high`; `mask()`: which, bool `[out, in]`."""

    low: int
    high: int
    mask: Callable[[], Tensor] | None = None

    def limit(self, path: str, low: int, high: int) -> None:
        """Narrow the bounds to at least `low` and at most `high`."""
        self.low, self.high = max(self.low, low), min(self.high, high)
        _demand(self.low <= self.high, path, "its tensors have other sizes than what is selected")


@dataclass(frozen=True)
class _Checker:
    """Checks nodes against the tensors that a layout lists, and removes theirs from the list."""

    listed: dict[str, tuple[str, int]]
    payload: Mapping[str, Tensor] | None

    def node(self, node: Any, path: str, shown: _Selection | None) -> tuple[int, int]:
        """Check a node, of which `shown` is stored (None: all); return its size."""
        _demand(path.count("_") <= DEEPEST, "", f"its nodes lie more than {DEEPEST} deep")
        match node:
            case _LowRank():
                rows, rank = self.node(node.left, f"{path}left_", None)
                same, width = self.node(node.right, f"{path}right_", None)
                _demand(rank == same, path, f"its factors have the ranks {rank} and {same}")
                _demand(rank <= max(rows, width), path, f"its rank {rank} is larger than {[rows, width]}")
            case _Where(shape=[rows, width]):
                self._where(node, path, shown)
            case _RotatedInputs(block=block):
                rows, width = self.node(node.inner, f"{path}inner_", None)
                fits = block & (block - 1) == 0 and width % block == 0
                _demand(fits, path, f"{block} is no power of two that divides the width {width}")
                self._take(f"{path}signs", CODES, packed_bytes(2, width))
            case _ScaledInputs():
                rows, width = self.node(node.inner, f"{path}inner_", shown)
                self._take(f"{path}columns", FLOATS, width)
            case _Transpose(shape=[rows, width]):
                lying = shown and _Selection(shown.low, shown.high, _transpose(shown.mask))
                size = self.node(node.inner, f"{path}inner_", lying)
                _demand(size == (width, rows), path, f"its inner matrix has the size {list(size)}")
                if shown and lying:
                    shown.limit(path, lying.low, lying.high)
            case _Sum(parts=parts):
                sizes = {self.node(part, f"{path}{i}_", shown) for i, part in enumerate(parts)}
                _demand(len(sizes) == 1, path, f"its parts have the sizes {sorted(sizes)}")
                [(rows, width)] = sizes
            case _:
                rows, width = node.shape
                self._leaf(node, path, rows, width, _Selection(rows * width, rows * width) if shown is None else shown)
        return rows, width

    def _leaf(self, node: Any, path: str, rows: int, width: int, shown: _Selection) -> None:
        """Check the tensors of a node without nodes below it."""
        match node:
            case _Dense():
                count = self._take(f"{path}values", FLOATS)
                shown.limit(path, count, count)
            case _Grid(levels=levels, scale=scale, group_size=group_size):
                self._elements(path, levels, shown)
                self._scale_shape(path, scale, group_size, (rows, width))
                self._take(f"{path}scale", FLOATS, math.prod(scale))
                if node.asymmetric:
                    self._take(f"{path}zero", CODES, packed_bytes(levels, math.prod(scale)))
            case _Trellis(run=run):
                trellis = trellis_of(node.model_dump())
                fits = rows % trellis.values == 0 and (run >= rows or run % trellis.values == 0)
                _demand(fits, path, f"{rows} rows in runs of {run} do not divide into {trellis.values}")
                self._take(f"{path}codes", CODES, packed_bytes(1 << trellis.bits, rows * width // trellis.values))
                self._take(f"{path}scale", FLOATS, rows)
            case _Tiles(bits=bits):
                _demand(rows % BLOCK == width % BLOCK == 0, path, f"{[rows, width]} are no multiples of {BLOCK}")
                self._take(f"{path}codes", CODES, packed_bytes(1 << bits, rows * width))
                self._take(f"{path}inputs", FLOATS, width)
                self._take(f"{path}outputs", FLOATS, rows)
            case _Superblocks(form=form):
                _demand(width % SUPERBLOCK == 0, path, f"{SUPERBLOCK} columns do not divide the width {width}")
                self._take(f"{path}codes", CODES, rows * width // SUPERBLOCK * LAYOUTS[form].bytes)
            case _Codebook(entries=entries, length=length):
                self._numbers(f"{path}codes", entries, rows * -(-width // length))
                self._take(f"{path}centroids", FLOATS, entries * length)
                self._take(f"{path}scale", FLOATS, rows)
            case _Minifloat(form=form, group_size=group_size):
                self._elements(path, float_codes(form), shown)
                scale = node.scale or [rows, -(-width // group_size)]
                self._scale_shape(path, scale, group_size, (rows, width))
                self._take(f"{path}scale", ("BF16",) if node.scales == "bfloat16" else CODES, math.prod(scale))
                if node.tensor_scale:
                    self._take(f"{path}tensor_scale", FLOATS, 1)

    def _where(self, node: _Where, path: str, shown: _Selection | None) -> None:
        """Check a selection within the elements `shown`, and both its sides."""
        rows, width = node.shape
        size, index = (rows, width), node.index
        all_shown = _Selection(rows * width, rows * width) if shown is None else shown
        inside, outside = _Selection(0, all_shown.high), _Selection(0, all_shown.high)
        if isinstance(index, _Pattern):
            _demand(index.keep < index.group, path, f"no pattern keeps {index.keep} of {index.group}")
            _demand(math.comb(index.group, index.keep) <= 256, path, "its patterns are more than a byte tells apart")
            _demand(width % index.group == 0, path, f"groups of {index.group} do not divide the width {width}")
            self._numbers(f"{path}index", math.comb(index.group, index.keep), rows * width // index.group)
            if shown is None:
                inside.low = inside.high = rows * width // index.group * index.keep
        else:
            self._take(f"{path}index", CODES, packed_bytes(2, width if index.kind == "columns" else rows * width))
        if self.payload is not None:
            stored, header = self.payload[f"{path}index"], index.model_dump(by_alias=True)

            def select() -> Tensor:
                return decode_index(header, list(size), stored).inside.expand(size)

            inside.mask = select if shown is None else lambda: select() & _mask_of(shown)
            outside.mask = (lambda: ~select()) if shown is None else lambda: ~select() & _mask_of(shown)
            inside.low = inside.high = _count(index, size, stored) if shown is None else int(inside.mask().sum())
            outside.low = outside.high = all_shown.high - inside.high
        sides = self.node(node.inside, f"{path}inside_", inside), self.node(node.outside, f"{path}outside_", outside)
        _demand(sides == (size, size), path, f"its sides have the sizes {sides} in a matrix of {size}")
        all_shown.limit(path, inside.low + outside.low, inside.high + outside.high)

    def _scale_shape(self, path: str, scale: list[int], group_size: int, size: tuple[int, int]) -> None:
        """Check the shape of scales, one a group of each row, or of all rows."""
        fits = scale[0] in (1, size[0]) and scale[1] == -(-size[1] // group_size)
        _demand(fits, path, f"its scales {scale} do not fit groups of {group_size} in {list(size)}")

    def _elements(self, path: str, levels: int, shown: _Selection) -> None:
        """Check codes of the shown elements."""
        count = self._take(f"{path}codes", CODES)
        shown.limit(path, *codes_in_bytes(levels, count))

    def _numbers(self, name: str, levels: int, count: int) -> None:
        """Check codes that are places in a table."""
        self._take(name, CODES, packed_bytes(levels, count))
        if self.payload is not None and not digits_per_byte(levels) and levels < 1 << stream_bits(levels):
            highest = int(unpack(self.payload[name], levels, count).max())
            _demand(highest < levels, name, f"it has the code {highest} of {levels}")

    def _take(self, name: str, kinds: tuple[str, ...], wanted: int | None = None) -> int:
        """Remove a tensor of one of the dtypes `kinds` from the list; return its elements, which must be `wanted`."""
        _demand(name in self.listed, name, "no such tensor is listed")
        kind, count = self.listed.pop(name)
        _demand(kind in kinds, name, f"{kind} is not {' or '.join(kinds)}")
        _demand(wanted is None or count == wanted, name, f"it has {count} elements where its node has {wanted}")
        return count


def _transpose(mask: Callable[[], Tensor] | None) -> Callable[[], Tensor] | None:
    return None if mask is None else lambda: mask().T


def _mask_of(shown: _Selection) -> Tensor:
    """Return the mask of a selection, which exists wherever there is a payload."""
    if shown.mask is None:
        raise TypeError("a selection has no mask without a payload")
    return shown.mask()


def _count(index: _Bits | _Pattern, size: tuple[int, int], stored: Tensor) -> int:
    """Return the number of elements of a matrix that an index selects, without a mask."""
    rows, width = size
    if isinstance(index, _Pattern):
        return rows * width // index.group * index.keep
    if index.kind == "columns":
        return rows * int(unpack(stored, 2, width).sum())
    beyond = unpack(stored[-1:], 2, 8)[rows * width % 8 or 8 :]  # what fills the last byte
    return int(ones(stored).sum()) - int(beyond.sum())
