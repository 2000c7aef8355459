"""Table of the families that can go to GGUF.

Names of tensors and of architectures come from the package gguf. A row adds the entries of a config that become
metadata, and those that llama.cpp takes for granted, so that a model that differs must be refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class GGUFFamily:
    """A family of transformers as llama.cpp runs it.

    `architecture`: its name in gguf's MODEL_ARCH. `facts`: methods `add_*` of GGUFWriter, each with the entry of the
    config (or the number) that it writes. `fixed`: values that entries of the config must have, as llama.cpp does not
    read them. `shown`: entries that llama.cpp sees in the tensors, or that are checked elsewhere. Entries in none of
    these, nor in `model.READ` or `config_entries.INERT`, must have their defaults.
    """

    architecture: str
    facts: Mapping[str, str | float] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    activation: str = "silu"
    interleaved: bool = False  # llama.cpp rotates neighbours in a head where transformers rotates its halves
    offset_norms: bool = False  # weights of norms are stored less 1
    fused: Literal["by head", "by group"] | None = None  # how the rows of a joint q, k and v lie in transformers
    full_every: int | None = None  # of so many layers the last attends to all tokens, the others to a window
    no_rope_every: int | None = None  # of so many layers the last has no rotary positions
    window_layers: int | None = None  # at that depth, layers have a window
    wide_layers: int | None = None  # at that depth, scores are divided by sqrt(width / heads), not by sqrt(head_dim)
    whole_heads: bool = True  # the heads of the queries together are as wide as the model
    own_keys: bool = False  # each head of the queries has a head of keys and values of its own
    divisors: bool = False  # llama.cpp takes a divisor for each frequency of rotary positions
    long_rope: bool = False  # and two lists of them, for short and for long contexts
    two_thetas: bool = False  # layers with a window have rotary positions of another base
    tied: bool | None = None  # whether the head must be the token table (true) or must not (false)

    @property
    def read(self) -> set[str]:
        """Entries of the config that a file says."""
        return {entry for entry in self.facts.values() if isinstance(entry, str)} | set(self.shown)


RMS = {"layer_norm_rms_eps": "rms_norm_eps"}
GELU = "gelu_pytorch_tanh"
GEMMA = {"attention_bias": False, "use_bidirectional_attention": (None, False)}
SOFT_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
EXPERTS = RMS | {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
BIASES = ("attention_bias", "mlp_bias")
UNBIASED = dict.fromkeys(BIASES, False)
EVERYWHERE = {"decoder_sparse_step": 1, "mlp_only_layers": (None, [])}  # experts in all blocks
GRANITE = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}

FAMILIES: Mapping[str, GGUFFamily] = {
    "llama": GGUFFamily("LLAMA", RMS, shown=BIASES, interleaved=True, whole_heads=False, divisors=True),
    "mistral": GGUFFamily("LLAMA", RMS, interleaved=True, whole_heads=False, divisors=True),
    "smollm3": GGUFFamily(
        "SMOLLM3", RMS, UNBIASED, ("no_rope_layers",), interleaved=True, whole_heads=False, no_rope_every=4
    ),
    "granite": GGUFFamily("GRANITE", RMS | GRANITE, shown=BIASES, interleaved=True, whole_heads=False, divisors=True),
    "arcee": GGUFFamily("ARCEE", RMS, UNBIASED, activation="relu2", interleaved=True, whole_heads=False, divisors=True),
    "olmo": GGUFFamily(
        "OLMO", {"layer_norm_eps": 1e-5, "clamp_kqv": "clip_qkv"}, {"attention_bias": False}, interleaved=True
    ),
    "olmo2": GGUFFamily("OLMO2", RMS, {"attention_bias": False}, tied=False),
    "olmo3": GGUFFamily("OLMO2", RMS, {"attention_bias": False}, full_every=4, tied=False),
    "qwen2": GGUFFamily("QWEN2", RMS),
    "qwen3": GGUFFamily("QWEN3", RMS, {"attention_bias": False}, whole_heads=False),
    "qwen3_moe": GGUFFamily(
        "QWEN3MOE", EXPERTS, EVERYWHERE | {"attention_bias": False, "norm_topk_prob": True}, whole_heads=False
    ),
    "qwen2_moe": GGUFFamily(
        "QWEN2MOE",
        EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        EVERYWHERE | {"norm_topk_prob": False},
        ("qkv_bias",),
    ),
    "olmoe": GGUFFamily(
        "OLMOE",
        EXPERTS | {"expert_feed_forward_length": "intermediate_size"},
        {"attention_bias": False, "clip_qkv": None, "norm_topk_prob": False},
        own_keys=True,
    ),
    "mixtral": GGUFFamily(
        "LLAMA",
        RMS | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        interleaved=True,
        whole_heads=False,
        divisors=True,
    ),
    "seed_oss": GGUFFamily(
        "SEED_OSS", RMS, {"attention_out_bias": False, "mlp_bias": False}, ("attention_bias",), whole_heads=False
    ),
    "ernie4_5": GGUFFamily("ERNIE4_5", RMS, {"use_bias": False}, whole_heads=False),
    "exaone4": GGUFFamily("EXAONE4", RMS, {"sliding_window": None}, window_layers=64, divisors=True),
    "gemma": GGUFFamily("GEMMA", RMS, GEMMA, (), GELU, offset_norms=True, whole_heads=False, tied=True),
    "gemma2": GGUFFamily(
        "GEMMA2",
        RMS | SOFT_CAPS,
        GEMMA,
        activation=GELU,
        offset_norms=True,
        whole_heads=False,
        full_every=2,
        wide_layers=46,
        tied=True,
    ),
    "gemma3_text": GGUFFamily(
        "GEMMA3",
        RMS | {"final_logit_softcapping": "final_logit_softcapping"},
        GEMMA | {"attn_logit_softcapping": None},
        activation=GELU,
        offset_norms=True,
        whole_heads=False,
        full_every=6,
        wide_layers=62,
        two_thetas=True,
    ),
    "phi": GGUFFamily(
        "PHI2", {"layer_norm_eps": "layer_norm_eps"}, {"qk_layernorm": False}, activation="gelu_new", tied=False
    ),
    "phi3": GGUFFamily("PHI3", RMS, long_rope=True),
    "glm": GGUFFamily("CHATGLM", RMS, shown=("attention_bias",)),
    "glm4": GGUFFamily("GLM4", RMS, shown=("attention_bias",), whole_heads=False),
    "starcoder2": GGUFFamily("STARCODER2", {"layer_norm_eps": "norm_epsilon"}, {"use_bias": True}, activation=GELU),
    "stablelm": GGUFFamily(
        "STABLELM",
        {"layer_norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
        {"qk_layernorm": False},
        ("use_qkv_bias",),
        tied=False,
    ),
    "cohere": GGUFFamily(
        "COMMAND_R",
        {"layer_norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
        {"use_qk_norm": False, "attention_bias": False},
        tied=True,
    ),
    "cohere2": GGUFFamily(
        "COHERE2",
        {"layer_norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
        {"attention_bias": False},
        full_every=4,
        tied=True,
    ),
    "nemotron": GGUFFamily(
        "NEMOTRON",
        {"layer_norm_eps": "norm_eps"},
        {"mlp_bias": False},
        ("attention_bias",),
        "relu2",
        offset_norms=True,
        tied=False,
    ),
    "gpt2": GGUFFamily(
        "GPT2",
        {"layer_norm_eps": "layer_norm_epsilon"},
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        activation="gelu_new",
    ),
    "gpt_neox": GGUFFamily(
        "GPTNEOX",
        {"layer_norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
        {"attention_bias": True},
        activation="gelu",
        fused="by head",
        tied=False,
    ),
    "falcon": GGUFFamily(
        "FALCON",
        {"layer_norm_eps": "layer_norm_epsilon"},
        {"alibi": False, "bias": False, "parallel_attn": True, "num_ln_in_parallel_attn": (None, 2)},
        ("multi_query", "new_decoder_architecture", "num_kv_heads"),
        "gelu",
        fused="by group",
    ),
}
