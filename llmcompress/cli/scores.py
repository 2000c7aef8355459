"""The commands that measure quality: `eval`, `compare`, `drift` and `passport`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.options import BatchSize, Group, Length, Limit, Model, Revision, Tasks, Text, Windows, command
from llmcompress.cli.terminal import Terminal, build_table
from llmcompress.errors import InputError, RecipeError, format_bytes
from llmcompress.evaluation.protocol import Protocol
from llmcompress.reporting.formatting import number, with_error
from llmcompress.reporting.tables import Row, adapter_table, change_table, comparison_table, metrics

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Shots = Annotated[int | None, typer.Option(min=0, help="Examples in each prompt; by default the task's own number.")]
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help="Write the prompts of tasks as chats.")]
Generate = Annotated[
    bool,
    typer.Option(
        "--generate",
        help="Let the model write answers (GSM8K) and programs (HumanEval) of task files, and check them. "
        "Programs are run, in processes with limits of time and memory, but no sandbox.",
    ),
]
TaskSeed = Annotated[int, typer.Option(help="Random seed for few-shot examples and sampling.")]
Domains = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder of .txt files, one kind of text each, to score as well.")
]


def build_protocol(tasks: str | None, limit: float | None, **others: Any) -> Protocol:
    """Return the protocol that options of a command ask for; `tasks` has commas. Raises RecipeError for options of
    tasks without any."""
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    of_tasks = {"limit": limit} | {name: others.get(name) for name in ("num_fewshot", "chat_template", "generate")}
    unread = [name for name, value in of_tasks.items() if value is not None and value is not False]
    if unread and not names:
        option = f"--{unread[0].replace('_', '-')}"
        raise RecipeError(f"{option} is for tasks, and there are none; name some by --tasks, or leave {option} out")
    items = int(limit) if limit is not None and limit >= 1 and limit.is_integer() else limit
    return Protocol(tasks=names, limit=items, **others)


PROTOCOL = Group(
    {
        "text": (Text, None),
        "windows": (Windows, Protocol.windows),
        "length": (Length, Protocol.length),
        "tasks": (Tasks, None),
        "limit": (Limit, None),
        "num_fewshot": (Shots, None),
        "batch_size": (BatchSize, Protocol.batch_size),
        "chat_template": (ChatTemplate, False),
        "generate": (Generate, False),
        "seed": (TaskSeed, Protocol.seed),
        "domains": (Domains, None),
    },
    "protocol",
    build_protocol,
)


@command(PROTOCOL, "device", "trust_remote_code")
def evaluate(
    terminal: Terminal,
    model: Model,
    protocol: Protocol,
    device: str,
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="Also measure KL and top-1 agreement with this model.")
    ] = None,
    revision: Revision = None,
    save: Annotated[
        bool, typer.Option("--save", help="Score DENSE too, and keep both scores in MODEL for its model card.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", metavar="OUT", help="A new folder for the scores and lm-eval's own files."),
    ] = None,
    **scoring: Any,
) -> None:
    """Score MODEL, dense or compressed: perplexity, tasks, and the distance to the dense model.

    Example: llmcompress eval small --against smollm2 --tasks arc_easy --limit 100
    """
    from llmcompress.evaluation.processes import join_processes
    from llmcompress.evaluation.score import score

    scoring |= {"revision": revision, "against": against, "save": save, "output": output, "progress": terminal.scoring}
    with join_processes(device) as processes:
        scores = score(model, protocol, device=processes.device, processes=processes, **scoring)
    terminal.warn(scores.get("warnings", ()))
    terminal.show(scores, score_view)
    _refuse_failed_tasks([scores])


@command(PROTOCOL, "device", "trust_remote_code")
def compare(
    terminal: Terminal,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL MODEL...", help="Models; the first is what the others are compared to."),
    ],
    protocol: Protocol,
    device: str,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="A new .md file for the table, or .json for all numbers."),
    ] = None,
    **scoring: Any,
) -> None:
    """Score models side by side, and mark the differences to the first that are larger than noise.

    Example: llmcompress compare smollm2 small smaller --tasks llmcompress_pairs -o table.md
    """
    from llmcompress.evaluation.processes import join_processes
    from llmcompress.evaluation.score import compare as run

    scoring |= {"output": output, "progress": terminal.scoring}
    with join_processes(device) as processes:
        comparison = run(models, protocol, device=processes.device, processes=processes, **scoring)
    terminal.show(comparison, comparison_view)
    _refuse_failed_tasks(comparison["models"])


@command("revision", "device", "trust_remote_code")
def drift(
    terminal: Terminal,
    model: Model,
    against: Annotated[str, typer.Option(metavar="DENSE", help="The dense model that MODEL came from.")],
    text: Text = None,
    windows: Windows = 8,
    length: Annotated[int, typer.Option(min=4, help="Tokens in a window.")] = 512,
    **access: Any,
) -> None:
    """Show block by block how far the hidden states of MODEL are from those of the dense model.

    Example: llmcompress drift small --against smollm2
    """
    from llmcompress.evaluation.drift import drift as run

    protocol = Protocol(text=text, windows=windows, length=length)
    result = run(model, against, protocol, progress=partial(terminal.scoring, "block"), **access)
    terminal.show(result.to_json(), drift_view)


@command("device", "trust_remote_code")
def passport(
    terminal: Terminal,
    model: Model,
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Folders or Hub ids of PEFT adapters.")],
    against: Annotated[
        str, typer.Option(metavar="DENSE", help="The dense model that MODEL and the adapters came from.")
    ],
    text: Text = None,
    windows: Annotated[int, typer.Option(min=2, help="Number of windows of text.")] = 8,
    length: Annotated[int, typer.Option(min=4, help="Tokens in a window.")] = 256,
    save: Annotated[bool, typer.Option("--save", help="Keep the result in MODEL for its model card.")] = False,
    **access: Any,
) -> None:
    """Show how much of its gain each LoRA adapter trained on DENSE keeps on MODEL.

    Example: llmcompress passport small my-lora --against smollm2 --text mine.txt
    """
    from llmcompress.evaluation.adapter_transfer import passport as run
    from llmcompress.evaluation.adapter_transfer import save_passport
    from llmcompress.models.files.checkpoint import check_can_add

    if save:
        check_can_add(Path(model))
    protocol = Protocol(text=text, windows=windows, length=length)
    result = run(model, adapters, against, protocol, progress=partial(terminal.scoring, "adapter"), **access)
    terminal.show(result.to_json(), passport_view)
    if save:
        save_passport(Path(model), result)


def _refuse_failed_tasks(scores: Iterable[Row]) -> None:
    """Raise InputError if tasks of a model failed. To be called once all scores are shown."""
    for row in scores:
        if "tasks_failed" in row:
            raise InputError(row["tasks_failed"])


def score_view(scores: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the size and the scores of a model."""
    size, bpw, model_bpw = format_bytes(scores["bytes"]), number(scores["bpw"]), number(scores["model_bpw"])
    yield f"size    {size} · {bpw} bpw · model_bpw {model_bpw}"
    perplexity = with_error(scores["perplexity"], scores["perplexity_stderr"], 3)
    sure = f"calibration error {scores['calibration_error']:.4f}"
    behind = ", each window behind BOS" if scores.get("protocol", {}).get("bos") else ""
    yield f"text    perplexity {perplexity} over {scores['tokens']:,} tokens{behind} · {sure}"
    if scores["kl"] is not None:
        kl = with_error(scores["kl"], scores["kl_stderr"])
        agreement = with_error(scores["top1_agreement"], scores["top1_agreement_stderr"])
        yield f"dense   KL {kl} nats/token · top-1 agreement {agreement}"
    if scores.get("domains"):
        yield _domain_table(scores["domains"])
    if scores["tasks"]:
        cells = [
            (task, metric, with_error(value, error), f"{entry.get('samples', '')}")
            for task, entry in scores["tasks"].items()
            for metric, value, error in metrics(entry)
        ]
        yield build_table(("task", "metric", "value", "items"), cells, right=(2, 3))


