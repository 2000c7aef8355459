"""Entries of config.json that MLX and ExLlamaV3 read: a row for each family, in the notation of the engine.

Both read rotary positions in the notation before transformers 5, and have other defaults than transformers. So an
export writes every entry that the engine reads or takes for granted, and refuses a model with others that matter. Facts
from mlx-lm 0.32 and ExLlamaV3 1.4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError
from llmcompress.formats.config_entries import (
    ModelConfig,
    RotaryPositions,
    check_obstacles,
    overlooked_entries,
    window_pattern,
)

SIZES = {  # entries that both read in every family, or that the tensors show
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"),
}
CHECKED = {"rope_parameters", "layer_types", "sliding_window", "head_dim", "original_max_position_embeddings"}

OWN: dict[str, Any] = {"rope_traditional": False, "layer_norm_bias": False, "rotary_dim": None}  # not transformers'


@dataclass(frozen=True)
class EngineFamily:
    """A family as an engine reads its config.

    `read`: entries, beside `SIZES`. `fixed`: entries that it takes for granted, with a value or a tuple of several.
    `scaling`: types of rotary positions that it computes, beside the default. `every`: of so many layers the last has
    no window, if the engine does not read that. `window_theta`: base of rotary positions in layers
    with a window, if the engine does not read it. `wide`: True if activations are beyond float16's range.
    """

    read: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    scaling: tuple[str, ...] = ("linear", "llama3", "yarn")
    every: int | None = None
    window_theta: float | None = None
    wide: bool = False

    @property
    def entries(self) -> set[str]:
        """Entries that it reads."""
        return SIZES | set(self.read.split())


@dataclass(frozen=True)
class EngineFamilies:
    """An engine and the families that it runs. `yarn_by_length`: YaRN goes by the ratio of two lengths, not by its
    factor."""

    name: str
    families: Mapping[str, EngineFamily]
    yarn_by_length: bool = False


@dataclass(frozen=True)
class EngineConfig(ModelConfig):
    """A config as an engine reads it."""

    family: EngineFamily
    yarn_by_length: bool

    @property
    def rotary(self) -> RotaryPositions:
        """Rotary positions."""
        return RotaryPositions(self.config)

    @property
    def period(self) -> int | None:
        """The number of layers of which the last has no window and the others have one; None for another pattern."""
        count = len(self.windows)
        return next((n for n in range(1, count + 2) if self.windows == window_pattern(n, count)), None)

    def older_notation(self) -> dict[str, Any]:
        """Return rotary positions and windows in the notation of older configs.

        An attention factor stands there as such and as the `mscale` that makes it.
        """
        rotary, scaling = self.rotary, None
        if rotary.kind != "default":
            scaling = {key: value for key, value in rotary.full.items() if value is not None} | {"type": rotary.kind}
        if scaling and rotary.kind == "yarn":
            factor, (_, attention) = rotary.factor, rotary.scaled_frequencies()
            mscale = (attention - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0
            scaling |= {"factor": factor, "attention_factor": attention, "mscale": mscale, "mscale_all_dim": 0}
        entries: dict[str, Any] = {
            "rope_theta": rotary.full["rope_theta"],
            "rope_scaling": scaling,
            "partial_rotary_factor": rotary.part,
        }
        if rotary.nested:
            entries["rope_local_base_freq"] = rotary.window["rope_theta"]
        if getattr(self.config, "sliding_window", None) is not None:
            entries |= {"sliding_window_pattern": self.period, "sliding_window_size": self.config.sliding_window}
        return entries

    def obstacles(self) -> Iterator[str]:
        """Yield the properties of the model that the engine does not read."""
        config, entries = self.config, self.family.entries
        yield from overlooked_entries(config, entries | CHECKED, OWN | dict(self.family.fixed))
        if "head_dim" not in entries:
            yield from self.head_obstacles()
        if "sliding_window_pattern" in entries:
            if getattr(config, "sliding_window", None) is None or self.period is None:
                yield "attention windows in layers that follow no period"
        elif not {"layer_types", "sliding_window"} <= entries:
            yield from self.window_obstacles(self.family.every if any(self.windows) else None)
        yield from self._rotary_obstacles()

    def _rotary_obstacles(self) -> Iterator[str]:
        """Yield unusual rotary positions."""
        rotary, family = self.rotary, self.family
        if rotary.kind not in ("default", *family.scaling):
            yield f"rotary positions of type {rotary.kind!r}"
        yield from rotary.unknown_parameters()
        if rotary.kind == "yarn":
            yield from self._yarn_obstacles()
        if "partial_rotary_factor" not in family.entries and rotary.part != 1:
            yield f"partial_rotary_factor {rotary.part}"
        if rotary.nested:
            kind, theta = rotary.window.get("rope_type"), rotary.window["rope_theta"]
            expected = family.window_theta or rotary.full["rope_theta"]
            if kind != "default" or ("rope_local_base_freq" not in family.entries and theta != expected):
                yield f"rotary positions of type {kind!r} and base {theta} in layers with a window"

    def _yarn_obstacles(self) -> Iterator[str]:
        """Yield unusual parameters of YaRN."""
        rotary = self.rotary
        if self.yarn_by_length:
            if rotary.factor != rotary.ratio:
                yield f"a factor of {rotary.factor:g} of rotary positions for texts {rotary.ratio:g} times as long"
            return
        if rotary.full.get("truncate") is False:
            yield "rotary positions of type 'yarn' with truncate False"
        if rotary.factor <= 1 and (attention := rotary.scaled_frequencies()[1]) != 1:
            yield f"rotary positions of type 'yarn' with attention_factor {attention:g} and factor 1"


def readable_entries(folder: Path, entries: dict[str, Any], engine: EngineFamilies) -> dict[str, Any]:
    """Return the entries of config.json that an engine reads. Raises InputError for those that it would misread."""
    from transformers import AutoConfig

    kind = str(entries.get("model_type"))
    if kind not in engine.families:
        raise InputError(
            f"{folder} is a {kind} model, of which nobody here knows what {engine.name} reads (known are "
            f"{', '.join(sorted(engine.families))}); export to dense instead"
        )
    config, family = AutoConfig.for_model(**entries), engine.families[kind]
    read = EngineConfig(config, family, engine.yarn_by_length)
    check_obstacles(folder, read.obstacles(), engine.name)
    values = config.to_dict() | {"head_dim": read.head_dim} | read.older_notation()
    return {entry: values[entry] for entry in sorted(family.entries | set(family.fixed)) if entry in values}


# --- families -------------------------------------------------------------------------------------------------------

GELU = "gelu_pytorch_tanh"
SILU = {"hidden_act": "silu"}
ROPE = "rope_theta rope_scaling"
RMS = "rms_norm_eps head_dim"
LLAMA = f"{RMS} attention_bias mlp_bias {ROPE}"
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
UNBIASED = SILU | {"attention_bias": False}
GEMMA = {"attention_bias": False, "use_bidirectional_attention": (None, False)}
GEMMA2 = "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar"
GEMMA3 = {"attn_logit_softcapping": None, "hidden_activation": GELU} | GEMMA
GRANITE = "embedding_multiplier residual_multiplier attention_multiplier logits_scaling"
COHERE = "layer_norm_eps logit_scale"

MLX_FAMILIES = {
    "llama": EngineFamily(LLAMA, SILU),
    "mistral": EngineFamily(f"{RMS} {ROPE}", SILU),
    "smollm3": EngineFamily(f"{LLAMA} layer_types sliding_window no_rope_layers", SILU),
    "granite": EngineFamily(f"rms_norm_eps attention_bias mlp_bias {GRANITE} {ROPE}", SILU),
    "olmo2": EngineFamily(f"{RMS} attention_bias {ROPE}", SILU),
    "olmo3": EngineFamily(f"{RMS} attention_bias layer_types sliding_window {ROPE}", SILU),
    "qwen2": EngineFamily(f"rms_norm_eps {ROPE}", SILU),
    "qwen3": EngineFamily(f"{RMS} {ROPE}", UNBIASED),
    "seed_oss": EngineFamily(f"{LLAMA} attention_out_bias", SILU),
    "ernie4_5": EngineFamily(f"{RMS} use_bias rope_theta", SILU, ()),
    "exaone4": EngineFamily(f"{RMS} {ROPE}", SILU | {"sliding_window": None, "sliding_window_pattern": 0}),
    "gemma": EngineFamily(f"{RMS} rope_theta", TIED | GEMMA | {"hidden_act": (GELU, "gelu")}, (), wide=True),
    "gemma2": EngineFamily(f"{RMS} {GEMMA2} rope_theta", TIED | GEMMA | {"hidden_activation": GELU}, (), wide=True),
    "gemma3_text": EngineFamily(
        f"{RMS} query_pre_attn_scalar sliding_window sliding_window_pattern rope_local_base_freq {ROPE}",
        GEMMA3 | {"final_logit_softcapping": None},
        wide=True,
    ),
    "phi": EngineFamily(
        "layer_norm_eps partial_rotary_factor rope_theta",
        UNTIED | {"hidden_act": "gelu_new", "qk_layernorm": False},
        (),
    ),
    "phi3": EngineFamily("rms_norm_eps partial_rotary_factor rope_theta", SILU, ()),
    "glm4": EngineFamily(f"{RMS} attention_bias partial_rotary_factor rope_theta", SILU | UNTIED, ()),
    "starcoder2": EngineFamily("norm_epsilon rope_theta", {"use_bias": True, "hidden_act": (GELU, "gelu")}, ()),
    "stablelm": EngineFamily(
        "layer_norm_eps use_qkv_bias qk_layernorm use_parallel_residual partial_rotary_factor rope_theta",
        SILU | UNTIED,
        (),
    ),
    "cohere": EngineFamily(f"{COHERE} attention_bias use_qk_norm rope_theta", SILU | TIED, ()),
    "cohere2": EngineFamily(
        f"{COHERE} attention_bias head_dim sliding_window sliding_window_pattern rope_theta", SILU | TIED, ()
    ),
    "nemotron": EngineFamily(
        f"norm_eps head_dim attention_bias mlp_bias partial_rotary_factor {ROPE}", {"hidden_act": "relu2"}, ("linear",)
    ),
}
MLX = EngineFamilies("MLX", MLX_FAMILIES)

PART_ROPE = f"head_dim partial_rotary_factor {ROPE}"
EXL3_LLAMA = f"rms_norm_eps {PART_ROPE}"
NO_BIASES = {"attention_bias": False, "mlp_bias": False}
EXL3_FAMILIES = {
    "llama": EngineFamily(f"{EXL3_LLAMA} attention_bias", SILU | {"mlp_bias": False}),
    "mistral": EngineFamily(EXL3_LLAMA, SILU),
    "qwen2": EngineFamily(EXL3_LLAMA, SILU),
    "qwen3": EngineFamily(EXL3_LLAMA, UNBIASED),
    "smollm3": EngineFamily(f"{EXL3_LLAMA} no_rope_layers", SILU | NO_BIASES),
    "arcee": EngineFamily(EXL3_LLAMA, {"hidden_act": "relu2"} | NO_BIASES),
    "seed_oss": EngineFamily(f"{EXL3_LLAMA} attention_bias", SILU | {"attention_out_bias": False, "mlp_bias": False}),
    "ernie4_5": EngineFamily(EXL3_LLAMA, SILU | {"use_bias": False}),
    "phi3": EngineFamily(EXL3_LLAMA, SILU, ()),
    "glm4": EngineFamily(f"{EXL3_LLAMA} attention_bias", SILU),
    "olmo3": EngineFamily(  # the window for a length of 4,096 alone
        f"{EXL3_LLAMA} layer_types sliding_window", UNBIASED | {"sliding_window": 4096}
    ),
    "gemma2": EngineFamily(f"{EXL3_LLAMA} {GEMMA2} sliding_window_size", GEMMA | {"hidden_activation": GELU}, every=2),
    "gemma3_text": EngineFamily(
        f"{EXL3_LLAMA} query_pre_attn_scalar final_logit_softcapping layer_types sliding_window",
        GEMMA3,
        window_theta=1e4,
    ),
    "cohere": EngineFamily(f"{COHERE} use_qk_norm {PART_ROPE}", UNBIASED),
    "cohere2": EngineFamily(f"{COHERE} layer_types sliding_window {PART_ROPE}", UNBIASED),
}
EXL3 = EngineFamilies("EXL3", EXL3_FAMILIES, yarn_by_length=True)
