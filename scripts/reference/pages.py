"""The pages of docs/reference/ that are generated from the code. `python -m scripts.reference.pages` writes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from scripts.reference.markdown import line, page, prose, table
from scripts.reference.papers import docstring_of, paper_index, recipes_by_method, rows_of_results
from scripts.reference.schemas import keys, nested, section

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"
OF_EVERY_STEP = frozenset({"method"})
OF_EVERY_LOSS = frozenset({"loss"})
VALUES = {"int": "INTEGER", "float": "NUMBER", "Path": "PATH"}  # placeholders of options without one of their own
CODES = [  # that are no error's of our own
    ("0", "", "The command did what it was asked to."),
    ("1", "", "`doctor` found an error, the reader of a pipe left early, or something failed that nobody foresaw."),
    ("130", "", "Interrupted from the keyboard (Ctrl-C). Finished work is kept."),
    ("143", "", "Stopped by SIGTERM. Finished work is kept."),
]


def pages() -> dict[str, str]:
    """Return the text of every generated page by its file name."""
    return {
        "recipe.md": recipe_page(),
        "cli.md": cli_page(),
        "python.md": python_page(),
        "exit-codes.md": exit_codes_page(),
        "methods.md": methods_page(),
        "losses.md": losses_page(),
        "paper-index.md": paper_index(),
    }


def stale() -> list[str]:
    """Return the names of the pages that are not what the code says now."""
    return [name for name, text in pages().items() if not _is(FOLDER / name, text)]


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def recipe_page() -> str:
    """Return the page on the keys of recipes, read from the schemas that check them."""
    from llmcompress.recipe.compression import Recipe
    from llmcompress.recipe.distillation import Distillation
    from llmcompress.recipe.reconstruction import Reconstruction

    parts = [section(Recipe, "recipe")]
    shown: set[type[BaseModel]] = {Recipe}
    roots: list[tuple[str, type[BaseModel]]] = [
        ("", Recipe),
        ("reconstruct.", Reconstruction),
        ("distill.", Distillation),
    ]
    for prefix, root in roots:
        for key, model in [(prefix.rstrip("."), root), *nested(root, prefix)]:
            if key and model not in shown and not _is_registered(model):
                shown.add(model)
                parts.append(section(model, key))
    introduction = (
        "Every key that a recipe may have. A key that is not listed here is an error that names its line. "
        "A recipe of `llmcompress distill` is the section [`distill`](#distill) as a file of its own. "
        "Steps are listed under [methods](methods.md), losses under [losses](losses.md). "
        "`llmcompress recipe schema` prints the same as a JSON schema for editors."
    )
    return page("Recipe", introduction, parts)


def _is_registered(model: type[BaseModel]) -> bool:
    """True for a step or a loss, which have pages of their own."""
    from llmcompress.losses.loss import LossConfig
    from llmcompress.methods.layer import StepConfig

    return issubclass(model, StepConfig | LossConfig)


def cli_page() -> str:
    """Return the page on the commands, read from the command line itself."""
    from llmcompress.cli.app import app

    group: Any = typer.main.get_command(app)
    introduction = (
        "Every command with its arguments and options. `llmcompress COMMAND --help` prints the same. "
        "How a command ends is listed under [exit codes](exit-codes.md)."
    )
    return page(
        "Command line", introduction, [text for name in group.commands for text in _command(name, group.commands[name])]
    )


def _command(name: str, command: Any) -> list[str]:
    inner = getattr(command, "commands", None)
    if inner:
        return [part for child in inner for part in _command(f"{name} {child}", inner[child])]
    help_text, _, example = inspect.cleandoc(command.help or "").partition("\n\nExample: ")
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    usage = " ".join(["llmcompress", name, *(_metavar(one) for one in arguments), "[OPTIONS]"])
    rows = [[_names(one), line(getattr(one, "help", None) or ""), _shown_default(one)] for one in command.params]
    parts = [f"## `{name}`", f"```text\n{usage}\n```", prose(help_text)]
    parts += [f"```sh\n{example.strip()}\n```"] if example else []
    return [*parts, table(["argument or option", "meaning", "default"], rows)] if rows else parts


def _metavar(argument: Any) -> str:
    name = argument.metavar or argument.human_readable_name
    return name if argument.required else f"[{name.strip('[]')}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_metavar(parameter)}`"
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag or parameter.count:
        return names
    kind = getattr(parameter.type_descriptor.annotation, "__name__", "")
    return f"{names} {parameter.metavar or VALUES.get(kind, 'TEXT')}"


def _shown_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    plain = isinstance(parameter.default, int | float | str) and not isinstance(parameter.default, bool)
    return f"`{parameter.default}`" if plain and not getattr(parameter, "count", False) else ""


def python_page() -> str:
    """Return the page on the public names of the package; mkdocstrings fills it from their docstrings."""
    import llmcompress as lc

    introduction = (
        "`import llmcompress as lc` offers the names below. Importing it is light: what a name needs is loaded when it "
        "is first used. It also teaches transformers to load compressed checkpoints. The fields of the classes that "
        "make up a recipe are its keys; they are listed under [recipe](recipe.md)."
    )
    names = {name: getattr(lc, name) for name in lc.__all__}
    homes = {name: f"{name}.{value.function_home}.{name}" for name, value in names.items() if inspect.ismodule(value)}
    functions = [_entry(homes.get(name, name)) for name, value in names.items() if not inspect.isclass(value)]
    classes = [_entry(name, _is_schema(value)) for name, value in names.items() if inspect.isclass(value)]
    return page("Python API", introduction, ["## Functions", *functions, "## Classes", *classes])


def _is_schema(value: type) -> bool:
    return issubclass(value, BaseModel)


def _entry(name: str, is_schema: bool = False) -> str:
    return f"::: llmcompress.{name}" + ("\n    options: {members: false}" if is_schema else "")


def exit_codes_page() -> str:
    """Return the page on exit codes, read from the types of errors."""
    from llmcompress import errors

    types = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.LLMCompressError)
    ]
    own = [(str(kind.exit_code), f"`{kind.__name__}`", line(inspect.getdoc(kind) or "")) for kind in types]
    rows = sorted([*CODES, *own], key=lambda row: (int(row[0]), row[1]))
    introduction = (
        "How a command ends, and which exception the same error is in Python. Every one derives from "
        "`lc.LLMCompressError` and is one sentence: what is wrong, where, and what to do. With `--json` it is also "
        'printed as `{"error": {"code": ..., "message": ...}}`.'
    )
    return page("Exit codes", introduction, [table(["code", "exception", "meaning"], rows)])


def methods_page() -> str:
    """Return the page on the methods, read from the registry and each docstring: of the file, or of one in a family."""
    import llmcompress.methods  # noqa: F401 (registers them)
    from llmcompress.methods.layer import methods

    recipes, results = recipes_by_method(), rows_of_results()
    parts = []
    for name, method in sorted(methods().items()):
        reads = ", ".join(sorted(method.needs)) or "nothing"
        without = "; works without calibration text too" if method.data_free and method.needs else ""
        parts += [f"## {name}", prose(docstring_of(method.run))]
        parts += [
            f"Statistics it reads: {reads}{without}.",
            keys(method.config, OF_EVERY_STEP) or "It has no arguments.",
        ]
        if name in recipes:
            parts += [_recipes(recipes[name], results)]
    introduction = (
        "A recipe's `steps` are a list of these. Each part is the docstring of the method: what it minimises, "
        "what it stores, and where it differs from the paper. E is the error W - W_approx, H the second moment of the "
        "layer's inputs."
    )
    return page("Methods", prose(introduction), parts)


def _recipes(names: list[str], results: dict[str, str]) -> str:
    shown = [f"`{name}`" + (f" ({results[name]})" if name in results else "") for name in names[:6]]
    more = f", and {len(names) - 6} more" if len(names) > 6 else ""
    about = "Recipes that use it, with bits per weight and perplexity in [the results](../results/methods.md)"
    return f"{about}: {', '.join(shown)}{more}."


def losses_page() -> str:
    """Return the page on the losses, read from their two registries."""
    import llmcompress.losses  # noqa: F401 (registers them)
    from llmcompress.losses.loss import feature_losses, losses

    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("Losses on predictions", losses()),
        ("Losses on hidden states", feature_losses()),
    ]
    parts = []
    for title, found in groups:
        parts.append(f"## {title}")
        for name, loss in sorted(found.items()):
            parts += [f"### {name}", prose(docstring_of(loss.run))]
            parts += [keys(loss.config, OF_EVERY_LOSS) or "It has no arguments."]
    introduction = (
        "A distillation's `losses` are a list of these, each with a weight. Each part is the docstring of the "
        "loss. p is the teacher's prediction, q the student's. All are tested against their formulas, and were "
        "measured on a real model ([results](../results/distillation-arms.md))."
    )
    return page("Losses", introduction, parts)


def main() -> None:
    """Write every page that changed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        if not _is(FOLDER / name, text):
            (FOLDER / name).write_text(text, encoding="utf-8")
            print(f"wrote docs/reference/{name}")


if __name__ == "__main__":
    main()
