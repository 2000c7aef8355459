"""Passports: how much of its gain a LoRA of the dense model keeps on models that were compressed from it.

    python research/adapters.py MODEL... --out OUT [--steps 100] [--rank 8]

The adapter learns on the dense model from the source code of Python's library, without IDLE, and is judged on that of
IDLE, 16x256 tokens. It is trained by a plain loop once, and kept in OUT.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model

import llmcompress as lc
from llmcompress.evaluation.perplexity import text_windows
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.reporting.tables import adapter_table
from llmcompress.runtime.precision import product_dtype, products

DENSE = "smollm2"
LENGTH, BATCH = 256, 4
LEAST = 4000  # characters of a module


def source(idle: bool) -> str:
    """Return source code of Python's library: IDLE's, or that of all other modules in an order drawn once."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted((library / "idlelib").glob("*.py"))[10:30] if idle else sorted(library.glob("*.py"))
    if not idle:
        Random(0).shuffle(paths)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return "\n\n".join(text for text in texts if len(text) >= LEAST)


def train(folder: Path, steps: int, rank: int) -> None:
    """Write the adapter that learned `steps` batches."""
    place = locate(DENSE)
    tokenizer, model = load_tokenizer(place.folder), load_model(place, dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    ids = text_windows(tokenizer, source(idle=False), steps * BATCH, LENGTH)
    numbers = [value for value in adapted.parameters() if value.requires_grad]
    cpu = torch.device("cpu")
    optimizer = torch.optim.AdamW(numbers, lr=5e-4, weight_decay=0.0)
    for step, batch in enumerate(ids.split(BATCH), start=1):
        with products(cpu, product_dtype("auto", cpu)):
            loss = adapted(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(numbers, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    adapted.save_pretrained(str(folder))


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="where the adapter is kept")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    if not options.out.is_dir():
        train(options.out, options.steps, options.rank)
    protocol = lc.Protocol(source(idle=True), windows=16, length=LENGTH)
    print("| model | gain, dense | gain | kept | KL | alike | distinct pairs |\n|---|---|---|---|---|---|---|")
    for model in options.models:
        [row] = adapter_table(lc.passport(model, [options.out], DENSE, protocol).to_json()).rows
        print(f"| {' | '.join([Path(model).name, *row[1:]])} |", flush=True)


if __name__ == "__main__":
    main()
