"""A tiny mixture that has learned something, and how far others are from it on text that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

from llmcompress.data.builtin import builtin_documents, stdlib_text
from tests.tiny import tiny_tokenizer
from tests.zoo import zoo

LENGTH, BATCH, STEPS, EXPERTS, BLOCKS = 96, 16, 350, 8, 3


def tokens_of(text: str) -> Tensor:
    """Bytes of a text as the tiny tokenizer numbers them, `[sequences, LENGTH]`."""
    ids = tiny_tokenizer().backend_tokenizer.encode(text, add_special_tokens=False).ids
    count = len(ids) // LENGTH
    return torch.tensor(ids[: count * LENGTH]).reshape(count, LENGTH)


def train(folder: Path, seed: int) -> Path:
    """Train a mixture of three blocks for about half a minute, and write it to `folder`."""
    more = {"num_hidden_layers": BLOCKS, "num_experts": EXPERTS, "norm_topk_prob": True, "output_router_logits": True}
    model: Any = zoo("qwen3_moe", seed, **more).train()
    torch.manual_seed(seed)
    text = tokens_of("\n\n".join(builtin_documents())[:1_500_000])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    for _ in range(STEPS):
        batch = text[torch.randint(len(text), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    model.config.output_router_logits = False
    model.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def predictions(model: Any) -> Tensor:
    found: Tensor = log_softmax(model(input_ids=tokens_of(stdlib_text("test")[:20_000])).logits.double(), -1)
    return found


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def distance(found: Any, dense: Tensor) -> float:
    """The mean KL of a model's predictions from the dense ones, in nats a token."""
    return float(kl_div(predictions(found), dense, reduction="sum", log_target=True)) / dense.shape[:2].numel()
