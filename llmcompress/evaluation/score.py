"""Scores of models by their names, beside their sizes: of one model, or of several side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError, RecipeError, check_several
from llmcompress.evaluation.evaluate import Evaluation, Scoring, evaluate, evaluate_all
from llmcompress.evaluation.logits import open_model
from llmcompress.evaluation.perplexity import describe_protocol, windows_by_text
from llmcompress.evaluation.processes import ALONE, Processes
from llmcompress.evaluation.protocol import STANDARD, Protocol
from llmcompress.evaluation.tasks import find_tasks
from llmcompress.models.dense.adapter import adapter_files
from llmcompress.models.dense.config import MODEL, packing_entry, read_entries
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.gguf_model import stored_bytes
from llmcompress.models.dense.headers import Header, model_files, read_headers
from llmcompress.models.dense.load import check_fits
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.model import open_source
from llmcompress.models.dense.packed import packing_method
from llmcompress.models.dense.sizes import is_dense, with_sizes
from llmcompress.models.dense.skeleton import folder_skeleton
from llmcompress.models.dense.tokenizer import check_vocabularies, load_tokenizer
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import add_file, check_can_add, write_checkpoint
from llmcompress.models.files.output import check_new_file, check_writable, write_new_file
from llmcompress.reporting import report as reports
from llmcompress.reporting.tables import comparison_markdown
from llmcompress.runtime.facts import versions
from llmcompress.runtime.precision import fast_float32
from llmcompress.runtime.progress import progress_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Size:
    """Size of a model. `bpw`: bits per weight of the decoder's linears, None where they cannot be told apart."""

    bytes: int
    bpw: float | None
    model_bpw: float