def _domain_table(domains: Row) -> Table:
    """Return the scores on each kind of text, the farthest from the dense model first."""
    cells = []
    for name, scores in sorted(domains.items(), key=lambda entry: -(entry[1]["kl"] or 0)):
        pairs = [(scores[key], scores[f"{key}_stderr"]) for key in ("kl", "top1_agreement")]
        distances = ["" if value is None else with_error(value, error) for value, error in pairs]
        perplexity = with_error(scores["perplexity"], scores["perplexity_stderr"], 3)
        cells.append((name, perplexity, *distances, f"{scores['calibration_error']:.4f}"))
    headings = ("kind of text", "perplexity", "KL", "top-1 agreement", "calibration error")
    return build_table(headings, cells, right=range(1, len(headings)))


def comparison_view(comparison: Row, every: bool) -> Iterator[RenderableType]:
    """Yield models as rows and scores as columns; with `every`, also every difference."""
    table, changes = comparison_table(comparison), change_table(comparison)
    yield build_table(table.headings, table.rows, table.numbers)
    yield from table.notes
    if every:
        yield build_table(changes.headings, changes.rows, changes.numbers)


def drift_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield how far the inputs of each block are from the dense model's, then the block where they are farthest."""
    cells = [
        (
            str(row["block"]),
            str(row["original"]),
            *("" if row[key] is None else f"{row[key]:.4f}" for key in ("cka", "error")),
        )
        for row in result["blocks"]
    ]
    yield build_table(("block", f"of {result['against']}", "CKA", "relative error"), cells, right=range(4))
    comparable = [row for row in result["blocks"] if row["cka"] is not None]
    if comparable:
        least = min(comparable, key=lambda row: row["cka"])
        yield f"least   {least['cka']:.4f} at block {least['block']}; the last row is the output of the last block"


def passport_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the gain of every adapter on both models, the share that is kept, and how alike the two are with it."""
    table = adapter_table(result)
    yield build_table(table.headings, table.rows, table.numbers)
    yield "gain    in nats per token; alike: of gains over tokens; distinct pairs: dense, compressed, handed over"
