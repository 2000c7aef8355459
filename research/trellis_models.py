"""Compare the codes of trellises in whole models: perplexity and KL at 1 to 4 bits, all else equal.

    python research/trellis_models.py --data DATA [--model MODEL] [--rates 1 1.5 2 2.5 3 4] [--seeds 0 1] [--jsonl FILE]

The recipe is `trellis-2` with other `bits` and `code`. Calibration is the first 16 windows of 1024 tokens of
`wikitext2-valid.txt`; scores are of the first `--windows` windows of `wikitext2-test.raw`. `--jsonl` collects a record
of each arm, and skips those that it has.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from records import Record, append, provenance, read_records
from rows import calibration

import llmcompress as lc
from llmcompress.evaluation.score import score
from llmcompress.recipe.read import read_recipe

CODES = ("table", "linear")


def main() -> None:
    """Measure every arm and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two WikiText-2 files")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 1.5, 2, 2.5, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--name", default="smollm2", help="of the model, in records")
    parser.add_argument("--memory", type=int, default=12)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each arm")
    options = parser.parse_args()
    done = {row["arm"] for row in read_records(options.jsonl)} if options.jsonl else set()
    print("| bits | code | bpw | perplexity | KL | seconds |\n|---|---|---|---|---|---|")
    for bits, seed, code in product(options.rates, options.seeds, CODES):
        if name_arm(bits, code, seed, options.name) not in done:
            record = measured(bits, code, seed, options)
            if options.jsonl:
                append(options.jsonl, record)
            print(line(record), flush=True)


def name_arm(bits: float, code: str, seed: int, model: str) -> str:
    """Return the name of an arm; those of the first seed on SmolLM2 are the shortest."""
    parts = [f"{bits:g} bits, {code}", *([f"seed {seed}"] if seed else []), *([model] if model != "smollm2" else [])]
    return ", ".join(parts)


def measured(bits: float, code: str, seed: int, options: argparse.Namespace) -> Record:
    """Compress and score one arm."""
    text = calibration(options.data) | {"bos": "auto"}
    steps = [{"method": "rotate"}, {"method": "trellis", "bits": bits, "memory": options.memory, "code": code}]
    recipe: dict[str, Any] = {
        "version": 1,
        "name": f"trellis-{bits:g}-{code}",
        "calibration": text,
        "asymmetric": 0.25,
        "seed": seed,
        "rules": [{"match": "*", "steps": [*steps, {"method": "refine", "passes": 1}]}],
    }
    protocol = lc.Protocol(text=options.data / "wikitext2-test.raw", windows=options.windows)
    with tempfile.TemporaryDirectory() as folder:
        report = lc.compress(options.model, read_recipe(recipe), Path(folder) / "model").report
        found = score(Path(folder) / "model", protocol, against=options.model)
    kept = {key: found[key] for key in ("bytes", "perplexity", "perplexity_stderr", "kl", "kl_stderr")}
    return {
        "table": "trellis_codes",
        "arm": name_arm(bits, code, seed, options.name),
        "bits": bits,
        "code": code,
        "command": f"python research/trellis_models.py --data DATA --windows {options.windows} --rates {bits:g}",
        "model": options.name,
        "text": "wikitext2-test.raw",
        "windows": options.windows,
        "calibration": text | {"dataset": Path(text["dataset"]).name},
        **provenance(),
        "numbers": kept | {"bpw": report.bpw, "model_bpw": report.model_bpw, "seconds": report.seconds},
    }


def line(record: Record) -> str:
    """Return one line of the table."""
    numbers = record["numbers"]
    quality = f"{numbers['bpw']:.3f} | {numbers['perplexity']:.2f} | {numbers['kl']:.4f} | {numbers['seconds']:.0f}"
    return f"| {record['bits']:g} | {record['code']} | {quality} |"


if __name__ == "__main__":
    main()
