"""The commands that recover quality: a dense model teaches, and writes answers to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.options import (
    AsJson,
    Device,
    KeepReference,
    Model,
    Prompts,
    Quiet,
    RecipeFile,
    Revision,
    Rewrite,
    Seed,
    Settings,
    TrustRemoteCode,
    Verbose,
    seeded,
)
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import answered_view, distilled_view


def distill(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="What compress wrote, or a smaller dense model.")],
    recipe: RecipeFile,
    teacher: Annotated[str, typer.Option("--teacher", metavar="DENSE", help="The model that it was made from.")],
    output: Annotated[Path, typer.Option("--output-dir", "-o", metavar="OUT", help="A new or an empty folder.")],
    settings: Settings = None,
    seed: Seed = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train STUDENT towards DENSE according to RECIPE. An interrupted run resumes.

    Example: llmcompress distill small distil.yaml --teacher smollm2 -o recovered
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.distillation.run import distill as run
        from llmcompress.recipe.distillation import Distillation
        from llmcompress.recipe.read import read_as

        asked = read_as(Distillation, recipe, settings or (), seeded(seed))
        how: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
        found = run(student, teacher, asked, output, progress=terminal.training, **how)
        terminal.warn(found.warnings)
        terminal.show(found.to_json(), distilled_view)


def answer(
    model: Model,
    prompts: Prompts,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A new .jsonl file of chats.")],
    limit: Annotated[int | None, typer.Option(min=1, help="The first prompts only.")] = None,
    column: Annotated[str | None, typer.Option(help="The column with the chats or texts.")] = None,
    split: Annotated[str | None, typer.Option(help="Of a data set; train by default.")] = None,
    subset: Annotated[str | None, typer.Option(help="Of a data set that has several.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=10, help="0: always the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(max=1, help="Tokens are drawn from the likeliest with this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws; each prompt has its own.")] = 0,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts side by side.")] = 8,
    keep_reference: KeepReference = False,
    rewrite: Rewrite = False,
    revision: Revision = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Let MODEL answer PROMPTS, and write the checked answers as chats to distil from. An interrupted run resumes.

    Example: llmcompress answer smollm2 prompts.jsonl -o answers.jsonl
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.data.generate_answers import AnswerSampling
        from llmcompress.data.self_data import Answering
        from llmcompress.data.self_data import answer as run

        sampling = AnswerSampling(temperature, top_p, seed, longest)
        asked = Answering(prompts, subset, None, split, column, limit, sampling, batch_size, keep_reference, rewrite)
        how: dict[str, Any] = {"revision": revision, "device": device, "trust_remote_code": trust_remote_code}
        found = run(model, asked, output, progress=terminal.answering, **how)
        terminal.show(found.to_json(), answered_view)
