"""Tokens per second of a distillation against a bare PyTorch loop that does the same: same student, trained numbers,
batches and products, whole logits, torch's own KL and attention. In turn, in one process.

python research/training.py STUDENT [--teacher smollm2] [--steps 6] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional

from llmcompress.distillation.run import distill
from llmcompress.distillation.student.model import relaxed_student
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.recipe.distillation import Distillation
from llmcompress.weight.modules import decoded

RATES = {"scales": 1e-3, "norms": 1e-3}
BATCH, PART, LENGTH = 8, 4, 256


def ours(student: str, teacher: str, steps: int) -> list[float]:
    """Seconds of each step but the first."""
    data = {"dataset": "stdlib", "samples": BATCH * (steps + 1) + 2, "length": LENGTH, "held_out": 2}
    shape = {"batch": BATCH, "micro_batch": PART, "steps": steps, "compute": "bfloat16", "evaluate_every": steps}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        distill(student, teacher, Distillation.model_validate({"data": data, "rates": RATES, **shape}), output)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [BATCH * (LENGTH - 1) / line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:]


def bare(student: str, teacher: str, steps: int) -> list[float]:
    """Seconds of each step but the first."""
    learning = relaxed_student(load_model(locate(student), "cpu"), RATES)  # type: ignore[arg-type]
    dense = load_model(locate(teacher), "cpu").to(torch.bfloat16)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(learning.named_parameters().values(), lr=1e-4, weight_decay=0.0)
    seconds = []
    with decoded(learning.model), decoded(dense):
        for _ in range(steps):
            ids = torch.randint(0, dense.config.vocab_size, (BATCH, LENGTH))
            start = time.perf_counter()
            for part in ids.split(PART):
                with torch.autocast("cpu", torch.bfloat16):
                    with torch.no_grad():
                        wanted = dense(part, use_cache=False).logits[:, :-1].float().log_softmax(-1)
                    given = learning.model(part, use_cache=False).logits[:, :-1].float().log_softmax(-1)
                loss = functional.kl_div(given, wanted, reduction="sum", log_target=True)
                (loss / (BATCH * (LENGTH - 1))).backward()
            torch.nn.utils.clip_grad_norm_(learning.named_parameters().values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main() -> None:
    """Prints both speeds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(options.rounds):
        found["bare"] += bare(options.student, options.teacher, options.steps)
        found["ours"] += ours(options.student, options.teacher, options.steps)
    speeds = {name: BATCH * (LENGTH - 1) / statistics.median(seconds) for name, seconds in found.items()}
    print(f"ours {speeds['ours']:.0f} tokens/s, bare loop {speeds['bare']:.0f}, {speeds['ours'] / speeds['bare']:.2f}")


if __name__ == "__main__":
    main()
