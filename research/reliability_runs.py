"""Runs that are killed, or that meet a fault, at any change of the disk; and what the next run makes of the rest."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trials import Outcome, contents, tried

import llmcompress as lc

CHANGES = ("fsync", "rename", "unlink", "mkdir", "rmdir")  # functions of os that a run changes the disk by
TIMED = frozenset({"report.json", "manifest.json", "allocation.json", "distillation.json", "metrics.jsonl"})
FAULTS: dict[str, Callable[[], BaseException]] = {
    "full disk": lambda: OSError(28, "No space left on device"),
    "input/output error": lambda: OSError(5, "Input/output error"),
    "no memory": MemoryError,
    "Ctrl-C": KeyboardInterrupt,
}
GPTQ = [{"method": "gptq", "bits": 3, "group_size": 8}]
OPTIONS = [[{"method": "rtn", "bits": bits, "group_size": 8}] for bits in (2, 4)]


def scenarios(text: str) -> dict[str, dict[str, Any]]:
    """Return recipes by name: blocks alone, with tables, blocks that learn two at a time, a target, a distillation."""
    calibration = {"dataset": text, "samples": 8, "length": 32, "held_out": 2}
    plain: dict[str, Any] = {"version": 1, "name": "trial", "calibration": calibration}
    gptq = plain | {"rules": [{"match": "*", "steps": GPTQ}]}
    learn = {"rates": {"scales": 1e-2, "norms": 1e-2}, "steps": 4, "evaluate_every": 2, "window": 2}
    data = {"dataset": text, "samples": 20, "length": 32, "held_out": 4}
    section = {"data": data, "rates": {"scales": 1e-3}, "batch": 4, "compute": "float32", "steps": 4, "save_every": 1}
    return {
        "blocks": gptq,
        "tables": gptq | {"embeddings": [{"method": "rtn", "bits": 8, "group_size": 8}], "head": GPTQ},
        "learning": gptq | {"reconstruct": learn},
        "target": plain | {"rules": [], "options": OPTIONS, "target": {"bpw": 5.0}},
        "distillation": gptq | {"distill": section | {"evaluate_every": 4}},
    }


@dataclass(frozen=True)
class Stage:
    """A scenario in `place`, which holds `dense` and `text.txt`: its recipe, the files of a whole run, and how often
    that changes the disk."""

    name: str
    place: Path
    recipe: dict[str, Any]
    whole: dict[str, str]
    changes: int


def prepared(name: str, place: Path) -> Stage:
    """Run a scenario to its end, and count."""
    recipe = scenarios(str(place / "text.txt"))[name]
    output = place / f"whole-{name}"
    found = tried(lambda: run(place, recipe, output, _Counting()), seconds=600)
    if found.kind != "done":
        raise SystemExit(f"{name} does not run: {found.said}")
    return Stage(name, place, recipe, contents(output, TIMED), found.said)


def run(place: Path, recipe: dict[str, Any], output: Path, watching: _Counting) -> int:
    """Compress in this process while `watching`; return how often the disk was changed."""
    for name in CHANGES:
        setattr(os, name, watching.over(getattr(os, name)))
    lc.compress(place / "dense", recipe, output)
    return watching.count


class _Counting:
    """Count changes of the disk."""

    def __init__(self) -> None:
        self.count = 0

    def over(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is counted and does what `original` does."""

        def counted(*given: Any, **named: Any) -> Any:
            self.count += 1
            return self.change(original, *given, **named)

        return counted

    def change(self, original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Do it."""
        return original(*given, **named)


class _Ending(_Counting):
    """Kill the process at change number `at`, before or behind it; or raise there."""

    def __init__(self, at: int, behind: bool, fault: Callable[[], BaseException] | None = None) -> None:
        super().__init__()
        self.at, self.behind, self.fault = at, behind, fault

    def change(self, original: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Do it, unless this is the end."""
        if self.count != self.at:
            return original(*given, **named)
        if self.fault is not None:
            raise self.fault()
        if self.behind:
            original(*given, **named)
        os.kill(os.getpid(), signal.SIGKILL)
        return None


def killed(stage: Stage, seed: int, folder: Path) -> tuple[str, str]:
    """Kill a run once, or twice, at places that the seed chooses; return where, and what became of it."""
    draw, output = random.Random(seed), folder / "out"
    phases = []
    for _ in range(draw.choice((1, 1, 2))):
        ending = _Ending(draw.randrange(1, stage.changes + 1), draw.random() < 0.5)
        found = tried(partial(run, stage.place, stage.recipe, output, ending))
        if found.kind == "killed":
            phases.append(phase(output))
        elif found.kind != "done":  # a second run may be shorter than the place in it
            return _phases(phases), found.kind if "exists already" not in str(found.said) else _judged(stage, output)
    return _phases(phases), _ended(stage, output)


def faulty(stage: Stage, seed: int, folder: Path) -> tuple[str, str]:
    """Let one change of the disk fail; return how, and what became of it, then and in the next run."""
    draw, output = random.Random(seed), folder / "out"
    name = draw.choice(sorted(FAULTS))
    ending = _Ending(draw.randrange(1, stage.changes + 1), behind=False, fault=FAULTS[name])
    found = tried(lambda: run(stage.place, stage.recipe, output, ending))
    if found.kind not in ("refused", "done"):
        return name, found.kind
    return name, _ended(stage, output)


def _ended(stage: Stage, output: Path) -> str:
    """Run the same command again, to its end, and judge what it made."""
    found: Outcome = tried(lambda: run(stage.place, stage.recipe, output, _Counting()))
    if found.kind == "done" or (found.kind == "refused" and "exists already" in str(found.said)):
        return _judged(stage, output)
    return "refused" if found.kind == "refused" else found.kind


def _judged(stage: Stage, output: Path) -> str:
    if contents(output, TIMED) != stage.whole:
        return "silent change"
    left = [path.name for path in output.parent.iterdir() if path != output and path.suffix != ".lock"]
    return f"left behind: {left[0]}" if left else "identical"


def phase(output: Path) -> str:
    """Return how far a run got, by what it left."""
    staging = output.with_name("out.partial")
    if output.exists():
        return "behind the rename"
    if (output.with_name("out.training")).exists():
        return "training"
    if (staging / "merging").exists() or list(staging.glob("checkpoint/model*.safetensors")):
        return "last phase"
    return "blocks" if (staging / "finished").exists() else "before the first block"


def _phases(phases: list[str]) -> str:
    return phases[-1] if phases else "not at all"


def fresh(folder: Path) -> Path:
    """Return the folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
