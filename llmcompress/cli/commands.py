"""The group of all commands: mistakes in the arguments are a sentence with a hint, or a JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

CLOSE = 0.75  # of two options, 1 if they are the same


class Commands(TyperGroup):
    """The commands; with `--json`, mistakes in the arguments are a JSON object too."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that is named, or say more of an option that it lacks."""
        try:
            return super().invoke(ctx)
        except typer.TyperException as error:
            if hasattr(error, "possibilities"):  # an option that the command lacks
                error.message, error.possibilities = _no_such_option(error), None
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


def _no_such_option(error: Any) -> str:
    """Return what is wrong with an option that a command lacks, and what may have been meant."""
    name, command = error.option_name, error.ctx.command
    known = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
    if near := get_close_matches(name, known, n=1, cutoff=CLOSE):
        return f"No such option: {name}; did you mean {near[0]}?"
    key = name.lstrip("-").replace("-", "_")
    if "--set" not in known or not _is_key_of_steps(key):
        return f"No such option: {name}; `{error.ctx.command_path} --help` lists all"
    instead = "; --bpw gives a target without a recipe" if key == "bits" and "--bpw" in known else ""
    return f"No such option: {name}; {key} belongs to a recipe: change it by --set rules[0].steps[0].{key}=...{instead}"


def _is_key_of_steps(key: str) -> bool:
    """True if the steps of a method have a key of this name."""
    from llmcompress.methods.layer import methods

    return any(key in one.config.model_fields for one in methods().values())
