"""The forward of student and teacher: hidden states, output heads, recomputed activations, and checks of all these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import getsource
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.data.batch import Batch
from llmcompress.errors import InputError, RecipeError
from llmcompress.models.dense.blocks import body
from llmcompress.models.dense.families import block_stack
from llmcompress.weight.modules import CompressedLinear
from llmcompress.weight.nodes import Dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_DIFFERENCE = 0.1  # relative, between hidden states: rounding to bfloat16 makes less, another document more

Head = Callable[[Tensor], Tensor]  # hidden states [..., width] -> logits [..., vocabulary]

# Entries of configs by which families change what their output head computes; `check_head` refuses those without.
FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISORS = ("logits_scaling",)  # Granite
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the input of the output head, `[sequences, length, width]`.

    If documents share a sequence, the positions of each start at 0, from which transformers makes the mask that keeps
    them apart (see `check_boundaries`).
    """
    positions = {} if batch.documents is None else {"position_ids": batch.positions()}
    hidden: Tensor = body(model)(input_ids=batch.ids, use_cache=False, **positions)[0]
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden
    # Mamba's residual stream is float32, whatever its head is; a stand-in for a model may have no dtype
    return hidden.to(getattr(model, "dtype", hidden.dtype))


def head_of(model: PreTrainedModel) -> Head:
    """Return the output head of a model as a function.

    Call this once for a whole computation, under the autocast that it will run in.
    """
    linear = _cast_once(model.get_output_embeddings())
    factor = prod(_entries(model, FACTORS)) / prod(_entries(model, DIVISORS))
    cap = next(_entries(model, CAPS), None)
    scaled = linear if factor == 1 else lambda hidden: linear(hidden) * factor
    return scaled if cap is None else lambda hidden: torch.tanh(scaled(hidden) / cap) * cap


def as_function(head: Tensor | Head) -> Head:
    """Return a head, or the matrix `[vocabulary, width]` of one, as a function."""
    return partial(nn.functional.linear, weight=head) if isinstance(head, Tensor) else head


def _entries(model: PreTrainedModel, names: Sequence[str]) -> Iterator[float]:
    """Yield the numbers under these names in a model's config, or in that of its text part if the model reads them."""
    config = model.config
    if hasattr(config, "get_text_config") and (text := config.get_text_config(decoder=True)) is not config:
        config, code = text, getsource(getattr(model, "original", type(model)).forward)
        names = [name for name in names if name in code]
    for name in names:
        if isinstance(value := getattr(config, name, None), int | float):
            yield value


def _cast_once(linear: nn.Module) -> Head:
    """Return `linear`, under autocast with its frozen matrix already cast.

    Autocast keeps its casts of trained parameters alone. It would cast a frozen table again for every chunk of tokens,
    a seventh of a step.
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


@contextmanager
def recompute_activations(model: PreTrainedModel, check: bool = True) -> Iterator[None]:
    """Recompute the activations of decoder blocks in the backward pass, within the context; results stay the same.

    transformers does so for blocks in train mode. So the blocks alone are put into it: the modules inside stay in
    evaluation mode, without dropout, and a block's own dropout is set to 0.

    Raises RecipeError for a model that cannot do it, or whose blocks still apply dropout. Without `check` the model is
    not run to find the latter, as its weights may be in another process.
    """
    kind = type(model).__name__
    before = _read_two_tokens(model) if check else None
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise RecipeError(f"a {kind} cannot recompute activations; set checkpointing: false") from error
    blocks = list(model.get_submodule(block_stack(model.config, model)).children())
    for block in blocks:
        for name, value in vars(block).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(block, name, 0.0)
        block.training = True
    try:
        if before is not None and not torch.allclose(before, _read_two_tokens(model)):
            raise RecipeError(f"blocks of a {kind} apply dropout in training; set checkpointing: false")
        yield
    finally:
        for block in blocks:
            block.training = False


@torch.no_grad()
def _read_two_tokens(model: PreTrainedModel) -> Tensor:
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    hidden: Tensor = body(model)(input_ids=ids, use_cache=False)[0]
    return hidden


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
    alone, beside = hidden_states(model, Batch.of(few[:, half:])), hidden_states(model, together)[:, half:]
    if (beside - alone).norm() > LARGEST_DIFFERENCE * alone.norm():
        kind = type(model).__name__
        raise InputError(f"documents in one sequence see each other in a {kind}; set boundaries: false in its data")
