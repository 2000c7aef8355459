"""Train a LoRA adapter on a compressed model, and fold it into the compressed weights.

pip install -e '.[distill]'
python examples/lora_on_compressed.py --output tuned
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

import llmcompress as lc

TEXT = "The mill stood by the river. The miller ground the corn, and the river turned the wheel. "


def train(model: PeftModel, ids: torch.Tensor, steps: int) -> list[float]:
    """Let the adapter learn one text `ids [1, tokens]`; return the loss before each step."""
    optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> None:
    """Compress a model to 4 bits, train an adapter on it, fold it in, and save the result."""
    parser = argparse.ArgumentParser(description="Train LoRA on a compressed model.")
    parser.add_argument("--model", default="smollm2", help="a folder, a Hub id, or smollm2")
    parser.add_argument("--output", default="tuned", help="a new folder")
    parser.add_argument("--steps", default=10, type=int)
    given = parser.parse_args(arguments)

    recipe = {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 32}]}]}
    result = lc.compress(given.model, recipe)
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    adapted = get_peft_model(result.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    losses = train(adapted, ids, given.steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    adapted.eval()
    with torch.no_grad():
        before = adapted(input_ids=ids).logits
        folded = lc.fold(adapted)
        after = folded(input_ids=ids).logits
    print(f"largest difference of logits after folding: {(before - after).abs().max():.2e}")
    folded.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)


if __name__ == "__main__":
    main()
