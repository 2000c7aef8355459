"""Metadata of a Llama (or Mistral) in a GGUF file, and the places of its tensors in llama.cpp.

llama.cpp turns neighbouring numbers of a head into each other where transformers turns the halves of a head, so the
rows of q and k change places there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig

ARCHITECTURE = "llama"  # in GGUF's words, Mistral too
FAMILIES = ("llama", "mistral")
ROPE_TYPES = ("default", "linear", "llama3")
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Llama:
    """A model that llama.cpp runs as its architecture `llama`."""

    config: PreTrainedConfig
    name_of: Callable[..., str | None]  # of gguf's table

    @property
    def head_dim(self) -> int:
        """Numbers per attention head."""
        given = getattr(self.config, "head_dim", None)
        return int(given or self.config.hidden_size // self.config.num_attention_heads)

    def name(self, tensor: str) -> str:
        """GGUF's name of a tensor. Raises InputError for one that a Llama does not have."""
        found = self.name_of(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{tensor} has no place in the GGUF file of a Llama; export to another format")
        return found

    def row_order(self, name: str) -> Tensor | None:
        """Return the order of rows in GGUF's tensor `name`: `[out]` for q and k, None where rows stay."""
        heads = {"attn_q": self.config.num_attention_heads, "attn_k": self.config.num_key_value_heads}
        parts = name.split(".")  # blk.0.attn_q.weight
        if len(parts) < 3 or parts[2] not in heads:
            return None
        rows = torch.arange(heads[parts[2]] * self.head_dim)
        return rows.reshape(-1, 2, self.head_dim // 2).transpose(1, 2).flatten()

    def rope_factors(self) -> Tensor | None:
        """Return llama.cpp's divisor of each frequency, float32 `[head_dim / 2]`; None for plain and linear ones."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = self.config.rope_parameters
        if rope["rope_type"] != "llama3":
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        return (plain / scaled).float()

    def describe(self, writer: GGUFWriter, vocabulary: int) -> None:
        """Write the sizes of a model with `vocabulary` tokens."""
        from gguf import RopeScalingType

        config, rope = self.config, self.config.rope_parameters
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(vocabulary)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])


def llama(folder: Path, entries: dict[str, Any]) -> Llama:
    """The model with the config `entries`. Raises InputError for one that llama.cpp's `llama` would run otherwise."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from transformers import AutoConfig

    kind = entries.get("model_type")
    if kind not in FAMILIES:
        raise InputError(
            f"{folder} is a {kind} model, and only {' and '.join(FAMILIES)} models can go to GGUF; "
            f"export to another format"
        )
    config = AutoConfig.for_model(**entries)
    if obstacle := _obstacle(config):
        raise InputError(f"{folder} has {obstacle}, which cannot go to GGUF here; export to another format")
    return Llama(config, get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers).get_name)


def _obstacle(config: PreTrainedConfig) -> str | None:
    """Return the property of a model that the export cannot express in GGUF; None if there is none."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type") not in ROPE_TYPES:
        return f"rotary positions of type {rope.get('rope_type')!r}"
    if rope.get("partial_rotary_factor", 1) != 1:
        return "rotary positions on part of each head"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"attention to the last {window} tokens only"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act!r}"
    return None
