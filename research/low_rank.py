"""On how many layers does EoRA pay? Held-out output error against no compensation and plain SVD, layer by layer.

    python research/low_rank.py --data DATA

All variants see the same inputs (the dense prefix). `finer groups` spends EoRA's bits on scales instead of factors.
DATA is as for rows.py.
"""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path
from typing import Any

import torch

import llmcompress.methods  # noqa: F401 (registers them)
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import walk
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.data.files import read_text
from llmcompress.methods.layer import Layer, apply, relative_error, step
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.model import resolve
from llmcompress.weight.expression import bits
from llmcompress.weight.nodes import Dense

BASE: dict[str, Any] = {"method": "rtn", "bits": 3, "group_size": 64}
ARMS: dict[str, list[dict[str, Any]]] = {
    "no compensation": [BASE],
    "finer groups": [BASE | {"group_size": 24}],
    "svd": [BASE, {"method": "svd", "rank": 16}],
    "lqer": [BASE, {"method": "lqer", "rank": 16}],
    "eora": [BASE, {"method": "eora", "rank": 16}],
}


def main() -> None:
    """Prints the bits of every arm, and on which share of the layers EoRA has the lower error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2-valid.txt")
    parser.add_argument("--model", default="smollm2")
    options = parser.parse_args()
    source = resolve(options.model)
    text = read_text(options.data / "wikitext2-valid.txt")
    ids = torch.tensor(source.tokenizer()(text, add_special_tokens=False)["input_ids"][: 18 * 1024])
    tokens = CalibrationTokens(ids.view(18, 1024), held_out=2, source="given", requested=18)
    arch = architecture(source.config, source.skeleton())
    errors: dict[str, list[float]] = {name: [] for name in ARMS}
    stored = dict.fromkeys(ARMS, 0)
    weights = 0
    needs = frozenset({"outer"})
    for block in walk(source, arch, tokens.sequences, Statistics(needs=needs, prefix="dense"), held_out=2):
        for group in block.groups:
            for name in group.names:
                weight = block.weight(name)
                weights += prod(weight.shape)
                for arm, steps in ARMS.items():
                    layer = Layer(name, weight, Dense(weight.to(torch.bfloat16)), group.inputs)
                    done = apply(layer, [step(arguments) for arguments in steps]).expression()
                    stored[arm] += bits(done)
                    errors[arm].append(relative_error(weight, done, group.held_out))
    print("| arm | bpw | median held-out error | eora is lower on |\n|---|---|---|---|")
    for arm, found in errors.items():
        median = float(torch.tensor(found).median())
        lower = sum(ours < theirs for ours, theirs in zip(errors["eora"], found, strict=True)) / len(found)
        share = "" if arm == "eora" else f"{lower:.1%} of {len(found)} layers"
        print(f"| {arm} | {stored[arm] / weights:.3f} | {median:.5f} | {share} |")


if __name__ == "__main__":
    main()
