"""The commands on the experts of a mixture. Each shows its plan, and writes the result unless it is a dry run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.options import Group, Model, OutOrDryRun, check_output, check_seed, command
from llmcompress.cli.terminal import Terminal, build_table, surgery_lines
from llmcompress.reporting.tables import Row, merge_sentences

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmcompress.surgery.experts.job import ExpertsReport

Score = Annotated[
    str,
    typer.Option(
        "--by",
        metavar="SCORE",
        help="How to score experts: reap (router weight times output), frequency, or random as a control.",
    ),
]
RandomSeed = Annotated[int, typer.Option("--seed", min=0, help="Random seed for --by random.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show which experts change and the predicted damage; write nothing.")
]
ReadText = Annotated[str, typer.Option(help="Text to judge experts on: a file, a data set, or stdlib.")]
Samples = Annotated[
    int, typer.Option(min=2, help="Number of sequences of text; a fifth of them is held out to judge on.")
]
OUTPUT = Group({"output": (OutOrDryRun, None), "dry_run": (DryRun, False)}, "output", check_output)
READING = Group({"text": (ReadText, "stdlib"), "samples": (Samples, 20)})

experts = typer.Typer(
    help="Remove, merge, condense or replace the experts of a mixture-of-experts model.", no_args_is_help=True
)


@experts.command()
@command(OUTPUT, READING, "revision", "device")
def prune(
    terminal: Terminal,
    model: Model,
    keep: Annotated[float, typer.Option(help="Experts to keep in each block: a count, or a share below 1.")],
    by: Score = "reap",
    seed: RandomSeed = 0,
    **others: Any,
) -> None:
    """Keep the most useful experts of every block of MODEL.

    Every engine that reads MODEL reads the result.

    Example: llmcompress experts prune Qwen/Qwen3-30B-A3B --keep 96 -o fewer
    """
    from llmcompress.surgery.experts.prune import prune_experts

    check_seed(by, seed)
    _show(terminal, prune_experts, model, keep=keep, by=by, seed=seed, **others)


@experts.command()
@command(OUTPUT, READING, "revision", "device")
def merge(
    terminal: Terminal,
    model: Model,
    keep: Annotated[float, typer.Option(help="Experts that each block has afterwards: a count, or a share below 1.")],
    **others: Any,
) -> None:
    """Average experts of MODEL that have similar outputs.

    Every engine that reads MODEL reads the result.

    Example: llmcompress experts merge Qwen/Qwen3-30B-A3B --keep 96 -o merged
    """
    from llmcompress.surgery.experts.merge import merge_experts

    _show(terminal, merge_experts, model, keep=keep, **others)


@experts.command()
@command(OUTPUT, READING, "revision", "device")
def condense(
    terminal: Terminal,
    model: Model,
    blocks: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Numbers of the blocks to condense, from 0: 13-18 or 4,7-9.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Number of blocks to condense: those that it changes least.")
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "--experts",
            help="Experts that stay on in each block, beside shared ones; by default as many as a token uses.",
        ),
    ] = None,
    **others: Any,
) -> None:
    """Replace the router and the experts in some blocks of MODEL by a few experts that are always on.

    These experts form one dense layer.

    Example: llmcompress experts condense Qwen/Qwen3-30B-A3B --count 6 -o condensed
    """
    from llmcompress.surgery.block_choice import block_numbers
    from llmcompress.surgery.experts.condense import condense_experts

    chosen = None if blocks is None else block_numbers(blocks)
    _show(terminal, condense_experts, model, blocks=chosen, count=count, experts=number, **others)


@experts.command()
@command(OUTPUT, READING, "revision", "device")
def replace(
    terminal: Terminal,
    model: Model,
    count: Annotated[float, typer.Option(help="Experts to replace in each block: a count, or a share below 1.")],
    share: Annotated[
        float | None,
        typer.Option(help="Size of a replaced expert, as a share of its size in bfloat16; 0.25 by default."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the two factors; in place of --share.")] = None,
    by: Score = "reap",
    seed: RandomSeed = 0,
    **others: Any,
) -> None:
    """Store the least useful experts of every block of MODEL as low-rank factors.

    The result is a compressed model, as `compress` writes it.

    Example: llmcompress experts replace Qwen/Qwen3-30B-A3B --count 0.5 -o lighter
    """
    from llmcompress.surgery.experts.replace import replace_experts

    check_seed(by, seed)
    _show(terminal, replace_experts, model, count=count, share=share, rank=rank, by=by, seed=seed, **others)


def _show(terminal: Terminal, run: Callable[..., ExpertsReport], model: str, **arguments: Any) -> None:
    """Run a change of experts, and show its report."""
    from llmcompress.models.files.output import lock_work

    with lock_work(arguments["output"]):
        report = run(model, progress=terminal.progress, **arguments)
    terminal.warn(merge_sentences(report.warnings))
    terminal.show(report.to_json(), experts_view)


def experts_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the experts of each block that change, the predicted damage, and the sizes."""
    yield f"experts {_summary(result)}"
    cells = []
    for block in result["blocks"]:
        changed = [row for row in block["experts"] if row["fate"] != "kept"]
        total = sum(row["tokens"] for row in block["experts"])
        share = f"{sum(row['tokens'] for row in changed) / total:.3f}" if total and changed else ""
        damage = block["damage"] if changed else block["considered"]
        shown = "" if damage is None else f"{damage:.4f}" + ("" if changed else " if condensed")
        cells.append((str(block["block"]), _fates(changed, every) or "stay", share, shown))
    yield build_table(("block", "experts", "share of tokens", "damage"), cells, right=(0, 2, 3))
    yield from surgery_lines(result)


def _summary(result: Row) -> str:
    """Return what is done to a mixture in one line."""
    settings, each = result["settings"], result["experts_before"]
    if result["way"] == "prune":
        return f"{settings['keep']} of {each} stay in each block, by {settings['by']}"
    if result["way"] == "merge":
        return f"{each} in each block become {settings['keep']}, by averages of alike ones"
    if result["way"] == "condense":
        return f"{settings['experts']} of {each} stay on, without a router, in {len(settings['blocks'])} blocks"
    return f"{settings['count']} of {each} in each block become factors of rank {settings['rank']}, by {settings['by']}"


def _fates(rows: Sequence[Row], every: bool) -> str:
    """Return the fates of a block's experts with their numbers; with `every`, weights of those that are folded too."""
    parts = []
    for fate in ("dropped", "merged", "replaced", "folded"):
        groups: dict[int | None, list[Row]] = {}
        for row in (row for row in rows if row["fate"] == fate):
            groups.setdefault(row["becomes"] if fate == "merged" else None, []).append(row)
        for same in groups.values():
            names = [
                f"{row['number']}" + (f" x {row['weight']:.3f}" if every and row["weight"] else "") for row in same
            ]
            parts.append(f"{fate} {', '.join(names)}")
    return "; ".join(parts)
