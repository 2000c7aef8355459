"""Measure what choosing steps by the worst kind of text is worth, beside the plan with the least mean, at equal bytes.

    python research/worst_kind.py --work FOLDER [--model smollm2] [--bpw 2.05] [--seed 0] [--texts FOLDER] [--quick]
        [--jsonl FILE]

FOLDER keeps the prices, which are measured once for both plans, and the models: a run that was cut goes on. The recipe
is that of `compress --bpw`. Both models are scored by the KL to the dense one on each kind of `builtin`, on documents
that neither calibration nor prices have read, or on each .txt file of `--texts`. Before that, it prints what is
predicted where the mean counts more beside the largest loss (`TIE` in allocation/solve.py). `--quick` has options that
are chosen and compressed in a sixth of the time, trellises with a memory of 8 and no `refine`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from records import Record, append, provenance

import llmcompress as lc
from llmcompress.allocation import solve
from llmcompress.allocation.allocate import Allocation, choose, priced_tokens
from llmcompress.allocation.price_file import allocate_by
from llmcompress.allocation.prices import damage, damage_by_kind
from llmcompress.cli.compress import DEFAULT
from llmcompress.compression import run
from llmcompress.compression.job import Job, prepare
from llmcompress.data.builtin import builtin_documents, builtin_kinds
from llmcompress.data.text import shuffle
from llmcompress.evaluation.score import score
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.read import read_recipe
from llmcompress.recipe.target import Target

RATES = (1, 1.5, 2, 2.5, 3, 4)
WEIGHTS = (0.0, solve.TIE, 0.1, 0.3, 1.0, 3.0)  # of the mean
PRICED = 8  # documents of a kind that its two windows may have been cut from


def main() -> None:
    """Measure both plans and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keeps prices and models")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bpw", type=float, default=2.05)
    parser.add_argument("--seed", type=int, default=0, help="of the compression, not of the text")
    parser.add_argument("--texts", type=Path, help="a folder with a .txt file for each kind to score")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens of each kind")
    parser.add_argument("--quick", action="store_true", help="options that are priced and compressed fast")
    parser.add_argument("--jsonl", type=Path, help="collects a record of each plan")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    job = prepare(resolve(asked.model), read_recipe(recipe(asked)))
    found = allocate_by(asked.work / "prices.json", job)
    plans = {"plain": choose(found.choices, found.prices, Target(bpw=asked.bpw)), "worst": found.chosen}
    print("\n".join(trade(found, plans)), flush=True)
    texts = asked.texts or write_texts(job, asked.work / "texts")
    rows = {name: measured(name, replace(found, chosen=plan), texts, asked) for name, plan in plans.items()}
    print("\n".join(table(rows)))
    for row in rows.values():
        if asked.jsonl:
            append(asked.jsonl, row)


def recipe(asked: argparse.Namespace) -> dict[str, Any]:
    """Return that of a target without a recipe."""
    fast = [[{"method": "rotate"}, {"method": "trellis", "bits": bits, "memory": 8}] for bits in RATES]
    options = {"options": fast} if asked.quick else {}
    return DEFAULT | options | {"target": {"bpw": asked.bpw, "worst": True}, "seed": asked.seed}


def trade(found: Allocation, plans: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield a line for each weight of the mean: the largest loss of a kind and the mean, beside those of `plans`."""
    usual = solve.TIE
    for weight in WEIGHTS:
        solve.TIE = weight
        aim = found.job.recipe.target or Target(bpw=1)
        plans = plans | {f"mean counts {weight:g}": choose(found.choices, found.prices, aim)}
    solve.TIE = usual
    for name, plan in plans.items():
        losses = damage_by_kind(found.prices, plan)
        yield f"{name}: largest {max(losses):.4f}, mean {damage(found.prices, plan):.4f}, of kinds {fmean(losses):.4f}"


def write_texts(job: Job, folder: Path) -> Path:
    """Write the documents of each kind that calibration and prices have not read."""
    tokens, seed = priced_tokens(job), DEFAULT["calibration"].get("seed", 0)
    read = {*islice(shuffle(builtin_documents(), seed), tokens.documents)}
    folder.mkdir(exist_ok=True)
    for kind, documents in builtin_kinds().items():
        others = [str(text) for text in shuffle(documents, seed) if text not in read]
        (folder / f"{kind}.txt").write_text("\n\n".join(others[PRICED:]), encoding="utf-8")
    return folder


def measured(name: str, plan: Allocation, texts: Path, asked: argparse.Namespace) -> Record:
    """Compress by a plan, unless that is done, and score the model on each kind of text."""
    folder = asked.work / name
    if not folder.exists():
        run.compress(plan.settled, folder)
    first = min(texts.glob("*.txt"))
    protocol = lc.Protocol(text=first, windows=asked.windows, length=512, domains=texts)
    found = score(folder, protocol, against=asked.model)
    predicted = dict(zip(plan.text.kinds, damage_by_kind(plan.prices, plan.chosen), strict=True))
    kl = {kind: scores["kl"] for kind, scores in found["domains"].items()}
    numbers = {"bytes": found["bytes"], "bpw": found["bpw"], "predicted": predicted, "kl": kl}
    quick = " --quick" if asked.quick else ""
    command = f"python research/worst_kind.py --work FOLDER --bpw {asked.bpw:g} --seed {asked.seed}{quick}"
    said = {"table": "worst-kind", "arm": name, "command": command, "model": asked.model, "calibration": "builtin"}
    return said | provenance() | {"numbers": numbers}


def table(rows: dict[str, Record]) -> Iterator[str]:
    """Yield a line for each kind, then the mean and the largest over kinds, and bytes."""
    plain, worst = (rows[name]["numbers"] for name in ("plain", "worst"))
    yield "| kind | predicted, plain | predicted, worst | KL, plain | KL, worst | change |\n|---|---|---|---|---|---|"
    for kind in plain["kl"]:
        guesses = [f"{each['predicted'][kind]:.4f}" if kind in each["predicted"] else "" for each in (plain, worst)]
        yield f"| {kind} | {' | '.join(guesses)} | {change(plain['kl'][kind], worst['kl'][kind])} |"
    for name, over in (("mean", fmean), ("largest", max)):
        pairs = [[over(each[key].values()) for each in (plain, worst)] for key in ("predicted", "kl")]
        yield f"| {name} | {pairs[0][0]:.4f} | {pairs[0][1]:.4f} | {change(*pairs[1])} |"
    yield f"\nbytes: {plain['bytes']:,} plain, {worst['bytes']:,} worst"


def change(before: float, after: float) -> str:
    """Return the cells of two numbers and what the second is more than the first."""
    return f"{before:.4f} | {after:.4f} | {after / before - 1:+.1%}"


if __name__ == "__main__":
    main()
