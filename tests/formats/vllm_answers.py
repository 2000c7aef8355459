"""A model's folder asked in vLLM's engine, where its environment is, and by our own modules."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.formats.vllm_engine import TOKENS
from tests.rules.source_tree import ROOT


def vllm_scores(folder: Path, script: str = "vllm_engine.py") -> Tensor:
    """Return the log-probability of each token behind the ones before it. Skips where vLLM is missing."""
    program = ROOT / ".engines" / "vllm" / "bin" / "python"
    if not program.exists():
        pytest.skip("there is no vLLM here; research/engines/setup makes its environment")
    answer = folder.with_name("answer.json")
    subprocess.run([program, Path(__file__).with_name(script), folder, answer], check=True, cwd=folder.parent)
    return torch.tensor(json.loads(answer.read_text())["scores"])


def our_scores(folder: Path) -> Tensor:
    """Return the same of our own modules, or of transformers, in float32."""
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
