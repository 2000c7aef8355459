"""The command line: parse, call, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.bench import bench
from llmcompress.cli.commands import Commands
from llmcompress.cli.doctor import doctor
from llmcompress.cli.drift import drift
from llmcompress.cli.drop import drop
from llmcompress.cli.experts import experts as experts_commands
from llmcompress.cli.frontier import frontier
from llmcompress.cli.narrow import narrow
from llmcompress.cli.options import (
    AsJson,
    Bpw,
    Device,
    KeepReference,
    Kl,
    Model,
    Prompts,
    Quiet,
    RecipeFile,
    RecipeOrTarget,
    Revision,
    Rewrite,
    Seed,
    Settings,
    Size,
    Sparsity,
    TrustRemoteCode,
    Tune,
    Verbose,
    Version,
    asked_recipe,
    seeded,
    target_of,
)
from llmcompress.cli.passport import passport
from llmcompress.cli.publish import export, push, verify
from llmcompress.cli.recipe import recipe as recipe_commands
from llmcompress.cli.recipes import recipes
from llmcompress.cli.report import report
from llmcompress.cli.scores import compare, evaluate
from llmcompress.cli.shrink import shrink
from llmcompress.cli.streams import guarded
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import (
    answered_view,
    distilled_view,
    plan_view,
    priced_view,
    report_view,
)
from llmcompress.models.files import file_names
from llmcompress.reporting.tables import summarized

app = typer.Typer(
    cls=Commands,
    help="Makes a Hugging Face language model smaller and tells you what that cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},
)


@app.callback()
def _program(version: Version = False) -> None: ...


@app.command()
def compress(
    model: Model,
    output: Annotated[Path, typer.Option("--output-dir", "-o", metavar="OUT", help="A new or an empty folder.")],
    recipe: RecipeOrTarget = None,
    bpw: Bpw = None,
    size: Size = None,
    kl: Kl = None,
    sparsity: Sparsity = None,
    tune: Tune = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Resume an interrupted run, or start over.")
    ] = True,
    price_part: Annotated[
        str | None, typer.Option(metavar="K/N", help="Only measure part K of N of a target's prices, beside OUT.")
    ] = None,
    settings: Settings = None,
    revision: Revision = None,
    seed: Seed = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Compress MODEL according to RECIPE and write it to OUT (created only on success). A `distill:` section also
    distills it. With --bpw, --size, --kl or --sparsity, steps are chosen for every layer that no rule covers.

    Example: llmcompress compress smollm2 --size 40MB -o small
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.allocation.parts import Part
        from llmcompress.errors import GateError
        from llmcompress.pipeline import compress as pipeline
        from llmcompress.reporting.report import gathered

        asked = asked_recipe(recipe, settings, seed, target_of(bpw, size, kl, sparsity), tune)
        how: dict[str, Any] = {"revision": revision, "device": device, "trust_remote_code": trust_remote_code}
        if price_part is not None:
            file = pipeline.price_part(model, asked, output, Part.of(price_part), pricing=terminal.pricing, **how)
            terminal.show({"part": price_part, "file": str(file)}, priced_view)
            return
        shown: dict[str, Any] = {name: getattr(terminal, name) for name in ("progress", "pricing", "training")}
        try:
            result = pipeline.compress(model, asked, output, judging=terminal.judging, resume=resume, **how, **shown)
        except GateError:
            terminal.show(gathered(output), report_view)
            raise
        terminal.warn(summarized(result.report.warnings))
        more = {"distillation": result.distillation, "allocation": result.allocation}
        found = result.report.to_json() | {name: part for name, part in more.items() if part is not None}
        terminal.show(found, report_view)
        if not as_json and not terminal.quiet:
            typer.echo(f"next    llmcompress eval {output} --against {model}")


@app.command()
def plan(
    model: Model,
    recipe: RecipeOrTarget = None,
    bpw: Bpw = None,
    size: Size = None,
    kl: Kl = None,
    sparsity: Sparsity = None,
    tune: Tune = False,
    settings: Settings = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show what RECIPE, or a target, would do to MODEL: steps of each layer, sizes, time and memory. Reads headers, and
    writes nothing but the speeds of this machine, which it keeps for the next plan.

    Example: llmcompress plan smollm2 recipe.yaml
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.pipeline.compress import plan as run

        asked = asked_recipe(recipe, settings, None, target_of(bpw, size, kl, sparsity), tune)
        found = run(model, asked, revision, trust_remote_code)
        terminal.warn(summarized(found.warnings))
        terminal.show(found.to_json(), plan_view)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What compress wrote.")],
    as_json: AsJson = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show what is inside a compressed checkpoint: expressions, bits and errors by layer, and its recipe.

    Example: llmcompress inspect small -v
    """
    with Terminal(as_json, verbose, quiet) as terminal:
        from llmcompress.recipe.read import dump, read_recipe
        from llmcompress.reporting import report

        values, recipe = report.gathered(folder), read_recipe(folder / file_names.RECIPE)
        terminal.warn(summarized(values["warnings"]))
        terminal.show(values | ({"recipe": recipe.model_dump(mode="json")} if as_json else {}), report_view)
        if not as_json and not quiet:
            typer.echo("\n" + dump(recipe), nl=False)


app.command("eval")(evaluate)

app.command()(drift)
app.command()(passport)


app.command()(compare)

app.command()(bench)

app.command()(frontier)

app.command()(verify)

app.command()(export)

app.command()(report)


@app.command()
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


app.command()(drop)

app.command()(narrow)

app.command()(shrink)

app.add_typer(experts_commands, name="experts")


@app.command()
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


app.command()(push)

app.command()(recipes)

app.add_typer(recipe_commands, name="recipe")

app.command()(doctor)


def main() -> None:
    """The program `llmcompress`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(guarded(app))
