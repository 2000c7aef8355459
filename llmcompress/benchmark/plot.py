"""Speed over size as a picture, quality as colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from llmcompress.errors import RecipeError
from llmcompress.reporting.plots import MISSING, new_figure, png_bytes, write_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

UNKNOWN = "lightgray"  # of a model whose quality is not known, or not by the same protocol


def check_plots() -> None:
    """Raise RecipeError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise RecipeError(MISSING)


def speed_png(found: Mapping[str, Any]) -> bytes:
    """Tokens/s of decoding over bytes on disk, one part for each number of threads; the colour is the perplexity that
    `eval --save` kept beside a model, grey without one.

    `found`: what `bench` finds. Raises RecipeError where matplotlib is missing.
    """
    figure = new_figure()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogFormatter

    threads = found["protocol"]["threads"]
    figure.set_size_inches(8, 1 + 3.5 * len(threads))
    parts = figure.subplots(len(threads), sharex=True, squeeze=False)[:, 0]
    quality = qualities(found["models"])
    known = [value for value in quality if value is not None]
    colours = ScalarMappable(LogNorm(min(known), max(known) * 1.001), "viridis_r") if known else None
    filled = [
        UNKNOWN if colours is None or value is None else tuple(colours.to_rgba(np.asarray(value))) for value in quality
    ]
    for axes, count in zip(parts, threads, strict=True):
        _draw(axes, found["models"], str(count), filled)
        axes.set_ylabel(f"tokens/s, {count} thread{'s' * (count > 1)}")
    parts[-1].set_xlabel("weight files, MB")
    parts[-1].xaxis.set_major_formatter(LogFormatter())  # 200, not 2 times 10 to the 2
    parts[-1].xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    if colours is not None:
        bar = figure.colorbar(colours, ax=list(parts), label="perplexity", format=LogFormatter())
        bar.ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(4, 1)))
    return png_bytes(figure)


def qualities(models: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the perplexity of each model; None where it is unknown, or measured by another protocol than the first."""
    scores = [one["scores"] for one in models]
    first = next((one["protocol"] for one in scores if one is not None), None)
    return [None if one is None or one["protocol"] != first else float(one["perplexity"]) for one in scores]


def _draw(axes: Axes, models: Sequence[Mapping[str, Any]], threads: str, colours: Sequence[Any]) -> None:
    """Draw one point for each model, with its name, and a line from the lowest to the highest round."""
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    points = []
    for one, colour in zip(models, colours, strict=True):
        speed = one["threads"][threads]["decode"]
        x, y = one["bytes"] / 1e6, speed["median"]
        axes.plot([x, x], [speed["lowest"], speed["highest"]], color="gray", linewidth=1, zorder=1)
        marker = "s" if one["kind"] == "gguf" else "o"
        axes.scatter([x], [y], color=[colour], edgecolors="black", marker=marker, zorder=2)
        points.append((x, y, one["model"]))
    axes.set_ylim(bottom=0)
    axes.margins(0.15)
    covered: list[Bbox] = []
    for x, y, name in points:
        covered.append(write_name(axes, (x, y), name, covered))
