"""The output heads of student and teacher: hidden states, logits, and checks that the two models fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.data.batch import Batch
from llmcompress.distillation.objective.chunked_loss import HeadLoss
from llmcompress.errors import InputError
from llmcompress.losses.loss import SumAndCount
from llmcompress.models.dense.blocks import body
from llmcompress.weight.modules import CompressedLinear
from llmcompress.weight.nodes import Dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

APART = 0.1  # relative difference: rounding to bfloat16 makes less, another document more

Head = Callable[[Tensor], Tensor]

# Entries of configs by which families change what their output head computes; `check_head` finds those that do not.
FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISORS = ("logits_scaling",)  # Granite
CAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma; RecurrentGemma


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the input of the output head, `[sequences, length, width]`.

    If documents share a sequence, the positions of each start at 0. From that, transformers makes the mask that keeps
    them apart (`check_boundaries` checks that it does so for a model).
    """
    positions = {} if batch.documents is None else {"position_ids": batch.positions()}
    found: Tensor = body(model)(input_ids=batch.ids, use_cache=False, **positions)[0]
    if torch.is_autocast_enabled(found.device.type):
        return found
    # Mamba's residual stream is float32, whatever its head is; what stands for a model may have no dtype
    return found.to(getattr(model, "dtype", found.dtype))


def head_of(model: PreTrainedModel) -> Head:
    """Return the function from hidden states `[..., width]` to logits `[..., vocabulary]`.

    Call this once for a whole computation, under the autocast that it will run in.
    """
    linear = _cast_once(model.get_output_embeddings())
    factor = prod(_entries(model, FACTORS)) / prod(_entries(model, DIVISORS))
    cap = next(_entries(model, CAPS), None)
    scaled = linear if factor == 1 else lambda hidden: linear(hidden) * factor
    return scaled if cap is None else lambda hidden: torch.tanh(scaled(hidden) / cap) * cap


def _entries(model: PreTrainedModel, names: Sequence[str]) -> Iterator[float]:
    """Yield the numbers that a model's config has under these names."""
    for name in names:
        if isinstance(value := getattr(model.config, name, None), int | float):
            yield value


def _cast_once(linear: nn.Module) -> Head:
    """Return `linear`, under autocast with its frozen matrix already cast.

    Autocast keeps only its casts of parameters that train. It would cast a frozen table again for every chunk of
    tokens, a seventh of a step.
    """
    matrix: Tensor | None = None
    match linear:
        case CompressedLinear(ready=Dense(values)):
            matrix = values
        case nn.Linear(weight=weight) if type(linear) is nn.Linear and not weight.requires_grad:
            matrix = weight
    bias = getattr(linear, "bias", None)
    if matrix is None or bias is not None or not torch.is_autocast_enabled(matrix.device.type):
        return linear
    return partial(nn.functional.linear, weight=matrix.to(torch.get_autocast_dtype(matrix.device.type)))


def joined(
    predicted: HeadLoss, elsewhere: Mapping[int, SumAndCount], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of all losses, with gradient, and the sum and the count of each, `[losses, 2]`, without.

    `elsewhere`: by number in the recipe, the losses that are not between the last predictions; `predicted`: the others,
    in their order and already weighted.
    """
    total, rows = predicted.total, []
    others = iter(predicted.terms)
    for number, weight in enumerate(weights):
        found, count = elsewhere[number] if number in elsewhere else next(others)
        if number in elsewhere:
            total = total + weight * found
        rows.append(torch.stack([found.detach(), count]))
    return total, torch.stack(rows)


@torch.no_grad()
def check_head(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise InputError for a model that computes logits from hidden states in another way than `head_of`."""
    few = ids[:1, :8].to(model.device)
    ours, own = head_of(model)(hidden_states(model, Batch.of(few))), model(input_ids=few, use_cache=False).logits
    if ours.shape != own.shape or not torch.allclose(ours.float(), own.float(), rtol=1e-2, atol=1e-2):
        kind = type(model).__name__
        raise InputError(f"a {kind} computes its logits in an unknown way; choose a model of another family")


@torch.no_grad()
def check_boundaries(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise InputError for a model in which documents of one sequence see each other."""
    few = ids[:1, :8].to(model.device)
    half = few.shape[1] // 2
    together = Batch(few, torch.ones_like(few, dtype=torch.bool), (torch.arange(few.shape[1]) >= half)[None].to(few))
    alone, found = hidden_states(model, Batch.of(few[:, half:])), hidden_states(model, together)[:, half:]
    if (found - alone).norm() > APART * alone.norm():
        kind = type(model).__name__
        raise InputError(f"documents in one sequence see each other in a {kind}; set boundaries: false in its data")
