"""The commands `compress`, `plan` and `frontier`, and the recipe that their options ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.distill import distilled_view
from llmcompress.cli.options import (
    BatchSize,
    Length,
    Limit,
    Model,
    Out,
    Quick,
    Revision,
    Seed,
    Settings,
    Tasks,
    Text,
    Tune,
    Windows,
    command,
)
from llmcompress.cli.scores import build_protocol
from llmcompress.cli.terminal import Terminal, build_table, next_line
from llmcompress.errors import RecipeError, format_bytes
from llmcompress.evaluation.protocol import Protocol
from llmcompress.reporting.formatting import duration, number, phases_text, target_text
from llmcompress.reporting.report import GateReport
from llmcompress.reporting.tables import Row, frontier_table, group_rows, merge_sentences

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmcompress.recipe.compression import Recipe
    from llmcompress.recipe.read import Change

DEFAULT: dict[str, Any] = {  # the recipe for a target that is given without one
    "version": 1,
    "name": "target",
    "calibration": {"dataset": "builtin", "samples": 66, "held_out": 2},
    "token_weights": {"by": "gradient", "rows": True},
    "asymmetric": 0.25,
}
RecipeOrTarget = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or a name that `llmcompress recipes` lists. Not needed with a target: --bpw, --size, --kl "
        "or --sparsity.",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="ENGINE",
        help="Write what this engine loads: vllm, llama.cpp, mlx or exllamav3. By default in its form of 4 bits, for "
        "exllamav3 of 3. Or our own forms that have kernels: transformers on a CPU, transformers-cuda on a GPU.",
    ),
]
EngineOfSweep = Annotated[
    str | None,
    typer.Option("--for", metavar="ENGINE", help="Choose among the forms of this engine, as in `compress`."),
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Resume an interrupted run, or start over.")]
PricePart = Annotated[
    str | None,
    typer.Option(
        metavar="K/N",
        help="For a target: measure only part K of N of the options, so that machines can share the work.",
    ),
]
Bpw = Annotated[float | None, typer.Option("--bpw", help="Target: bits per weight of the decoder's linear layers.")]
Size = Annotated[str | None, typer.Option("--size", help="Target: size of all weight files, such as 40MB.")]
Kl = Annotated[
    float | None,
    typer.Option("--kl", help="Target: most predicted KL to MODEL, in nats per token; gives the smallest file."),
]
Sparsity = Annotated[
    float | None, typer.Option("--sparsity", help="Target: share of zeros; layers are pruned more where it costs less.")
]


@command("device", "trust_remote_code")
def compress(
    terminal: Terminal,
    model: Model,
    output: Out,
    recipe: RecipeOrTarget = None,
    bpw: Bpw = None,
    size: Size = None,
    kl: Kl = None,
    sparsity: Sparsity = None,
    engine: Engine = None,
    tune: Tune = False,
    quick: Quick = False,
    resume: Resume = True,
    price_part: PricePart = None,
    settings: Settings = None,
    revision: Revision = None,
    seed: Seed = None,
    **access: Any,
) -> None:
    """Compress MODEL by RECIPE, or to a target, and write it to OUT.

    With a target (--bpw, --size, --kl or --sparsity), the steps of every layer that no rule covers are chosen for you.
    If the recipe has a `distill:` section, the compressed model is then distilled. With --for, OUT is what that engine
    loads, beside the report. OUT appears only when it is complete, with exit code 3 too.

    Example: llmcompress compress smollm2 --size 40MB -o small
    """
    from llmcompress.allocation.price_file import Part
    from llmcompress.errors import GateError
    from llmcompress.pipeline import compress as pipeline
    from llmcompress.pipeline.engines import compress_for
    from llmcompress.reporting.report import read_all

    target = target_change(bpw, size, kl, sparsity)
    built = build_recipe(recipe, settings, seed, target, tune, engine, quick)
    access["revision"] = revision
    if price_part is not None:
        if engine is not None:
            raise RecipeError("--price-part measures for a run without --for; leave one of them out")
        if not resume:
            raise RecipeError("--price-part always measures its part anew; leave --no-resume out")
        file = pipeline.price_part(model, built, output, Part.of(price_part), pricing=terminal.pricing, **access)
        terminal.show({"part": price_part, "file": str(file)}, priced_view)
        return
    reports: dict[str, Any] = {name: getattr(terminal, name) for name in ("progress", "pricing", "training", "judging")}
    try:
        run = pipeline.compress if engine is None else partial(compress_for, engine)
        result = run(model, built, output, resume=resume, **access, **reports)
    except GateError:
        if terminal.first:  # other machines may not have it
            terminal.show(read_all(output), report_view)
        raise
    terminal.warn(merge_sentences(result.report.warnings))
    more = {"distillation": result.distillation, "allocation": result.allocation}
    terminal.show(
        result.report.to_json() | {name: part for name, part in more.items() if part is not None}, report_view
    )
    terminal.say(next_line(("eval", str(output), "--against"), model, revision, access["trust_remote_code"]))


@command("revision", "trust_remote_code")
def plan(
    terminal: Terminal,
    model: Model,
    recipe: RecipeOrTarget = None,
    bpw: Bpw = None,
    size: Size = None,
    kl: Kl = None,
    sparsity: Sparsity = None,
    engine: Engine = None,
    tune: Tune = False,
    settings: Settings = None,
    **access: Any,
) -> None:
    """Show what RECIPE or a target would do to MODEL: steps of each layer, sizes, time and memory.

    Reads only the headers of MODEL; one on the Hub is downloaded whole first. The first plan on a machine times it, and
    keeps the result for later plans.

    Example: llmcompress plan smollm2 recipe.yaml
    """
    from llmcompress.pipeline.compress import plan as run
    from llmcompress.pipeline.engines import plan_for

    built = build_recipe(recipe, settings, None, target_change(bpw, size, kl, sparsity), tune, engine)
    planned = run(model, built, **access) if engine is None else plan_for(engine, model, built, **access)
    terminal.warn(merge_sentences(planned.warnings))
    terminal.show(planned.to_json(), plan_view)


@command("device", "trust_remote_code")
def frontier(
    terminal: Terminal,
    model: Model,
    output: Annotated[
        Path, typer.Option("--output-dir", "-o", metavar="OUT", help="A new folder, or that of a sweep to resume.")
    ],
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE...", help="YAML files or names, one line in the plot each. Optional."),
    ] = None,
    bpw: Annotated[
        str | None,
        typer.Option("--bpw", help="Budgets in bits per weight of the decoder's linear layers: 1.25,1.6,2."),
    ] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Budgets for all weight files: 30MB,40MB.")] = None,
    peers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON file with results of other tools, to plot beside yours.")
    ] = None,
    text: Text = None,
    windows: Windows = Protocol.windows,
    length: Length = Protocol.length,
    tasks: Tasks = None,
    limit: Limit = None,
    batch_size: BatchSize = Protocol.batch_size,
    tune: Tune = False,
    settings: Settings = None,
    revision: Revision = None,
    seed: Seed = None,
    engine: EngineOfSweep = None,
    **access: Any,
) -> None:
    """Compress MODEL to several sizes, score each, and plot quality over size.

    The options for layers are measured once for all sizes. An interrupted sweep resumes. With --for, each can be
    exported for the engine.

    Example: llmcompress frontier smollm2 --bpw 1.25,1.6,2,2.5,3 -o curve
    """
    from llmcompress.pipeline.engines import aim_at
    from llmcompress.pipeline.frontier import SweepCallbacks
    from llmcompress.pipeline.frontier import frontier as run
    from llmcompress.pipeline.frontier_inputs import budgets, read_peers
    from llmcompress.recipe.read import Change

    wanted = budgets(bpw, sizes)
    first = wanted[0].target.model_dump(exclude_none=True)
    target = Change("target", first, "--sizes" if bpw is None else "--bpw", stay=("engine",))
    built = [build_recipe(recipe, settings, seed, target, tune) for recipe in recipes or (None,)]
    built = built if engine is None else [aim_at(engine, recipe) for recipe in built]
    results = () if peers is None else read_peers(peers, "bytes" if bpw is None else "bpw")
    protocol = build_protocol(tasks, limit, text=text, windows=windows, length=length, batch_size=batch_size)
    callbacks = SweepCallbacks(terminal.stage, terminal.pricing, terminal.progress, terminal.training)
    access["revision"] = revision
    points = run(model, built, wanted, output, protocol, peers=results, callbacks=callbacks, **access)
    terminal.show(points, frontier_view)
    terminal.say(f"plot    {output / 'frontier.png'} and .svg; table {output / 'frontier.md'}")


def build_recipe(
    recipe: str | None,
    settings: list[str] | None,
    seed: int | None,
    target: Change | None,
    tune: bool,
    engine: str | None = None,
    quick: bool = False,
) -> Recipe:
    """Return the recipe of a command, changed as its options say. A target or an engine alone gets a default one.

    Raises RecipeError without both, and for whatever is wrong with the recipe or the options.
    """
    from llmcompress.pipeline.engines import engine_of
    from llmcompress.recipe.read import Change, read_recipe

    settings = settings or []
    aims = [each for each in settings if each.startswith(("target.", "target=")) and "target.engine" not in each]
    if target is not None and aims:
        raise RecipeError(f"{target.origin} and {aims[0]} of --set both say what to aim at; leave one of them out")
    without_target = target is None and not any(setting.startswith("target") for setting in settings)
    if engine is not None and recipe is None and without_target:
        recipe = engine_of(engine).recipe
    if recipe is None and without_target:
        raise RecipeError("there is no RECIPE; name one, or give a target: one of --bpw, --size, --kl and --sparsity")
    changes = [] if seed is None else [Change("seed", seed, "--seed")]
    changes += [] if target is None else [target]
    changes += [Change("reconstruct", {}, "--tune", keep=True)] if tune else []
    changes += [Change("trial", True, "--quick")] if quick else []
    return read_recipe(DEFAULT if recipe is None else recipe, settings, changes)


def target_change(bpw: float | None, size: str | None, kl: float | None, sparsity: float | None) -> Change | None:
    """Return the change of a recipe's target that these options ask for, or None. A recipe accepts one of them."""
    from llmcompress.recipe.read import Change

    options = {
        "--bpw": ("bpw", bpw),
        "--size": ("bytes", size),
        "--kl": ("kl", kl),
        "--sparsity": ("sparsity", sparsity),
    }
    given = {option: aim for option, aim in options.items() if aim[1] is not None}
    return Change("target", dict(given.values()), " and ".join(given), stay=("engine",)) if given else None


