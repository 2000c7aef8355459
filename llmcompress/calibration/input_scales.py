"""Formats of the inputs of linears, with the scales that calibration finds, and samples of inputs.

Scales of keys and values in FP8, too: those under which the largest in the calibration text just fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration.blocks import BlockForward, RowBatch, for_products
from llmcompress.errors import RecipeError
from llmcompress.recipe.rules import InputRounding
from llmcompress.runtime.ranks import Ranks
from llmcompress.weight.inputs import FP8, InputFormat

SAMPLED_BATCHES, SAMPLED_TOKENS = 8, 64  # batches that a sample is taken from, and tokens from each


def input_formats(
    run: BlockForward, rounding: Mapping[str, InputRounding], batches: Sequence[RowBatch], hidden: Tensor, ranks: Ranks
) -> dict[str, InputFormat]:
    """Return the format of the inputs of each linear that is named in `rounding`.

    A scale for all tokens holds the largest magnitude in the calibration text of all processes. Raises RecipeError for
    a linear that no token reaches.
    """
    calibrated = tuple(name for name, inputs in rounding.items() if inputs.is_calibrated)
    with ranks.agree_on_errors():
        own = _peaks(run, calibrated, batches, hidden)
    every = ranks.gather(own) if calibrated else []
    peaks = {name: max(each.get(name, 0.0) for each in every) for name in calibrated}
    for name in (name for name, peak in peaks.items() if peak <= 0):
        raise RecipeError(
            f"{name}: no calibration token has an input, so a scale for all is unknown; calibrate on more text, or let "
            f"scale of inputs be token"
        )
    return {
        name: InputFormat.of_peak(inputs.format, peaks[name]) if name in peaks else InputFormat(inputs.format)
        for name, inputs in rounding.items()
    }


@torch.no_grad()
def sample_inputs(
    run: BlockForward, names: tuple[str, ...], batches: Sequence[RowBatch], hidden: Tensor
) -> dict[str, Tensor]:
    """Return inputs `[tokens, in]` of each linear for tokens that are spread over the calibration text, float32."""
    samples: dict[str, list[Tensor]] = {}

    def visit(name: str, x: Tensor, tokens: Tensor | None) -> None:
        x = x.flatten(0, -2)
        samples.setdefault(name, []).append(x[:: max(1, len(x) // SAMPLED_TOKENS)].float())

    read = [batch for batch in batches if not batch.held_out]
    with for_products(run):
        for batch in read[:: max(1, len(read) // SAMPLED_BATCHES)]:
            run(hidden[batch.rows], batch.rows, visit, names)
    return {name: torch.cat(parts) for name, parts in samples.items()}


@torch.no_grad()
def _peaks(run: BlockForward, names: tuple[str, ...], batches: Sequence[RowBatch], hidden: Tensor) -> dict[str, float]:
    """Return the largest magnitude that each linear reads in the calibration text."""
    peaks: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor, tokens: Tensor | None) -> None:
        if x.numel():
            peak = x.abs().amax().float()
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    if names:
        with for_products(run):
            for batch in (batch for batch in batches if not batch.held_out):
                run(hidden[batch.rows], batch.rows, visit, names)
    return {name: float(peak) for name, peak in peaks.items()}


class _Peaks:
    """In the place of a cache: keeps the largest magnitudes, 0 before any, of what attention would keep."""

    def __init__(self) -> None:
        self.keys = self.values = 0.0

    def update(self, keys: Tensor, values: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Return new keys and values as they are."""
        self.keys = max(self.keys, float(keys.abs().amax()))
        self.values = max(self.values, float(values.abs().amax()))
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Return 0: nothing is remembered."""
        return 0

    def get_linear_cache(self, *_: Any) -> None:
        """Return None: nothing is remembered."""

    def set_linear_cache(self, *_: Any) -> None:
        """Forget the states of linear attention."""


@torch.no_grad()
def key_value_scales(
    run: BlockForward, batches: Sequence[RowBatch], hidden: Tensor, ranks: Ranks
) -> dict[str, list[float]]:
    """Return the scales of keys, after their rotation, and of values, by the path of the block's attention.

    Nothing for a block that keeps no keys and values.
    """
    layers = run.module.named_modules()
    attention = next((name for name, layer in layers if type(layer).__name__.endswith("Attention")), None)
    known = () if attention is None else signature(run.module.get_submodule(attention).forward).parameters
    key = next((name for name in ("past_key_values", "layer_past") if name in known), None)
    if attention is None or key is None:  # such as a convolution, or a state-space model
        return {}
    peaks = _Peaks()

    def give_cache(
        _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, named | {key: peaks}

    layer = run.module.get_submodule(attention)
    with layer.register_forward_pre_hook(give_cache, with_kwargs=True), ranks.agree_on_errors(), for_products(run):
        for batch in (batch for batch in batches if not batch.held_out):
            run(hidden[batch.rows], batch.rows)
    every = ranks.gather((peaks.keys, peaks.values))
    most = [max(each) for each in zip(*every, strict=True)]
    return {f"{run.path}.{attention}": [peak / FP8 for peak in most]} if min(most) > 0 else {}
