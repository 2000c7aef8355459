"""Heads for an objective: the model's own logits, without a cast of the same matrix for every chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress.data.batch import Batch
from llmcompress.distillation.objective.forward import check_head, head_of, hidden_states
from llmcompress.weight.modules import decoded
from tests.distillation.miniature import make
from tests.tiny import tiny
from tests.zoo import zoo

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model and one made `small`, its table compressed."""
    return make(tmp_path_factory.mktemp("objective"), RULES)


class _Casts(TorchDispatchMode):
    """Counts the tensors of `size` that become bfloat16."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16 and found.shape == self.size:
            self.count += 1
        return found


def frozen(folder: Path) -> PreTrainedModel:
    """A float32 model in which nothing trains."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.requires_grad_(False)


def hidden_of(model: PreTrainedModel) -> Tensor:
    """Return random hidden states of 12 tokens, for a head to read."""
    return torch.randn(12, model.config.hidden_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["dense", "small"])
def test_under_autocast_a_frozen_head_is_cast_once_for_all_chunks(name: str, place: Path) -> None:
    model = frozen(place / name)
    own, hidden = model.get_output_embeddings(), hidden_of(model).requires_grad_()
    with decoded(model), torch.autocast("cpu", torch.bfloat16):
        with _Casts((model.config.vocab_size, model.config.hidden_size)) as casts:
            head = head_of(model)
            found = torch.cat([head(part) for part in hidden.split(4)])
        wanted = torch.cat([own(part) for part in hidden.split(4)])
    assert casts.count == 1
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    ours, theirs = (torch.autograd.grad(logits.float().square().sum(), hidden)[0] for logits in (found, wanted))
    assert torch.equal(ours, theirs)


def test_a_trained_or_uncast_head_is_used_unchanged(place: Path) -> None:
    model = frozen(place / "dense")
    own: nn.Module = model.get_output_embeddings()
    assert head_of(model) is own
    own.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert head_of(model) is own


HEADS: dict[str, dict[str, float]] = {
    "xlstm": {"output_logit_soft_cap": 0.5},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.3},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
    "granite": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "mpt": {},
}


@pytest.mark.parametrize("family", HEADS)
@torch.no_grad()
def test_a_head_computes_the_models_logits(family: str) -> None:
    model, ids = zoo(family, **HEADS[family]), torch.arange(3, 19)[None]
    wanted = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(head_of(model)(hidden_states(model, Batch.of(ids))), wanted, rtol=1e-5, atol=1e-6)
    check_head(model, ids)


@torch.no_grad()
def test_a_head_of_gemma_computes_the_models_logits() -> None:
    model, ids = tiny("gemma2", final_logit_softcapping=0.5), torch.arange(3, 19)[None]
    wanted = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(head_of(model)(hidden_states(model, Batch.of(ids))), wanted, rtol=1e-5, atol=1e-6)
