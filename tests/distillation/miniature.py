"""A dense model, a student compressed from it, and a text, small enough to distil within a second."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.distillation.run import distill
from tests.tiny import save_tiny

TEXT = "Forty farms bring their corn to the mill by the river, and the miller counts every sack of it. "


def make(place: Path, rules: list[dict[str, Any]]) -> Path:
    """Fills the folder `place`: `dense`, `small` made from it by `rules`, `text.txt`; returns it."""
    return Path(shutil.copytree(_made(json.dumps(rules)), place, dirs_exist_ok=True))


@cache
def _made(rules: str) -> str:
    """The folder that `make` copies, once for all tests of a process."""
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place)
    save_tiny("llama", place / "dense", tie_word_embeddings=True)
    (place / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    data = {"dataset": str(place / "text.txt"), "samples": 8, "length": 32, "held_out": 2}
    recipe = {
        "version": 1,
        "rules": json.loads(rules),
        "calibration": data,
        "embeddings": [{"method": "rtn", "bits": 4}],
    }
    lc.compress(place / "dense", recipe, place / "small")
    return str(place)


def loaded(place: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The student and its teacher."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("small", "dense"))
    return student, teacher


def recipe(place: Path, **more: Any) -> dict[str, Any]:
    """A distillation over the text in `place`."""
    data = {"dataset": str(place / "text.txt"), "samples": 28, "length": 32, "held_out": 4}
    exact = {"batch": 4, "micro_batch": 2, "evaluate_every": 100, "compute": "float32"}
    return {"version": 1, "data": data, "rates": {"scales": 5e-3}, **exact} | more


class Cut(Exception):
    """An interruption of a run."""


def cut_short(place: Path, settings: dict[str, Any], output: Path, calls: int) -> None:
    """Begin a distillation that ends when it reports for the `calls`-th time."""
    left = [calls]

    def cut(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise Cut

    with pytest.raises(Cut):
        distill(place / "small", place / "dense", settings, output, progress=cut)


def weight_files(folder: Path) -> list[bytes]:
    """The weight files of a checkpoint."""
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def weights_bytes(folder: Path) -> int:
    """Of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
