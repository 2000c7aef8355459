"""Layers as a page shows them: two heat maps, a table, and the matrices that stayed dense with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from statistics import median
from typing import TYPE_CHECKING, Any

from llmcompress.errors import RecipeError
from llmcompress.models.dense.roles import roles_of
from llmcompress.models.files import file_names
from llmcompress.reporting.html.charts import HeatMap, heat_map
from llmcompress.reporting.report import BLOCK, LayerReport, Report, by_kind
from llmcompress.reporting.tables import grouped, starred, summarized

if TYPE_CHECKING:
    from llmcompress.recipe.compression import Recipe

STAYS_DENSE = " stays dense"  # the end of a warning that names such a matrix
MOST_ROWS = 1000  # of the table; more layers share rows
MOST_CELLS = 3000  # of a heat map


def layer_facts(report: Report, recipe: str | None) -> dict[str, Any]:
    """Return the heat maps, the table, the dense matrices, the fallbacks and the warnings of a report."""
    named = [sentence.removesuffix(STAYS_DENSE) for sentence in report.warnings if sentence.endswith(STAYS_DENSE)]
    others = [sentence for sentence in report.warnings if not sentence.endswith(STAYS_DENSE)]
    maps = list(_maps(report, named))
    return {
        "count": len(report.layers),
        "maps": maps,
        "too_many": bool(report.layers) and not maps,
        "held_out": any(row.error_heldout is not None for row in report.layers),
        "rows": list(_rows(report)),
        "shared_rows": len(report.layers) > MOST_ROWS,
        "dense": list(_dense(named, recipe)),
        "fallbacks": list(_fallbacks(report)),
        "warnings": summarized(others),
        "fused": list(report.fused),
        "learned": _learned(report),
    }


def _maps(report: Report, dense: list[str]) -> Iterator[HeatMap]:
    """Errors and bits by block and linear. Linears that differ in another number, as experts do, share a cell."""
    cells: dict[tuple[str, int], list[LayerReport]] = {}
    for kind, rows in by_kind(report).items():
        for block, row in rows:
            cells.setdefault((starred(f".{kind}")[1:], block), []).append(row)
    kept = [(starred(f".{name[found.end() :]}")[1:], int(found[1])) for name in dense if (found := BLOCK.search(name))]
    if not cells or len(cells) + len(kept) > MOST_CELLS:
        return
    left = [cell for cell in kept if cell not in cells]
    errors: dict[tuple[str, int], float | None] = dict.fromkeys(left)
    bits = dict(errors)
    errors |= {cell: median(row.shown_error for row in rows) for cell, rows in cells.items()}
    bits |= {cell: _bits(rows) for cell, rows in cells.items()}
    seen = "held-out text" if any(row.error_heldout is not None for row in report.layers) else "the calibration"
    where = "the weights alone" if report.calibration is None else seen
    yield heat_map(f"Relative error on {where}", errors, "", ".4f", logarithmic=True)
    yield heat_map("Bits per weight", bits, "bits", ".3f", logarithmic=False)


def _bits(rows: list[LayerReport]) -> float:
    return sum(row.bpw * prod(row.shape) for row in rows) / sum(prod(row.shape) for row in rows)


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Cells of (layer, shape, steps, bits per weight, error, held-out error, form) for the table."""
    entries = [vars(row) for row in report.layers]
    for name, rows in grouped(entries, ("shape", "steps", "stored"), len(entries) <= MOST_ROWS):
        first, many = rows[0], f" ({len(rows)} layers)" if len(rows) > 1 else ""
        unseen = [row["error_heldout"] for row in rows if row["error_heldout"] is not None]
        yield (
            name + many,
            " × ".join(map(str, first["shape"])),
            ", ".join(first["steps"]),
            f"{sum(row['bpw'] for row in rows) / len(rows):.3f}",
            f"{median(row['error'] for row in rows):.4f}",
            f"{median(unseen):.4f}" if unseen else "not measured",
            first["stored"],
        )


def _dense(names: list[str], recipe: str | None) -> Iterator[tuple[str, int, str]]:
    """(matrices, how many, reason) of what no step was applied to."""
    rules = _read(recipe)
    rows = [{"name": name, "reason": _reason(name, rules)} for name in names]
    for pattern, members in grouped(rows, ("reason",)):
        yield pattern, len(members), members[0]["reason"]


def _reason(name: str, recipe: Recipe | None) -> str:
    """The rule of the recipe that leaves a matrix dense, or the lack of one."""
    if recipe is None:
        return f"unknown: there is no {file_names.RECIPE} of this version"
    for number, rule in enumerate(recipe.rules, start=1):
        if any(rule.covers(name, role) for role in roles_of(name) or (None,)):
            return "it is no linear layer of a block" if rule.steps else f"rule {number} of the recipe keeps it dense"
    if BLOCK.search(name) is None:
        return "it is in no block, and the recipe has no steps for it"
    return "no rule of the recipe matches it"


def _read(recipe: str | None) -> Recipe | None:
    """The recipe; None where it is missing, or of another version."""
    from llmcompress.recipe.read import parse_recipe

    try:
        return None if recipe is None else parse_recipe(recipe)
    except RecipeError:
        return None


def _fallbacks(report: Report) -> Iterator[tuple[str, int, str]]:
    """(layers, how many, what was done instead) of steps that failed numerically."""
    rows = [{"name": row.name, "fallback": row.fallback} for row in report.layers if row.fallback]
    for pattern, members in grouped(rows, ("fallback",)):
        yield pattern, len(members), members[0]["fallback"]


def _learned(report: Report) -> str | None:
    """A sentence on blocks whose free parameters were trained while they were compressed."""
    if not report.blocks:
        return None
    error = median(block["after"] for block in report.blocks.values())
    said = f"{len(report.blocks)} blocks were reconstructed; the median of their output errors is {error:.4f}"
    if left := [block["left"] for block in report.blocks.values() if "left" in block]:
        said += f", {median(left):.3f} times that of the methods alone"
    return said + "."
