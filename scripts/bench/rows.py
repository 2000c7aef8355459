"""Measures recipes and prints their rows for docs/results.md.

    python scripts/bench/rows.py --data DATA [RECIPE ...]

DATA holds `wikitext2-valid.txt` (calibration: its first 16 windows of 1024 tokens, the next two held out) and
`wikitext2-test.raw` (perplexity: its first `--windows` windows of 1024 tokens, float32). Each recipe runs in a process
of its own, so that its peak memory is its own; `--jsonl` collects the rows as they come and skips those it holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
GROUPS = ("recommended", "methods", "ablations")  # of recipes below configs/
RECIPES = {path.stem: path for group in GROUPS for path in sorted((ROOT / "configs" / group).glob("*.yaml"))}
COLUMNS = ("recipe", "bpw", "model_bpw", "MB", "perplexity", "ratio", "held-out error", "seconds", "peak MB")


def main() -> None:
    """Measures what was asked for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two WikiText-2 files")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--jsonl", type=Path, help="collects finished rows")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("recipes", nargs="*", help="names in configs/, or files; all by default")
    options = parser.parse_args()
    recipes = options.recipes or ["dense", *RECIPES]
    if options.one:
        print(json.dumps(measured(recipes[0], options)))
        return
    rows = {}
    if options.jsonl and options.jsonl.exists():
        rows = {row["recipe"]: row for row in map(json.loads, options.jsonl.read_text().splitlines())}
    for recipe in recipes:
        if recipe not in rows:
            rows[recipe] = in_own_process(recipe, options)
            if options.jsonl:
                with options.jsonl.open("a") as file:
                    file.write(json.dumps(rows[recipe]) + "\n")
            print(line(rows[recipe], rows.get("dense")), file=sys.stderr, flush=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for recipe in recipes:
        print(line(rows[recipe], rows.get("dense")))


def in_own_process(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one recipe."""
    given = ["--data", str(options.data), "--model", options.model, "--windows", str(options.windows)]
    command = [sys.executable, __file__, *given, "--one", recipe]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measured(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compresses and scores; `dense` is the model as it is."""
    import llmcompress as lc
    from llmcompress.evaluate.score import score
    from llmcompress.recipe.compression import read_recipe

    protocol = lc.Protocol(text=options.data / "wikitext2-test.raw", windows=options.windows)
    if recipe == "dense":
        found = score(options.model, protocol)
        return {"recipe": recipe, **{key: found[key] for key in ("bytes", "bpw", "model_bpw", "perplexity")}}
    settings = [f"calibration={json.dumps(calibration(options.data))}"]
    with tempfile.TemporaryDirectory() as folder:
        chosen = read_recipe(RECIPES.get(recipe, recipe), settings)
        report = lc.compress(options.model, chosen, Path(folder) / "model").report
        found = score(Path(folder) / "model", protocol)
    errors = [row.error_heldout for row in report.layers if row.error_heldout is not None]
    return {
        "recipe": recipe,
        "bytes": report.bytes,
        "bpw": report.bpw,
        "model_bpw": report.model_bpw,
        "perplexity": found["perplexity"],
        "error_heldout": statistics.median(errors) if errors else None,
        "errors_heldout": {row.name: row.error_heldout for row in report.layers},
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
    }


def calibration(data: Path) -> dict[str, Any]:
    """That of every row, as a recipe says it: the first windows of WikiText-2 validation in the folder `data`."""
    text = {"dataset": str(data / "wikitext2-valid.txt"), "bos": False, "eos": False, "shuffle": False}
    return text | {"samples": 18, "length": 1024, "held_out": 2}


def line(row: dict[str, Any], dense: dict[str, Any] | None) -> str:
    """One line of the table."""
    ratio = f"{row['perplexity'] / dense['perplexity']:.3f}" if dense else ""
    cost = ("", "", "")
    if "seconds" in row:
        error = "" if row["error_heldout"] is None else f"{row['error_heldout']:.4f}"
        cost = (error, f"{row['seconds']:.0f}", f"{row['peak_memory_bytes'] / 1e6:.0f}")
    size = (f"{row['bpw']:.3f}", f"{row['model_bpw']:.3f}", f"{row['bytes'] / 1e6:.1f}")
    quality = (f"{row['perplexity']:.3f}", ratio)
    return f"| {' | '.join((row['recipe'], *size, *quality, *cost))} |"


if __name__ == "__main__":
    main()
