"""Compressing, choosing and making up for what is lost build no graph of gradients, unless blocks learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llmcompress as lc
from tests.tiny import save_tiny

TEXT = "Two herons wait where the mill stream bends; by noon the taller one has caught its third small fish. "
CHOICE = {
    "target": {"bpw": 4.6},
    "options": [
        [{"method": "gptq", "bits": 2, "group_size": 16}, {"method": "eora", "rank": 2}],
        [{"method": "gptq", "bits": 3, "group_size": 16}],
        [{"method": "gptq", "bits": 4, "group_size": 16}],
    ],
}
LEARNS = {"rates": {"scales": 1e-3}}


class GraphBuilt(Exception):
    """A tensor was kept for a backward pass."""


def compress(tmp_path: Path, **more: Any) -> None:
    """Compress a tiny model to a size, where whatever is kept for a backward pass raises GraphBuilt."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number}. {TEXT}" for number in range(60)))
    calibration = {"dataset": str(text), "samples": 8, "length": 32, "held_out": 2}
    source = save_tiny("llama", tmp_path / "dense")

    def refuse(_: torch.Tensor) -> None:
        raise GraphBuilt

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda kept: kept):
        lc.compress(source, {"version": 1, "calibration": calibration, **CHOICE, **more}, tmp_path / "out")


def test_no_step_keeps_anything_for_a_backward_pass(tmp_path: Path) -> None:
    compress(tmp_path)


@pytest.mark.slow
def test_blocks_that_learn_do(tmp_path: Path) -> None:
    with pytest.raises(GraphBuilt):
        compress(tmp_path, reconstruct=LEARNS)