@fast_float32()
def score(
    model: str | Path,
    protocol: Protocol = STANDARD,
    *,
    revision: str | None = None,
    against: str | Path | None = None,
    save: bool = False,
    output: str | Path | None = None,
    device: str = "cpu",
    processes: Processes = ALONE,
    progress: Scoring | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score a model in float32: perplexity, tasks and, beside a dense model, KL and top-1 agreement.

    Args:
        model: a folder, a Hub id or `smollm2`; dense, compressed, or quantized by a tool that transformers knows.
        protocol: the texts and the tasks.
        revision: a branch, tag or commit of a Hub model.
        against: the dense model that KL (nats per token) and top-1 agreement are measured from; None for neither.
        save: True to score `against` too, and to keep both results in the compressed folder for its card.
        output: a new folder for the result as `eval.json` and for lm-eval's own files; None for none.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        processes: which share the work; the first of them writes and knows the scores of tasks.
        progress: receives what is being scored, how much is done, and how much there is; None for a line in a notebook.
        trust_remote_code: True to run the Python code that models bring along, if transformers lacks their class.

    Returns:
        The scores with their standard errors, `bytes`, `bpw` and `model_bpw` (bits per weight), and the protocol;
        "tasks_failed", a sentence, in place of the scores of tasks that did not finish, and "warnings" on cut prompts.

    Raises:
        InputError: for a model that cannot be loaded, and for two that have different vocabularies.
        MemoryLimitError: for models that do not fit into this machine together.
        RecipeError: for `save` without `against`, or for a folder that compress did not write.
        DiskError: for an output that cannot be written.
    """
    folder = _saving_folder(model, against) if save else None
    if output is not None:
        check_writable(output := Path(output), 0)
    place = locate(model, revision, trust_remote_code)
    places = [place, *([] if against is None else [locate(against, trust_remote_code=trust_remote_code)])]
    size, tokenizer = size_of(place), load_tokenizer(place.folder, trust_remote_code)
    check_vocabularies(places)
    windows_by_text(tokenizer, protocol)  # texts and tasks are missed before models are loaded
    tasks = find_tasks(tokenizer, protocol, processes.count)
    shared: dict[str, Any] = {"processes": processes, "progress": progress or progress_lines(), "tasks": tasks}
    whole = places[: 1 + save] if protocol.tasks else []  # tasks are not read block by block
    passing = [each for each in places if each not in whole]
    check_fits(device, "scoring", whole, passing, processes=processes.here)
    loaded, *dense_models = [open_model(each, device, each in whole) for each in places]
    if save:
        evaluations = evaluate_all(dense_models[0], [lambda: loaded], tokenizer, protocol, **shared)
    else:
        evaluations = [evaluate(loaded, tokenizer, protocol, against=next(iter(dense_models), None), **shared)]
    scores = _merge_scores(evaluations) | asdict(size) | {"protocol": describe_protocol(tokenizer, protocol)}
    _write_scores(output if processes.rank == 0 else None, place, evaluations[-1], scores)
    if folder is not None and processes.rank == 0:
        save_scores(folder, scores["protocol"], *evaluations)
    return scores


def _saving_folder(model: str | Path, against: str | Path | None) -> Path:
    """Return the folder of a model that scores are saved in.

    Raises RecipeError without a dense model, and what `check_can_add` raises, before anything is measured.
    """
    if against is None:
        raise RecipeError("saving scores needs the dense model to compare with; give against (--against) too")
    check_can_add(folder := Path(os.path.expanduser(model)))
    return folder


def _merge_scores(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the scores of the last evaluation; tasks that failed on the dense model before it have failed too."""
    failures = [each.tasks.failure for each in evaluations if each.tasks.failure is not None]
    return ({"tasks_failed": failures[0]} if failures else {}) | evaluations[-1].to_json()


def save_scores(folder: Path, protocol: Mapping[str, Any], dense: Evaluation, compressed: Evaluation) -> None:
    """Add the scores of a compressed checkpoint and of its dense model to the checkpoint, for its card and its page.

    Raises DiskError.
    """
    both = {"dense": dense.to_json(), "compressed": compressed.to_json(), "differences": compressed.differences(dense)}
    entries = {**protocol, "versions": versions(), **both}
    add_file(folder, file_names.SCORES, json.dumps(entries, indent=2))


def _write_scores(output: Path | None, place: Place, evaluation: Evaluation, scores: dict[str, Any]) -> None:
    """Write scores, and lm-eval's own files, to a new folder if one is given. Raises DiskError."""
    if output is None:
        return
    with write_checkpoint(output) as writer:
        writer.write(file_names.SCORES, json.dumps(scores, indent=2))
        if evaluation.tasks.scores:
            evaluation.tasks.save(writer.folder, place.name if place.name.strip("./") else str(place.folder.resolve()))


@fast_float32()
def compare(
    models: Sequence[str | Path],
    protocol: Protocol = STANDARD,
    *,
    output: str | Path | None = None,
    device: str = "cpu",
    processes: Processes = ALONE,
    progress: Scoring | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score two or more models side by side; KL and top-1 agreement are measured from the first.

    Two models are in memory at a time.

    Args:
        models: folders, Hub ids or `smollm2`; the first is the reference.
        protocol: the texts and the tasks.
        output: a new file for the table (.md) or for all numbers (.json); None for neither.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        processes: which share the work; the first of them writes and knows the scores of tasks.
        progress: receives what is being scored, how much is done, and how much there is; None for a line in a notebook.
        trust_remote_code: True to run the Python code that models bring along, if transformers lacks their class.

    Returns:
        {"protocol", "versions", "models"}: for each model what `score` returns, with its name as "model" and as
        "differences" its item-by-item differences from the first, None for the first itself.

    Raises:
        RecipeError: for fewer than two models.
        InputError: for models that cannot be loaded, or that have different vocabularies.
        MemoryLimitError: for models that do not fit into this machine, two at a time.
        DiskError: for an output that cannot be written.
    """
    check_several(models, "models")
    if len(models) < 2:
        raise RecipeError("a comparison needs two models or more; give the one that the others are compared with first")
    if output is not None:
        check_new_file(output := Path(output), (".md", ".json"), "a comparison")
    places = [locate(model, trust_remote_code=trust_remote_code) for model in models]
    sizes = [size_of(place) for place in places]
    check_vocabularies(places)
    tokenizer = load_tokenizer(places[0].folder, trust_remote_code)
    windows_by_text(tokenizer, protocol)  # texts and tasks are missed before models are loaded
    tasks = find_tasks(tokenizer, protocol, processes.count)
    whole = bool(protocol.tasks)
    for pair in ([places[0], place] for place in places[1:]):
        check_fits(device, "comparing", pair if whole else [], [] if whole else pair, processes=processes.here)
    first, *others = (partial(open_model, place, device, whole) for place in places)
    shared: dict[str, Any] = {"processes": processes, "progress": progress or progress_lines(), "tasks": tasks}
    evaluations = evaluate_all(first(), others, tokenizer, protocol, **shared)
    rows = [
        {"model": place.name, **asdict(size), **evaluation.to_json()}
        | {"differences": None if evaluation is evaluations[0] else evaluation.differences(evaluations[0])}
        for place, size, evaluation in zip(places, sizes, evaluations)
    ]
    result = {"protocol": describe_protocol(tokenizer, protocol), "versions": versions(), "models": rows}
    if output is not None and processes.rank == 0:
        text = comparison_markdown(result) if output.suffix == ".md" else json.dumps(result, indent=2) + "\n"
        write_new_file(output, text)
    return result


def size_of(place: Place) -> Size:
    """Return the size of a model: of its weight files, of a dense one its numbers, and of what linears have in them.

    Our report counts where it is that of these files. A GGUF file counts as it is stored, though bfloat16 is scored.
    Raises InputError for a model that cannot be read.
    """
    home = place.folder if place.file is None else place.file.parent
    if (home / file_names.REPORT).is_file() and (report := reports.read(home)).bytes == _file_bytes(place):
        return Size(report.bytes, report.bpw, report.model_bpw)
    model, stored = open_stored(place)
    plain = place.file is None and is_dense(read_entries(place.folder / MODEL, place.folder))
    total = sum(header.bytes for header in stored.values()) if plain else _file_bytes(place)
    tied = model.all_tied_weights_keys
    weights = sum(value.numel() for name, value in model.named_parameters() if name not in tied)
    return Size(total, _linear_bpw(place, model, stored), total * 8 / weights)


def _file_bytes(place: Place) -> int:
    files = model_files(place.folder) if place.file is None else [place.file]
    if place.adapter is not None:
        files = [*files, adapter_files(place.adapter)[1]]
    return sum(path.stat().st_size for path in files)


def open_stored(place: Place) -> tuple[PreTrainedModel, dict[str, Header]]:
    """Return a model on meta, and the headers of what is stored of it: by its own names where they are known here."""
    entries = read_entries(place.folder / MODEL, place.folder)
    if is_dense(entries) or packing_method(entries) is not None:
        source = open_source(place)  # which says what is wrong with a folder
        return source.skeleton(), source.tensors
    model = folder_skeleton(place.folder, trust_remote_code=place.trust_remote_code)
    packing, stored = packing_entry(entries), read_headers(place.folder)
    from llmcompress.models.transformers.hf_quantizer import NAME, LLMCompressConfig

    if not isinstance(packing, dict) or packing.get("quant_method") != NAME:
        return model, stored
    config = LLMCompressConfig(**packing)
    common = {base: name for name, base in config.ties.items()}  # counts with one linear that shares it
    sizes = {name: list(layout.size) for name, layout in config.table().items() if name not in common}
    renamed = {name: f"{common[base]}.{name}" for name in stored if (base := name.rpartition(".")[0]) in common}
    return with_sizes(model, config.sizes | sizes), {renamed.get(name, name): stored[name] for name in stored}


def _linear_bpw(place: Place, model: PreTrainedModel, stored: Mapping[str, Header]) -> float | None:
    """Return the bits of a weight of the linears; None if they are unknown, since it can be scored all the same."""
    try:
        linears = architecture(model.config, model).linears()
        names = [name for name in stored if _is_of_linear(name, linears) and not name.endswith(".bias")]
        inside = [stored[name] for name in names]
        held = sum(header.bytes for header in inside)
        if place.file is not None:  # the adapter's part is in a file of its own
            parts = [part for header in inside for part in header.sources if part.file.parent != place.folder]
            held = stored_bytes(place.file, [f"{name}.weight" for name in linears]) + sum(part.bytes for part in parts)
    except (InputError, KeyError, ModuleNotFoundError):  # without the package gguf, too
        return None
    return held * 8 / sum(prod(linear.shape) for linear in linears.values())


def _is_of_linear(name: str, linears: Container[str]) -> bool:
    """True for what is stored under the name of a linear: `a.b.weight.absmax` for `a.b`."""
    parts = name.split(".")
    return any(".".join(parts[:stop]) in linears for stop in range(1, len(parts)))
