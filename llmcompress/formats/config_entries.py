"""A model's config as transformers reads it: the entries that an engine overlooks, and rotary positions.

An export lists, for a family, the entries that it writes or that the engine reads, and those that the engine takes for
granted. Any other must have its default; one that transformers' class does not have must be one that its code does not
read either, as entries of other programs are not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from inspect import getsource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

INERT = {  # entries of transformers' classes that change no prediction, or only by way of others
    # training
    *("attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop", "embedding_dropout", "hidden_dropout"),
    *("initializer_range", "resid_pdrop", "residual_dropout", "router_aux_loss_coef", "router_jitter_noise"),
    # tokens and text, which a tokenizer tells
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    # of a run of transformers and its outputs
    *("chunk_size_feed_forward", "dtype", "is_decoder", "is_encoder_decoder", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "pretraining_tp", "reorder_and_upcast_attn", "return_dict"),
    *("use_cache", "gradient_checkpointing"),
    # heads of classifiers, which no engine here has
    *("id2label", "label2id", "problem_type", "summary_activation", "summary_first_dropout"),
    *("summary_proj_to_labels", "summary_type", "summary_use_proj"),
    # the origin of a model
    *("_name_or_path", "architectures", "model_type", "transformers_version"),
    # from which transformers derives `layer_types`, `sliding_window` and `no_rope_layers`
    *("_sliding_window_pattern", "max_window_layers", "no_rope_layer_interval", "sliding_window_pattern"),
    *("use_sliding_window",),
}
SHARED = ("masking_utils", "modeling_rope_utils", "modeling_utils", "modeling_layers", "cache_utils")  # of all families
FULL, WINDOW = "full_attention", "sliding_attention"  # types of layers, which may have parameters of their own
PARAMETERS = {  # that transformers reads, and three that it does not
    *("rope_theta", "rope_type", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor"),
    *("high_freq_factor", "short_factor", "long_factor", "type", "finetuned", "mrope_section"),
}
ALWAYS: dict[str, Any] = {"is_causal": True}  # entries that no class has, and transformers reads in every family


def overlooked_entries(config: PreTrainedConfig, read: Collection[str], fixed: Mapping[str, Any]) -> Iterator[str]:
    """Yield the entries, with their values, that change a model's outputs but not an engine's.

    `read`: entries that the engine reads; `fixed`: those that it takes for granted, with the right value or a tuple of
    several.
    """
    plain, other_names = type(config)(), {real: name for name, real in config.attribute_map.items()}
    fixed = {**ALWAYS, **fixed}
    for entry, value in config.to_dict().items():
        names = {entry, other_names.get(entry, entry)}
        if entry in fixed:
            right = value in (fixed[entry] if isinstance(fixed[entry], tuple) else (fixed[entry],))
        elif names & (INERT | set(read)):
            continue
        elif names & entries_of(type(config)):
            right = value == getattr(plain, entry)
        else:
            right = value is None or entry not in entries_read(type(config))
            entry = f"the unknown entry {entry}"
        if not right:
            yield f"{entry} {value!r}"


def entries_of(kind: type[PreTrainedConfig]) -> set[str]:
    """Return the entries that a class of configs has."""
    return {entry.name for entry in fields(kind)}


def entries_read(kind: type[PreTrainedConfig]) -> set[str]:
    """Return the names that transformers' code reads of a config, in its family or in all of them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    modules = MODEL_FOR_CAUSAL_LM_MAPPING[kind].__module__, *(f"transformers.{name}" for name in SHARED)
    return set().union(*map(_names_read, modules))


@cache
def _names_read(module: str) -> set[str]:
    """Return the names that a module reads of something that it calls a config."""
    pairs = re.findall(r'config\.(\w+)|config, "(\w+)"', getsource(import_module(module)))
    return {name for pair in pairs for name in pair}


def check_obstacles(folder: Path, obstacles: Iterator[str], engine: str) -> None:
    """Raise InputError for the first obstacle, if any."""
    obstacle = next(obstacles, None)
    if obstacle is not None:
        raise InputError(f"{folder} has {obstacle}, which cannot go to {engine} here; export to dense instead")


@dataclass(frozen=True)
class ModelConfig:
    """A config, and the properties that engines have words of their own for."""

    config: PreTrainedConfig

    @property
    def head_dim(self) -> int:
        """Numbers per attention head."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def windows(self) -> list[bool]:
        """True for every layer that attends to a window only."""
        window, count = getattr(self.config, "sliding_window", None), self.config.num_hidden_layers
        kinds = getattr(self.config, "layer_types", None) or [WINDOW] * count
        return [kind == WINDOW and window is not None for kind in kinds]

    def head_obstacles(self) -> Iterator[str]:
        """Yield heads that together are not as wide as the model."""
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        if heads * self.head_dim != width:
            yield f"{heads} heads of {self.head_dim} numbers, not of {width} in all"

    def window_obstacles(self, every: int | None) -> Iterator[str]:
        """Yield unusual attention windows, where all layers have one but the last of `every`, or none has."""
        if every and self.windows != window_pattern(every, len(self.windows)):
            yield f"attention to all tokens in other layers than the last of every {every}"
        elif not every and any(self.windows) and self.config.sliding_window < self.config.max_position_embeddings:
            yield f"attention to the last {self.config.sliding_window} tokens only"


def window_pattern(every: int, layers: int) -> list[bool]:
    """Return true for all layers but the last of `every`."""
    return [layer % every != 0 for layer in range(1, layers + 1)]


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
        """The longest text over the longest one of the first training."""
        return float(self.config.max_position_embeddings / self.full["original_max_position_embeddings"])

    @property
    def factor(self) -> float:
        """The factor of linear scaling and of YaRN."""
        return float(self.full["factor"] or self.ratio)

    def scaled_frequencies(self) -> tuple[Tensor, float]:
        """Return frequencies, float32 `[rotated numbers / 2]`, and the attention factor; not of the default type."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        layer = FULL if self.nested else None
        return ROPE_INIT_FUNCTIONS[self.kind](self.config, torch.device("cpu"), layer_type=layer)

    def unknown_parameters(self) -> Iterator[str]:
        """Yield unknown parameters, with their values, and a type of layers that has none."""
        if not self.full or (self.nested and not self.window):
            yield "no rotary positions in some layers"
        for entry, value in (self.full | self.window).items():
            if entry not in PARAMETERS and value is not None:
                yield f"the unknown parameter {entry} {value!r} of rotary positions"
