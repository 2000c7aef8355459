"""The weight of each calibration token, by the attention it receives or by its norm (RSQ, arXiv 2503.01820).

Weights by gradient are those of `gradients`. A block's tokens get one weight each, for the inputs of all its linears,
which multiplies with the cap of `moments`. Inputs of the output head are not weighed.

The attention that a token receives is the probability that all queries of all heads give to its key, summed. The
block's own code computes it, in transformers' eager form, some queries at a time: so softcaps, sliding windows and
attention sinks are right for every family, and memory stays small.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration.blocks import BlockForward
from llmcompress.errors import InputError
from llmcompress.recipe.calibration import TokenWeights
from llmcompress.runtime.precision import products

QUERIES = 32  # at a time, as in `attention`
INTERFACE = "llmcompress_received_attention"  # the name transformers knows `_receive` by


class AttentionUnknownError(InputError):
    """A block does not reveal how much attention its tokens receive."""


@torch.no_grad()
def weigh_tokens(run: BlockForward, hidden: Tensor, rows: slice, config: TokenWeights) -> Tensor:
    """Return the weights `[sequences, length]`, float32, of a block's inputs `hidden [sequences, length, width]`.

    `rows`: of all sequences. Raises AttentionUnknownError as `received_attention` does.
    """
    if config.by == "norm":
        measure = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
    else:
        measure = received_attention(run, hidden, rows)
    return rescale(measure, config.minimum)


def rescale(measure: Tensor, minimum: float) -> Tensor:
    """Map `measure [sequences, length]` linearly to `minimum` ... 1 in every sequence; to 1 if all are equal."""
    low, high = measure.amin(1, keepdim=True), measure.amax(1, keepdim=True)
    share = torch.where(high > low, (measure - low) / (high - low), 1.0)
    return minimum + (1 - minimum) * share


@torch.no_grad()
def received_attention(run: BlockForward, hidden: Tensor, rows: slice) -> Tensor:
    """Return the attention that each token of `hidden [sequences, length, width]` receives in the block.

    Probabilities are summed over heads and queries: float32 `[sequences, length]`, `heads * length` in all unless sinks
    take some.

    Raises AttentionUnknownError for a block whose attention does not go through transformers' interface.
    """
    call = run.calls.of(run.index, len(hidden), rows)
    try:
        with _interface(run.module), products(hidden.device, run.dtype):
            run.module(hidden, *call.args, **call.kwargs)
    except _AttentionSums as sums:
        return sums.attention
    raise AttentionUnknownError(
        f"{run.path} does not tell how much attention its tokens receive, since it goes past transformers' attention "
        f"interface; set token_weights.by to norm, or leave token_weights out"
    )


class _AttentionSums(Exception):
    """Raised to end a block's forward with its result: nothing after its attention is needed."""

    def __init__(self, attention: Tensor) -> None:
        super().__init__()
        self.attention = attention


@contextmanager
def _interface(block: nn.Module) -> Iterator[None]:
    """Make the block's attention call `_receive` while the context lasts."""
    from transformers import AttentionInterface, PreTrainedConfig

    AttentionInterface.register(INTERFACE, _receive)
    held = (vars(inner).get("config") for inner in block.modules())
    configs = {id(config): config for config in held if isinstance(config, PreTrainedConfig)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = INTERFACE
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _receive(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """Raise `_AttentionSums`, in place of computing attention.

    `query [sequences, heads, length, width]`, `key` and `value` alike with fewer heads; `attention_mask`: as for
    torch's `scaled_dot_product_attention`.
    """
    eager: Callable[..., tuple[Tensor, Tensor | None]] | None = getattr(
        sys.modules[type(module).__module__], "eager_attention_forward", None
    )
    if eager is None:
        raise AttentionUnknownError(
            f"{type(module).__name__} has no eager attention, which tells how much attention tokens receive; "
            f"set token_weights.by to norm, or leave token_weights out"
        )
    query, key = query.float(), key.float()  # a score of 20 rounded to bfloat16 is off by 0.06
    column = value[..., :1].float()  # enough, since outputs are not wanted
    causal = attention_mask is None and getattr(module, "is_causal", True)
    total = query.new_zeros(query.shape[0], key.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, query.shape[2], QUERIES):
            run = slice(start, min(start + QUERIES, query.shape[2]))
            seen = run.stop if causal else key.shape[2]
            mask = _causal_mask(query, run) if causal else _additive_mask(attention_mask, run)
            _, shares = eager(module, query[:, :, run], key[:, :, :seen], column[:, :, :seen], mask, **others)
            if shares is None:
                raise AttentionUnknownError(
                    f"the eager attention of {type(module).__name__} does not return its probabilities; "
                    f"set token_weights.by to norm, or leave token_weights out"
                )
            total[:, :seen] += shares.sum((1, 2))
    raise _AttentionSums(total)


def _causal_mask(query: Tensor, run: slice) -> Tensor:
    """Return the addend to scores of a run of queries and the keys up to it: minus infinity for later keys."""
    return query.new_full((1, 1, run.stop - run.start, run.stop), -torch.inf).triu(run.start + 1)


def _additive_mask(mask: Tensor | None, run: slice) -> Tensor | None:
    """Return the rows of a mask for a run of queries, as an addend to scores."""
    if mask is None:
        return None
    rows = mask[..., run, :] if mask.shape[-2] > 1 else mask
    if rows.dtype != torch.bool:
        return rows.float()
    return torch.zeros_like(rows, dtype=torch.float32).masked_fill_(~rows, torch.finfo(torch.float32).min)
