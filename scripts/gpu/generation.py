"""Tokens a second of a dense model and of compressed ones on a device, by the loop of `llmcompress bench`, in turn."""

from __future__ import annotations

import statistics
from typing import Any

import torch

import llmcompress as lc
from llmcompress.benchmark.runners import generate
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from scripts.gpu.given import Given, peaks, restart_peak

PROMPT, TOKENS, ROUNDS = 512, 64, 5
STEPS = [{"method": "rtn", "bits": 4, "group_size": 32}]
GRIDS = {"version": 1, "calibration": None, "rules": [{"match": "*", "steps": STEPS}]}


def generation(given: Given) -> None:
    """Time each model in every round: dense, and compressed to grids and, if stage `recipe` made one, to trellises,
    as they are stored and with their weights decoded once."""
    grids = given.work / "grids"
    lc.compress(given.model(), GRIDS, grids, device=given.device)
    trellis = given.work / "trellis-2"
    places = {"dense": given.model(), "4-bit grids": str(grids)}
    if trellis.is_dir():
        places["trellis-2"] = str(trellis)
    models, held = {}, {}
    for name, place in places.items():
        restart_peak(given.device)
        models[name] = load_model(locate(place), given.device, torch.bfloat16).eval()
        held[name] = peaks(given.device)
    prompt, tokens, rounds = (16, 4, 1) if given.small else (PROMPT, TOKENS, ROUNDS)
    ids = [number % 256 for number in range(prompt)]
    times: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds + 1):
        for name, model in models.items():
            for decoded in (False, True) if name != "dense" else (False,):
                given.check_time(f"round {number} of {rounds}")
                found = _turn(model, ids, tokens if number else 2, decoded)
                if number:
                    times.setdefault(f"{name}{', decoded once' * decoded}", []).append(found)
    dense = statistics.median(one["decode"] for one in times["dense"])
    for arm, turns in times.items():
        median = {key: statistics.median(one[key] for one in turns) for key in ("prefill", "decode")}
        ratio = {"decode_ratio": median["decode"] / dense}
        given.found(arm, median | ratio | {"prompt": prompt, "tokens": tokens, "rounds": rounds} | held.get(arm, {}))


def _turn(model: Any, prompt: list[int], tokens: int, decoded: bool) -> dict[str, float]:
    """Return tokens a second, of the prompt and of those behind it."""
    if decoded:
        with lc.decoded(model):
            return _turn(model, prompt, tokens, False)
    times = generate(model, prompt, tokens)[1]
    return {"prefill": times.prompt / times.prefill, "decode": times.tokens / times.decode}
