"""A small dense model, a text, and recipes with a target for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import save_tiny

TEXT = "The quick brown fox jumps over the lazy dog, and 42 grey geese fly past the old mill by the river. "
OPTIONS = [[{"method": "gptq", "bits": bits}] for bits in (2, 3, 4, 5, 6, 7)]


def make(folder: Path) -> Path:
    """Fills `folder` with a `dense` model of three blocks with a tied table, and a text; returns it."""
    changes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "tie_word_embeddings": True}
    save_tiny("llama", folder / "dense", **changes)
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return folder


def recipe(place: Path, target: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """A recipe whose options are grids of 2 to 7 bits."""
    calibration = {"dataset": str(place / "text.txt"), "samples": 16, "length": 48, "held_out": 4}
    return {"version": 1, "name": "aimed", "calibration": calibration, "target": target, "options": OPTIONS} | more
