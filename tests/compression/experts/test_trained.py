"""A mixture that has learned something: which ways of saving experts keep what it knows, on text it has not seen.

Only orders that are far from the noise between seeds are held on to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.data.builtin import builtin_documents, stdlib_text
from tests.tiny import tiny_tokenizer
from tests.zoo import zoo

pytestmark = pytest.mark.slow
Note = Callable[[str, object], None]  # of figures, for --junit-xml
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "dense", 0)


@torch.no_grad()
def predictions(model: Any) -> Tensor:
    found: Tensor = log_softmax(model(input_ids=tokens_of(stdlib_text("test")[:20_000])).logits.double(), -1)
    return found


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def distance(found: Any, dense: Tensor) -> float:
    """The mean KL of a model's predictions from the dense ones, in nats a token."""
    return float(kl_div(predictions(found), dense, reduction="sum", log_target=True)) / dense.shape[:2].numel()


@pytest.fixture(scope="module")
def dense(trained: Path) -> Tensor:
    return predictions(loaded(trained))


def test_pruning_by_reap_is_better_than_at_random(
    trained: Path, dense: Tensor, tmp_path: Path, record_property: Note
) -> None:
    def kl(by: str, seed: int = 0) -> float:
        out = tmp_path / f"{by}-{seed}"
        lc.prune_experts(trained, out, keep=EXPERTS // 2, by=by, seed=seed, text="builtin")
        return distance(loaded(out), dense)

    random = [kl("random", seed) for seed in range(5)]
    best, often = kl("reap"), kl("frequency")
    record_property("kl", {"reap": best, "frequency": often, "random": random})
    assert best < sum(random) / len(random)


def test_condensing_is_better_than_dropping_the_layer(
    trained: Path, dense: Tensor, tmp_path: Path, record_property: Note
) -> None:
    for block in range(BLOCKS):
        lc.condense_experts(trained, tmp_path / f"{block}", blocks=[block], text="builtin")
        without = loaded(trained)
        without.model.layers[block].mlp.forward = torch.zeros_like
        condensed, dropped = distance(loaded(tmp_path / f"{block}"), dense), distance(without, dense)
        record_property(f"kl of block {block}", {"condensed": condensed, "dropped": dropped})
        assert condensed < dropped


def test_factors_are_better_than_nothing_in_the_same_experts(
    trained: Path, dense: Tensor, tmp_path: Path, record_property: Note
) -> None:
    """Of a quarter of their size; the others are zero, and routers still choose them."""
    report = lc.replace_experts(trained, tmp_path / "out", count=EXPERTS // 2, text="builtin")
    without = loaded(trained)
    for block in report.blocks:
        experts = without.get_submodule(block.path)
        for row in block.experts:
            if row.fate == "replaced":
                experts.down_proj.data[row.number] = 0
    replaced, zero = distance(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), dense), distance(without, dense)
    record_property("kl", {"replaced": replaced, "zero": zero})
    assert replaced < zero
