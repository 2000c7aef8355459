"""Distillation on a device, beside the targets of docs/results/distillation.md for twenty minutes on two cores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import llmcompress as lc
from llmcompress.distillation.run import distill
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import read_as
from llmcompress.surgery.block_choice import choose_blocks
from llmcompress.surgery.drop import drop_blocks
from scripts.gpu.compression import figure, measured
from scripts.gpu.given import Given, OutOfTimeError, peaks, restart_peak, wait

STUDENT, WINDOWS, DROPPED = "rotate-gptq-2-refine", 8, 6
TARGETS = {"low-rank": {"of_the_gap": 0.5, "of_the_kl": 0.4}, "shortened": {"of_the_gap": 0.6}}
LEAST = 45.0  # seconds that must be left for the second student


def distil(given: Given) -> None:
    """Distil a student of 2 bits with low-rank terms; then, if time is left, one that lost blocks."""
    asked = given.recipe(STUDENT)
    student = measured(given, STUDENT, asked, WINDOWS, figure(given, asked, WINDOWS, STUDENT))
    _taught(given, "low-rank", student)
    if not given.small and given.left < LEAST:
        raise OutOfTimeError(f"{given.left:.0f} seconds were left, too few for a student that lost blocks")
    short, model = given.work / "short", given.model()
    blocks, count, text = ("1", None, str(given.text())) if given.small else (None, DROPPED, "stdlib")
    drop_blocks(model, choose_blocks(model, blocks, count, text=text, device=given.device).blocks, short)
    _taught(given, "shortened", short)


def _taught(given: Given, name: str, student: Path) -> None:
    """Distil by a recipe, and write what came back of the gap and of the KL."""
    model, out, watch = given.model(), given.work / name, given.watching(name, "steps")
    before = _scored(given, student)
    restart_peak(given.device)
    began = wait(given.device)
    done = distill(student, model, _lesson(given, name), out, device=given.device, progress=watch)
    seconds = wait(given.device) - began
    cost: dict[str, Any] = {"seconds": seconds, "tokens": done.tokens, "tokens_per_second": done.tokens / done.seconds}
    cost |= {"history": done.history} | peaks(given.device)
    given.check_time(f"{name}, taught but not scored,")
    after, dense = _scored(given, out), lc.score(model, given.protocol(WINDOWS), device=given.device)["perplexity"]
    gap, left = (math.log(scores["perplexity"] / dense) for scores in (before, after))
    shares = {"of_the_gap": 1 - left / gap if gap else None, "of_the_kl": 1 - after["kl"] / before["kl"]}
    given.found(name, cost | shares | {"before": before, "after": after, "dense_perplexity": dense,
                                       "targets": TARGETS[name]})  # fmt: skip


def _lesson(given: Given, name: str) -> Distillation:
    text = {"dataset": str(given.text()), "samples": 24, "length": 32, "held_out": 4}
    small = [f"data={json.dumps(text)}", "steps=2", "evaluate_every=1", "batch=4", "micro_batch=2"]
    return read_as(Distillation, name, ["controls=[]", *(small if given.small else [])])


def _scored(given: Given, folder: Path) -> dict[str, Any]:
    found = lc.score(folder, given.protocol(WINDOWS), against=given.model(), device=given.device)
    return {key: found[key] for key in ("perplexity", "kl", "kl_stderr")}
