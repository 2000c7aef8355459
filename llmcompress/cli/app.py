"""The command line: every command by what people want of it. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmcompress import __version__
from llmcompress.cli.compress import compress, frontier, plan
from llmcompress.cli.distill import answer, distill
from llmcompress.cli.experts import experts
from llmcompress.cli.inspect import inspect, recipe, recipes, report
from llmcompress.cli.machine import bench, doctor
from llmcompress.cli.process import end_process, run_program
from llmcompress.cli.publish import export, push, verify
from llmcompress.cli.scores import compare, drift, evaluate, passport
from llmcompress.cli.surgery import drop, narrow, shrink

PANELS: dict[str, dict[str, Callable[..., Any] | typer.Typer]] = {
    "Compress": {"compress": compress, "plan": plan, "recipes": recipes, "recipe": recipe, "frontier": frontier},
    "Look": {
        "eval": evaluate,
        "compare": compare,
        "inspect": inspect,
        "report": report,
        "bench": bench,
        "drift": drift,
        "passport": passport,
        "verify": verify,
    },
    "Recover": {"distill": distill, "answer": answer},
    "Change the shape": {"drop": drop, "narrow": narrow, "shrink": shrink, "experts": experts},
    "Publish": {"export": export, "push": push},
    "Set up": {"doctor": doctor},
}
CLOSE = 0.75  # similarity of two option names that are taken for each other; 1 if they are equal


class Commands(TyperGroup):
    """The group of all commands. Mistakes in the arguments have a hint, and with `--json` are a JSON object."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of a command line; `bench` goes on with `--json=FILE` as with `--json FILE`."""
        if args[:1] == ["bench"]:
            args = [part for word in args for part in (word.split("=", 1) if word.startswith("--json=") else [word])]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; explain an option that it does not have."""
        try:
            return super().invoke(ctx)
        except typer.TyperException as error:
            if hasattr(error, "possibilities"):  # no such option
                error.message, error.possibilities = _explain_option(error), None
            raise

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit, as typer does."""
        words = sys.argv[1:] if args is None else list(args)
        as_json = standalone_mode and "--json" in words
        try:
            code = super().main(
                args, prog_name, complete_var, standalone_mode and not as_json, windows_expand_args, **extra
            )
        except typer.TyperException as error:
            if not as_json:
                raise
            code, message = error.exit_code, error.format_message()
            typer.echo(json.dumps({"error": {"code": code, "message": message}}, indent=2))
            typer.echo(f"[{code}] {message}", err=True)
        if not as_json:
            return code
        sys.exit(code)


def _explain_option(error: Any) -> str:
    """Return the sentence on an option that a command does not have, with the option that may have been meant."""
    name, command = error.option_name, error.ctx.command
    known = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    if near := get_close_matches(name, known, n=1, cutoff=CLOSE):
        return f"No such option: {name}; did you mean {near[0]}?"
    key = name.lstrip("-").replace("-", "_")
    if "--set" not in known or not _is_key_of_steps(key):
        return f"No such option: {name}; `{error.ctx.command_path} --help` lists all options"
    instead = "; --bpw sets a target without a recipe" if key == "bits" and "--bpw" in known else ""
    setting = f"--set 'rules[0].steps[0].{key}=...'"  # quoted: zsh takes [ for a pattern of files
    return f"No such option: {name}; {key} belongs to a recipe: change it by {setting}{instead}"


def _is_key_of_steps(key: str) -> bool:
    """True if the steps of some method have this key."""
    from llmcompress.methods.layer import methods

    return any(key in method.config.model_fields for method in methods().values())


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"llmcompress {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    help="Makes a Hugging Face language model smaller and tells you what that cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},
)


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


for panel, commands in PANELS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(command)


def main() -> None:
    """Run the program `llmcompress`."""
    for library in ("TRANSFORMERS", "HF_HUB", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    end_process(run_program(app))
