"""What a step minimises: the losses between the student's and the teacher's predictions of the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]


def hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the output head reads, `[sequences, length, width]`, of token ids `[sequences, length]`."""
    found: Tensor = model.base_model(input_ids=ids, use_cache=False)[0]
    return found


def head_of(model: PreTrainedModel) -> Head:
    """The function from hidden states `[..., width]` to logits `[..., vocabulary]`."""
    linear: nn.Module = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is None:
        return linear
    return lambda hidden: torch.tanh(linear(hidden) / cap) * cap


@torch.no_grad()
def check_head(model: PreTrainedModel, ids: Tensor) -> None:
    """Raises InputError for a model that makes logits of hidden states in another way than `head_of`."""
    few = ids[:1, :8]
    ours, own = head_of(model)(hidden_states(model, few)), model(input_ids=few, use_cache=False).logits
    if ours.shape != own.shape or not torch.allclose(ours.float(), own.float(), rtol=1e-2, atol=1e-2):
        kind = type(model).__name__
        raise InputError(f"a {kind} makes its logits in a way that is not known here; choose a model of another family")


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel, tokenizers: Sequence[dict[str, int]]) -> None:
    """Raises InputError unless both speak of the same tokens."""
    sizes = [model.get_input_embeddings().num_embeddings for model in (student, teacher)]
    if sizes[0] != sizes[1] or tokenizers[0] != tokenizers[1]:
        raise InputError(
            f"the student knows {sizes[0]} tokens and the teacher {sizes[1]}, or not the same ones; distil from the "
            f"model that the student was made from"
        )
