"""Compression on a device: by a recipe, to a size, in the shape of a billion weights, and its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memory import make
from records import RESULTS, Record, read_records

import llmcompress as lc
from llmcompress.cli.compress import build_recipe, target_change
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.read import read_recipe
from scripts.gpu.given import Given, peaks, restart_peak, wait

RECIPES = (("trellis-2", 8), ("default", 16))  # with the windows that their records were scored on
BPW, BPW_WINDOWS = 2.05, 32
TO_A_SIZE = {  # of random models
    "target": {"bpw": 3.5},
    "options": [[{"method": "rtn", "bits": bits}] for bits in (2, 3, 4)],
    "damage": "distortion",
}
WIDTH, BLOCKS = 2048, 3  # of the shape of a billion weights, and how many of its 16 blocks
DEPTHS, MEMORY_WIDTH = (4, 12), 1024
GROWTH = 1.1  # most that a GPU's peak may grow with the depth
LENGTH = 512  # tokens in a calibration sequence of a random model
BESIDE = ("perplexity", "kl", "seconds", "peak_memory_bytes")  # figures of the CPU that are kept
DOCUMENTATION, TEST = "Python's documentation", "wikitext2-test.raw"  # as records name them


def recipe(given: Given) -> None:
    """Compress by recipes."""
    for name, windows in RECIPES[: 1 if given.small else None]:
        asked = given.recipe(name)
        measured(given, name, asked, windows, figure(given, asked, windows, name))


def bpw(given: Given) -> None:
    """Compress to a size, with nothing else said."""
    text = given.calibration()
    if given.small:
        asked = read_recipe({"version": 1, "calibration": text, "rules": [], **TO_A_SIZE})
    else:
        settings = [] if text is None else [f"calibration={json.dumps(text)}"]
        asked = build_recipe(None, settings, None, target_change(BPW, None, None, None), False)
    beside = figure(given, asked, BPW_WINDOWS, "budget-2", f"{BPW:.3f}")  # the same but for its name
    measured(given, f"--bpw {3.5 if given.small else BPW}", asked, BPW_WINDOWS, beside)


def measured(given: Given, arm: str, asked: Recipe, windows: int, beside: Record | None = None) -> Path:
    """Compress and score; return the folder. `beside`: the CPU's figures, to be written beside these."""
    out, model = given.work / arm.replace(" ", ""), given.model()
    numbers = _cost(given, arm, model, asked, out)
    given.check_time(f"{arm}, compressed but not scored,")
    scores = lc.score(out, given.protocol(windows), against=model, device=given.device)
    numbers |= {key: scores[key] for key in ("perplexity", "kl", "kl_stderr", "top1_agreement")}
    cpu = {} if beside is None else {"cpu": {key: beside["numbers"][key] for key in BESIDE if key in beside["numbers"]}}
    text = None if asked.calibration is None else asked.calibration.model_dump(mode="json")
    said = {"calibration": text, "recipe": asked.name, "text": scores["protocol"]["text"], "windows": windows}
    given.found(arm, numbers | cpu, **said)
    return out


def figure(given: Given, asked: Recipe, windows: int, name: str, arm: str | None = None) -> Record | None:
    """Return the record in docs/results of a recipe, or of an `arm` of it, on the CPU, calibrated and scored on the
    same text; of several one that has a KL, None where there is none."""
    if given.small or asked.calibration is None:
        return None
    text = DOCUMENTATION if given.data is None else TEST
    records = [one for path in sorted(RESULTS.glob("*.jsonl")) for one in read_records(path)]
    alike = [
        one
        for one in records
        if one.get("recipe") == name
        and (arm is None or one.get("arm") == arm)
        and one.get("windows") == windows
        and str(one["text"]).startswith(text)
        and Path((one["calibration"] or {}).get("dataset", "")).name == Path(asked.calibration.dataset).name
    ]
    return max(alike, key=lambda one: "kl" in one["numbers"], default=None)


def billion(given: Given) -> None:
    """Compress random blocks in the shape of a billion weights: by a recipe, and to a size."""
    width, blocks = (64, 2) if given.small else (WIDTH, BLOCKS)
    model = given.work / "billion"
    make(model, width, blocks)
    text = calibration(given, 32 if given.small else LENGTH)
    steps = [{"method": "rotate"}, {"method": "trellis", "bits": 2}]
    rules = [{"match": "*", "steps": [{"method": "gptq", "bits": 3, "group_size": 64}]}]
    arms: dict[str, dict[str, Any]] = {
        "random, gptq 3 bits": {"rules": rules},
        "random, trellis 2 bits": {"rules": [{"match": "*", "steps": steps}]},
        "random, to 3.5 bits": {"rules": [], **TO_A_SIZE},
    }
    for arm, more in arms.items():
        asked, out = {"version": 1, "calibration": text, **more}, given.work / arm.replace(" ", "")
        given.found(arm, _cost(given, arm, model, asked, out), model=named(width, blocks), calibration=text)


def memory(given: Given) -> None:
    """Compress random models of two depths, and compare their peaks."""
    found, width = [], 64 if given.small else MEMORY_WIDTH
    text = calibration(given, 32 if given.small else LENGTH)
    for depth in (2, 3) if given.small else DEPTHS:
        model, arm = given.work / f"deep-{depth}", f"{depth} blocks"
        make(model, width, depth)
        rules = [{"match": "*", "steps": [{"method": "gptq", "bits": 3}]}]
        asked = {"version": 1, "calibration": text, "rules": rules}
        numbers = _cost(given, arm, model, asked, given.work / f"small-{depth}")
        numbers["estimate_bytes"] = lc.plan(model, asked).peak_memory_bytes
        given.found(arm, numbers, model=named(width, depth), calibration=text)
        found.append(numbers.get("peak_gpu_bytes", 0))
    if found[1] > GROWTH * found[0]:
        raise SystemExit(f"the peak of the GPU's memory grows with the depth, from {found[0]} to {found[1]} bytes")


def named(width: int, blocks: int) -> str:
    """Return what a random model is called."""
    return f"a Llama of {blocks} blocks, width {width}, random weights"


def calibration(given: Given, length: int) -> dict[str, Any]:
    """Return the calibration of random models."""
    return {"dataset": str(given.text()), "samples": 18, "length": length, "held_out": 2}


def _cost(given: Given, arm: str, model: str | Path, asked: Recipe | dict[str, Any], out: Path) -> dict[str, Any]:
    """Compress into `out`; return the time, the sizes and the peaks."""
    watch, pricing = given.watching(arm), given.watching(f"{arm}, prices")
    restart_peak(given.device)
    began = wait(given.device)
    report = lc.compress(model, asked, out, device=given.device, progress=watch, pricing=pricing).report
    found = {"seconds": wait(given.device) - began, "bpw": report.bpw, "bytes": report.bytes} | peaks(given.device)
    return found | ({"warnings": list(report.warnings)} if report.warnings else {})
