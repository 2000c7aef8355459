"""Record what ./scripts/demo measured, for the tables of the main job in docs/results.md.

    python research/main_job.py out/demo.json [--full] [--jsonl docs/results/main.jsonl]

Reads the numbers that the demo left, and appends a record each of the dense, the compressed and the distilled model.
Run it on the machine, the commit and with the threads of the demo.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from records import RESULTS, Record, append, provenance, recipe_facts, recipe_path

from llmcompress.recipe.read import read_recipe

TOKENS = 1024  # of a window


def main() -> None:
    """Append three records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=Path, help="the .json file beside the demo's checkpoints")
    parser.add_argument("--full", action="store_true", help="it was ./scripts/demo --full")
    parser.add_argument("--jsonl", type=Path, default=RESULTS / "main.jsonl")
    options = parser.parse_args()
    for record in records(json.loads(options.numbers.read_text()), options.full):
        append(options.jsonl, record)


def records(found: Record, full: bool) -> list[Record]:
    """Return the records of one run."""
    recipe, lesson = ("default", "scales-norms") if full else ("quick", "quick-lesson")
    calibration = read_recipe(recipe_path(recipe)).calibration
    common = provenance() | {
        "table": "main" if full else "quick",
        "command": "./scripts/demo --full" if full else "./scripts/demo",
        "model": "smollm2",
        "text": "Python's documentation",
        "windows": -(-found["dense"]["tokens"] // TOKENS),
        "seconds_in_all": found["seconds"],
    }
    asked = None
    if calibration is not None:
        asked = {"dataset": calibration.dataset} | calibration.model_dump(mode="json", exclude_defaults=True)
    costs = {
        "compressed": {"seconds": found["compress_seconds"], "peak_memory_bytes": found["peak_memory_bytes"]},
        "distilled": {"seconds": found["distill_seconds"], "training_tokens": found["distill_tokens"]},
    }
    made = {"dense": None, "compressed": recipe, "distilled": lesson}
    return [
        common
        | {"arm": side if name is None else name, "calibration": None if name is None else asked}
        | ({} if name is None else recipe_facts(name))
        | {"student": side == "compressed"}  # the row that the distilled one is to be held against
        | {"numbers": numbers(found[side]) | costs.get(side, {})}
        for side, name in made.items()
    ]


def numbers(found: Record) -> Record:
    """Return the scores and sizes of one model."""
    kept = {key: found[key] for key in ("bytes", "perplexity", "perplexity_stderr")}
    distance = {"kl": found.get("kl", 0.0), "top1_agreement": found.get("top1_agreement", 1.0)}
    sizes = {"bpw": found.get("bpw", 16.0), "model_bpw": found.get("model_bpw", 16.0)}
    [pairs] = found["tasks"].values()
    return kept | sizes | distance | {"pairs": pairs["acc"]}


if __name__ == "__main__":
    main()
