"""A report as a picture: what each layer lost and what it costs, by depth."""

from __future__ import annotations

import re
from io import BytesIO
from typing import TYPE_CHECKING

from llmcompress.errors import RecipeError
from llmcompress.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def layers_png(report: Report) -> bytes:
    """Errors (held out, where they were measured) and bits per weight of the decoder's linears, one line for each kind.

    Raises RecipeError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError('plots need matplotlib; run pip install "llmcompress[report]"') from error
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for kind, rows in by_kind(report).items():
        depths = [depth for depth, _ in rows]
        above.plot(depths, [_error(row) for _, row in rows], marker=".", label=kind)
        below.plot(depths, [row.bpw for _, row in rows], marker=".", label=kind)
    _describe(above, "relative output error", "log")
    _describe(below, "bits per weight", "linear")
    below.set_ylim(bottom=0)
    below.set_xlabel("decoder block")
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=100, metadata={"Software": None})
    return picture.getvalue()


def by_kind(report: Report) -> dict[str, list[tuple[int, LayerReport]]]:
    """Rows with the number of their block, in its order, by what follows that number in their names."""
    kinds: dict[str, list[tuple[int, LayerReport]]] = {}
    for row in report.layers:
        if found := BLOCK.search(row.name):  # a token table is in no block
            kinds.setdefault(row.name[found.end() :], []).append((int(found[1]), row))
    return {kind: sorted(rows, key=lambda entry: entry[0]) for kind, rows in kinds.items()}


def _error(row: LayerReport) -> float:
    return row.error if row.error_heldout is None else row.error_heldout


def _describe(axes: Axes, label: str, scale: str) -> None:
    axes.set_ylabel(label)
    axes.set_yscale(scale)
    axes.grid(alpha=0.3)
