"""Rotary positions of a model, as transformers computes them: the parameters of a config, old or new."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FULL, WINDOW = "full_attention", "sliding_attention"  # types of layers, which may have parameters of their own
PARAMETERS = {  # that transformers reads, and three that it does not
    *("rope_theta", "rope_type", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor"),
    *("high_freq_factor", "short_factor", "long_factor", "type", "finetuned", "mrope_section"),
}


@dataclass(frozen=True)
class RotaryPositions:
    """Rotary positions of a model with a config."""

    config: PreTrainedConfig

    @property
    def nested(self) -> bool:
        """True if layers with a window have parameters of their own."""
        return FULL in (getattr(self.config, "rope_parameters", None) or {})

    @property
    def full(self) -> dict[str, Any]:
        """Parameters in layers that attend to all tokens; empty where there are none."""
        rotary = getattr(self.config, "rope_parameters", None) or {}
        return dict((rotary[FULL] or {}) if self.nested else rotary)

    @property
    def window(self) -> dict[str, Any]:
        """Parameters in layers with a window, where these are others."""
        return dict(self.config.rope_parameters.get(WINDOW) or {}) if self.nested else {}

    @property
    def kind(self) -> str:
        """Their type in transformers."""
        return str(self.full.get("rope_type", "default"))

    @property
    def part(self) -> float:
        """The part of each head that is rotated."""
        part = self.full.get("partial_rotary_factor")
        return 1.0 if part is None else float(part)

    @property
    def ratio(self) -> float:
        """The length of texts over that of the first training."""
        return float(self.config.max_position_embeddings / self.full["original_max_position_embeddings"])

    @property
    def factor(self) -> float:
        """The factor of linear scaling and of YaRN."""
        return float(self.full["factor"] or self.ratio)

    def scaled(self) -> tuple[Tensor, float]:
        """Return frequencies, float32 `[rotated numbers / 2]`, and attention factor of types but the default."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        layer = FULL if self.nested else None
        return ROPE_INIT_FUNCTIONS[self.kind](self.config, torch.device("cpu"), layer_type=layer)

    def unknown(self) -> Iterator[str]:
        """Yield the parameters, with their values, that nobody here knows, and a type of layers that has none."""
        if not self.full or (self.nested and not self.window):
            yield "no rotary positions in some layers"
        for entry, value in (self.full | self.window).items():
            if entry not in PARAMETERS and value is not None:
                yield f"the unknown parameter {entry} {value!r} of rotary positions"
