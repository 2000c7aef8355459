"""Entries of config.json that MLX and ExLlamaV3 read: a row for each family, in the notation of the engine.

Both read rotary positions as configs had them before transformers 5, and have other defaults than transformers. So an
export writes every entry that the engine reads or takes for granted, and refuses a model with others that matter. Facts
from mlx-lm 0.32 and ExLlamaV3 1.4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.formats.config_keys import overlooked, refuse
from llmcompress.formats.rotary import WINDOW, RotaryPositions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SIZES = {  # entries that both read in every family, or that the tensors show
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"),
}
CHECKED = {"rope_parameters", "layer_types", "sliding_window", "head_dim", "original_max_position_embeddings"}

OWN: dict[str, Any] = {
    "rope_traditional": False,
    "layer_norm_bias": False,
    "rotary_dim": None,
}  # transformers reads none


@dataclass(frozen=True)
class EngineFamily:
    """A family as an engine reads its config.

    `read`: entries, beside `SIZES`. `fixed`: what it takes for granted, a value or a tuple of several. `scaling`: types
    of rotary positions that it computes, beside the default. `every`: of so many layers the last has no window, where
    that is not read. `window_theta`: base of rotary positions in layers with a window, where that is not read.
    `by_length`: YaRN goes by the ratio of the two lengths, not by its factor.
    """

    read: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    scaling: tuple[str, ...] = ("linear", "llama3", "yarn")
    every: int | None = None
    window_theta: float | None = None
    by_length: bool = False

    @property
    def entries(self) -> set[str]:
        """Entries that it reads."""
        return SIZES | set(self.read.split())


@dataclass(frozen=True)
class EngineConfig:
    """A config as an engine reads it."""

    config: PreTrainedConfig
    family: EngineFamily

    @property
    def head_dim(self) -> int:
        """Numbers per attention head."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def rotary(self) -> RotaryPositions:
        """Rotary positions."""
        return RotaryPositions(self.config)

    @property
    def windows(self) -> list[bool]:
        """True for every layer that has a window."""
        window, count = getattr(self.config, "sliding_window", None), self.config.num_hidden_layers
        kinds = getattr(self.config, "layer_types", None) or [WINDOW] * count
        return [kind == WINDOW and window is not None for kind in kinds]

    @property
    def period(self) -> int | None:
        """Of so many layers the last has no window, the others have one; None where it is otherwise."""
        layers = range(1, len(self.windows) + 1)
        return next((n for n in (*layers, len(layers) + 1) if self.windows == [at % n != 0 for at in layers]), None)

    def older(self) -> dict[str, Any]:
        """Return rotary positions and windows in the notation of older configs.

        An attention factor stands there as such and as the `mscale` that makes it.
        """
        rotary, scaling = self.rotary, None
        if rotary.kind != "default":
            scaling = {key: value for key, value in rotary.full.items() if value is not None} | {"type": rotary.kind}
        if scaling and rotary.kind == "yarn":
            factor, (_, attention) = rotary.factor, rotary.scaled()
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
        yield from overlooked(config, entries | CHECKED, OWN | dict(self.family.fixed))
        if "head_dim" not in entries and config.num_attention_heads * self.head_dim != config.hidden_size:
            yield f"{config.num_attention_heads} heads of {self.head_dim} numbers, not of {config.hidden_size} in all"
        yield from self._window_obstacles()
        yield from self._rotary_obstacles()

    def _window_obstacles(self) -> Iterator[str]:
        """Yield what is unusual in attention windows."""
        window, read, every = getattr(self.config, "sliding_window", None), self.family.entries, self.family.every
        if {"layer_types", "sliding_window"} <= read:
            return
        if "sliding_window_pattern" in read:
            if window is None or self.period is None:
                yield "attention windows in layers that follow no period"
        elif every:
            if any(self.windows) and self.period != every:
                yield f"attention to all tokens in other layers than the last of every {every}"
        elif any(self.windows) and window < self.config.max_position_embeddings:
            yield f"attention to the last {window} tokens only"

    def _rotary_obstacles(self) -> Iterator[str]:
        """Yield what is unusual in rotary positions."""
        rotary, family = self.rotary, self.family
        if rotary.kind not in ("default", *family.scaling):
            yield f"rotary positions of type {rotary.kind!r}"
        yield from rotary.unknown()
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
        """Yield what is unusual in YaRN."""
        rotary = self.rotary
        if self.family.by_length and rotary.factor != rotary.ratio:
            yield f"a factor of {rotary.factor:g} of rotary positions for texts that are {rotary.ratio:g} times as long"
        if not self.family.by_length and rotary.full.get("truncate") is False:
            yield "rotary positions of type 'yarn' with truncate False"
        if not self.family.by_length and rotary.factor <= 1 and rotary.scaled()[1] != 1:
            yield f"rotary positions of type 'yarn' with attention_factor {rotary.scaled()[1]:g} and factor 1"


