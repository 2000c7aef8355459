"""Compress a model to 2 bits, distill the dense model into it, and score dense, compressed and distilled.

python examples/distill.py
python examples/distill.py --model org/model --output recovered
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import llmcompress as lc


def main(arguments: list[str] | None = None) -> None:
    """Write the compressed model to OUTPUT-compressed and the distilled one to OUTPUT."""
    parser = argparse.ArgumentParser(description="Compress a model, then distill the dense model into it.")
    parser.add_argument("--model", default="smollm2", help="a folder, a Hub id, or smollm2")
    parser.add_argument("--output", default="recovered", help="a new folder")
    parser.add_argument("--samples", default=736, type=int, help="sequences of 256 tokens to distill on")
    parser.add_argument("--windows", default=8, type=int, help="windows of text to score on")
    given = parser.parse_args(arguments)

    recipe: dict[str, Any] = {
        "version": 1,
        "name": "two-bits",
        "calibration": {"dataset": "builtin", "samples": 34, "length": 1024, "held_out": 2},
        "rules": [{"match": "*", "steps": [{"method": "rotate"}, {"method": "gptq", "bits": 2}]}],
    }
    learning = {
        "data": {"dataset": "stdlib", "samples": given.samples, "length": 256, "held_out": 8},
        "rates": {"scales": 3e-3, "norms": 3e-3},  # codes stay, so not a byte is added
        "batch": 8,
    }
    compressed = Path(f"{given.output}-compressed")
    lc.compress(given.model, recipe, compressed)
    result = lc.compress(given.model, recipe | {"distill": learning}, given.output)

    found = result.distillation or {}
    print(f"{found['tokens']:,} tokens in {found['seconds']:.0f} s; trained: {found['trained']}")
    table = lc.compare([given.model, compressed, given.output], lc.Protocol(windows=given.windows))
    for row in table["models"]:
        distance = "" if row["kl"] is None else f", KL {row['kl']:.4f}"
        print(f"{row['model']:30} {row['bytes']:>12,} bytes, perplexity {row['perplexity']:.3f}{distance}")


if __name__ == "__main__":
    main()
