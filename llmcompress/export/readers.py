"""What MLX and ExLlamaV3 read of a model's config.json: a row for each family, in their own notation.

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
from llmcompress.export.config_keys import overlooked, refuse, unknown_rotary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SIZES = {  # entries that both read in every family, or that the tensors show
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"),
}
CHECKED = {"rope_parameters", "layer_types", "sliding_window", "head_dim", "original_max_position_embeddings"}
FULL, WINDOW = "full_attention", "sliding_attention"  # types of layers


@dataclass(frozen=True)
class Reader:
    """An engine as it reads the config of a family.

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
class ReadConfig:
    """A config as an engine reads it."""

    config: PreTrainedConfig
    reader: Reader

    @property
    def head_dim(self) -> int:
        """Numbers per attention head."""
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def nested(self) -> bool:
        """True if layers with a window have rotary positions of their own."""
        return FULL in self.config.rope_parameters

    @property
    def rotary(self) -> dict[str, Any]:
        """Parameters of rotary positions in layers that attend to all tokens."""
        rotary = self.config.rope_parameters
        return dict((rotary[FULL] or {}) if self.nested else rotary)

    @property
    def window_rotary(self) -> dict[str, Any]:
        """Those in layers with a window; empty where there are none, or the same."""
        return dict(self.config.rope_parameters.get(WINDOW) or {}) if self.nested else {}

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
        rotary = self.rotary
        kind, theta, part = (rotary.pop(key, None) for key in ("rope_type", "rope_theta", "partial_rotary_factor"))
        scaling = None
        if kind not in (None, "default"):
            scaling = {"type": kind, "rope_type": kind} | {key: v for key, v in rotary.items() if v is not None}
        if scaling and kind == "yarn":
            factor, attention = self._yarn()
            mscale = (attention - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0
            scaling |= {"factor": factor, "attention_factor": attention, "mscale": mscale, "mscale_all_dim": 0}
        entries = {"rope_theta": theta, "rope_scaling": scaling, "partial_rotary_factor": 1.0 if part is None else part}
        if self.nested:
            entries["rope_local_base_freq"] = self.window_rotary.get("rope_theta")
        if getattr(self.config, "sliding_window", None) is not None:
            entries |= {"sliding_window_pattern": self.period, "sliding_window_size": self.config.sliding_window}
        return entries

    def _yarn(self) -> tuple[float, float]:
        """Return the factor of YaRN and its attention factor."""
        import torch
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        layer = FULL if self.nested else None
        _, attention = ROPE_INIT_FUNCTIONS["yarn"](self.config, torch.device("cpu"), layer_type=layer)
        return self.rotary["factor"] or self._ratio(), attention

    def _ratio(self) -> float:
        return float(self.config.max_position_embeddings / self.rotary["original_max_position_embeddings"])

    def obstacles(self) -> Iterator[str]:
        """Yield the properties of the model that the engine does not read."""
        config, entries = self.config, self.reader.entries
        yield from overlooked(config, entries | CHECKED, self.reader.fixed)
        if "head_dim" not in entries and config.num_attention_heads * self.head_dim != config.hidden_size:
            yield f"{config.num_attention_heads} heads of {self.head_dim} numbers, not of {config.hidden_size} in all"
        yield from self._window_obstacles()
        yield from self._rotary_obstacles()

    def _window_obstacles(self) -> Iterator[str]:
        """Yield what is unusual in attention windows."""
        window, read, every = getattr(self.config, "sliding_window", None), self.reader.entries, self.reader.every
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
        reader, rotary, older = self.reader, self.rotary, self.older() if self.rotary else {}
        if not rotary or (self.nested and not self.window_rotary):
            yield "no rotary positions in some layers"
            return
        kind = rotary.get("rope_type", "default")
        if kind not in ("default", *reader.scaling):
            yield f"rotary positions of type {kind!r}"
        yield from unknown_rotary(rotary)
        yield from unknown_rotary(self.window_rotary)
        if kind == "yarn":
            yield from self._yarn_obstacles()
        if "partial_rotary_factor" not in reader.entries and older["partial_rotary_factor"] != 1:
            yield f"partial_rotary_factor {older['partial_rotary_factor']}"
        if self.nested:
            theta, window = older["rope_local_base_freq"], self.window_rotary
            expected = theta if "rope_local_base_freq" in reader.entries else reader.window_theta or older["rope_theta"]
            if window.get("rope_type") != "default" or theta != expected:
                yield f"rotary positions of type {window.get('rope_type')!r} and base {theta} in layers with a window"

    def _yarn_obstacles(self) -> Iterator[str]:
        """Yield what is unusual in YaRN."""
        factor, attention = self._yarn()
        if self.reader.by_length and factor != self._ratio():
            yield f"a factor of {factor:g} of rotary positions for texts that are {self._ratio():g} times as long"
        if not self.reader.by_length and (self.rotary.get("truncate") is False or (factor <= 1 and attention != 1)):
            yield f"rotary positions of type 'yarn' with {'truncate False' if factor > 1 else 'an attention factor'}"


def readable_entries(
    folder: Path, entries: dict[str, Any], readers: Mapping[str, Reader], engine: str
) -> dict[str, Any]:
    """Return the entries of config.json that an engine reads. Raises InputError for what it would compute otherwise."""
    from transformers import AutoConfig

    kind = str(entries.get("model_type"))
    if kind not in readers:
        raise InputError(
            f"{folder} is a {kind} model, of which nobody here knows what {engine} reads ({', '.join(sorted(readers))} "
            f"are known); export to dense instead"
        )
    config = AutoConfig.for_model(**entries)
    read = ReadConfig(config, readers[kind])
    refuse(folder, read.obstacles(), engine)
    values = config.to_dict() | {"head_dim": read.head_dim} | read.older()
    written = readers[kind].entries | set(readers[kind].fixed)
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

MLX: Mapping[str, Reader] = {
    "llama": Reader(LLAMA, SILU),
    "mistral": Reader(f"rms_norm_eps head_dim {ROPE}", SILU),
    "smollm3": Reader(f"{LLAMA} layer_types sliding_window no_rope_layers", SILU),
    "granite": Reader(f"rms_norm_eps attention_bias mlp_bias {GRANITE} {ROPE}", SILU),
    "olmo2": Reader(f"rms_norm_eps head_dim attention_bias {ROPE}", SILU),
    "olmo3": Reader(f"rms_norm_eps head_dim attention_bias layer_types sliding_window {ROPE}", SILU),
    "qwen2": Reader(f"rms_norm_eps {ROPE}", SILU),
    "qwen3": Reader(f"rms_norm_eps head_dim {ROPE}", SILU | {"attention_bias": False}),
    "seed_oss": Reader(f"{LLAMA} attention_out_bias", SILU),
    "ernie4_5": Reader("rms_norm_eps head_dim use_bias rope_theta", SILU, ()),
    "exaone4": Reader(f"rms_norm_eps head_dim {ROPE}", SILU | {"sliding_window": None, "sliding_window_pattern": 0}),
    "gemma": Reader("rms_norm_eps head_dim rope_theta", TIED | GEMMA | {"hidden_act": (GELU, "gelu")}, ()),
    "gemma2": Reader(f"rms_norm_eps head_dim {GEMMA2} rope_theta", TIED | GEMMA | {"hidden_activation": GELU}, ()),
    "gemma3_text": Reader(
        "rms_norm_eps head_dim query_pre_attn_scalar sliding_window sliding_window_pattern rope_local_base_freq "
        + ROPE,
        GEMMA3 | {"final_logit_softcapping": None},
    ),
    "phi": Reader(
        "layer_norm_eps partial_rotary_factor rope_theta",
        UNTIED | {"hidden_act": "gelu_new", "qk_layernorm": False},
        (),
    ),
    "phi3": Reader("rms_norm_eps partial_rotary_factor rope_theta", SILU, ()),
    "glm4": Reader("rms_norm_eps head_dim attention_bias partial_rotary_factor rope_theta", SILU | UNTIED, ()),
    "starcoder2": Reader("norm_epsilon rope_theta", {"use_bias": True, "hidden_act": (GELU, "gelu")}, ()),
    "stablelm": Reader(
        "layer_norm_eps use_qkv_bias qk_layernorm use_parallel_residual partial_rotary_factor rope_theta",
        SILU | UNTIED,
        (),
    ),
    "cohere": Reader(f"{COHERE} use_qk_norm rope_theta", SILU | TIED, ()),
    "cohere2": Reader(f"{COHERE} head_dim sliding_window sliding_window_pattern rope_theta", SILU | TIED, ()),
    "nemotron": Reader(
        f"norm_eps head_dim attention_bias mlp_bias partial_rotary_factor {ROPE}", {"hidden_act": "relu2"}, ("linear",)
    ),
}

EXL3_LLAMA = "rms_norm_eps head_dim partial_rotary_factor rope_theta rope_scaling"
EXL3: Mapping[str, Reader] = {
    "llama": Reader(f"{EXL3_LLAMA} attention_bias", SILU | {"mlp_bias": False}, by_length=True),
    "mistral": Reader(EXL3_LLAMA, SILU, by_length=True),
    "qwen2": Reader(EXL3_LLAMA, SILU, by_length=True),
    "qwen3": Reader(EXL3_LLAMA, SILU | {"attention_bias": False}, by_length=True),
    "smollm3": Reader(
        f"{EXL3_LLAMA} no_rope_layers", SILU | {"attention_bias": False, "mlp_bias": False}, by_length=True
    ),
    "arcee": Reader(EXL3_LLAMA, {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False}, by_length=True),
    "seed_oss": Reader(
        f"{EXL3_LLAMA} attention_bias", SILU | {"attention_out_bias": False, "mlp_bias": False}, by_length=True
    ),
    "ernie4_5": Reader(EXL3_LLAMA, SILU | {"use_bias": False}, by_length=True),
    "phi3": Reader(EXL3_LLAMA, SILU, ()),
    "glm4": Reader(f"{EXL3_LLAMA} attention_bias", SILU, by_length=True),
    "olmo3": Reader(
        f"{EXL3_LLAMA} layer_types sliding_window",  # the second for a length of 4,096 alone
        SILU | {"attention_bias": False, "sliding_window": 4096},
        by_length=True,
    ),
    "gemma2": Reader(
        f"{EXL3_LLAMA} {GEMMA2} sliding_window_size",
        GEMMA | {"hidden_activation": GELU},
        by_length=True,
        every=2,
    ),
    "gemma3_text": Reader(
        f"{EXL3_LLAMA} query_pre_attn_scalar final_logit_softcapping layer_types sliding_window",
        GEMMA3,
        by_length=True,
        window_theta=1e4,
    ),
    "cohere": Reader(
        "layer_norm_eps logit_scale use_qk_norm head_dim partial_rotary_factor rope_theta rope_scaling",
        SILU | {"attention_bias": False},
        by_length=True,
    ),
    "cohere2": Reader(
        "layer_norm_eps logit_scale head_dim layer_types sliding_window partial_rotary_factor rope_theta rope_scaling",
        SILU | {"attention_bias": False},
        by_length=True,
    ),
}
