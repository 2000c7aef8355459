"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress import __version__
from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluation.protocol import Protocol

if TYPE_CHECKING:
    from llmcompress.recipe.compression import Recipe
    from llmcompress.recipe.overrides import Change

DEFAULT: dict[str, Any] = {  # the recipe of a target without one
    "version": 1,
    "name": "target",
    "calibration": {"dataset": "builtin", "samples": 66, "held_out": 2},
    "token_weights": {"by": "gradient", "rows": True},
    "asymmetric": 0.25,
}

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a Hub id (org/name, org/name@revision) or smollm2.")
]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name that `recipes` lists.")]
RecipeOrTarget = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="A YAML file or a name of `recipes`; optional with a target.")
]
Bpw = Annotated[float | None, typer.Option("--bpw", help="Target: bits per weight of the decoder's linears.")]
Size = Annotated[str | None, typer.Option("--size", help="Target: of all weight files, as in 40MB.")]
Kl = Annotated[float | None, typer.Option("--kl", help="Target: predicted KL, the smallest file that keeps to it.")]
Sparsity = Annotated[
    float | None, typer.Option("--sparsity", help="Target: share of zeros, pruned more where it costs less.")
]
Tune = Annotated[
    bool, typer.Option("--tune", help="Blocks learn while they are compressed: better, and several times slower.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that a model needs and brings along.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override the recipe, as in rules[0].steps[1].rank=16; repeatable."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Override the recipe's seed.")]
Text = Annotated[Path | None, typer.Option(help="UTF-8 text for perplexity; by default documentation of Python.")]
Domains = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Of .txt files, one kind of text each, to read besides.")
]
Windows = Annotated[int, typer.Option(min=1, help="Windows of text.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Tasks = Annotated[str | None, typer.Option(help="lm-eval tasks or task files, separated by commas.")]
Limit = Annotated[float | None, typer.Option(min=0, help="Items per task, or a share; not a result to quote.")]
Shots = Annotated[int | None, typer.Option(min=0, help="Examples in a task's prompt; by default the task's own.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Of tasks; moves their scores a little.")]
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help="Write the prompts of tasks as chats.")]
TaskSeed = Annotated[int, typer.Option(help="Of few-shot examples and samples.")]
Prompts = Annotated[
    str, typer.Argument(metavar="PROMPTS", help="A .jsonl, .parquet or .txt file, or a Hub data set: chats or texts.")
]
KeepReference = Annotated[
    bool, typer.Option("--keep-reference", help="Where an answer fails its checks, keep that of the data.")
]
Rewrite = Annotated[
    bool, typer.Option("--rewrite", help="Show the model the data's own answer too, and let it write that anew.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, all else on stderr.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Every layer; -vv: tracebacks too.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and JSON).")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"llmcompress {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
]


def asked_recipe(
    recipe: str | None, settings: list[str] | None, seed: int | None, target: Change | None, tune: bool
) -> Recipe:
    """Return the recipe of a command, changed as its options say; with a target, a default one stands in for None.

    Raises RecipeError without both, and for whatever is wrong with the recipe or the options.
    """
    from llmcompress.recipe.overrides import Change
    from llmcompress.recipe.read import read_recipe

    given = settings or []
    if recipe is None and target is None and not any(setting.startswith("target") for setting in given):
        raise RecipeError("there is no RECIPE; name one, or give a target: one of --bpw, --size, --kl and --sparsity")
    changes = [*seeded(seed), *([] if target is None else [target])]
    if tune:
        changes.append(Change("reconstruct", {}, "--tune", keep=True))
    return read_recipe(DEFAULT if recipe is None else recipe, given, changes)


def seeded(seed: int | None) -> list[Change]:
    """Return the change of --seed, if it is given."""
    from llmcompress.recipe.overrides import Change

    return [] if seed is None else [Change("seed", seed, "--seed")]


def target_of(bpw: float | None, size: str | None, kl: float | None, sparsity: float | None) -> Change | None:
    """Return the target of --bpw, --size, --kl and --sparsity, of which a recipe accepts one; None if none is given."""
    from llmcompress.recipe.overrides import Change

    aims = {"bpw": bpw, "size": size, "kl": kl, "sparsity": sparsity}
    options = {f"--{name}": ("bytes" if name == "size" else name, value) for name, value in aims.items()}
    given = {option: pair for option, pair in options.items() if pair[1] is not None}
    return Change("target", dict(given.values()), " and ".join(given), stay=("engine",)) if given else None


def protocol_of(
    text: Path | None, windows: int, length: int, tasks: str | None, limit: float | None, *others: Any
) -> Protocol:
    """The options of `eval` and `compare`, in the order of its fields."""
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    items = int(limit) if limit is not None and limit >= 1 and limit.is_integer() else limit
    return Protocol(text, windows, length, names, items, *others)


def refuse_failed(scores: Iterable[dict[str, Any]]) -> None:
    """Raise InputError, after all scores were shown, where tasks did not come to an end."""
    for one in scores:
        if "tasks_failed" in one:
            raise InputError(one["tasks_failed"])


def planned_output(output: Path | None, dry_run: bool) -> Path | None:
    """Return the folder to write, None for a dry run. Raises RecipeError for neither an output nor a dry run."""
    if output is None and not dry_run:
        raise RecipeError("there is no OUT; name a folder with -o, or look at the plan with --dry-run")
    return None if dry_run else output
