"""Measure what choosing blocks to drop is worth: the chosen ones beside random ones, without any training.

    python research/dropped.py --data DATA [--count 6] [--seeds 0 1 2]

Arms: `by damage` and `by similarity`, as `llmcompress drop --count` has them; for each seed `random`, blocks drawn from
all but the first and the last; and `interval`, as many in a row, anywhere between these two. Scores perplexity and KL
against the dense model on the first `--windows` windows of 1024 tokens of DATA's `wikitext2-test.raw`. `--jsonl`
collects the records.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from records import Record, append, provenance

import llmcompress as lc
from llmcompress.evaluation.score import score
from llmcompress.models.dense.model import resolve
from llmcompress.surgery.block_choice import choose_blocks
from llmcompress.surgery.drop import blocks_of

COLUMNS = ("arm", "blocks", "perplexity", "KL", "top-1 agreement")


def main() -> None:
    """Measure every arm and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2-test.raw")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each arm")
    options = parser.parse_args()
    there = blocks_of(resolve(options.model))
    chosen = {by: choose_blocks(options.model, None, options.count, by).blocks for by in ("damage", "similarity")}
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for arm, blocks in arms(chosen, len(there), options.count, options.seeds):
        record = measured(arm, blocks, options)
        if options.jsonl:
            append(options.jsonl, record)
        print(line(record), flush=True)


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
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lc.drop_blocks(options.model, blocks, Path(folder) / "short")
        found = score(Path(folder) / "short", protocol, against=options.model)
    said = {
        "table": "dropped",
        "arm": arm,
        "command": f"python research/dropped.py --data DATA {given}",
        "model": options.model,
        "text": "wikitext2-test.raw",
        "windows": options.windows,
        "calibration": None,
    }
    kept = ("bytes", "perplexity", "perplexity_stderr", "kl", "kl_stderr", "top1_agreement")
    numbers = {key: found[key] for key in kept} | {"seconds": time.perf_counter() - began}
    return said | {"blocks": list(blocks)} | provenance() | {"numbers": numbers}


def line(record: Record) -> str:
    """Return one line of the table."""
    numbers = record["numbers"]
    blocks = " ".join(map(str, record["blocks"]))
    quality = f"{numbers['perplexity']:.2f} | {numbers['kl']:.4f} | {numbers['top1_agreement']:.3f}"
    return f"| {record['arm']} | {blocks} | {quality} |"


if __name__ == "__main__":
    main()
