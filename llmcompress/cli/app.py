"""The command line: the commands by what people want of them. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from llmcompress.cli.bench import bench
from llmcompress.cli.commands import Commands
from llmcompress.cli.compress import compress, plan
from llmcompress.cli.distill import answer, distill
from llmcompress.cli.doctor import doctor
from llmcompress.cli.drift import drift
from llmcompress.cli.drop import drop
from llmcompress.cli.experts import experts
from llmcompress.cli.frontier import frontier
from llmcompress.cli.inspect import inspect
from llmcompress.cli.narrow import narrow
from llmcompress.cli.options import Version
from llmcompress.cli.passport import passport
from llmcompress.cli.publish import export, push, verify
from llmcompress.cli.recipe import recipe
from llmcompress.cli.recipes import recipes
from llmcompress.cli.report import report
from llmcompress.cli.scores import compare, evaluate
from llmcompress.cli.shrink import shrink
from llmcompress.cli.streams import guarded

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

app = typer.Typer(
    cls=Commands,
    help="Makes a Hugging Face language model smaller and tells you what that cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},
)


@app.callback()
def _program(version: Version = False) -> None: ...


for panel, commands in PANELS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            app.command(name, rich_help_panel=panel)(command)


def main() -> None:
    """The program `llmcompress`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(guarded(app))
