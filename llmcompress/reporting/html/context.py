"""The values that the template of a page shows, section by section, from the files of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError, format_bytes
from llmcompress.models.files import file_names
from llmcompress.models.files.reading import MENDING
from llmcompress.reporting.formatting import duration, phases_text, target_text, without_folders
from llmcompress.reporting.html.charts import Curve, curve
from llmcompress.reporting.html.layers import layer_context
from llmcompress.reporting.plots import running_count
from llmcompress.reporting.report import GateReport, Report
from llmcompress.reporting.tables import (
    Table,
    gain_table,
    loss_sum,
    score_rows,
    size_rows,
    star_numbers,
    steps_and_tokens,
)

Facts = dict[str, Any]
Generations = Mapping[str, Mapping[str, str]]  # prompt -> model -> its continuation
HUB_MODEL = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LONGEST_TEXT = 100_000  # characters of a recipe, and of all generations, that a page shows
NO_SCORES = "Nobody has scored this checkpoint. `llmcompress eval FOLDER --against DENSE --save` does."
NO_LAYERS = "There is no report of layers: this is a dense student, which keeps its dtype."
NO_GENERATIONS = "No sentences of it are recorded."


@dataclass(frozen=True)
class CheckpointFiles:
    """The content of a checkpoint's files; None for one that is missing."""

    folder: Path
    report: Report | None
    scores: Facts | None
    allocation: Facts | None
    distillation: Facts | None
    recipe: str | None
    distillation_recipe: str | None
    generations: Generations | None


def page_context(files: CheckpointFiles) -> Facts:
    """Return the variables of the template. Raises InputError for a file that llmcompress would not write so."""
    folder, report = files.folder, files.report
    facts: Facts = dict.fromkeys(("sizes", "gates", "layers", "origin"))
    with _name_damage(folder / file_names.REPORT):
        facts["head"] = _head(files)
        if report is not None:
            facts |= {"sizes": _sizes(report), "layers": layer_context(report, files.recipe), "origin": _origin(report)}
            facts["gates"] = None if report.gates is None else _gates(report.gates)
    with _name_damage(folder / file_names.SCORES):
        facts["quality"] = None if files.scores is None else _quality(files.scores)
    with _name_damage(folder / file_names.ALLOCATION):
        facts["target"] = None if files.allocation is None else _target(files.allocation)
    with _name_damage(folder / file_names.DISTILLATION):
        facts["distillation"] = None if files.distillation is None else _distillation(files.distillation)
    with _name_damage(folder / file_names.GENERATIONS):
        facts["generations"] = None if files.generations is None else _generations(files.generations)
    recipes = (("Recipe", files.recipe), ("Recipe of the distillation", files.distillation_recipe))
    facts["recipes"] = [(title, _shorten(text)) for title, text in recipes if text is not None]
    facts["tiles"] = _tiles(files, facts)
    sentences = {"quality": NO_SCORES, "layers": NO_LAYERS, "generations": NO_GENERATIONS}
    missing = tuple(sentence for section, sentence in sentences.items() if facts[section] is None)
    return facts | {"no_scores": NO_SCORES, "no_layers": NO_LAYERS, "missing": missing}


