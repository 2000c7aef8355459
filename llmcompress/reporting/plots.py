"""Pictures: errors and bits of layers by depth, distillations by tokens, quality by size, speed by size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from llmcompress.errors import RecipeError
from llmcompress.reporting.report import Report, group_by_kind
from llmcompress.reporting.tables import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

MISSING = 'plots need matplotlib; run pip install "llmcompress[report]"'
UNKNOWN = "lightgray"  # of a model whose quality is not known, or not by the same protocol


def layers_png(report: Report) -> bytes:
    """Return errors, held out if measured, and bits per weight of the decoder's linears, a line for each kind.

    Raises RecipeError where matplotlib is missing.
    """
    figure = new_figure()
    above, below = figure.subplots(2, sharex=True)
    for kind, rows in group_by_kind(report).items():
        depths = [depth for depth, _ in rows]
        above.plot(depths, [row.shown_error for _, row in rows], marker=".", label=kind)
        below.plot(depths, [row.bpw for _, row in rows], marker=".", label=kind)
    _describe(above, "relative output error", "log")
    _describe(below, "bits per weight", "linear")
    below.set_ylim(bottom=0)
    below.set_xlabel("decoder block")
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return png_bytes(figure)


def distillation_png(history: Sequence[dict[str, Any]]) -> bytes:
    """Return KL to the teacher and perplexity on held-out text, over the tokens trained on, and a line for the teacher.

    `history`: maps with tokens, kl, perplexity and teacher_perplexity. Raises RecipeError where matplotlib is missing.
    """
    figure = new_figure()
    from matplotlib.ticker import LogFormatter

    above, below = figure.subplots(2, sharex=True)
    tokens = list(running_count(row["tokens"] for row in history))
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
    return png_bytes(figure)


def frontier_pictures(results: dict[str, Any]) -> dict[str, bytes]:
    """Return {"png", "svg"}: perplexity, and the score in each task, over the size.

    Each recipe has a line, each peer a cross, and the dense model a dashed line. `results`: of a sweep over budgets.
    Raises RecipeError where matplotlib is missing.
    """
    figure = new_figure()
    import matplotlib
    from matplotlib.ticker import LogFormatter

    tasks = [task for task, entry in results["dense"]["tasks"].items() if main_metric(entry) is not None]
    figure.set_size_inches(8, 1.5 + 3.5 * (1 + len(tasks)))
    above, *others = figure.subplots(1 + len(tasks), sharex=True, squeeze=False)[:, 0]
    _draw_frontier(above, results, lambda one: one["perplexity"], "perplexity", "log")
    above.yaxis.set_major_formatter(LogFormatter())
    above.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(4, 1)))
    for axes, task in zip(others, tasks, strict=True):
        label = f"{task}: {main_metric(results['dense']['tasks'][task])}"
        _draw_frontier(axes, results, partial(_task_score, task=task), label, "linear")
    last = [above, *others][-1]
    last.set_xlabel("bits per weight of the decoder's linears" if results["axis"] == "bpw" else "weight files, MB")
    above.legend(fontsize="small")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "frontier"}):
        drawing = BytesIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    return {"png": png_bytes(figure), "svg": drawing.getvalue()}


def speed_png(results: dict[str, Any]) -> bytes:
    """Return tokens/s of decoding over bytes on disk, one part for each number of threads.

    The colour is the perplexity that `eval --save` wrote beside a model, grey without one. `results`: of `bench`.
    Raises RecipeError where matplotlib is missing.
    """
    figure = new_figure()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogFormatter

    threads = results["protocol"]["threads"]
    figure.set_size_inches(8, 1 + 3.5 * len(threads))
    parts = figure.subplots(len(threads), sharex=True, squeeze=False)[:, 0]
    quality = qualities(results["models"])
    known = [value for value in quality if value is not None]
    colours = ScalarMappable(LogNorm(min(known), max(known) * 1.001), "viridis_r") if known else None
    filled = [
        UNKNOWN if colours is None or value is None else tuple(colours.to_rgba(np.asarray(value))) for value in quality
    ]
    for axes, count in zip(parts, threads, strict=True):
        _draw_speeds(axes, results["models"], str(count), filled)
        axes.set_ylabel(f"tokens/s, {count} thread{'s' * (count > 1)}")
    parts[-1].set_xlabel("weight files, MB")
    parts[-1].xaxis.set_major_formatter(LogFormatter())  # 200, not 2 times 10 to the 2
    parts[-1].xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    if colours is not None:
        bar = figure.colorbar(colours, ax=list(parts), label="perplexity", format=LogFormatter())
        bar.ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(4, 1)))
    return png_bytes(figure)


def qualities(models: Sequence[dict[str, Any]]) -> list[float | None]:
    """Return the perplexity of each model; None where it is unknown, or measured by another protocol than the first."""
    scores = [model["scores"] for model in models]
    first = next((known["protocol"] for known in scores if known is not None), None)
    return [None if known is None or known["protocol"] != first else float(known["perplexity"]) for known in scores]


def _draw_speeds(axes: Axes, models: Sequence[dict[str, Any]], threads: str, colours: Sequence[Any]) -> None:
    """Draw one point for each model, with its name, and a line from the lowest to the highest round."""
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    points = []
    for model, colour in zip(models, colours, strict=True):
        speed = model["threads"][threads]["decode"]
        x, y = model["bytes"] / 1e6, speed["median"]
        axes.plot([x, x], [speed["lowest"], speed["highest"]], color="gray", linewidth=1, zorder=1)
        marker = "s" if model["kind"] == "gguf" else "o"
        axes.scatter([x], [y], color=[colour], edgecolors="black", marker=marker, zorder=2)
        points.append((x, y, model["model"]))
    axes.set_ylim(bottom=0)
    axes.margins(0.15)
    covered: list[Bbox] = []
    for x, y, name in points:
        covered.append(write_name(axes, (x, y), name, covered))


def main_metric(entry: dict[str, float]) -> str | None:
    """Return the metric of a task that a plot shows: accuracy, else the first; None without any."""
    names = [name for name, _, _ in metrics(entry)]
    return next((name for name in ("acc", *names) if name in names), None)


def _task_score(one: dict[str, Any], task: str) -> float | None:
    entry = one["tasks"].get(task, {})
    metric = main_metric(entry)
    return None if metric is None else float(entry[metric])


def _draw_frontier(
    axes: Axes, results: dict[str, Any], value: Callable[[dict[str, Any]], float | None], label: str, scale: str
) -> None:
    """Draw one quantity of all points: lines by size, peers with their names, the dense model."""

    def place(one: dict[str, Any]) -> float:
        return float(one["bpw"] if results["axis"] == "bpw" else one["bytes"] / 1e6)

    for series in results["series"]:
        points = sorted((place(one), y) for one in series["points"] if (y := value(one)) is not None)
        axes.plot([x for x, _ in points], [y for _, y in points], marker=".", label=series["recipe"])
    peers = sorted((place(peer), y, peer["name"]) for peer in results["peers"] if (y := value(peer)) is not None)
    crosses = axes.plot([x for x, *_ in peers], [y for _, y, _ in peers], marker="x", linestyle="", color="black")
    axes.axhline(value(results["dense"]) or 0.0, linestyle="--", color="gray", label="dense")
    _describe(axes, label, scale)
    from matplotlib.transforms import Bbox

    corners = axes.transData.transform(crosses[0].get_xydata())
    covered = [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for x, y in corners]
    for x, y, name in peers:
        covered.append(write_name(axes, (x, y), name, covered))


def write_name(axes: Axes, point: tuple[float, float], name: str, covered: list[Bbox]) -> Bbox:
    """Write a name nearest to a point where it covers least and is not cut off, with a line to it from afar.

    Returns the box of the name.
    """
    places = [(right, up) for up in (4, -10, 14, -20, 24, -30) for right in (4, -4)]  # by nearness
    written = partial(axes.annotate, xy=point, textcoords="offset points", fontsize="x-small")
    texts = [written(name, xytext=place, ha="left" if place[0] > 0 else "right") for place in places]
    boxes = [text.get_window_extent() for text in texts]
    inside = [all(axes.bbox.contains(*corner) for corner in box.corners()) for box in boxes]
    best = min(range(len(texts)), key=lambda number: (not inside[number], boxes[number].count_overlaps(covered)))
    for text in (*texts[:best], *texts[best + 1 :]):
        text.remove()
    if abs(places[best][1]) > 10:
        written("", xytext=places[best], arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.5})
    return boxes[best]


def running_count(tokens: Iterable[int]) -> Iterator[int]:
    """Yield token counts that restart with every phase as one running count."""
    before = last = 0
    for count in tokens:
        before += last if count < last else 0
        last = count
        yield before + count


def check_matplotlib() -> None:
    """Raise RecipeError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise RecipeError(MISSING)


def new_figure() -> Figure:
    """Return an empty figure. Raises RecipeError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError(MISSING) from error
    return Figure(figsize=(8, 6), layout="constrained")


def png_bytes(figure: Figure) -> bytes:
    """Return a figure as a PNG file that does not say what wrote it."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=100, metadata={"Software": None})
    return picture.getvalue()


def _describe(axes: Axes, label: str, scale: str) -> None:
    axes.set_ylabel(label)
    axes.set_yscale(scale)
    axes.grid(alpha=0.3)
