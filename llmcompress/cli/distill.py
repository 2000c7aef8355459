"""The commands that recover quality: `distill` trains on a dense model, `answer` lets one write text to train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.options import Model, Out, Quick, RecipeFile, Seed, Settings, command
from llmcompress.cli.terminal import Terminal, build_table, size_change
from llmcompress.reporting.formatting import duration
from llmcompress.reporting.tables import Row, steps_and_tokens

if TYPE_CHECKING:
    from rich.console import RenderableType


@command("device", "trust_remote_code")
def distill(
    terminal: Terminal,
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="A compressed model, or a smaller dense one.")],
    recipe: RecipeFile,
    teacher: Annotated[str, typer.Option("--teacher", metavar="DENSE", help="The dense model that STUDENT came from.")],
    output: Out,
    quick: Quick = False,
    settings: Settings = None,
    seed: Seed = None,
    **access: Any,
) -> None:
    """Train STUDENT to predict as DENSE does, by RECIPE.

    The format of STUDENT stays, and its size unless the recipe adds terms. An interrupted run resumes.

    Example: llmcompress distill small distil.yaml --teacher smollm2 -o recovered
    """
    from llmcompress.distillation.run import distill as run
    from llmcompress.recipe.distillation import Distillation
    from llmcompress.recipe.read import Change, read_as

    changes = [] if seed is None else [Change("seed", seed, "--seed")]
    changes += [Change("trial", True, "--quick")] if quick else []
    wanted = read_as(Distillation, recipe, settings or (), changes)
    result = run(student, teacher, wanted, output, progress=terminal.training, **access)
    terminal.warn(result.warnings)
    terminal.show(result.to_json(), distilled_view)


@command("revision", "device", "trust_remote_code")
def answer(
    terminal: Terminal,
    model: Model,
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS", help="Chats or texts, as `dataset` of a recipe: files, or a data set of the Hub."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new .jsonl file for the chats.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Number of prompts to answer; by default all.")] = None,
    column: Annotated[str | None, typer.Option(help="Column of PROMPTS with the chats or texts.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data set; by default train.")] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a data set that has several.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0, max=10, help="Sampling temperature; 0 always takes the likeliest token.")
    ] = 1.0,
    top_p: Annotated[float, typer.Option(max=1, help="Sample from the likeliest tokens that have this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for sampling.")] = 0,
    longest: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of prompts to answer at a time.")] = 8,
    keep_reference: Annotated[
        bool,
        typer.Option("--keep-reference", help="Keep the data set's answer when the model's answer fails a check."),
    ] = False,
    rewrite: Annotated[
        bool, typer.Option("--rewrite", help="Show the model the data set's answer and let it write a new one.")
    ] = False,
    **access: Any,
) -> None:
    """Let MODEL answer PROMPTS, and write the answers that pass checks as chats to distil from.

    An interrupted run resumes.

    Example: llmcompress answer smollm2 prompts.jsonl -o answers.jsonl
    """
    from llmcompress.data.generate import AnswerSampling
    from llmcompress.data.self_data import Answering
    from llmcompress.data.self_data import answer as run

    sampling = AnswerSampling(temperature, top_p, seed, longest)
    wanted = Answering(prompts, subset, None, split, column, limit, sampling, batch_size, keep_reference, rewrite)
    result = run(model, wanted, output, progress=terminal.answering, **access)
    terminal.show(result.to_json(), answered_view)


def distilled_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the gains of a distillation on held-out text, then its cost."""
    history = result["history"]
    yield build_table(
        ("step", "KL", "perplexity", "loss", "seconds"),
        [_history_cells(row) for row in (history if every else (history[0], history[-1]))],
        right=range(5),
    )
    for kind, label in (("domains", "domain  "), ("sizes", "size    rank ")):
        for name, last in history[-1].get(kind, {}).items():
            yield f"{label}{name} · KL {history[0][kind][name]['kl']:.4f} -> {last['kl']:.4f}"
    yield f"teacher {result['teacher']} · perplexity {history[-1]['teacher_perplexity']:.3f}"
    for phase in result["phases"]:
        if blocks := phase.get("blocks"):
            path, last = list(blocks.items())[-1]
            yield f"blocks  {len(blocks)} · held-out error of {path} {last['before']:.4f} -> {last['after']:.4f}"
        if (frozen := phase.get("frozen")) is not None:
            yield f"frozen  {frozen:,} codes that oscillated"
        if (regrown := phase.get("regrown")) is not None:
            yield f"regrown {regrown:.1%} of the weights of a phase's matrices, which had been pruned"
    if result["bytes_before"] != result["bytes_after"]:
        yield f"sizes   {size_change(result)} of compressed weights"
    trained = " · ".join(f"{count:,} {kind}" for kind, count in result["trained"].items())
    yield f"trained {trained} · {steps_and_tokens(result)} in {duration(result['seconds'])}"
    yield f"plot    {result['plot'] or 'none: it needs matplotlib (the extra report)'}"
    if (cost := result.get("quantized_teacher")) is not None:
        yield f"bits    {cost['bits']} of the teacher while it taught · KL {cost['kl']:.4f} to itself before"
    for name, last in result.get("controls", {}).items():
        reached = last.get("failed") or f"KL {last['kl']:.4f} · perplexity {last['perplexity']:.3f}, on the same tokens"
        yield f"control {name.replace('_', ' ')} · {reached}"
    if result["cache_bias"] is not None:
        bias = result["cache_bias"]["after"]
        seen = f"KL {bias['kl_with_tail']:.4f} of {bias['kl']:.4f}"
        yield f"cache   {bias['tail_mass']:.1%} of the teacher's mass in the tail · {seen} seen through it"


def _history_cells(row: Row) -> tuple[str, ...]:
    loss = f"{row['loss']:.4f}" if "loss" in row else ""
    seconds = duration(row["seconds"]) if "seconds" in row else ""
    return str(row["step"]), f"{row['kl']:.4f}", f"{row['perplexity']:.3f}", loss, seconds


def answered_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the number of answers, and the reasons for those that were refused."""
    yield f"answers {result['answers']:,} to {result['prompts']:,} prompts, by {result['model']}, in {result['output']}"
    faults = " · ".join(f"{count:,} {name}" for name, count in result["faults"].items()) or "none"
    yield f"faults  {faults}"
    yield f"instead {result['references']:,} references · {result['dropped']:,} prompts left out"
