"""Content of a page: plain values for the template, section by section, from the files of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from math import prod
from pathlib import Path, PurePath
from typing import Any

from llmcompress.errors import InputError
from llmcompress.models.files import file_names
from llmcompress.models.files.integrity import MENDING
from llmcompress.reporting.formatting import aim, byte_count, duration
from llmcompress.reporting.html.charts import Curve, curve
from llmcompress.reporting.html.files import Files
from llmcompress.reporting.html.layers import layer_facts
from llmcompress.reporting.plots import running_count
from llmcompress.reporting.report import Report
from llmcompress.reporting.tables import measured, metrics, starred

Facts = dict[str, Any]
HUB_MODEL = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LONGEST_TEXT = 100_000  # characters of a recipe, and of all generations, that a page shows
NO_SCORES = "Nobody has scored this checkpoint. `llmcompress eval FOLDER --against DENSE --save` does."
NO_LAYERS = "There is no report of layers: this is a dense student, which keeps its dtype."
NO_GENERATIONS = "No sentences of it are recorded."


def page_facts(files: Files) -> Facts:
    """Return everything the template shows. Raises InputError for a file that llmcompress would not write so."""
    folder = files.folder
    with _as_written(folder / file_names.REPORT):
        facts: Facts = {"head": _head(files), "sizes": _sizes(files), "origin": _origin(files)}
        facts["gates"] = _gates(files.report)
        layers = None if files.report is None else layer_facts(files.report, files.recipe)
    with _as_written(folder / file_names.SCORES):
        facts["quality"] = None if files.scores is None else _quality(files.scores)
    with _as_written(folder / file_names.ALLOCATION):
        facts["target"] = None if files.allocation is None else _target(files.allocation)
    with _as_written(folder / file_names.DISTILLATION):
        facts["distillation"] = None if files.distillation is None else _distillation(files.distillation)
    with _as_written(folder / file_names.GENERATIONS):
        facts["generations"] = None if files.generations is None else _generations(files.generations)
    recipes = (("Recipe", files.recipe), ("Recipe of the distillation", files.distillation_recipe))
    facts["recipes"] = [(title, _shortened(text)) for title, text in recipes if text is not None]
    facts["tiles"] = _tiles(files, facts)
    absent = ((facts["quality"], NO_SCORES), (layers, NO_LAYERS), (facts["generations"], NO_GENERATIONS))
    return facts | {
        "layers": layers,
        "no_scores": NO_SCORES,
        "no_layers": NO_LAYERS,
        "missing": tuple(sentence for part, sentence in absent if part is None),
    }


@contextmanager
def _as_written(path: Path) -> Iterator[None]:
    """Turn the errors of entries that are missing or of another type into one sentence about `path`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not as llmcompress writes it ({type(error).__name__}: {error}); {MENDING}"
        ) from error


def _head(files: Files) -> Facts:
    """The names above everything."""
    report, done = files.report, files.distillation
    if report is None:
        return {"title": files.folder.resolve().name, "lead": "a dense model, distilled by llmcompress"}
    verbs = "compressed and distilled" if done is not None else "compressed"
    lead = f"{verbs} by llmcompress with the recipe {report.recipe}"
    return {"title": report.base_model or public(report.model), "lead": lead}


def _tiles(files: Files, facts: Facts) -> list[tuple[str, str, str]]:
    """(label, value, note): the numbers that one looks for first."""
    report, tiles = files.report, []
    if report is not None:
        share = report.dense_bytes / report.bytes
        tiles += [
            ("weights", byte_count(report.bytes), f"of {byte_count(report.dense_bytes)}, {share:.1f} times smaller"),
            ("bits per weight", f"{report.bpw:.2f}", f"in compressed linears; {report.model_bpw:.2f} over all files"),
        ]
    if (quality := facts["quality"]) is not None:
        tiles += quality["tiles"]
    elif (distillation := facts["distillation"]) is not None:
        tiles += distillation["tiles"]
    return tiles


def _sizes(files: Files) -> Facts | None:
    """Bytes and bits of dense and compressed weights, and where the bytes are."""
    report = files.report
    if report is None:
        return None
    dense_bits = f"{report.dense_bytes * 8 / report.parameters:.3g}"
    rows = [
        ("bytes of all weight files", f"{report.dense_bytes:,}", f"{report.bytes:,}"),
        ("bits per weight, compressed linears", dense_bits, f"{report.bpw:.3f}"),
        ("bits per weight, all files", dense_bits, f"{report.model_bpw:.3f}"),
    ]
    return {"rows": rows, "parts": _parts(report), "parameters": f"{report.parameters:,}"}