@contextmanager
def _name_damage(path: Path) -> Iterator[None]:
    """Turn errors of missing or wrong entries into an InputError about `path`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not as llmcompress writes it ({type(error).__name__}: {error}); {MENDING}"
        ) from error


def _head(files: CheckpointFiles) -> Facts:
    """Return the title and the line below it."""
    report, done = files.report, files.distillation
    if report is None:
        return {"title": files.folder.resolve().name, "lead": "a dense model, distilled by llmcompress"}
    verbs = "compressed and distilled" if done is not None else "compressed"
    lead = f"{verbs} by llmcompress with the recipe {report.recipe}"
    return {"title": report.base_model or without_folders(report.model), "lead": lead}


def _tiles(files: CheckpointFiles, facts: Facts) -> list[tuple[str, str, str]]:
    """Return (label, value, note) of the most important numbers."""
    report, tiles = files.report, []
    if report is not None:
        share = report.dense_bytes / report.bytes
        tiles += [
            (
                "weights",
                format_bytes(report.bytes),
                f"of {format_bytes(report.dense_bytes)}, {share:.1f} times smaller",
            ),
            ("bits per weight", f"{report.bpw:.2f}", f"in compressed linears; {report.model_bpw:.2f} over all files"),
        ]
    if (quality := facts["quality"]) is not None:
        tiles += quality["tiles"]
    elif (distillation := facts["distillation"]) is not None:
        tiles += distillation["tiles"]
    return tiles


def _sizes(report: Report) -> Facts:
    """Return bytes and bits of dense and compressed weights, and the bytes of each kind of matrix."""
    table = Table(("", "dense", "this model"), size_rows(report), (1, 2))
    return {"table": table, "parts": _parts(report), "parameters": f"{report.parameters:,}"}


def _parts(report: Report) -> list[tuple[str, int, str, str]]:
    """Return (name, layers, size, percent of all bytes) of every kind of matrix, and of the rest."""
    kinds: dict[str, list[float]] = {}
    for row in report.layers:
        kinds.setdefault(star_numbers(row.name), []).append(row.bpw * prod(row.shape) / 8)
    sizes = [(name, len(held), sum(held)) for name, held in kinds.items()]
    rest = report.bytes - sum(size for *_, size in sizes)
    if rest > 0:
        sizes.append(("everything else: dense matrices, norms, biases, headers", 0, rest))
    return [(name, count, format_bytes(size), f"{size / report.bytes:.1%}") for name, count, size in sizes]


def _quality(scores: Facts) -> Facts:
    """Return the scores that `eval --save` wrote, beside those of the dense model."""
    dense, small = scores["dense"], scores["compressed"]
    tiles = [
        (
            "perplexity",
            f"×{small['perplexity'] / dense['perplexity']:.2f}",
            f"{small['perplexity']:.2f}, dense {dense['perplexity']:.2f}",
        ),
        ("KL to dense", f"{small['kl']:.3f}", "nats per token"),
        ("same top token", f"{small['top1_agreement']:.0%}", "as the dense model"),
    ]
    table = Table(("score", "dense", "this model", "change"), score_rows(scores), (1, 2, 3))
    return {"table": table, "tiles": tiles, "protocol": _protocol(scores), "tasks": bool(small["tasks"])}


def _gates(gates: GateReport) -> list[tuple[str, str]]:
    """Return the quality at the end of the run beside the recipe's limits."""
    rows = [("verdict", gates.sentence())]
    if gates.predicted_bytes is not None:
        rows.append(("size predicted to hold", f"{gates.predicted_bytes:,} bytes"))
    return rows


def _protocol(scores: Facts) -> str:
    """Return a sentence on the text and the settings of the scores."""
    tokens = scores["compressed"]["tokens"]
    said = f"Perplexity, KL and agreement on {tokens:,} tokens of {without_folders(scores['text'])}"
    said += ", each window behind BOS" if scores.get("bos") else ""
    if scores["compressed"]["tasks"]:
        limit = scores.get("limit")
        some = f"{100 * limit:g}% of the items" if limit is not None and limit < 1 else f"a limit of {limit} items"
        said += f"; tasks with {'all items' if limit is None else some}, seed {scores.get('seed', 0)}"
    return f"{said}. ± is one standard error."


def _target(allocation: Facts) -> list[tuple[str, str]]:
    """Return the target, and predicted beside measured numbers."""
    baselines = allocation.get("baselines", {})  # older folders have none
    return [
        ("target", target_text(allocation["target"])),
        ("size", f"predicted {allocation['predicted_bytes']:,}, got {allocation['measured_bytes']:,} bytes"),
        ("KL", f"predicted {allocation['predicted_kl']:.4f}, measured {allocation['measured_kl']:.4f} nats per token"),
        *((f"KL of a {name} plan of that size", f"predicted {kl:.4f}") for name, kl in baselines.items()),
        ("measured on", f"{allocation['probing_tokens']:,} tokens"),
        ("time to choose", duration(allocation["seconds"])),
    ]


