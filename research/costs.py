"""Processor seconds that compressing takes for each million weights: GPTQ, a trellis, and the prices of a target.

    python research/costs.py [--width 2048] [--blocks 1 3] [--jsonl FILE] [ARM ...]

Each arm runs, in a process of its own with one thread, on two random Llamas that differ in depth alone; the difference
is that of the blocks between, without start, text and tables. Calibration: 4 sequences of 512 tokens, 1 held out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import make
from records import ROOT, Record, append, provenance

TEXT = {"dataset": "builtin", "samples": 5, "length": 512, "held_out": 1}
GPTQ = [{"match": "*", "steps": [{"method": "gptq", "bits": 4, "group_size": 64}]}]
TRELLIS = [{"method": "rotate"}, {"method": "trellis", "bits": 2}, {"method": "refine", "passes": 1}]
ARMS: dict[str, dict[str, Any]] = {
    "gptq-4-g64": {"rules": GPTQ},
    "trellis-2": {"rules": [{"match": "*", "steps": TRELLIS}], "asymmetric": 0.25},
    "prices": {"target": {"bpw": 2.5}},
}
RUN = """
import json, sys
import llmcompress as lc
from llmcompress.allocation.allocate import allocate
from llmcompress.compression.job import prepare
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.read import read_recipe
model, recipe = sys.argv[1], json.loads(sys.argv[2])
if "target" in recipe:
    allocate(prepare(resolve(model), read_recipe(recipe)))
else:
    lc.compress(model, recipe)
"""


def main() -> None:
    """Measure the arms, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(ARMS)}; all by default")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, nargs=2, default=[1, 3])
    parser.add_argument("--jsonl", type=Path, help="collects a record of each arm")
    options = parser.parse_args()
    print("| arm | processor seconds per million weights |\n|---|---|")
    with tempfile.TemporaryDirectory() as place:
        models = [Path(place) / str(blocks) for blocks in options.blocks]
        for model, blocks in zip(models, options.blocks, strict=True):
            make(model, options.width, blocks)
        weights = (options.blocks[1] - options.blocks[0]) * 13 * options.width**2  # inner width 3, heads all alike
        for arm in options.arms or ARMS:
            few, many = (seconds(model, {"version": 1, "calibration": TEXT, **ARMS[arm]}) for model in models)
            each = (many - few) / weights * 1e6
            print(f"| {arm} | {each:.2f} |", flush=True)
            if options.jsonl:
                append(options.jsonl, record(arm, {"seconds": each, "few": few, "many": many}, options))


def seconds(model: Path, recipe: dict[str, Any]) -> float:
    """Return the processor seconds of a run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", RUN, str(model), json.dumps(recipe)]
    subprocess.run(words, check=True, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def record(arm: str, numbers: dict[str, float], options: argparse.Namespace) -> Record:
    """Return the record of an arm."""
    few, many = options.blocks
    words = f"--width {options.width} --blocks {few} {many} {arm}"
    shape = f"random Llamas of width {options.width} and {few} and {many} blocks"
    place = {"table": "costs", "arm": arm, "command": f"python research/costs.py {words}", "model": shape}
    return {**place, "text": None, "calibration": TEXT, "numbers": numbers, **provenance()}


if __name__ == "__main__":
    main()
