"""Scores of several models in one table, each beside the first: for `llmcompress compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from llmcompress.errors import RecipeError
from llmcompress.evaluation.lm_eval import find_tasks
from llmcompress.evaluation.logits import opened
from llmcompress.evaluation.perplexity import windows_by_text
from llmcompress.evaluation.processes import ALONE, Processes
from llmcompress.evaluation.protocol import STANDARD, Protocol
from llmcompress.evaluation.score import size_of
from llmcompress.evaluation.scores import Scoring, evaluate_all
from llmcompress.models.dense.load import check_fits
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import check_vocabularies, load_tokenizer
from llmcompress.reporting.output_file import check_new_file, write_new_file
from llmcompress.reporting.tables import comparison_markdown
from llmcompress.runtime.facts import versions
from llmcompress.runtime.notebook import progress_lines
from llmcompress.runtime.precision import fast_float32

KINDS = (".md", ".json")  # of an output file


@fast_float32()
def compare(
    models: Sequence[str | Path],
    protocol: Protocol = STANDARD,
    *,
    output: Path | None = None,
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
    progress = progress or progress_lines()
    if isinstance(models, str) or len(models) < 2:
        raise RecipeError("a comparison needs two models or more; give the one that the others are compared with first")
    if output is not None:
        check_new_file(output, KINDS, "a comparison")
    places = [locate(model, trust_remote_code=trust_remote_code) for model in models]
    sizes = [size_of(place) for place in places]
    check_vocabularies(places)
    tokenizer = load_tokenizer(places[0].folder, trust_remote_code)
    windows_by_text(tokenizer, protocol)  # texts and tasks are missed before models are loaded
    tasks = find_tasks(tokenizer, protocol)
    whole = bool(protocol.tasks)
    for pair in ([places[0], place] for place in places[1:]):
        check_fits(device, "comparing", pair if whole else [], [] if whole else pair)
    first, *others = (partial(opened, place, device, whole) for place in places)
    found = evaluate_all(first(), others, tokenizer, protocol, processes=processes, progress=progress, tasks=tasks)
    rows = [
        {"model": place.name, **asdict(size), **one.to_json()}
        | {"differences": None if one is found[0] else one.differences(found[0])}
        for place, size, one in zip(places, sizes, found)
    ]
    result = {"protocol": protocol.to_json(), "versions": versions(), "models": rows}
    if output is not None and processes.rank == 0:
        text = comparison_markdown(result) if output.suffix == ".md" else json.dumps(result, indent=2) + "\n"
        write_new_file(output, text)
    return result
