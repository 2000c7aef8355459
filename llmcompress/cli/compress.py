"""The commands that compress, and that say beforehand what would come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.options import (
    AsJson,
    Bpw,
    Device,
    Kl,
    Model,
    Quiet,
    RecipeOrTarget,
    Revision,
    Seed,
    Settings,
    Size,
    Sparsity,
    TrustRemoteCode,
    Tune,
    Verbose,
    asked_recipe,
    target_of,
)
from llmcompress.cli.terminal import Terminal
from llmcompress.cli.views import plan_view, priced_view, report_view
from llmcompress.reporting.tables import summarized


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
        from llmcompress.allocation.price_shards import Part
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
