"""Compare losses and mixtures with plain forward KL at equal tokens, in a table over several seeds.

python scripts/bench/lessons.py STUDENT --text OTHER [--steps 20] [--seeds 0 1] [--arms forward_kl taid ...] --out OUT

Every arm trains scales, norms and low-rank terms of rank 16 on Python's documentation, `ddk` and its control `mixed` on
half of it and half of the first part of OTHER, `self` on what the teacher writes, `cached` of a teacher of which the 64
likeliest tokens are kept; scored on documentation that no training saw and on the end of OTHER.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import llmcompress as lc
from llmcompress.distill.run import distill
from llmcompress.recipe.distillation import Distillation

TEACHER = "smollm2"
DOCS: dict[str, Any] = {"dataset": "stdlib", "length": 256, "held_out": 8}
BATCH = 8
KL = {"of": {"loss": "forward_kl"}}
LOSSES: dict[str, list[dict[str, Any]]] = {
    "forward_kl": [KL],
    "reverse_kl": [{"of": {"loss": "reverse_kl"}}],
    "js": [{"of": {"loss": "js", "beta": 0.5}}],
    "taid": [{"of": {"loss": "taid"}}],
    "dad": [{"of": {"loss": "dad"}}],
    "bdkd": [{"of": {"loss": "bdkd"}}],
    "cross_entropy": [{"of": {"loss": "cross_entropy"}}],
    "hidden": [KL, {"of": {"loss": "hidden"}, "weight": 0.5}],
}
MIXTURES = ("mixed", "ddk")
SELF, CACHED = "self", "cached"


def recipe(arm: str, steps: int, seed: int, other: Path) -> Distillation:
    """Return the recipe of an arm."""
    samples = steps * BATCH + DOCS["held_out"]
    data: Any = DOCS | {"samples": samples}
    if arm == SELF:
        data = {**data, "dataset": "self"}
    if arm in MIXTURES:
        part = {"length": 256, "held_out": 8, "samples": samples}
        data = [{"name": "docs", "dataset": "stdlib", **part}, {"name": "other", "dataset": str(other), **part}]
    more: dict[str, Any] = {"mixture": {"reweight": "ddk", "every": 5}} if arm == "ddk" else {}
    if arm == CACHED:
        more = {"teacher": {"kind": "cached", "k": 64}}
    asked = {
        "seed": seed,
        "data": data,
        "losses": LOSSES.get(arm, [KL]),
        "rates": {"scales": 3e-3, "norms": 3e-3, "factors": 3e-3},
        "adapt": {"rank": 16},
        "batch": BATCH,
        "micro_batch": 4,
        "steps": steps,
        "evaluate_every": steps,
    }
    return Distillation.model_validate(asked | more)


def scored(model: str | Path, texts: list[str | None]) -> list[tuple[float, float]]:
    """(KL to the teacher, perplexity) on each text; None is documentation."""
    found = [lc.score(model, lc.Protocol(text, windows=8, length=512), against=TEACHER) for text in texts]
    return [(one["kl"], one["perplexity"]) for one in found]


def main() -> None:
    """Prints a row for each arm: the shares of KL and gap that are gone, on both texts; means and half the spread."""
    arms = [*LOSSES, *MIXTURES, SELF, CACHED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=arms, choices=arms)
    parser.add_argument("--out", type=Path, required=True, help="where students and texts are kept")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    whole = options.text.read_text(encoding="utf-8")
    other = options.out / "other.txt"
    other.write_text(whole[: len(whole) * 3 // 4], encoding="utf-8")
    texts = [None, whole[len(whole) * 3 // 4 :]]
    dense = [perplexity for _, perplexity in scored(TEACHER, texts)]
    before = scored(options.student, texts)
    print("| arm | KL, docs | gap, docs | KL, other | gap, other |\n|---|---|---|---|---|", flush=True)
    for arm in options.arms:
        rows = []
        for seed in options.seeds:
            folder = options.out / f"{arm}-{seed}"
            if not folder.is_dir():
                distill(options.student, TEACHER, recipe(arm, options.steps, seed, other), folder)
            rows.append(recovered(scored(folder, texts), before, dense))
        cells = [f"{statistics.mean(each):.1%} ± {(max(each) - min(each)) / 2:.1%}" for each in zip(*rows)]
        print(f"| {arm} | {' | '.join(cells)} |", flush=True)


def recovered(
    after: list[tuple[float, float]], before: list[tuple[float, float]], dense: list[float]
) -> tuple[float, ...]:
    """The shares of KL and gap that are gone, on each text."""
    shares = []
    for (kl, perplexity), (first_kl, first_perplexity), best in zip(after, before, dense, strict=True):
        shares += [1 - kl / first_kl, 1 - math.log(perplexity / best) / math.log(first_perplexity / best)]
    return tuple(shares)


if __name__ == "__main__":
    main()