def plan_view(plan: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the planned steps of each layer, and the sizes. Layers that differ only in block number share a line."""
    yield f"plan    {plan['recipe']} on {plan['model']}"
    groups = group_rows(plan["layers"], ("shape", "steps", "bits", "description"), every)
    cells = [(*_layer_cells(name, rows), f"{rows[0]['bpw']:.3f}", rows[0]["description"]) for name, rows in groups]
    yield build_table(("layers", "", "shape", "steps", "bpw", "stored as"), cells, right=(1, 4))
    if plan["target"] is not None:
        yield f"target  {target_text(plan['target'])} · compress measures what options cost, and spends where it counts"
    yield f"sizes   {_sizes(plan)}"
    yield (
        f"needs   about {format_bytes(plan['peak_memory_bytes'])} of memory and {duration(plan['seconds'])}, where "
        f"products run at {plan['product_speed'] / 1e9:,.0f} GFLOP/s"
    )
    if (blocks := plan["reconstruction"]) is not None:
        rates = ", ".join(f"{kind} at {rate:g}" for kind, rate in blocks["rates"].items())
        steps = "a pass over the text" if blocks["steps"] is None else f"{blocks['steps']} steps"
        window = "" if blocks["window"] == 1 else f" in windows of {blocks['window']}"
        yield f"learns  every block{window}, {steps} each time: {rates}"
    if (distillation := plan["distillation"]) is not None:
        losses = " + ".join(term["of"]["loss"] for term in distillation["losses"])
        if {phase["kind"] for phase in distillation["phases"]} == {"blockwise"}:
            losses = "outputs of each block"
        texts = distillation["data"] if isinstance(distillation["data"], list) else [distillation["data"]]
        amounts = " + ".join(f"{text['samples']} x {text['length']}" for text in texts)
        trained = f"{', '.join(distillation['rates'])} by {losses} · {amounts} tokens"
        yield f"then    distillation {distillation['name']}: {trained}; that comes on top"


def report_view(report: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the steps and errors of each layer, then sizes, calibration text and cost of a compression."""
    from statistics import median  # here, since it takes longer to import than typer parses

    yield f"recipe  {report['recipe']} on {report['model']}" + (f" at {report['revision']}" * bool(report["revision"]))
    lines: list[tuple[str, ...]] = []
    for name, rows in group_rows(report["layers"], ("shape", "steps"), every):
        fitted = [row["error"] for row in rows]
        unseen = [row["error_heldout"] for row in rows if row["error_heldout"] is not None]
        held_out, worst = (f"{median(unseen):.4f}", f"{max(unseen):.4f}") if unseen else ("", f"{max(fitted):.4f}")
        bpw = f"{sum(row['bpw'] for row in rows) / len(rows):.3f}"
        lines.append((*_layer_cells(name, rows), bpw, f"{median(fitted):.4f}", held_out, worst, _storage(rows)))
    headings = ("layers", "", "shape", "steps", "bpw", "error", "held out", "worst", "stored as")
    yield build_table(headings, lines, right=(1, 4, 5, 6, 7))
    yield f"sizes   {_sizes(report)}"
    if (text := report["calibration"]) is not None:
        yield f"data    {text['source']} · {text['tokens']:,} tokens · sha256 {text['hash'][:12]}…"
    else:
        yield "data    none: errors are those of the weights, not of the layers' outputs"
    yield from (f"note    {row['name']}: {row['fallback']}" for row in report["layers"] if row["fallback"])
    if blocks := list(report["blocks"].values()):
        error = median(block["after"] for block in blocks)
        clauses = [f"blocks  {len(blocks)} reconstructed", f"error {error:.4f} in the median"]
        if left := [block["left"] for block in blocks if "left" in block]:  # older reports do not have it
            clauses.append(f"x{median(left):.3f} by learning")
            clauses += [f"nothing helped {left.count(1)}"] if 1 in left else []
        yield " · ".join(clauses)
    yield f"cost    {duration(report['seconds'])} · {format_bytes(report['peak_memory_bytes'])} of memory at the peak"
    if phases := phases_text(report.get("phases", {})):  # older reports do not have them
        yield f"phases  {phases}"
    if "allocation" in report:
        yield _target_line(report["allocation"])
    if report["gates"] is not None:
        yield f"gates   {GateReport(**report['gates']).sentence()}"
    if "distillation" in report:
        yield ""
        yield from distilled_view(report["distillation"], every)


def priced_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the part of the prices that was measured, and the next step."""
    yield f"priced  part {result['part']} in {result['file']}"
    yield "next    the same command without --price-part, once all parts are done"


def frontier_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the table of a frontier: one model at many sizes."""
    table = frontier_table(result)
    yield build_table(table.headings, table.rows, table.numbers)
    yield from table.notes


def _layer_cells(name: str, rows: Sequence[Row]) -> tuple[str, str, str, str]:
    """Return the cells that plans and reports have in common: name, number of layers, shape, steps."""
    count = f"x{len(rows)}" if len(rows) > 1 else ""
    return name, count, " x ".join(map(str, rows[0]["shape"])), ", ".join(rows[0]["steps"]) or "stays dense"


def _storage(rows: Sequence[Row]) -> str:
    """Return the form that most rows are stored in, and the number of rows stored otherwise."""
    (form, count), *others = Counter(row["stored"] for row in rows).most_common()
    return f"{form}, {len(rows) - count} otherwise" if others else form


def _target_line(allocation: Row) -> str:
    """Return the line on a target: predicted and measured KL, and the time it took."""
    between = [f"{value:.4f}" for value in allocation.get("predicted_range", ())]  # older outputs have none
    kl = f"KL predicted {allocation['predicted_kl']:.4f}{f' ({between[0]} to {between[1]})' if between else ''}, "
    kl += f"measured {allocation['measured_kl']:.4f}"
    others = [f"{value:.4f} for a {name} plan" for name, value in allocation.get("baselines", {}).items()]
    kl += f" on {allocation['probing_tokens']} tokens"
    beside = f" · {' and '.join(others)} of that size, predicted" if others else ""
    return f"target  {target_text(allocation['target'])} · {kl}{beside} · {duration(allocation['seconds'])}"


def _sizes(values: Row) -> str:
    return (
        f"{format_bytes(values['dense_bytes'])} -> {format_bytes(values['bytes'])} · "
        f"{number(values['bpw'])} bpw · model_bpw {number(values['model_bpw'])}"
    )
