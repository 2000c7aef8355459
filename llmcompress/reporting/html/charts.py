"""Geometry of a page's charts: places and strengths of numbers, which the template turns into SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CELL = 22  # pixels from one cell of a heat map to the next
GAP = 2
LETTER = 7.3  # pixels that a letter of a label takes, at most
WIDTH, HEIGHT = 460, 230  # of a curve
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40  # margins of a curve
MOST_POINTS = 300  # of a curve; more do not show at this width
MARKED_POINTS = 60  # up to here every point has a dot
FAINTEST = 0.08  # opacity of the smallest value, which must be seen against the page


@dataclass(frozen=True)
class Cell:
    """A value of a heat map. `strength`: its opacity in (0, 1], None where the layer stayed dense."""

    x: float
    y: float
    strength: float | None
    title: str


@dataclass(frozen=True)
class HeatMap:
    """Cells by block (columns) and linear (rows), in pixels; `low` and `high` are the ends of the legend."""

    title: str
    width: float
    height: float
    cells: tuple[Cell, ...]
    rows: tuple[tuple[float, str], ...]  # (y, label)
    columns: tuple[tuple[float, str], ...]  # (x, label)
    low: str
    high: str
    size: int  # of a cell
    label: float  # where labels of rows end


@dataclass(frozen=True)
class Curve:
    """A line over tokens, in pixels of a picture of WIDTH by HEIGHT. `level`: a dashed line of another model."""

    title: str
    points: tuple[tuple[float, float, str], ...]  # (x, y, what is there)
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    level: float | None
    marked: bool

    @property
    def path(self) -> str:
        """The points as SVG lists them."""
        return " ".join(f"{x},{y}" for x, y, _ in self.points)


def heat_map(
    title: str, values: Mapping[tuple[str, int], float | None], unit: str, form: str, *, logarithmic: bool
) -> HeatMap:
    """Return the map of `values` by (linear, block); None stands for a layer that stayed dense.

    Strength grows with the logarithm of the value, or with the value itself from 0. Values that cannot be placed so
    (zero, NaN, infinite) are drawn faintest, with their number.
    """
    kinds = list(dict.fromkeys(kind for kind, _ in sorted(values, key=lambda cell: values[cell] is None)))
    blocks = sorted({block for _, block in values})
    placed = {kind: number for number, kind in enumerate(kinds)}
    column = {block: number for number, block in enumerate(blocks)}
    known = [value for value in values.values() if value is not None and _drawable(value, logarithmic)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    label = 8 + LETTER * max((len(kind) for kind in kinds), default=0)
    cells = tuple(
        Cell(
            x=round(label + column[block] * CELL, 1),
            y=placed[kind] * CELL,
            strength=None if value is None else _strength(value, low if logarithmic else 0.0, high, logarithmic),
            title=f"block {block}, {kind}: " + ("stayed dense" if value is None else f"{value:{form}} {unit}".strip()),
        )
        for (kind, block), value in values.items()
    )
    step = 1 if len(blocks) <= 12 else 5
    return HeatMap(
        title=title,
        width=round(label + len(blocks) * CELL + 4, 1),
        height=len(kinds) * CELL + 20,
        cells=cells,
        rows=tuple((number * CELL + CELL / 2 - GAP / 2, kind) for kind, number in placed.items()),
        columns=tuple((label + column[block] * CELL + (CELL - GAP) / 2, str(block)) for block in blocks[::step]),
        low=f"{low if logarithmic else 0.0:{form}}",
        high=f"{high:{form}}",
        size=CELL - GAP,
        label=label - 6,
    )


def _drawable(value: float, logarithmic: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not logarithmic)


def _strength(value: float, low: float, high: float, logarithmic: bool) -> float:
    if not _drawable(value, logarithmic):
        return FAINTEST
    value, low, high = (math.log(one) for one in (value, low, high)) if logarithmic else (value, low, high)
    share = (value - low) / (high - low) if high > low else 1.0
    return round(FAINTEST + (1 - FAINTEST) * min(max(share, 0.0), 1.0), 3)


def curve(title: str, points: Sequence[tuple[float, float]], level: float | None = None, *, zero: bool) -> Curve | None:
    """Return the line through (tokens, value), with the y axis from 0 if `zero`; None without two finite points."""
    drawn = _thin_points([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
    if len(drawn) < 2:
        return None
    level = level if level is not None and math.isfinite(level) else None
    heights = [y for _, y in drawn] + ([] if level is None else [level]) + ([0.0] if zero else [])
    across = ticks(min(x for x, _ in drawn), max(x for x, _ in drawn), 4)
    upright = ticks(min(heights), max(heights), 5)
    x_low, x_high = drawn[0][0], max(drawn[-1][0], drawn[0][0] + 1)
    y_low, y_high = min(upright[0], min(heights)), max(upright[-1], max(heights))

    def place_x(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def place_y(y: float) -> float:
        return round(TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    return Curve(
        title=title,
        points=tuple((place_x(x), place_y(y), f"{y:.4g} after {x:,.0f} tokens") for x, y in drawn),
        x_ticks=tuple((place_x(x), _short(x)) for x in across if x_low <= x <= x_high),
        y_ticks=tuple((place_y(y), f"{y:.4g}") for y in upright if y_low <= y <= y_high),
        level=None if level is None else place_y(level),
        marked=len(drawn) <= MARKED_POINTS,
    )


def _thin_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most MOST_POINTS of the points, evenly, with the first and the last."""
    if len(points) <= MOST_POINTS:
        return list(points)
    return [points[round(number * (len(points) - 1) / (MOST_POINTS - 1))] for number in range(MOST_POINTS)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers, evenly spaced, that enclose [low, high]."""
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, low + spread
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * one for one in (1, 2, 2.5, 5, 10) if scale * one >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _short(count: float) -> str:
    """Return a count of tokens as "120k" or "1.5M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"
