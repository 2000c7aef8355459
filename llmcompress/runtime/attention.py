"""Causal attention of bfloat16 inputs, a run of queries at a time: faster on a CPU than torch's fused kernel.

The scores of a few queries against the keys up to them are one product, and fit in the cache. Scores stay float32:
rounded to bfloat16, a score of 20 would change its weight by 6 %. The backward pass computes them again, run by run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

QUERIES = 32  # at a time: as fast as 64, twice as fast as 128, at 1024 keys


class FasterAttention(TorchFunctionMode):
    """Computes plain causal calls of `scaled_dot_product_attention` by `causal_attention` while it is active.

    Calls with a mask, with dropout, or with fewer queries than keys go to torch unchanged.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Intercept one torch call."""
        given = kwargs or {}
        if func is functional.scaled_dot_product_attention and len(args) == 3 and _is_plain(args[0], args[1], given):
            query, key, value = (tensor.to(torch.bfloat16) for tensor in args)
            return causal_attention(query, key, value, given.get("scale"))
        return func(*args, **given)


def _is_plain(query: Tensor, key: Tensor, given: dict[str, Any]) -> bool:
    return (
        bool(given.get("is_causal"))
        and given.get("attn_mask") is None
        and not given.get("dropout_p")
        and query.ndim == 4
        and query.shape[2] == key.shape[2]
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Return `softmax(query key^T * scale) value`, where a query sees the keys up to its own place.

    `query [batch, heads, length, width]`; `key`, `value` `[batch, groups, length, width]`, with `heads` a multiple of
    `groups`. The default `scale` is `width ** -0.5`. Differentiable once.
    """
    output: Tensor = _Causal.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return output


class _Runs:
    """The attention weights of runs of queries over the keys up to them; heads that share keys are one product."""

    def __init__(self, query: Tensor, key: Tensor, scale: float) -> None:
        self.batch, self.heads, self.length, _ = query.shape
        self.groups = key.shape[1]
        exact = torch.promote_types(query.dtype, torch.float32)
        self.query = query.to(exact) * scale
        self.keys = key.to(exact).transpose(-1, -2).flatten(0, 1)
        self.later = torch.ones(QUERIES, QUERIES, dtype=torch.bool, device=query.device).triu(1)
        most = self.batch * self.heads * QUERIES * self.length  # buffers of their own: growing ones splinter the heap
        self.scores, self.shares = (torch.empty(most, dtype=exact, device=query.device) for _ in range(2))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the queries and their weights `[batch * groups, queries of all heads, keys]`, valid until the next."""
        for start in range(0, self.length, QUERIES):
            run = slice(start, min(start + QUERIES, self.length))
            count = run.stop - start
            size = self.batch * self.heads * count * run.stop
            together = self.rows(self.query, run)
            score, share = (buffer[:size].view(*together.shape[:2], run.stop) for buffer in (self.scores, self.shares))
            torch.bmm(together, self.keys[..., : run.stop], out=score)
            diagonal = score.view(self.batch, self.heads, count, run.stop)[..., start:]
            diagonal.masked_fill_(self.later[:count, :count], -torch.inf)
            yield run, torch.softmax(score, -1, out=share)

    def rows(self, tensor: Tensor, run: slice) -> Tensor:
        """Return a run of `[batch, heads, length, width]` as `[batch * groups, queries of all heads, width]`."""
        return tensor[:, :, run].reshape(self.batch * self.groups, -1, tensor.shape[-1])

    def heads_of(self, rows: Tensor) -> Tensor:
        """Return the inverse of `rows`: `[batch, heads, queries, width]`."""
        return rows.view(self.batch, self.heads, -1, rows.shape[-1])


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        runs, values = _Runs(query, key, scale), value.flatten(0, 1)
        output = value.new_empty(*query.shape[:3], value.shape[-1])
        for run, shares in runs:
            output[:, :, run] = runs.heads_of(shares.to(value.dtype) @ values[:, : run.stop])
        ctx.save_for_backward(query, key, value, output)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output = ctx.saved_tensors
        runs, incoming = _Runs(query, key, ctx.scale), incoming.to(value.dtype)
        exact = runs.query.dtype
        keys, values = key.flatten(0, 1), value.flatten(0, 1).transpose(-1, -2)
        of_query = torch.empty_like(query)
        of_key, of_value = (
            torch.zeros(given.flatten(0, 1).shape, dtype=exact, device=key.device) for given in (key, value)
        )
        weighed = (incoming.to(exact) * output.to(exact)).sum(-1, keepdim=True)
        for run, shares in runs:
            wanted = runs.rows(incoming, run)
            of_value[:, : run.stop] += shares.to(value.dtype).transpose(-1, -2) @ wanted
            of_score = (wanted @ values[..., : run.stop]).to(exact).sub_(runs.rows(weighed, run)).mul_(shares)
            rounded = of_score.to(query.dtype)
            of_query[:, :, run] = runs.heads_of(rounded @ keys[:, : run.stop]) * ctx.scale
            of_key[:, : run.stop] += rounded.transpose(-1, -2) @ runs.rows(query, run) * ctx.scale
        return of_query, of_key.view(key.shape).to(key.dtype), of_value.view(value.shape).to(value.dtype), None
