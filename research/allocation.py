"""Measure what an allocation is worth: its plan beside plans of the same size, and how well damages are predicted.

    python research/allocation.py --data DATA (--bpw 2 | --size 40MB | --sparsity 0.6) [--options FILE]
        [--damage kl] [--plans 20] [--spread 0.1] [--subsets 1] [--prices FILE]

DATA holds `wikitext2-valid.txt` (calibration: its first 16 windows of 1024 tokens, the next two held out) and
`wikitext2-test.raw` (the KL of every plan: its first `--windows` windows of 256 tokens). Prices are measured once, or
read from `--prices`, where they are kept; then the chosen plan, the uniform one, `--plans` random ones, and those that
prices on `--subsets` random samples of the same text choose are compressed alike, measured and printed, with the rank
correlation of predicted and measured KL over the random ones; with `--spread` these differ in size, evenly between the
target's less that share and the target's more it. Beside a sparsity stands a plan by the matrices' sides alone (`er`),
as random masks are given (arXiv 2202.02643). `--options` is a YAML list of lists of steps; trellises
with a memory of 8 and no `refine` take a sixth of the time of the default ones and are ranked alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import yaml
from rows import calibration
from scipy.stats import spearmanr

from llmcompress.allocation.allocate import Allocation, allocate, target_of
from llmcompress.allocation.price_file import allocate_by
from llmcompress.allocation.prices import damage
from llmcompress.allocation.sensitivity import DensePredictions
from llmcompress.allocation.solve import (
    Table,
    cheapest_first,
    fill_up,
    random_plan,
    spread_over_depth,
    total_cost,
    uniform_plan,
)
from llmcompress.compression import run
from llmcompress.compression.job import prepare
from llmcompress.errors import RecipeError
from llmcompress.evaluation.logits import window_logits
from llmcompress.evaluation.perplexity import text_windows
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.recipe.read import dump, read_recipe
from llmcompress.weight.modules import decoded

COLUMNS = ("plan", "bpw", "sparsity", "MB", "predicted KL", "probing KL", "text KL")
LENGTH = 256
PIECE = 4000  # characters


def main() -> None:
    """Measures what was asked for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two WikiText-2 files")
    parser.add_argument("--model", default="smollm2")
    aims = parser.add_mutually_exclusive_group(required=True)
    aims.add_argument("--bpw", type=float)
    aims.add_argument("--size")
    aims.add_argument("--sparsity", type=float)
    parser.add_argument("--options", type=Path, help="what each linear may become; the default ones otherwise")
    parser.add_argument("--damage", choices=("distortion", "noise", "kl"), default="distortion", help="as in a recipe")
    parser.add_argument("--plans", type=int, default=20, help="random ones")
    parser.add_argument("--spread", type=float, default=0.0, help="of the random plans' sizes: none, they are alike")
    parser.add_argument("--subsets", type=int, default=1, help="random samples of text to price on once more")
    parser.add_argument("--prices", type=Path, help="a file that keeps them, for other budgets of the same kind")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--jsonl", type=Path, help="collects the rows; plans that it holds are not measured again")
    asked = parser.parse_args()
    source = resolve(asked.model)
    found = allocated(source, recipe(asked), asked.prices)
    text = (asked.data / "wikitext2-test.raw").read_text(encoding="utf-8")
    windows = text_windows(load_tokenizer(source.folder), text, asked.windows, LENGTH, source.config)
    dense = DensePredictions(windows, window_logits(source.load(), windows))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    held = asked.jsonl.read_text(encoding="utf-8").splitlines() if asked.jsonl and asked.jsonl.exists() else []
    known = {row["steps"]: row for row in map(json.loads, held)}
    rows = []
    for name, plan in chain(plans(found, asked.plans, asked.spread), others(source, asked)):
        planned = dataclasses.replace(found, chosen=plan)
        steps = sha256(dump(planned.recipe).encode()).hexdigest()
        row = known.get(steps) or measured(planned, dense)
        row |= {"plan": name, "predicted_kl": damage(found.prices, plan), "sparsity": found.choices.sparsity(plan)}
        rows.append(row)
        print(line(row), flush=True)
        if asked.jsonl and steps not in known:
            with asked.jsonl.open("a") as file:
                file.write(json.dumps(row | {"steps": steps}) + "\n")
    random = [row for row in rows if row["plan"].startswith("random")]
    for where in ("probing_kl", "text_kl") if len(random) > 1 else ():
        rank = spearmanr([row["predicted_kl"] for row in random], [row[where] for row in random]).statistic
        print(f"rank correlation of predicted KL and {where} over {len(random)} random plans: {rank:.3f}")