def readable_entries(
    folder: Path, entries: dict[str, Any], families: Mapping[str, EngineFamily], engine: str
) -> dict[str, Any]:
    """Return the entries of config.json that an engine reads. Raises InputError for what it would compute otherwise."""
    from transformers import AutoConfig

    kind = str(entries.get("model_type"))
    if kind not in families:
        raise InputError(
            f"{folder} is a {kind} model, of which nobody here knows what {engine} reads (known are "
            f"{', '.join(sorted(families))}); export to dense instead"
        )
    config = AutoConfig.for_model(**entries)
    read = EngineConfig(config, families[kind])
    refuse(folder, read.obstacles(), engine)
    values = config.to_dict() | {"head_dim": read.head_dim} | read.older()
    written = families[kind].entries | set(families[kind].fixed)
    return {entry: values[entry] for entry in sorted(written) if entry in values}


# --- families -------------------------------------------------------------------------------------------------------

GELU = "gelu_pytorch_tanh"
SILU = {"hidden_act": "silu"}
ROPE = "rope_theta rope_scaling"
LLAMA = f"rms_norm_eps head_dim attention_bias mlp_bias {ROPE}"
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GEMMA = {"attention_bias": False, "use_bidirectional_attention": (None, False)}
GEMMA2 = "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar"
GEMMA3 = {"attn_logit_softcapping": None, "hidden_activation": GELU} | GEMMA
GRANITE = "embedding_multiplier residual_multiplier attention_multiplier logits_scaling"
COHERE = "layer_norm_eps logit_scale attention_bias"

MLX: Mapping[str, EngineFamily] = {
    "llama": EngineFamily(LLAMA, SILU),
    "mistral": EngineFamily(f"rms_norm_eps head_dim {ROPE}", SILU),
    "smollm3": EngineFamily(f"{LLAMA} layer_types sliding_window no_rope_layers", SILU),
    "granite": EngineFamily(f"rms_norm_eps attention_bias mlp_bias {GRANITE} {ROPE}", SILU),
    "olmo2": EngineFamily(f"rms_norm_eps head_dim attention_bias {ROPE}", SILU),
    "olmo3": EngineFamily(f"rms_norm_eps head_dim attention_bias layer_types sliding_window {ROPE}", SILU),
    "qwen2": EngineFamily(f"rms_norm_eps {ROPE}", SILU),
    "qwen3": EngineFamily(f"rms_norm_eps head_dim {ROPE}", SILU | {"attention_bias": False}),
    "seed_oss": EngineFamily(f"{LLAMA} attention_out_bias", SILU),
    "ernie4_5": EngineFamily("rms_norm_eps head_dim use_bias rope_theta", SILU, ()),
    "exaone4": EngineFamily(
        f"rms_norm_eps head_dim {ROPE}", SILU | {"sliding_window": None, "sliding_window_pattern": 0}
    ),
    "gemma": EngineFamily("rms_norm_eps head_dim rope_theta", TIED | GEMMA | {"hidden_act": (GELU, "gelu")}, ()),
    "gemma2": EngineFamily(
        f"rms_norm_eps head_dim {GEMMA2} rope_theta", TIED | GEMMA | {"hidden_activation": GELU}, ()
    ),
    "gemma3_text": EngineFamily(
        "rms_norm_eps head_dim query_pre_attn_scalar sliding_window sliding_window_pattern rope_local_base_freq "
        + ROPE,
        GEMMA3 | {"final_logit_softcapping": None},
    ),
    "phi": EngineFamily(
        "layer_norm_eps partial_rotary_factor rope_theta",
        UNTIED | {"hidden_act": "gelu_new", "qk_layernorm": False},
        (),
    ),
    "phi3": EngineFamily("rms_norm_eps partial_rotary_factor rope_theta", SILU, ()),
    "glm4": EngineFamily("rms_norm_eps head_dim attention_bias partial_rotary_factor rope_theta", SILU | UNTIED, ()),
    "starcoder2": EngineFamily("norm_epsilon rope_theta", {"use_bias": True, "hidden_act": (GELU, "gelu")}, ()),
    "stablelm": EngineFamily(
        "layer_norm_eps use_qkv_bias qk_layernorm use_parallel_residual partial_rotary_factor rope_theta",
        SILU | UNTIED,
        (),
    ),
    "cohere": EngineFamily(f"{COHERE} use_qk_norm rope_theta", SILU | TIED, ()),
    "cohere2": EngineFamily(f"{COHERE} head_dim sliding_window sliding_window_pattern rope_theta", SILU | TIED, ()),
    "nemotron": EngineFamily(
        f"norm_eps head_dim attention_bias mlp_bias partial_rotary_factor {ROPE}", {"hidden_act": "relu2"}, ("linear",)
    ),
}

