"""The command that lists the recipes that come with llmcompress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmcompress.cli.options import AsJson, Quiet
from llmcompress.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

UNMEASURED = "-"


def recipes(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the recipes that come with llmcompress: what each is for, and what it measured on SmolLM2.

    Example: llmcompress recipes
    """
    with Terminal(as_json, quiet=quiet) as terminal:
        from llmcompress.recipe.library import GROUPS, PROTOCOL, library, measurements

        rows = [{**asdict(one), "path": str(one.path)} for one in library()]
        dense = asdict(measurements()["dense"])
        terminal.show({"protocol": PROTOCOL, "dense": dense, "groups": GROUPS, "recipes": rows}, recipes_view)


def recipes_view(values: dict[str, Any], _every: bool) -> Iterator[RenderableType]:
    """Yield a table for each group, and below them how the numbers were measured."""
    from rich.table import Table

    for group, purpose in values["groups"].items():
        rows = [row for row in values["recipes"] if row["group"] == group]
        headings = ("bpw", "MB", "perplexity") if any(row["measured"] for row in rows) else ()
        yield f"{group}: {purpose}"
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("name", no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="right")
        table.add_column("for")
        for row in rows:
            table.add_row(row["name"], *_numbers(row["measured"])[: len(headings)], row["purpose"])
        yield table
        yield ""
    dense = ", ".join(map(" ".join, zip(_numbers(values["dense"]), ("bpw", "MB", "perplexity"), strict=True)))
    yield f"{values['protocol']} (dense: {dense}). {UNMEASURED}: not measured like that; see docs/results/."
    yield "A name serves in place of a file: llmcompress compress MODEL gptq-4-g64 -o OUT"


def _numbers(measured: dict[str, Any] | None) -> tuple[str, str, str]:
    if measured is None:
        return UNMEASURED, UNMEASURED, UNMEASURED
    perplexity = measured["perplexity"]
    shown = f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}"
    return f"{measured['bpw']:.3f}", f"{measured['megabytes']:.1f}", shown
