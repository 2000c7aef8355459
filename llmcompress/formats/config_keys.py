"""Entries of config.json that an engine does not read: where one changes what a model computes, its export is refused.

An export lists, for a family, the entries that it writes or that the engine reads, and those that the engine takes for
granted. Any other must have its default; one that transformers' class does not have must be one that its code does not
read either, as entries of other programs are not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from inspect import getsource
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

INERT = {  # entries of transformers' classes that change no prediction, or only by way of others
    # training
    *("attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop", "embedding_dropout", "hidden_dropout"),
    *("initializer_range", "resid_pdrop", "residual_dropout", "router_aux_loss_coef", "router_jitter_noise"),
    # tokens and text, which a tokenizer tells
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    # how transformers runs a model, and what it returns
    *("chunk_size_feed_forward", "dtype", "is_decoder", "is_encoder_decoder", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "pretraining_tp", "reorder_and_upcast_attn", "return_dict"),
    *("use_cache", "gradient_checkpointing"),
    # heads of classifiers, which no engine here has
    *("id2label", "label2id", "problem_type", "summary_activation", "summary_first_dropout"),
    *("summary_proj_to_labels", "summary_type", "summary_use_proj"),
    # the origin of a model
    *("_name_or_path", "architectures", "model_type", "transformers_version"),
    # what transformers derives `layer_types`, `sliding_window` and `no_rope_layers` from
    *("_sliding_window_pattern", "max_window_layers", "no_rope_layer_interval", "sliding_window_pattern"),
    *("use_sliding_window",),
}
SHARED = ("masking_utils", "modeling_rope_utils", "modeling_utils", "modeling_layers", "cache_utils")  # of all families
ALWAYS: dict[str, Any] = {"is_causal": True}  # entries that no class has, and transformers reads in every family


def overlooked(config: PreTrainedConfig, read: Collection[str], fixed: Mapping[str, Any]) -> Iterator[str]:
    """Yield the entries, with their values, that change what a model computes without an engine's knowing.

    It reads the entries `read` and takes for granted those of `fixed`: the value that is right, or a tuple of several.
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
    found = re.findall(r'config\.(\w+)|config, "(\w+)"', getsource(import_module(module)))
    return {name for pair in found for name in pair}


def refuse(folder: Path, obstacles: Iterator[str], engine: str) -> None:
    """Raise InputError for the first obstacle."""
    obstacle = next(obstacles, None)
    if obstacle is not None:
        raise InputError(f"{folder} has {obstacle}, which cannot go to {engine} here; export to dense instead")
