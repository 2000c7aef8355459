"""The task of a stage: its device, model, text and time, and the file of its findings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

import llmcompress as lc
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.read import read_recipe
from llmcompress.runtime.memory import peak_memory

SPARE = 0.05  # of a stage's time, in which it ends by itself before it is ended
LATE = 3  # exit code of a stage that had no time left
LINE = "Line {} says {} things about {} geese and the {} sacks of corn.\n"


class OutOfTimeError(Exception):
    """A stage has used up its time; its findings so far are kept."""


@dataclass(frozen=True)
class Given:
    """The task of a stage.

    `small`: True for tiny models, which try every part within seconds; `work`: the folder of this run; `seconds`: for
    the stage; `data`: a folder with the two WikiText-2 files, None for the text of the package; `tokens`, `forms`: of
    the timed products.
    """

    stage: str
    device: str
    small: bool
    work: Path
    seconds: float
    data: Path | None = None
    tokens: str = "1,4,16"
    forms: str = ""
    started: float = field(default_factory=time.monotonic)

    def to_json(self) -> str:
        """Return the task as text, for the stage's process."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "started"}, default=str)

    @classmethod
    def of_json(cls, text: str) -> Self:
        """Return the inverse of `to_json`; the clock starts here."""
        given = cls(**json.loads(text))
        return replace(given, work=Path(given.work), data=None if given.data is None else Path(given.data))

    @property
    def left(self) -> float:
        """The seconds left, less the time to end."""
        return self.seconds * (1 - SPARE) - (time.monotonic() - self.started)

    @property
    def findings(self) -> Path:
        """The file of the stage's findings, a JSON object a line."""
        return self.work / f"{self.stage}.jsonl"

    def found(self, arm: str, numbers: dict[str, Any], **more: Any) -> None:
        """Write a finding at once, so that a later failure cannot lose it."""
        with self.findings.open("a") as file:
            file.write(json.dumps({"arm": arm, **more, "numbers": numbers}) + "\n")

    def check_time(self, doing: str) -> None:
        """Raise OutOfTimeError if no time is left."""
        if self.left <= 0:
            raise OutOfTimeError(f"{doing} had {self.seconds:.0f} seconds, which were not enough")

    def watching(self, arm: str, unit: str = "blocks") -> Callable[..., None]:
        """Return a `progress` that ends the work when time is out, and then writes its state."""
        started = time.monotonic()

        def watch(done: int, count: int, *_: float) -> None:
            if self.left <= 0:
                self.found(f"{arm}, unfinished", {unit: done, "of": count, "seconds": time.monotonic() - started})
                self.check_time(f"{arm}, {done} of {count} {unit} done,")

        return watch

    def model(self) -> str:
        """Return the embedded model, or a tiny random one."""
        if not self.small:
            return "smollm2"
        from tests.tiny import save_tiny

        place = self.work / "tiny"
        return str(place if place.exists() else save_tiny("llama", place, tie_word_embeddings=True))

    def text(self) -> Path:
        """Return a text for random models."""
        path = self.work / "text.txt"
        if not path.exists():
            path.write_text("".join(LINE.format(i, i * i, i % 7, i % 11) for i in range(4000)))
        return path

    def calibration(self) -> dict[str, Any] | None:
        """Return the calibration that replaces the recipe's; None to keep the recipe's."""
        if self.small:
            return {"dataset": str(self.text()), "samples": 6, "length": 32, "held_out": 2}
        if self.data is None:
            return None
        from rows import calibration

        return calibration(self.data)

    def recipe(self, name: str, *settings: str) -> Recipe:
        """Return a recipe by its name, or file, with this run's calibration."""
        from records import recipe_path

        text = self.calibration()
        more = () if text is None else (f"calibration={json.dumps(text)}",)
        return read_recipe(recipe_path(name), [*more, *settings])

    def protocol(self, windows: int) -> lc.Protocol:
        """Return the text to score on: WikiText-2 test, or documentation of Python."""
        if self.small:
            return lc.Protocol(text=self.text(), windows=2, length=32)
        return lc.Protocol(text=None if self.data is None else self.data / "wikitext2-test.raw", windows=windows)


def restart_peak(device: str) -> None:
    """Count a GPU's memory from here on."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: str) -> dict[str, int]:
    """Return the most memory of the process so far, and of the GPU since `restart_peak`, in bytes."""
    found = {"peak_memory_bytes": peak_memory()}
    if torch.device(device).type == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
        found["peak_gpu_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return found


def wait(device: str | torch.device) -> float:
    """Return the time when a device has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
