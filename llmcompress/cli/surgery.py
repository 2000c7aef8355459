"""The commands that change the shape of a model: `drop`, `narrow` and `shrink`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.options import Model, Out, OutOrDryRun, check_output, check_seed, command
from llmcompress.cli.terminal import Terminal, build_table, next_line, size_change, surgery_lines
from llmcompress.errors import RecipeError
from llmcompress.reporting.tables import Row, merge_sentences

if TYPE_CHECKING:
    from rich.console import RenderableType


@command("revision", "device", "trust_remote_code")
def drop(
    terminal: Terminal,
    model: Model,
    output: Out,
    blocks: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Numbers of the blocks to drop, from 0: 13-18 or 4,7-9.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Number of blocks to drop; --by decides which.")] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="MEASURE",
            help="How --count chooses: similarity (a run of blocks that changes hidden states least), or damage "
            "(blocks that predictions miss least, found by trying; takes minutes).",
        ),
    ] = "similarity",
    text: Annotated[
        str | None,
        typer.Option(help="Text for --count: a file or a data set. By default stdlib, or builtin with --by damage."),
    ] = None,
    **access: Any,
) -> None:
    """Write MODEL without some of its decoder blocks.

    The result is a student for `distill`, which makes up for the loss.

    Example: llmcompress drop smollm2 --count 6 -o short
    """
    from llmcompress.models.files.output import check_writable, lock_work
    from llmcompress.surgery.block_choice import choose_blocks
    from llmcompress.surgery.drop import drop_blocks

    if blocks is not None and (by != "similarity" or text is not None):
        raise RecipeError("--by and --text choose blocks for --count, and --blocks names them; leave these two out")
    check_writable(output, 0)
    device = access.pop("device")  # dropping itself computes nothing
    reading = {} if text is None else {"text": text}
    with lock_work(output):
        chosen = choose_blocks(model, blocks, count, by, terminal.choosing, device=device, **reading, **access)
        result = drop_blocks(model, chosen.blocks, output, **access)
    terminal.warn(merge_sentences(result.warnings))
    terminal.show(result.to_json() | {"damage": chosen.damage}, dropped_view)


@command("revision", "device", "trust_remote_code")
def narrow(
    terminal: Terminal,
    model: Model,
    output: OutOrDryRun = None,
    neurons: Annotated[
        float | None, typer.Option(help="Neurons to keep in each feed-forward layer: a count, or a share below 1.")
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(help="Key-value heads to keep in each block, with the query heads that read them."),
    ] = None,
    per_block: Annotated[
        bool,
        typer.Option(
            "--per-block", help="Keep more neurons or heads in blocks where predictions need them; the same total."
        ),
    ] = False,
    by: Annotated[
        str,
        typer.Option(
            metavar="SCORE",
            help="How to choose: energy (largest part of the outputs), subset (least error of the layer), or random as "
            "a control.",
        ),
    ] = "energy",
    text: Annotated[str, typer.Option(help="Text to choose on: a file, a data set, or stdlib.")] = "stdlib",
    samples: Annotated[
        int, typer.Option(min=2, help="Number of sequences of text; a ninth of them is held out to judge on.")
    ] = 36,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for --by random.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the predicted damage and the size; write nothing.")
    ] = False,
    **access: Any,
) -> None:
    """Write MODEL with fewer neurons or heads in every block.

    The result is faster in any engine, and a student for `distill`, which makes up for the loss.

    Example: llmcompress narrow smollm2 --neurons 0.75 -o slim
    """
    from llmcompress.models.files.output import lock_work
    from llmcompress.surgery.narrow import narrow as run

    check_seed(by, seed)
    target = check_output(output, dry_run)
    choice: dict[str, Any] = {"neurons": neurons, "kv_heads": kv_heads, "per_block": per_block, "by": by}
    choice |= {"text": text, "samples": samples, "seed": seed}
    with lock_work(target):
        report = run(model, target, progress=terminal.progress, **choice, **access)
    terminal.warn(merge_sentences(report.warnings))
    terminal.show(report.to_json(), narrowed_view)
    if report.output is not None:
        words = ("distill", report.output, "shortened", "-o", "MENDED", "--teacher")
        terminal.say(next_line(words, model, access["revision"], access["trust_remote_code"]))


@command("trust_remote_code")
def shrink(
    terminal: Terminal,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder with a compressed model, or its Hub id (org/name).")
    ],
    rank: Annotated[int, typer.Option(min=0, help="Components of low-rank terms to keep; 0 drops these terms.")],
    output: Out,
    **access: Any,
) -> None:
    """Write MODEL at a smaller size, with only the first components of its low-rank terms.

    Example: llmcompress shrink small --rank 16 -o smaller
    """
    from llmcompress.surgery.shrink import shrink as run

    terminal.show(run(model, rank, output, **access).to_json(), shrunk_view)


def dropped_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the numbers of the dropped blocks, what they cost if that was measured, and the sizes before and after."""
    yield f"dropped {', '.join(map(str, result['dropped']))} of the {len(result['dropped'] + result['kept'])} blocks"
    if result["damage"] is not None:
        yield f"damage  {result['damage']:.3f} nats of KL a token, before any training"
    yield f"sizes   {size_change(result)} of weights in {result['output']}"


def narrowed_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield what stays in every block, the predicted damage, and the sizes."""
    for part, before in result["before"].items():
        where = "a block, on average" if result["per_block"] else "every block"
        yield f"{part.replace('_', '-'):7} {before:,} -> {round(result['after'][part], 1):,} in {where}"
    parts = list(result["before"])
    names = [part.replace("_", "-") for part in parts]
    headings = ("block", *names, *(f"error by {name}" for name in names), "damage")
    yield build_table(headings, [_block_cells(result, block) for block in result["blocks"]], right=range(len(headings)))
    if result["damage"] is not None:
        yield f"damage  {result['damage']:.3f} nats of KL a token, the sum over blocks narrowed one by one"
    yield from surgery_lines(result)


def _block_cells(result: Row, block: Row) -> list[str]:
    """Return the cells of a narrowed block: its number, what stays of each part, the error of each, the damage."""
    changed = {part["part"]: part for part in block["parts"]}
    sizes = [f"{len(changed[part]['kept']) if part in changed else size:,}" for part, size in result["before"].items()]
    errors = [f"{changed[part]['error']:.4f}" if part in changed else "" for part in result["before"]]
    return [str(block["block"]), *sizes, *errors, f"{block['damage']:.4f}"]


def shrunk_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the terms that lost components, and the sizes before and after."""
    yield f"terms   {result['terms']} of more than rank {result['rank']} were cut to it"
    yield f"sizes   {size_change(result)} of weights in {result['output']}"
    yield f"bits    {result['bpw_before']:.3f} -> {result['bpw_after']:.3f} bpw"
