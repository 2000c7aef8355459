"""Scales for keys and values in FP8: those under which their largest magnitudes in the calibration text just fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration.blocks import BlockForward, RowBatch, for_products
from llmcompress.runtime.ranks import Ranks
from llmcompress.weight.inputs import FP8


class _Peaks:
    """In the place of a cache: keeps the largest magnitudes, 0 before any, of what attention would keep."""

    def __init__(self) -> None:
        self.keys = self.values = 0.0

    def update(self, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Return new keys and values as they are."""
        self.keys = max(self.keys, float(keys.abs().amax()))
        self.values = max(self.values, float(values.abs().amax()))
        return keys, values


@torch.no_grad()
def key_value_scales(
    run: BlockForward, batches: Sequence[RowBatch], hidden: Tensor, ranks: Ranks
) -> dict[str, list[float]]:
    """Return the scales of keys, after their rotation, and of values, by the path of the block's attention.

    Nothing for a block that keeps no keys and values.
    """
    peaks = _Peaks()

    def give_cache(
        _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, named | {"past_key_values": peaks}

    handle = run.module.register_forward_pre_hook(give_cache, with_kwargs=True)
    try:
        with ranks.agree_on_errors(), for_products(run):
            for batch in (batch for batch in batches if not batch.held_out):
                run(hidden[batch.rows], batch.rows)
    finally:
        handle.remove()
    every = ranks.gather((peaks.keys, peaks.values))
    most = [max(each) for each in zip(*every, strict=True)]
    layers = run.module.named_modules()
    attention = next((name for name, layer in layers if type(layer).__name__.endswith("Attention")), None)
    return {f"{run.path}.{attention}": [peak / FP8 for peak in most]} if attention and min(most) > 0 else {}
