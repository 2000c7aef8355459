"""Parts of results that several commands print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from llmcompress.errors import format_bytes
from llmcompress.reporting.tables import Row

if TYPE_CHECKING:
    from rich.table import Table


def build_table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Table:
    """Return a table without lines. The columns numbered in `right` are flush right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def size_change(result: Row) -> str:
    """Return the sizes before and after, such as "269.1 MB -> 39.9 MB"."""
    return f"{format_bytes(result['bytes_before'])} -> {format_bytes(result['bytes_after'])}"


def surgery_lines(result: Row) -> Iterator[str]:
    """Yield the sizes before and after a change of shape, and the text that it was chosen on."""
    written = f"of weights in {result['output']}" if result["output"] else "of weights; nothing was written"
    yield f"sizes   {size_change(result)} {written}"
    text = result["calibration"]
    judged = text["held_out"] * text["length"]
    yield f"data    {text['source']} · {text['tokens']:,} tokens, {judged:,} of them to judge on"
