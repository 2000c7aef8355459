"""Measure recipes and print their rows for docs/results/methods.md.

    python research/rows.py --data DATA [RECIPE ...]

DATA holds `wikitext2-valid.txt` (calibration: its first 16 windows of 1024 tokens, the next two held out) and
`wikitext2-test.raw` (perplexity: its first `--windows` windows of 1024 tokens, float32). A recipe that asks for no
calibration gets none, so it has no held-out error; one that reads `random` or `self` keeps that. Each recipe runs in a
process of its own, so that its peak memory is its own. `--jsonl` collects a record of each row as it is measured, and
skips the recipes that were measured into that file before; rows copied from an older document do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records import CONFIGS, Record, append, provenance, read_records, recipe_path, recipe_sha256

if TYPE_CHECKING:
    from llmcompress.recipe.compression import Recipe

COLUMNS = ("recipe", "bpw", "model_bpw", "MB", "perplexity", "ratio", "held-out error", "seconds", "peak MB")
OTHERS = ("accelerate", "distillation")  # folders of configs/ whose files compress nothing


def main() -> None:
    """Measure the recipes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two WikiText-2 files")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each row")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("recipes", nargs="*", help="names of recipes below configs/, or files; all by default")
    options = parser.parse_args()
    recipes = options.recipes or ["dense", *every_recipe()]
    if options.one:
        print(json.dumps(measured(recipes[0], options)))
        return
    found = read_records(options.jsonl) if options.jsonl else []
    rows = {row["recipe"]: row for row in found if row.get("source") != "transcribed" or row["recipe"] == "dense"}
    for recipe in recipes:
        if recipe not in rows:
            rows[recipe] = in_own_process(recipe, options)
            if options.jsonl:
                append(options.jsonl, rows[recipe])
            print(line(rows[recipe], rows.get("dense")), file=sys.stderr, flush=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for recipe in recipes:
        print(line(rows[recipe], rows.get("dense")))


def every_recipe() -> list[str]:
    """Return the names of all recipes that compress."""
    return [path.stem for path in sorted(CONFIGS.glob("*/*.yaml")) if path.parent.name not in OTHERS]


def in_own_process(recipe: str, options: argparse.Namespace) -> Record:
    """Return the record of one recipe."""
    given = ["--data", str(options.data), "--model", options.model, "--windows", str(options.windows)]
    command = [sys.executable, __file__, *given, "--one", recipe]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: Record = json.loads(done.stdout.splitlines()[-1])
    return row


def measured(recipe: str, options: argparse.Namespace) -> Record:
    """Compress and score; `dense` is the model as it is."""
    import llmcompress as lc
    from llmcompress.evaluation.score import score

    protocol = lc.Protocol(text=options.data / "wikitext2-test.raw", windows=options.windows)
    said = {
        "table": "methods",
        "recipe": recipe,
        "command": f"python research/rows.py --data DATA --windows {options.windows} {recipe}",
        "model": options.model,
        "text": "wikitext2-test.raw",
        "windows": options.windows,
    }
    if recipe == "dense":
        found = score(options.model, protocol)
        numbers = {key: found[key] for key in ("bytes", "bpw", "model_bpw", "perplexity")}
        return said | {"calibration": None} | provenance() | {"numbers": numbers}
    return said | compressed(recipe, options, protocol) | provenance()


def compressed(recipe: str, options: argparse.Namespace, protocol: Any) -> Record:
    """Return what a record says of a recipe: its digest, its calibration, and the numbers of a run of it."""
    import llmcompress as lc
    from llmcompress.evaluation.score import score
    from llmcompress.recipe.read import read_recipe

    path = recipe_path(recipe)
    text = calibration(options.data) if asks_for_text(read_recipe(path)) else None
    settings = [f"calibration={json.dumps(text)}"] if text else []
    with tempfile.TemporaryDirectory() as folder:
        report = lc.compress(options.model, read_recipe(path, settings), Path(folder) / "model").report
        found = score(Path(folder) / "model", protocol)
    errors = [row.error_heldout for row in report.layers if row.error_heldout is not None]
    return {
        "recipe_sha256": recipe_sha256(path.read_text()),
        "calibration": text and text | {"dataset": Path(text["dataset"]).name},
        "numbers": {
            "bytes": report.bytes,
            "bpw": report.bpw,
            "model_bpw": report.model_bpw,
            "perplexity": found["perplexity"],
            "error_heldout": statistics.median(errors) if errors else None,
            "seconds": report.seconds,
            "peak_memory_bytes": report.peak_memory_bytes,
        },
    }


def asks_for_text(recipe: Recipe) -> bool:
    """True if a recipe is to be calibrated on text that the dense model does not write itself."""
    return recipe.calibration is not None and recipe.calibration.dataset not in ("random", "self")


def calibration(data: Path) -> dict[str, Any]:
    """Return the calibration of every row, as a recipe says it: the first windows of WikiText-2 validation."""
    text = {"dataset": str(data / "wikitext2-valid.txt"), "bos": False, "eos": False, "shuffle": False}
    return text | {"samples": 18, "length": 1024, "held_out": 2}


def calibration_words(data: Path, **changes: Any) -> list[str]:
    """Return the words of a command that make it read this text, with BOS where the model was taught with it."""
    values = calibration(data) | {"bos": "auto"} | changes
    return [word for key, value in values.items() for word in ("--set", f"calibration.{key}={value}")]


def line(row: Record, dense: Record | None) -> str:
    """Return one line of the table."""
    numbers = row["numbers"]
    ratio = f"{numbers['perplexity'] / dense['numbers']['perplexity']:.3f}" if dense else ""
    cost = ("", "", "")
    if "seconds" in numbers:
        error = "" if numbers["error_heldout"] is None else f"{numbers['error_heldout']:.4f}"
        cost = (error, f"{numbers['seconds']:.0f}", f"{numbers['peak_memory_bytes'] / 1e6:.0f}")
    size = (f"{numbers['bpw']:.3f}", f"{numbers['model_bpw']:.3f}", f"{numbers['bytes'] / 1e6:.1f}")
    quality = (f"{numbers['perplexity']:.3f}", ratio)
    return f"| {' | '.join((row['recipe'], *size, *quality, *cost))} |"


if __name__ == "__main__":
    main()