def recipe(asked: argparse.Namespace) -> dict[str, Any]:
    """Of a target, on the benchmarks' calibration text."""
    aims = {"bpw": asked.bpw, "bytes": asked.size, "sparsity": asked.sparsity}
    target = {name: value for name, value in aims.items() if value is not None}
    options = None if asked.options is None else yaml.safe_load(asked.options.read_text(encoding="utf-8"))
    return {
        "version": 1,
        "name": "allocation",
        "calibration": calibration(asked.data),
        "target": target,
        "options": options,
        "damage": asked.damage,
    }


def allocated(source: DenseModel, asked: dict[str, Any], kept: Path | None) -> Allocation:
    """The plan for a recipe, by the prices in the file `kept`."""
    job = prepare(source, read_recipe(asked))
    return allocate(job) if kept is None else allocate_by(kept, job)


def others(source: DenseModel, asked: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield, by name, the plans that prices on random pieces of the calibration text choose."""
    text = (asked.data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        pieces = Path(folder) / "pieces.jsonl"
        lines = [json.dumps({"text": text[start : start + PIECE]}) for start in range(0, len(text), PIECE)]
        pieces.write_text("\n".join(lines), encoding="utf-8")
        for seed in range(asked.subsets):
            wanted = recipe(asked)
            wanted["calibration"] |= {"dataset": str(pieces), "shuffle": True, "seed": seed}
            yield f"chosen on sample {seed}", allocated(source, wanted, None).chosen


def plans(found: Allocation, count: int, spread: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The chosen plan, then those of no thought that take as much, or with a `spread` about as much."""
    target = target_of(found.job)
    costs = [one.costs(target) for one in found.choices.matrices]
    limit = sum(row[option] for row, option in zip(costs, found.chosen, strict=True))
    yield "chosen", found.chosen
    controls = [("uniform", uniform_plan(costs, limit))]
    if target.sparsity is not None:
        controls.append(("er", er_plan(costs, [matrix.shape for matrix in found.choices.matrices], limit)))
    for seed in range(count):
        size = limit * (1 + spread * (2 * seed / max(count - 1, 1) - 1))
        controls.append((f"random {seed}", random_plan(costs, size, Random(seed))))
    for name, plan in controls:
        if plan is None:
            raise RecipeError(f"no {name} plan fits; ask for a larger size")
        yield name, plan


def er_plan(costs: Table, shapes: Sequence[tuple[int, int]], limit: float) -> tuple[int, ...] | None:
    """Return for every matrix the dearest option within its share of nonzero weights, as of an Erdos-Renyi graph.

    The share is proportional to the sum of its sides by their product; the proportion is the largest within the limit.
    `costs`: nonzero weights. None if nothing fits.
    """
    sides = [(out + width) / (out * width) for out, width in shapes]

    def plan(scale: float) -> tuple[int, ...]:
        """Return the plan of a proportion."""
        rooms = (scale * side * out * width for side, (out, width) in zip(sides, shapes, strict=True))
        fitting = ([n for n in cheapest_first(row) if row[n] <= room] for row, room in zip(costs, rooms, strict=True))
        return tuple((fits or cheapest_first(row)[:1])[-1] for fits, row in zip(fitting, costs, strict=True))

    if total_cost(costs, plan(0.0)) > limit:
        return None
    low, high = 0.0, 1 / min(sides)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if total_cost(costs, plan(middle)) <= limit else (low, middle)
    return fill_up(costs, plan(low), limit, spread_over_depth(len(costs)), steps=1)


def measured(found: Allocation, dense: DensePredictions) -> dict[str, Any]:
    """Compresses by a plan; its sizes, and its KL on the probing tokens and on the text."""
    with tempfile.TemporaryDirectory() as folder:
        report = run.compress(found.settled, Path(folder) / "model").report
        probing = found.measure_kl(Path(folder) / "model")
        model = load_model(Place("model", Path(folder) / "model"))
        with decoded(model):
            text = dense.divergence(window_logits(model, dense.windows))
    return {"bpw": report.bpw, "bytes": report.bytes, "probing_kl": probing, "text_kl": text}


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    kls = [f"{row[key]:.4f}" for key in ("predicted_kl", "probing_kl", "text_kl")]
    cells = (row["plan"], f"{row['bpw']:.3f}", f"{row['sparsity']:.3f}", f"{row['bytes'] / 1e6:.2f}", *kls)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