def _parts(report: Report) -> list[tuple[str, int, str, str]]:
    """(name, layers, size, percent of all bytes) of every kind of matrix, and of the rest."""
    kinds: dict[str, list[float]] = {}
    for row in report.layers:
        kinds.setdefault(starred(row.name), []).append(row.bpw * prod(row.shape) / 8)
    sizes = [(name, len(held), sum(held)) for name, held in kinds.items()]
    rest = report.bytes - sum(size for *_, size in sizes)
    if rest > 0:
        sizes.append(("everything else: dense matrices, norms, biases, headers", 0, rest))
    return [(name, count, byte_count(size), f"{size / report.bytes:.1%}") for name, count, size in sizes]


def _quality(scores: Facts) -> Facts:
    """The scores that `eval --save` kept: rows of (score, dense, compressed, change)."""
    dense, small = scores["dense"], scores["compressed"]
    ratio = small["perplexity"] / dense["perplexity"]
    pair = [measured(one["perplexity"], one.get("perplexity_stderr"), 3) for one in (dense, small)]
    kl = measured(small["kl"], small.get("kl_stderr"))
    agreement = measured(small["top1_agreement"], small.get("top1_agreement_stderr"))
    rows = [
        ("perplexity", *pair, f"×{ratio:.3f}"),
        ("KL to the dense model, nats per token", "0", kl, ""),
        ("top-1 agreement with the dense model", "1", agreement, ""),
    ]
    if "calibration_error" in small:  # folders that were scored before it was measured have none
        sure = [one["calibration_error"] for one in (dense, small)]
        both = [f"{one:.4f}" for one in (*sure, sure[1] - sure[0])]
        rows.append(("calibration error: how far confidence is from being right", *both))
    for name, one in small.get("domains", {}).items():
        far = measured(one["kl"], one["kl_stderr"])
        rows.append((f"KL to the dense model on {public(name)}", "0", far, ""))
    for task, entry in small["tasks"].items():
        before = {metric: (value, error) for metric, value, error in metrics(dense["tasks"][task])}
        for metric, value, error in metrics(entry):
            change = value - before[metric][0]
            rows.append(
                (f"{public(task)}: {metric}", measured(*before[metric]), measured(value, error), f"{change:+.4f}")
            )
    tiles = [
        ("perplexity", f"×{ratio:.2f}", f"{small['perplexity']:.2f}, dense {dense['perplexity']:.2f}"),
        ("KL to dense", f"{small['kl']:.3f}", "nats per token"),
        ("same top token", f"{small['top1_agreement']:.0%}", "as the dense model"),
    ]
    return {"rows": rows, "tiles": tiles, "protocol": _protocol(scores), "tasks": bool(small["tasks"])}


def _gates(report: Report | None) -> list[tuple[str, str]]:
    """The quality at the end of the run beside the recipe's limits; nothing where these are switched off."""
    gates = None if report is None else report.gates
    if gates is None or gates.unmeasured is not None:
        return [] if gates is None else [("verdict", gates.sentence())]
    verdict = "none asked for" if not gates.limits else "held" if gates.held else "missed"
    names = {"kl": "KL to the dense model, nats per token", "perplexity_ratio": "perplexity over the dense model's"}
    numbers = [
        (names[name], f"{value:.4g}" + (f", at most {gates.limits[name]:g}" if name in gates.limits else ""))
        for name, value in gates.measured.items()
    ]
    size = [] if gates.predicted_bytes is None else [("size predicted to hold", f"{gates.predicted_bytes:,} bytes")]
    return [("verdict", f"{verdict}, {gates.where()}"), *numbers, *size]


def _protocol(scores: Facts) -> str:
    """The text and the settings of the scores, in a sentence."""
    tokens = scores["compressed"]["tokens"]
    said = f"Perplexity, KL and agreement on {tokens:,} tokens of {public(scores['text'])}"
    if scores["compressed"]["tasks"]:
        limit = "all items" if scores.get("limit") is None else f"a limit of {scores['limit']} items"
        said += f"; tasks with {limit}, seed {scores.get('seed', 0)}"
    return f"{said}. ± is one standard error."


