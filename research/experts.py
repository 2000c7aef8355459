"""Measure what experts cost: prune, merge, condense and replace those of tiny mixtures, and print KLs on unseen text.

    python research/experts.py [--seeds 5]

Each seed trains a mixture of three blocks, 8 experts each, 2 of them for a token, on the text that comes with the
library, for half a minute. KL is from its own predictions, in nats a token, on documentation of Python. Beside it
stands the damage that was predicted, summed over blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from records import ROOT, Record, provenance
from torch import Tensor

import llmcompress as lc

sys.path.insert(0, str(ROOT))
from tests.surgery.experts.trained import BLOCKS, distance, loaded, predictions, train

RANDOM = 3  # controls


def main() -> None:
    """Measure every seed and print its numbers as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(provenance()))
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"seed": seed} | measured(Path(folder), seed)), flush=True)


def measured(folder: Path, seed: int) -> Record:
    """Return the KL, the predicted damage and the share of the bytes of every arm."""
    model = train(folder / "dense", seed)
    dense, found = predictions(loaded(model)), {}
    for name, arm in arms(model).items():
        report = arm(folder / name)
        found[name] = {
            "kl": round(distance(loaded(folder / name), dense), 4),
            "damage": round(sum(block.damage for block in report.blocks), 4),
            "bytes": round(report.bytes_after / report.bytes_before, 3),
        }
    return found | {f"drop-{block}": {"kl": round(without(model, block, dense), 4)} for block in range(BLOCKS)}


def arms(model: Path) -> dict[str, Any]:
    """Return what is done to a model, by name; each takes the folder that it writes."""
    found: dict[str, Any] = {}
    for keep in (4, 5):
        prune = partial(lc.prune_experts, model, keep=keep, text="builtin")
        found |= {f"{by}-{keep}": partial(prune, by=by) for by in ("reap", "frequency")}
        found |= {f"random-{keep}-{seed}": partial(prune, by="random", seed=seed) for seed in range(RANDOM)}
        found[f"merge-{keep}"] = partial(lc.merge_experts, model, keep=keep, text="builtin")
    for by in ("reap", "frequency"):
        found[f"replace-4-{by}"] = partial(lc.replace_experts, model, count=4, by=by, text="builtin")
    for block in range(BLOCKS):
        found[f"condense-{block}"] = partial(lc.condense_experts, model, blocks=[block], text="builtin")
    return found


def without(model: Path, block: int, dense: Tensor) -> float:
    """Return the KL of the model without the experts of a block."""
    cut = loaded(model)
    cut.model.layers[block].mlp.forward = torch.zeros_like
    return distance(cut, dense)


if __name__ == "__main__":
    main()
