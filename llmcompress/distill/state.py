"""The state of a run that is under way: what moves, the optimizer's moments, the step. Safetensors and JSON, replaced
as a whole, so that a run which is cut goes on from its last state, to the bit."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmcompress.distill.optimizers import moments, put_moments
from llmcompress.errors import DiskError, InputError

STOPPING = (signal.SIGTERM, signal.SIGINT)
METRICS = "metrics.jsonl"  # grows beside the state


@dataclass
class Progress:
    """How far a run is. `targets`: tokens predicted so far; `losses`: the state of each loss that has one; `shares`
    and `cursors`: of each domain, its part of a step and how many of its sequences were read; `history`: what was
    measured on the way."""

    step: int = 0
    targets: int = 0
    seconds: float = 0.0
    losses: list[dict[str, float] | None] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    cursors: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The signals that asked to stop, while it lasts: they wait for the end of a step, so that a state can be kept."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, lambda got, _: received.append(got)) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Keeper:
    """Keeps the state of one run in a folder. `run` identifies it: another recipe, other data or models are refused."""

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run

    def save(self, progress: Progress, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Replaces the state. Raises DiskError where it cannot be written."""
        staged = self.folder.with_name(self.folder.name + ".partial")
        known = {name: moments(optimizer, parameter) for name, parameter in named.items()}
        listed = {name: list(values) for name, values in known.items()}
        entries = {"run": self.run, "moments": listed, **vars(progress)}
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            save_file(_tensors(named, known), staged / "state.safetensors")
            (staged / "state.json").write_text(json.dumps(entries), encoding="utf-8")
            if (self.folder / METRICS).is_file():
                shutil.copyfile(self.folder / METRICS, staged / METRICS)
            shutil.rmtree(self.folder, ignore_errors=True)
            staged.rename(self.folder)
        except (OSError, SafetensorError) as error:
            raise DiskError(f"{self.folder} cannot be written ({error}); free some space and start again") from error

    def load(self, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
        """Puts the state back; a new `Progress` where there is none. Raises InputError for another run's, or damage."""
        if not self.folder.is_dir() or {path.name for path in self.folder.iterdir()} == {METRICS}:
            return Progress()
        try:
            entries = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            tensors = load_file(self.folder / "state.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{self.folder} cannot be read ({error}); remove it to start again") from error
        if entries.pop("run", None) != self.run:
            raise InputError(
                f"{self.folder} was left by a run with another recipe, other data or other models; remove it, or "
                f"choose another output folder"
            )
        for name, parameter in named.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"value.{name}"])
            found = {key: tensors[f"{key}.{name}"] for key in entries["moments"][name]}
            put_moments(optimizer, parameter, found)
        del entries["moments"]
        return Progress(**entries)

    def remove(self) -> None:
        """Forgets the state of a run that has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _tensors(named: Mapping[str, nn.Parameter], known: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    values = {f"value.{name}": parameter.detach() for name, parameter in named.items()}
    values |= {f"{key}.{name}": value for name, found in known.items() for key, value in found.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in values.items()}
