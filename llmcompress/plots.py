"""Reports as pictures: what each layer lost and what it costs, by depth; what a distillation recovered, by tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from llmcompress.errors import RecipeError
from llmcompress.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


def layers_png(report: Report) -> bytes:
    """Errors (held out, where they were measured) and bits per weight of the decoder's linears, one line for each kind.

    Raises RecipeError where matplotlib is missing.
    """
    figure = _figure()
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
    return _png(figure)


def distillation_png(history: Sequence[dict[str, Any]]) -> bytes:
    """KL to the teacher and perplexity on held-out text, over the tokens trained on; a line where the teacher is.

    `history`: maps with tokens, kl, perplexity and teacher_perplexity. Raises RecipeError where matplotlib is missing.
    """
    figure = _figure()
    from matplotlib.ticker import LogFormatter

    above, below = figure.subplots(2, sharex=True)
    tokens = list(_running(row["tokens"] for row in history))
    above.plot(tokens, [row["kl"] for row in history], marker=".")
    below.plot(tokens, [row["perplexity"] for row in history], marker=".", label="student")
    below.axhline(history[-1]["teacher_perplexity"], linestyle="--", color="gray", label="teacher")
    _describe(above, "held-out KL, nats/token", "linear")
    _describe(below, "held-out perplexity", "log")
    above.set_ylim(bottom=0)
    below.yaxis.set_major_formatter(LogFormatter())  # 20 and 30, not 2 and 3 times 10 to the 1
    below.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    below.set_xlabel("tokens trained on")
    below.legend(fontsize="small")
    return _png(figure)


def _running(tokens: Iterable[int]) -> Iterator[int]:
    """Counts that start again with every phase, as one that goes on."""
    before = last = 0
    for count in tokens:
        before += last if count < last else 0
        last = count
        yield before + count


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError('plots need matplotlib; run pip install "llmcompress[report]"') from error
    return Figure(figsize=(8, 6), layout="constrained")


def _png(figure: Figure) -> bytes:
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
