"""Metadata of a model in a GGUF file, and the names, the order and the offsets of its tensors there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.formats.config_keys import entries_of, overlooked, refuse
from llmcompress.formats.gguf.families import FAMILIES, GGUFFamily
from llmcompress.formats.gguf.rotary import GGUFRotary

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
class GGUFModel:
    """A model as llama.cpp runs it."""

    config: PreTrainedConfig
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
    def head_dim(self) -> int:
        """Numbers per attention head."""
        return int(_first(self.config, "head_dim") or self.config.hidden_size // self.heads)

    @property
    def rotary(self) -> GGUFRotary:
        """Rotary positions."""
        return GGUFRotary(self.config, self.family, self.head_dim)

    @property
    def layer_types(self) -> list[str]:
        """Return the type of attention of every layer: "sliding_attention" where it sees a window only."""
        config = self.config
        window = getattr(config, "sliding_window", None)
        if window is None:
            return ["full_attention"] * config.num_hidden_layers
        return list(getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers)

    def name(self, tensor: str) -> str:
        """GGUF's name of a tensor. Raises InputError for one that its family does not have there."""
        found = self.name_of(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(
                f"{tensor} has no place in the GGUF file of a {self.config.model_type} model; export to another format"
            )
        return found

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

    def stored(self, name: str, values: Tensor) -> Tensor:
        """Return a tensor that was never compressed as GGUF's `name` holds it: vectors in float32."""
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
        if "sliding_attention" in self.layer_types:
            writer.add_sliding_window(config.sliding_window)
        self.rotary.describe(writer)

    # --- what llama.cpp would run otherwise ---------------------------------------------------------------------------

    def obstacles(self) -> Iterator[str]:
        """Yield the properties of the model that a GGUF file cannot say, or not to llama.cpp."""
        config, family = self.config, self.family
        yield from overlooked(config, READ | family.read, family.fixed)
        activation = _first(config, *(entry for entry in ACTIVATION if entry in entries_of(type(config))))
        if activation != family.activation:
            yield f"the activation {activation!r}"
        tied = bool(getattr(config, "tie_word_embeddings", False))
        if family.tied not in (None, tied):
            yield "a head that is the token table" if tied else "a head beside the token table"
        if config.num_hidden_layers == family.window_layers:
            yield f"{family.window_layers} layers, at which llama.cpp takes attention windows for granted"
        if family.whole_heads and self.heads * self.head_dim != config.hidden_size:
            yield f"{self.heads} heads of {self.head_dim} numbers, not of {config.hidden_size} in all"
        if family.own_keys and self.key_heads != self.heads:
            yield f"{self.heads} heads of queries for {self.key_heads} of keys"
        divisor = config.hidden_size // self.heads if config.num_hidden_layers == family.wide_layers else self.head_dim
        if getattr(config, "query_pre_attn_scalar", divisor) != divisor:
            yield f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
        yield from self._positions()

    def _positions(self) -> Iterator[str]:
        """Yield what is unusual in rotary positions and attention windows."""
        config, family = self.config, self.family
        yield from self.rotary.obstacles()
        layers = range(1, config.num_hidden_layers + 1)
        if family.no_rope_every:
            expected = [int(layer % family.no_rope_every != 0) for layer in layers]
            if list(config.no_rope_layers) != expected:
                yield f"rotary positions left out in other layers than the last of every {family.no_rope_every}"
        windows = [kind == "sliding_attention" for kind in self.layer_types]
        if family.full_every:
            if windows != [layer % family.full_every != 0 for layer in layers]:
                yield f"attention to all tokens in other layers than the last of every {family.full_every}"
        elif any(windows) and config.sliding_window < config.max_position_embeddings:
            yield f"attention to the last {config.sliding_window} tokens only"


def gguf_model(folder: Path, entries: dict[str, Any]) -> GGUFModel:
    """The model with the config `entries`. Raises InputError for one that llama.cpp does not run, or otherwise."""
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
    refuse(folder, model.obstacles(), "GGUF")
    return model


def _first(config: PreTrainedConfig, *entries: str) -> Any:
    """The first of these entries of a config that is there and not None."""
    return next((value for entry in entries if (value := getattr(config, entry, None)) is not None), None)