def _distillation(done: Facts) -> Facts:
    """Return the gains of a distillation on held-out text, its cost, and its curves."""
    history = done["history"]
    before, after = history[0], history[-1]
    teacher = after["teacher_perplexity"]
    trained = ", ".join(f"{count:,} {kind}" for kind, count in done["trained"].items() if count)
    sources = [text["source"] for text in done["data"].get("domains", {"": done["data"]}).values()]
    cost = [
        ("teacher", done["teacher_id"] or without_folders(done["teacher"])),
        ("text", ", ".join(map(without_folders, sources))),
        ("trained", trained),
        ("training", f"{steps_and_tokens(done)} in {duration(done['seconds'])}"),
        ("losses", loss_sum(done)),
    ]
    if done["bytes_before"] != done["bytes_after"]:
        cost.append(("compressed weights", f"{done['bytes_before']:,} bytes before, {done['bytes_after']:,} after"))
    tiles = [
        (
            "held-out perplexity",
            f"{after['perplexity']:.2f}",
            f"{before['perplexity']:.2f} before, teacher {teacher:.2f}",
        ),
        ("held-out KL", f"{after['kl']:.3f}", f"{before['kl']:.3f} before, nats per token"),
    ]
    return {"table": gain_table(done), "cost": cost, "tiles": tiles, "curves": _curves(history, teacher)}


def _curves(history: list[Facts], teacher: float) -> list[Curve]:
    tokens = [float(count) for count in running_count(row["tokens"] for row in history)]

    def points(value: Callable[[Facts], float]) -> list[tuple[float, float]]:
        return [(x, float(value(row))) for x, row in zip(tokens, history) if value(row) is not None]

    drawn = (
        curve("KL to the teacher on held-out text, nats per token", points(lambda row: row["kl"]), zero=True),
        curve("perplexity on held-out text", points(lambda row: row["perplexity"]), teacher, zero=False),
    )
    return [line for line in drawn if line is not None]


def _generations(generations: Generations) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (prompt, [(model, continuation)]), as far as a page has room."""
    shown, room = [], LONGEST_TEXT
    for prompt, models in generations.items():
        room -= len(prompt) + sum(map(len, chain.from_iterable(models.items())))
        if room < 0:
            break
        shown.append((prompt, [(model, text.removeprefix(prompt).strip()) for model, text in models.items()]))
    return shown


def _origin(report: Report) -> list[tuple[str, str, str | None]]:
    """Return (name, value, address) of base model, licence, text, cost and versions."""
    base = report.base_model
    linked = base is not None and HUB_MODEL.fullmatch(base)
    rows: list[tuple[str, str, str | None]] = [
        ("base model", base or f"{without_folders(report.model)}, a local checkpoint", base if linked else None),
        ("revision", report.revision or "none given", None),
        ("licence of the base model", report.license or "not stated by the base model", None),
        ("recipe", report.recipe, None),
    ]
    if (text := report.calibration) is not None:
        value = f"{text['tokens']:,} tokens of {without_folders(text['source'])}, sha256 {text['hash'][:12]}…"
        rows.append(("calibration", value, None))
    else:
        rows.append(("calibration", "none: errors are those of the weights alone", None))
    rows.append(("time to compress", duration(report.seconds), None))
    if report.phases:
        rows.append(("most of it", phases_text(report.phases), None))
    rows.append(("peak memory", format_bytes(report.peak_memory_bytes), None))
    rows += [(name, version, None) for name, version in report.versions.items()]
    return rows


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}\n# ... {len(text) - LONGEST_TEXT:,} more"