EXL3_LLAMA = "rms_norm_eps head_dim partial_rotary_factor rope_theta rope_scaling"
EXL3: Mapping[str, EngineFamily] = {
    "llama": EngineFamily(f"{EXL3_LLAMA} attention_bias", SILU | {"mlp_bias": False}, by_length=True),
    "mistral": EngineFamily(EXL3_LLAMA, SILU, by_length=True),
    "qwen2": EngineFamily(EXL3_LLAMA, SILU, by_length=True),
    "qwen3": EngineFamily(EXL3_LLAMA, SILU | {"attention_bias": False}, by_length=True),
    "smollm3": EngineFamily(
        f"{EXL3_LLAMA} no_rope_layers", SILU | {"attention_bias": False, "mlp_bias": False}, by_length=True
    ),
    "arcee": EngineFamily(
        EXL3_LLAMA, {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False}, by_length=True
    ),
    "seed_oss": EngineFamily(
        f"{EXL3_LLAMA} attention_bias", SILU | {"attention_out_bias": False, "mlp_bias": False}, by_length=True
    ),
    "ernie4_5": EngineFamily(EXL3_LLAMA, SILU | {"use_bias": False}, by_length=True),
    "phi3": EngineFamily(EXL3_LLAMA, SILU, ()),
    "glm4": EngineFamily(f"{EXL3_LLAMA} attention_bias", SILU, by_length=True),
    "olmo3": EngineFamily(
        f"{EXL3_LLAMA} layer_types sliding_window",  # the second for a length of 4,096 alone
        SILU | {"attention_bias": False, "sliding_window": 4096},
        by_length=True,
    ),
    "gemma2": EngineFamily(
        f"{EXL3_LLAMA} {GEMMA2} sliding_window_size",
        GEMMA | {"hidden_activation": GELU},
        by_length=True,
        every=2,
    ),
    "gemma3_text": EngineFamily(
        f"{EXL3_LLAMA} query_pre_attn_scalar final_logit_softcapping layer_types sliding_window",
        GEMMA3,
        by_length=True,
        window_theta=1e4,
    ),
    "cohere": EngineFamily(
        "layer_norm_eps logit_scale use_qk_norm head_dim partial_rotary_factor rope_theta rope_scaling",
        SILU | {"attention_bias": False},
        by_length=True,
    ),
    "cohere2": EngineFamily(
        "layer_norm_eps logit_scale head_dim layer_types sliding_window partial_rotary_factor rope_theta rope_scaling",
        SILU | {"attention_bias": False},
        by_length=True,
    ),
}
