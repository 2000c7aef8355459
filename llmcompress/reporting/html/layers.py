"""The layers of a page: two heat maps, a table, and the matrices that stayed dense with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from statistics import median
from typing import TYPE_CHECKING, Any

from llmcompress.errors import RecipeError
from llmcompress.models.dense.families import roles_of
from llmcompress.models.files import file_names
from llmcompress.reporting.html.charts import HeatMap, heat_map
from llmcompress.reporting.report import BLOCK, LayerReport, Report, group_by_kind
from llmcompress.reporting.tables import Row, Table, group_rows, merge_sentences, star_numbers

if TYPE_CHECKING:
    from llmcompress.recipe.compression import Recipe

STAYS_DENSE = " stays dense"  # the end of a warning that names such a matrix
MOST_ROWS = 1000  # of the table; more layers share rows
MOST_CELLS = 3000  # of a heat map


def layer_context(report: Report, recipe: str | None) -> dict[str, Any]:
    """Return the heat maps, the table, the dense matrices, the fallbacks and the warnings of a report."""
    named = [sentence.removesuffix(STAYS_DENSE) for sentence in report.warnings if sentence.endswith(STAYS_DENSE)]
    others = [sentence for sentence in report.warnings if not sentence.endswith(STAYS_DENSE)]
    maps = list(_maps(report, named))
    return {
        "count": len(report.layers),
        "maps": maps,
        "too_many": bool(report.layers) and not maps,
        "held_out": any(row.error_heldout is not None for row in report.layers),
        "table": _layer_table(report),
        "shared_rows": len(report.layers) > MOST_ROWS,
        "dense": _dense_table(named, recipe),
        "fallbacks": _fallback_table(report),
        "warnings": merge_sentences(others),
        "fused": list(report.fused),
        "learned": _reconstruction(report),
    }


def _maps(report: Report, dense: list[str]) -> Iterator[HeatMap]:
    """Yield errors and bits by block and linear; experts of a block share a cell."""
    cells: dict[tuple[str, int], list[LayerReport]] = {}
    for kind, rows in group_by_kind(report).items():
        for block, row in rows:
            cells.setdefault((star_numbers(f".{kind}")[1:], block), []).append(row)
    dense_cells = [
        (star_numbers(f".{name[found.end() :]}")[1:], int(found[1])) for name in dense if (found := BLOCK.search(name))
    ]
    if not cells or len(cells) + len(dense_cells) > MOST_CELLS:
        return
    errors: dict[tuple[str, int], float | None] = dict.fromkeys(cell for cell in dense_cells if cell not in cells)
    bits = dict(errors)
    errors |= {cell: median(row.shown_error for row in rows) for cell, rows in cells.items()}
    bits |= {cell: _bits(rows) for cell, rows in cells.items()}
    text = "held-out text" if any(row.error_heldout is not None for row in report.layers) else "the calibration"
    where = "the weights alone" if report.calibration is None else text
    yield heat_map(f"Relative error on {where}", errors, "", ".4f", logarithmic=True)
    yield heat_map("Bits per weight", bits, "bits", ".3f", logarithmic=False)


def _bits(rows: list[LayerReport]) -> float:
    return sum(row.bpw * prod(row.shape) for row in rows) / sum(prod(row.shape) for row in rows)


def _layer_table(report: Report) -> Table:
    """Return the steps, bits and errors of every layer; where there are too many, like ones share a row."""
    layers = [vars(row) for row in report.layers]
    cells = []
    for name, rows in group_rows(layers, ("shape", "steps", "stored"), len(layers) <= MOST_ROWS):
        first, many = rows[0], f" ({len(rows)} layers)" if len(rows) > 1 else ""
        held_out = [row["error_heldout"] for row in rows if row["error_heldout"] is not None]
        cells.append(
            (
                name + many,
                " × ".join(map(str, first["shape"])),
                ", ".join(first["steps"]),
                f"{sum(row['bpw'] for row in rows) / len(rows):.3f}",
                f"{median(row['error'] for row in rows):.4f}",
                f"{median(held_out):.4f}" if held_out else "not measured",
                first["stored"],
            )
        )
    headings = ("matrix", "shape", "steps", "bits per weight", "error", "held out", "stored as")
    return Table(headings, cells, (3, 4, 5))


def _dense_table(names: list[str], recipe: str | None) -> Table:
    """Return the matrices that no step was applied to, with the reason."""
    rules = _read_rules(recipe)
    return _count_by("reason", [{"name": name, "reason": _reason(name, rules)} for name in names])


def _fallback_table(report: Report) -> Table:
    """Return the layers whose steps failed numerically, with the replacement."""
    rows = [{"name": row.name, "what was done": row.fallback} for row in report.layers if row.fallback]
    return _count_by("what was done", rows)


def _count_by(key: str, rows: list[Row]) -> Table:
    """Return the matrices that share an entry `key`, and their number."""
    cells = [(name, str(len(members)), members[0][key]) for name, members in group_rows(rows, (key,))]
    return Table(("matrices", "count", key), cells, (1,))


def _reason(name: str, recipe: Recipe | None) -> str:
    """Return the rule of the recipe that leaves a matrix dense, or the lack of one."""
    if recipe is None:
        return f"unknown: there is no {file_names.RECIPE} of this version"
    for number, rule in enumerate(recipe.rules, start=1):
        if any(rule.covers(name, role) for role in roles_of(name) or (None,)):
            return "it is no linear layer of a block" if rule.steps else f"rule {number} of the recipe keeps it dense"
    if BLOCK.search(name) is None:
        return "it is in no block, and the recipe has no steps for it"
    return "no rule of the recipe matches it"


def _read_rules(recipe: str | None) -> Recipe | None:
    """Return the recipe; None if it is missing, or of another version."""
    from llmcompress.recipe.read import parse_recipe

    try:
        return None if recipe is None else parse_recipe(recipe)
    except RecipeError:
        return None


def _reconstruction(report: Report) -> str | None:
    """Return a sentence on blocks whose free parameters were trained while they were compressed; None without."""
    if not report.blocks:
        return None
    error = median(block["after"] for block in report.blocks.values())
    sentence = f"{len(report.blocks)} blocks were reconstructed; the median of their output errors is {error:.4f}"
    if left := [block["left"] for block in report.blocks.values() if "left" in block]:
        sentence += f", {median(left):.3f} times that of the methods alone"
    return sentence + "."
