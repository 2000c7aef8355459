"""A model in a GGUF file: its metadata, the names, order and offsets of its tensors, and obstacles to its export.

Of rotary positions, llama.cpp knows linear scaling and YaRN by name, YaRN at betas of 32 and 1 with whole bounds only.
In some families it reads a tensor of divisors, one for each frequency, which says any other scaling. It multiplies
queries and keys by YaRN's own attention factor, and by the one of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.formats.config_entries import (
    ModelConfig,
    RotaryPositions,
    check_obstacles,
    entries_of,
    overlooked_entries,
    window_pattern,
)
from llmcompress.formats.gguf.families import FAMILIES, GGUFFamily

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig

INNER = ("intermediate_size", "ffn_hidden_size", "n_inner")  # names of the width of MLPs in configs
ACTIVATION = ("hidden_act", "hidden_activation", "activation_function", "activation")
READ = {  # entries of configs that this file looks at, in every family
    *INNER,
    *ACTIVATION,
    *("vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "max_position_embeddings", "n_positions"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "query_pre_attn_scalar"),
    *("rope_parameters", "original_max_position_embeddings", "sliding_window", "layer_types", "tie_word_embeddings"),
}


@dataclass(frozen=True)
class GGUFModel(ModelConfig):
    """A model as llama.cpp runs it."""

    family: GGUFFamily
    name_of: Callable[..., str | None]  # of gguf's table

    @property
    def architecture(self) -> str:
        """Name of the architecture in a GGUF file."""
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

        return MODEL_ARCH_NAMES[MODEL_ARCH[self.family.architecture]]

    @property
    def heads(self) -> int:
        """Number of heads of the queries."""
        return int(self.config.num_attention_heads)

    @property
    def key_heads(self) -> int:
        """Number of heads of the keys and values."""
        config = self.config
        if config.model_type == "falcon" and not config.new_decoder_architecture:
            return 1 if config.multi_query else self.heads
        return int(_first(config, "num_key_value_heads", "num_kv_heads") or self.heads)

    @property
    def rotary(self) -> GGUFRotary:
        """Rotary positions."""
        return GGUFRotary(self.config, self.family, self.head_dim)

    def name(self, tensor: str) -> str:
        """Return GGUF's name of a tensor. Raises InputError for one that its family does not have there."""
        name = self.name_of(tensor, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(
                f"{tensor} has no place in the GGUF file of a {self.config.model_type} model; export to another format"
            )
        return name

    def row_order(self, name: str) -> Tensor | None:
        """Return the order of rows in GGUF's tensor `name`: `[out]` where heads lie otherwise, None where rows stay."""
        kind = name.split(".")[2] if name.count(".") >= 3 else ""  # blk.0.attn_q.weight
        rotated = {"attn_q": self.heads, "attn_k": self.key_heads}
        if self.family.interleaved and kind in rotated:
            rows = torch.arange(rotated[kind] * self.head_dim)
            return rows.reshape(-1, 2, self.head_dim // 2).transpose(1, 2).flatten()
        if self.family.fused and kind == "attn_qkv":
            groups = self.heads if self.family.fused == "by head" else self.key_heads
            rows = torch.arange((self.heads + 2 * groups) * self.head_dim).reshape(groups, -1, self.head_dim)
            return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])
        return None

    def convert_plain(self, name: str, values: Tensor) -> Tensor:
        """Return a tensor that was never compressed as GGUF holds it under `name`: vectors in float32."""
        if values.dim() > 1:
            return values
        offset = self.family.offset_norms and name.endswith("norm.weight")
        return values.float() + 1 if offset else values.float()

    def describe(self, writer: GGUFWriter, vocabulary: int) -> None:
        """Write the sizes of a model with `vocabulary` tokens."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(_first(config, *INNER) or 4 * config.hidden_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.key_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_vocab_size(vocabulary)
        for method, entry in self.family.facts.items():
            value = getattr(config, entry, None) if isinstance(entry, str) else entry
            if value is not None:
                getattr(writer, f"add_{method}")(value)
        if any(self.windows):
            writer.add_sliding_window(config.sliding_window)
        self.rotary.describe(writer)

    # --- obstacles ----------------------------------------------------------------------------------------------------

    def obstacles(self) -> Iterator[str]:
        """Yield the properties of the model that a GGUF file cannot say, or not to llama.cpp."""
        config, family = self.config, self.family
        yield from overlooked_entries(config, READ | family.read, family.fixed)
        activation = _first(config, *(entry for entry in ACTIVATION if entry in entries_of(type(config))))
        if activation != family.activation:
            yield f"the activation {activation!r}"
        tied = bool(getattr(config, "tie_word_embeddings", False))
        if family.tied not in (None, tied):
            yield "a head that is the token table" if tied else "a head beside the token table"
        if config.num_hidden_layers == family.window_layers:
            yield f"{family.window_layers} layers, at which llama.cpp takes attention windows for granted"
        if family.whole_heads:
            yield from self.head_obstacles()
        if family.own_keys and self.key_heads != self.heads:
            yield f"{self.heads} heads of queries for {self.key_heads} of keys"
        divisor = config.hidden_size // self.heads if config.num_hidden_layers == family.wide_layers else self.head_dim
        if getattr(config, "query_pre_attn_scalar", divisor) != divisor:
            yield f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
        yield from self.rotary.obstacles()
        every = family.no_rope_every
        if every and list(config.no_rope_layers) != window_pattern(every, config.num_hidden_layers):
            yield f"rotary positions left out in other layers than the last of every {every}"
        yield from self.window_obstacles(family.full_every)


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
        """Return the attention factor for the file, without YaRN's own where llama.cpp knows YaRN by name."""
        own = 1 + 0.1 * math.log(max(self.factor, 1)) if self.by_name and self.kind == "yarn" else 1.0
        return self.scaled_frequencies()[1] / own if self.kind in ("yarn", "longrope") else 1.0

    def divisors(self) -> dict[str, Tensor]:
        """Return llama.cpp's divisors of the frequencies by their tensors' names, float32 `[width / 2]`."""
        if self.kind == "longrope":
            factors = {kind: self.full[f"{kind}_factor"] for kind in ("long", "short")}
            return {f"rope_factors_{kind}.weight": torch.tensor(values) for kind, values in factors.items()}
        if self.kind == "default" or self.by_name:
            return {}
        plain = self.full["rope_theta"] ** -(torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)
        return {"rope_freqs.weight": (plain / self.scaled_frequencies()[0]).float()}

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
        """Yield sentences on differences in llama.cpp."""
        if self.kind == "longrope":
            first = self.full["original_max_position_embeddings"]
            yield f"llama.cpp takes the long factors of positions where its context, not a text, exceeds {first}"

    def obstacles(self) -> Iterator[str]:
        """Yield the properties that a GGUF file cannot say, or not to llama.cpp."""
        full, family, kind = self.full, self.family, self.kind
        if not getattr(self.config, "rope_parameters", None):
            return
        if kind not in ("default", "linear", "llama3", "yarn", "longrope"):
            yield f"rotary positions of type {kind!r}"
        yield from self.unknown_parameters()
        if (kind == "longrope") != family.long_rope and kind != "default":
            yield f"rotary positions of type {kind!r}"
        if kind in ("llama3", "yarn") and not self.by_name and not family.divisors:
            betas = {key: full[key] for key in ("beta_fast", "beta_slow", "truncate") if full.get(key) is not None}
            values = f" with {', '.join(f'{key} {value!r}' for key, value in betas.items())}" if kind == "yarn" else ""
            yield f"rotary positions of type {kind!r}{values}"
        if self.width % 2 or (family.interleaved and self.width != self.head_dim):
            yield f"rotary positions on {self.width} of {self.head_dim} numbers of each head"
        if self.nested:
            yield from self._window_obstacles()

    def _window_obstacles(self) -> Iterator[str]:
        """Yield unusual positions in layers with a window."""
        full, window = self.full, self.window
        if window.get("rope_type") != "default":
            yield f"rotary positions of type {window.get('rope_type')!r} in layers with a window"
        for entry in ("rope_theta", "partial_rotary_factor"):
            if window.get(entry) != full.get(entry) and not (self.family.two_thetas and entry == "rope_theta"):
                yield f"{entry} {window.get(entry)} in layers with a window and {full.get(entry)} in others"
        if self.family.two_thetas and self.attention_factor() != 1:
            yield f"the attention factor {self.scaled_frequencies()[1]:g} in layers that attend to all tokens"


def gguf_model(folder: Path, entries: dict[str, Any]) -> GGUFModel:
    """Return the model with the config `entries`. Raises InputError for one that llama.cpp does not run alike."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from transformers import AutoConfig

    kind = str(entries.get("model_type"))
    if kind not in FAMILIES:
        raise InputError(
            f"{folder} is a {kind} model, which has no row in the table of families that can go to GGUF "
            f"({', '.join(sorted(FAMILIES))}); export to another format"
        )
    config, family = AutoConfig.for_model(**entries), FAMILIES[kind]
    names = get_tensor_name_map(MODEL_ARCH[family.architecture], config.num_hidden_layers)
    model = GGUFModel(config, family, names.get_name)
    check_obstacles(folder, model.obstacles(), "GGUF")
    return model


def _first(config: PreTrainedConfig, *entries: str) -> Any:
    """Return the first of these entries of a config that is not None."""
    return next((value for entry in entries if (value := getattr(config, entry, None)) is not None), None)