def _target(allocation: Facts) -> list[tuple[str, str]]:
    """The target, and predicted beside measured numbers."""
    others = allocation.get("baselines", {})  # older folders have none
    return [
        ("target", aim(allocation["target"])),
        ("size", f"predicted {allocation['predicted_bytes']:,}, got {allocation['measured_bytes']:,} bytes"),
        ("KL", f"predicted {allocation['predicted_kl']:.4f}, measured {allocation['measured_kl']:.4f} nats per token"),
        *((f"KL of a {name} plan of that size", f"predicted {kl:.4f}") for name, kl in others.items()),
        ("measured on", f"{allocation['probing_tokens']:,} tokens"),
        ("time to choose", duration(allocation["seconds"])),
    ]


def _distillation(done: Facts) -> Facts:
    """The gains of a distillation on held-out text, its cost, and its curves."""
    history = done["history"]
    before, after = history[0], history[-1]
    teacher = after["teacher_perplexity"]
    rows = [
        ("KL to the teacher, nats per token", f"{before['kl']:.4f}", f"{after['kl']:.4f}", "0"),
        ("perplexity", *(f"{value:.3f}" for value in (before["perplexity"], after["perplexity"], teacher))),
    ]
    for name, last in after.get("domains", {}).items():
        first = before["domains"][name]
        rows.append((f"KL on {public(name)}", f"{first['kl']:.4f}", f"{last['kl']:.4f}", "0"))
    trained = ", ".join(f"{count:,} {kind}" for kind, count in done["trained"].items() if count)
    sources = [text["source"] for text in done["data"].get("domains", {"": done["data"]}).values()]
    cost = [
        ("teacher", done["teacher_id"] or public(done["teacher"])),
        ("text", ", ".join(map(public, sources))),
        ("trained", trained),
        ("steps", f"{done['steps']:,} on {done['tokens']:,} tokens in {duration(done['seconds'])}"),
        ("losses", " + ".join(_weighted(name, weight) for name, weight in done["losses"].items())),
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
    return {"rows": rows, "cost": cost, "tiles": tiles, "curves": _curves(history, teacher)}


def _curves(history: list[Facts], teacher: float) -> list[Curve]:
    tokens = [float(count) for count in running_count(row["tokens"] for row in history)]

    def points(value: Callable[[Facts], float]) -> list[tuple[float, float]]:
        return [(x, float(value(row))) for x, row in zip(tokens, history) if value(row) is not None]

    drawn = (
        curve("KL to the teacher on held-out text, nats per token", points(lambda row: row["kl"]), zero=True),
        curve("perplexity on held-out text", points(lambda row: row["perplexity"]), teacher, zero=False),
    )
    return [one for one in drawn if one is not None]


def _weighted(name: str, weight: float | str) -> str:
    return name if weight == 1 else f"{weight:g} {name}" if isinstance(weight, float) else f"{weight} {name}"


def _generations(found: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(model, continuation)]), as far as a page has room."""
    shown, room = [], LONGEST_TEXT
    for prompt, models in found.items():
        room -= len(prompt) + sum(map(len, chain.from_iterable(models.items())))
        if room < 0:
            break
        shown.append((prompt, [(model, text.removeprefix(prompt).strip()) for model, text in models.items()]))
    return shown


def _origin(files: Files) -> list[tuple[str, str, str | None]]:
    """(name, value, address): the base model, the licence, the text, the cost, the versions."""
    report = files.report
    if report is None:
        return []
    base = report.base_model
    linked = base is not None and HUB_MODEL.fullmatch(base)
    rows: list[tuple[str, str, str | None]] = [
        ("base model", base or f"{public(report.model)}, a local checkpoint", base if linked else None),
        ("revision", report.revision or "none given", None),
        ("licence of the base model", report.license or "not stated by the base model", None),
        ("recipe", report.recipe, None),
    ]
    if (text := report.calibration) is not None:
        value = f"{text['tokens']:,} tokens of {public(text['source'])}, sha256 {text['hash'][:12]}…"
        rows.append(("calibration", value, None))
    else:
        rows.append(("calibration", "none: errors are those of the weights alone", None))
    rows.append(("time to compress", duration(report.seconds), None))
    rows.append(("peak memory", byte_count(report.peak_memory_bytes), None))
    rows += [(name, version, None) for name, version in report.versions.items()]
    return rows


def public(name: str) -> str:
    """Return a name without the folders of the machine that it was made on."""
    path = PurePath(name)
    return path.name if path.is_absolute() or name.startswith((".", "~")) else name


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}\n# ... {len(text) - LONGEST_TEXT:,} more"
