"""Measure what choosing blocks to drop is worth: the chosen ones beside random ones, before and after training.

    python research/dropped.py --data DATA [--count 6] [--seeds 0 1 2] [--steps 12]

Arms: `by damage` and `by similarity`, as `llmcompress drop --count` has them; for each seed `random`, blocks drawn from
all but the first and the last; and `interval`, as many in a row, anywhere between these two. Scores perplexity and KL
against the dense model on the first `--windows` windows of 1024 tokens of DATA's `wikitext2-test.raw`. With `--steps`
each student learns from the dense model for so many steps of 8x256 tokens of `wikitext2-valid.txt` and is scored again.
What was known of it before is ranked beside that (after DisWOT, 2303.15678): its KL, and how its states behind the last
block resemble the dense model's, on two windows of the end of that file, which no lesson reads. `--jsonl` collects the
records.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from records import Record, append, provenance
from scipy.stats import spearmanr

import llmcompress as lc
from llmcompress.distillation.run import distill
from llmcompress.evaluation.drift import drift
from llmcompress.evaluation.score import score
from llmcompress.models.dense.model import resolve
from llmcompress.surgery.block_choice import choose_blocks
from llmcompress.surgery.drop import blocks_of

COLUMNS = ("arm", "blocks", "perplexity", "KL", "top-1 agreement", "KL, taught")
HINTS = {"KL": "kl_before", "CKA": "cka", "error of states": "error"}  # CKA: the more, the nearer
LESSON = {"version": 1, "losses": [{"of": {"loss": "forward_kl"}}], "rates": {"weights": 1.0e-3, "norms": 1.0e-3}}


def main() -> None:
    """Measure every arm and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2-test.raw")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0, help="of a lesson (default: none)")
    parser.add_argument("--jsonl", type=Path, help="collects a record of each arm")
    options = parser.parse_args()
    there = blocks_of(resolve(options.model))
    chosen = {by: choose_blocks(options.model, None, options.count, by).blocks for by in ("damage", "similarity")}
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    records = []
    for arm, blocks in arms(chosen, len(there), options.count, options.seeds):
        records.append(measured(arm, blocks, options))
        if options.jsonl:
            append(options.jsonl, records[-1])
        print(line(records[-1]), flush=True)
    for hint, key in HINTS.items() if options.steps else ():
        values, taught = ([record["numbers"][name] for record in records] for name in (key, "kl_taught"))
        print(f"{hint} before, KL after: Spearman {spearmanr(values, taught).statistic:.2f}")


def arms(
    chosen: dict[str, tuple[int, ...]], there: int, count: int, seeds: list[int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name of each arm and the blocks that it drops from `there`, of which neither end goes."""
    yield from ((f"by {measure}", blocks) for measure, blocks in chosen.items())
    for seed in seeds:
        drawn = Random(seed)
        yield f"random, seed {seed}", tuple(sorted(drawn.sample(range(1, there - 1), count)))
        first = drawn.randrange(1, there - count)
        yield f"interval, seed {seed}", tuple(range(first, first + count))


def measured(arm: str, blocks: tuple[int, ...], options: argparse.Namespace) -> Record:
    """Drop `blocks` and score what is left."""
    seeds = " ".join(map(str, options.seeds))
    given = f"--count {options.count} --seeds {seeds} --windows {options.windows}"
    protocol = lc.Protocol(text=options.data / "wikitext2-test.raw", windows=options.windows)
    began, taught = time.perf_counter(), Record()
    with tempfile.TemporaryDirectory() as folder:
        lc.drop_blocks(options.model, blocks, Path(folder) / "short")
        found = score(Path(folder) / "short", protocol, against=options.model)
        if options.steps:
            given += f" --steps {options.steps}"
            taught = teach(Path(folder), protocol, options)
    said = {
        "table": "dropped-taught" if options.steps else "dropped",
        "arm": arm,
        "command": f"python research/dropped.py --data DATA {given}",
        "model": options.model,
        "text": "wikitext2-test.raw",
        "windows": options.windows,
        "calibration": None,
    }
    kept = ("bytes", "perplexity", "perplexity_stderr", "kl", "kl_stderr", "top1_agreement")
    numbers = {key: found[key] for key in kept} | taught | {"seconds": time.perf_counter() - began}
    return said | {"blocks": list(blocks)} | provenance() | {"numbers": numbers}


def teach(folder: Path, protocol: lc.Protocol, options: argparse.Namespace) -> Record:
    """Return what hints at a student before its lesson, and its distance to the dense model after it."""
    text = (options.data / "wikitext2-valid.txt").read_text(encoding="utf-8")
    read, unread = folder / "read.txt", folder / "unread.txt"
    read.write_text(text[:-50_000], encoding="utf-8")
    unread.write_text(text[-50_000:], encoding="utf-8")
    hints = lc.Protocol(text=unread, windows=2, length=512)
    states = tuple(drift(folder / "short", options.model, hints).blocks)[-1]
    before = score(folder / "short", hints, against=options.model)["kl"]
    data = {"dataset": str(read), "samples": 8 * options.steps + 8, "length": 256, "held_out": 8}
    recipe = LESSON | {"data": data, "batch": 8, "micro_batch": 2, "steps": options.steps}
    distill(folder / "short", options.model, recipe, folder / "taught")
    after = score(folder / "taught", protocol, against=options.model)
    return {
        "kl_before": before,
        "cka": states.cka,
        "error": states.error,
        "kl_taught": after["kl"],
        "perplexity_taught": after["perplexity"],
    }


def line(record: Record) -> str:
    """Return one line of the table."""
    numbers = record["numbers"]
    blocks = " ".join(map(str, record["blocks"]))
    quality = f"{numbers['perplexity']:.2f} | {numbers['kl']:.4f} | {numbers['top1_agreement']:.3f}"
    return f"| {record['arm']} | {blocks} | {quality} | {numbers.get('kl_taught', float('nan')):.4f} |"


if __name__ == "__main__":
    main()
