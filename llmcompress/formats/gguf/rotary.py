"""Rotary positions in a GGUF file: metadata, divisors of frequencies, and what llama.cpp would rotate otherwise.

llama.cpp knows linear scaling and YaRN by name, YaRN at betas of 32 and 1 with whole bounds only. In some families it
reads a tensor of divisors, one for each frequency, which says any other scaling. It multiplies queries and keys by
YaRN's own attention factor, and by the one of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmcompress.formats.gguf.families import GGUFFamily
from llmcompress.formats.rotary import RotaryPositions

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class GGUFRotary(RotaryPositions):
    """Rotary positions of a model with heads of `head_dim` numbers."""

    family: GGUFFamily
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers of a head that are rotated."""
        return int(self.head_dim * self.part)

    @property
    def by_name(self) -> bool:
        """True if llama.cpp knows the scaling by its name."""
        full = self.full
        plain_yarn = (full.get("beta_fast") or 32, full.get("beta_slow") or 1) == (32, 1) and full.get("truncate", True)
        return self.kind == "linear" or (self.kind == "yarn" and bool(plain_yarn))

    def attention_factor(self) -> float:
        """Return the attention factor that llama.cpp has to be told: beside that of YaRN where it knows it by name."""
        own = 1 + 0.1 * math.log(max(self.factor, 1)) if self.by_name and self.kind == "yarn" else 1.0
        return self.scaled()[1] / own if self.kind in ("yarn", "longrope") else 1.0

    def divisors(self) -> dict[str, Tensor]:
        """Return llama.cpp's divisors of the frequencies by their tensors' names, float32 `[width / 2]`."""
        if self.kind == "longrope":
            factors = {kind: self.full[f"{kind}_factor"] for kind in ("long", "short")}
            return {f"rope_factors_{kind}.weight": torch.tensor(values) for kind, values in factors.items()}
        if self.kind == "default" or self.by_name:
            return {}
        plain = self.full["rope_theta"] ** -(torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)
        return {"rope_freqs.weight": (plain / self.scaled()[0]).float()}

    def describe(self, writer: GGUFWriter) -> None:
        """Write the parameters."""
        from gguf import RopeScalingType

        full = self.full
        if not full:
            return
        writer.add_rope_dimension_count(self.width)
        writer.add_rope_freq_base(full["rope_theta"])
        if self.window:
            writer.add_rope_freq_base_swa(self.window["rope_theta"])
        if self.by_name:
            writer.add_rope_scaling_type(RopeScalingType(self.kind))
            writer.add_rope_scaling_factor(self.factor)
        if self.kind in ("yarn", "longrope"):
            writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        if (attention := self.attention_factor()) != 1:
            writer.add_rope_scaling_attn_factors(attention)

    def notes(self) -> Iterator[str]:
        """Yield sentences on what llama.cpp does otherwise."""
        if self.kind == "longrope":
            first = self.full["original_max_position_embeddings"]
            yield f"llama.cpp takes the long factors of positions where its context, not a text, exceeds {first}"

    def obstacles(self) -> Iterator[str]:
        """Yield what a GGUF file cannot say of them, or not to llama.cpp."""
        full, family, kind = self.full, self.family, self.kind
        if not getattr(self.config, "rope_parameters", None):
            return
        if kind not in ("default", "linear", "llama3", "yarn", "longrope"):
            yield f"rotary positions of type {kind!r}"
        yield from self.unknown()
        if (kind == "longrope") != family.long_rope and kind != "default":
            yield f"rotary positions of type {kind!r}"
        if kind in ("llama3", "yarn") and not self.by_name and not family.divisors:
            betas = {key: full[key] for key in ("beta_fast", "beta_slow", "truncate") if full.get(key) is not None}
            told = f" with {', '.join(f'{key} {value!r}' for key, value in betas.items())}" if kind == "yarn" else ""
            yield f"rotary positions of type {kind!r}{told}"
        if self.width % 2 or (family.interleaved and self.width != self.head_dim):
            yield f"rotary positions on {self.width} of {self.head_dim} numbers of each head"
        if self.nested:
            yield from self._window_obstacles()

    def _window_obstacles(self) -> Iterator[str]:
        """Yield what is unusual in the positions of layers with a window."""
        full, window = self.full, self.window
        if window.get("rope_type") != "default":
            yield f"rotary positions of type {window.get('rope_type')!r} in layers with a window"
        for entry in ("rope_theta", "partial_rotary_factor"):
            if window.get(entry) != full.get(entry) and not (self.family.two_thetas and entry == "rope_theta"):
                yield f"{entry} {window.get(entry)} in layers with a window and {full.get(entry)} in others"
        if self.family.two_thetas and self.attention_factor() != 1:
            yield f"the attention factor {self.scaled()[1]:g} in layers that attend to all tokens"
