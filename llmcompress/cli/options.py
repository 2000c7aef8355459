"""The decorator that makes a command, and the arguments and options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from llmcompress.cli.terminal import Terminal
from llmcompress.errors import RecipeError

Command = Callable[..., None]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a .gguf file, a Hub id (org/name or org/name@revision), or smollm2."
    ),
]
Checkpoint = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with a compressed model.")]
Out = Annotated[Path, typer.Option("--output-dir", "-o", metavar="OUT", help="Folder to write: new or empty.")]
OutOrDryRun = Annotated[
    Path | None,
    typer.Option("--output-dir", "-o", metavar="OUT", help="Folder to write: new or empty. Not needed with --dry-run."),
]
RecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name that `llmcompress recipes` lists.")
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune", help="Train every block while it is compressed: better at some two bits, and several times slower."
    ),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="See that all works: least text, fewest steps; the result cannot be pushed.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the recipe: rules[0].steps[1].rank=16. Repeatable."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Random seed, in place of the recipe's.")]
Text = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text to measure on, or files of documents as in a recipe: rows.jsonl.gz, 'data/*.csv' or "
        "a.json,b.json; by default Python's documentation."
    ),
]
Windows = Annotated[int, typer.Option(min=1, help="Number of windows of text.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Tasks = Annotated[str | None, typer.Option(help="lm-eval tasks, task files or folders of them, separated by commas.")]
Limit = Annotated[
    float | None,
    typer.Option(
        min=0, help="Most items of a task: a count, or a share below 1. For quick checks; do not report such scores."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Batch size for tasks; changes scores slightly.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu, cuda or cuda:1.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code in the model's files.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, everything else on standard error.")
]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Show every layer; -vv: tracebacks too.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors, and JSON with --json.")]

SHARED: dict[str, tuple[Any, Any]] = {  # the annotation and the default of options that a command names in @command
    "revision": (Revision, None),
    "device": (Device, "cpu"),
    "trust_remote_code": (TrustRemoteCode, False),
    "as_json": (AsJson, False),
    "verbose": (Verbose, 0),
    "quiet": (Quiet, False),
}


@dataclass(frozen=True)
class Group:
    """Options that several commands have, each with its annotation and default.

    `gather` makes of their values the one `argument` that a command receives; without it, each is one.
    """

    options: Mapping[str, tuple[Any, Any]]
    argument: str = ""
    gather: Callable[..., Any] | None = None


def _expand_home(value: Any) -> Any:
    """Return paths with the home folder in the place of `~`, which shells leave as it is in `--output-dir=~/out`."""
    if isinstance(value, list | tuple):
        return type(value)(map(_expand_home, value))
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def command(
    *shared: str | Group, output: Sequence[str] = ("as_json", "verbose", "quiet")
) -> Callable[[Command], Command]:
    """Return a decorator that turns `run(terminal, ...)` into a command.

    The command has the options of `run`, then those of `shared`, which are in SHARED or in a group, then those of
    `output`. `run` is called inside a `Terminal` that obeys the options of `output`; it receives the others by name.
    """
    groups = [group for group in shared if isinstance(group, Group)]
    added: dict[str, tuple[Any, Any]] = {}
    for each in (*shared, *output):
        added |= each.options if isinstance(each, Group) else {each: SHARED[each]}
    elsewhere = {"terminal", *added, *(group.argument for group in groups)}

    def decorate(run: Command) -> Command:
        parameters = [
            parameter
            for parameter in signature(run, eval_str=True).parameters.values()
            if parameter.name not in elsewhere and parameter.kind is not Parameter.VAR_KEYWORD
        ]
        for name, (annotation, default) in added.items():
            parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default))

        @wraps(run)
        def in_terminal(**values: Any) -> None:
            values = {name: _expand_home(value) for name, value in values.items()}
            with Terminal(**{name: values.pop(name) for name in output}) as terminal:
                for group in groups:
                    if group.gather is not None:
                        given = {name: values.pop(name) for name in group.options}
                        values[group.argument] = group.gather(**given)
                run(terminal, **values)

        vars(in_terminal)["__signature__"] = signature(run).replace(parameters=parameters)  # typer reads it
        return in_terminal

    return decorate


def check_seed(by: str, seed: int) -> None:
    """Raise RecipeError for a seed where nothing is drawn."""
    if seed and by != "random":
        raise RecipeError(f"--seed is for --by random, and --by {by} draws nothing; leave it out")


def check_output(output: Path | None, dry_run: bool) -> Path | None:
    """Return the folder to write, or None for a dry run. Raises RecipeError without an output and without a dry run."""
    if output is None and not dry_run:
        raise RecipeError("there is no OUT; name a folder with -o, or look at the plan with --dry-run")
    return None if dry_run else output
