"""Facts of GGUF files that transformers passes over: rotary positions, the scale of attention, biases.

Read into the model's config where that can say it; refused otherwise, since the model would be another one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmcompress.errors import InputError
from llmcompress.models.files.gguf_header import ORIGINAL, GGUFHeader

BIAS = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(up|down|gate))\.bias")
WIDE_QUERIES = {"gemma2": 46, "gemma3": 62}  # layers at which llama.cpp scales attention by the width, not by heads
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of all Llamas from 3.1 on
LLAMA3 |= {"original_max_position_embeddings": 8192}


def read_what_is_passed_over(model: PreTrainedModel, file: Path, header: GGUFHeader) -> None:
    """Complete the config of a model that transformers read from a file.

    Raises InputError for what a config cannot say, and for weights that the model has no place for.
    """
    config, kind = model.config, header.entries["general.architecture"]
    heads = getattr(config, "num_attention_heads", 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if kind in WIDE_QUERIES:
        wide = config.num_hidden_layers == WIDE_QUERIES[kind]
        config.query_pre_attn_scalar = config.hidden_size // heads if wide else head_dim
    _check_biases(model, file, header)
    positions = getattr(config, "rope_parameters", None)
    if not positions or "rotary_dim" in config.to_dict():
        return
    full = positions.get("full_attention", positions)
    if isinstance(base := header.entries.get(f"{kind}.rope.freq_base"), float):  # not read of all architectures
        full["rope_theta"] = base
    width = int(head_dim * (full.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1))
    told = header.entries.get(f"{kind}.rope.dimension_count", width)
    if told != width:
        raise _refusal(file, f"rotates {told} numbers of a head, and transformers reads {width}")
    if full.get("rope_type", "default") == "default":
        full |= _scaling_by_name(file, header) | _scaling_by_divisors(model, file, header, full, width)


def _check_biases(model: PreTrainedModel, file: Path, header: GGUFHeader) -> None:
    """Raise InputError for biases that the model has not."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = {name: number for number, name in MODEL_ARCH_NAMES.items()}[header.entries["general.architecture"]]
    known = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    own = {known.get_name(name, try_suffixes=(".bias",)) for name in model.state_dict() if name.endswith(".bias")}
    unread = sorted(name for name in header.sizes if BIAS.fullmatch(name) and name not in own)
    if unread:
        raise _refusal(file, f"has biases that transformers passes over, {unread[0]} for one")


def _scaling_by_name(file: Path, header: GGUFHeader) -> dict[str, Any]:
    """Return the parameters of linear scaling or of YaRN, as the file names it; nothing for none."""
    before = f"{header.entries['general.architecture']}.rope.scaling"
    kind, factor, length, attention = (
        header.entries.get(f"{before}.{key}") for key in ("type", "factor", "original_context_length", "attn_factor")
    )
    odd = {key for key in header.entries if key.startswith(f"{before}.yarn_")}
    if kind in (None, "none") and attention in (None, 1.0) and not odd:
        return {}
    if kind == "linear" and factor and not odd:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor and length and attention in (None, 1.0) and not odd:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    raise _refusal(file, f"has rotary positions of type {kind!r}, which transformers passes over")


def _scaling_by_divisors(
    model: PreTrainedModel, file: Path, header: GGUFHeader, full: dict[str, Any], width: int
) -> dict[str, Any]:
    """Return Llama 3's parameters if the file's divisors of frequencies are its own; nothing without divisors."""
    names = [name for name in header.sizes if name.startswith(("rope_freqs", "rope_factors"))]
    if not names:
        return {}
    divisors = _read_tensor(file, names[0])
    if names == ["rope_freqs.weight"] and len(divisors) == width // 2:
        scaled = LLAMA3 | {"factor": float(divisors.max())}
        before, model.config.rope_parameters = model.config.rope_parameters, full | scaled
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
        model.config.rope_parameters = before
        plain = full["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        if torch.allclose(plain / frequencies, divisors, rtol=1e-3, atol=0):
            return scaled
        if torch.all(divisors == 1):
            return {}
    raise _refusal(file, f"scales rotary positions by {names[0]}, which transformers passes over")


def _read_tensor(file: Path, name: str) -> Tensor:
    """Return a vector of float32 in a file, float64."""
    import gguf

    reader = gguf.GGUFReader(str(file))
    return next(torch.tensor(each.data).double().flatten() for each in reader.tensors if each.name == name)


def _refusal(file: Path, reason: str) -> InputError:
    return InputError(f"{file} {reason}, so its model would be another one; {ORIGINAL}")
