"""Tiny random models of families beside those of `tiny`: mixtures of experts, hybrids, plain ones without a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import FAMILY_CONFIGS, VOCABULARY, save_tiny, tiny_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog, and 42 grey geese fly past the old mill by the river. "
COUNT = 4  # of experts in a block
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 256, "eos_token_id": 257}
_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_HEADS = dict(_LLAMA, head_dim=16)
_QWEN: dict[str, Any] = {"num_experts": COUNT, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": COUNT,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_LOCAL: dict[str, Any] = {"num_local_experts": COUNT, "num_experts_per_tok": 2}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_STATES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_JAMBA = dict(_LLAMA, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False)
_OLD: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128}

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": dict(_LLAMA, **_LOCAL),
    "qwen2_moe": dict(_LLAMA, **_QWEN, shared_expert_intermediate_size=32),
    "qwen3_moe": dict(_HEADS, **_QWEN, norm_topk_prob=True),
    "olmoe": dict(_LLAMA, num_experts=COUNT, num_experts_per_tok=2) | {"num_key_value_heads": 4},
    "gpt_oss": dict(_HEADS, **_LOCAL, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    "deepseek_v2": dict(_LLAMA, **_ROUTED, **_LATENT, topk_method="greedy"),
    "deepseek_v3": dict(_LLAMA, **_ROUTED, **_LATENT),
    "llama4_text": dict(
        _HEADS, num_local_experts=COUNT, num_experts_per_tok=1, intermediate_size_mlp=96, interleave_moe_layer_step=2
    ),
    "granitemoe": dict(_LLAMA, **_LOCAL),
    "granitemoehybrid": dict(
        _LLAMA, **_LOCAL, **_MAMBA, layer_types=["mamba", "attention"], shared_intermediate_size=32
    ),
    "qwen3_next": dict(_HEADS, **_QWEN, **_LINEAR, shared_expert_intermediate_size=32),
    "lfm2_moe": dict(_LLAMA, **_QWEN, num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "glm4_moe": dict(_HEADS, **_ROUTED),
    "ernie4_5_moe": dict(_LLAMA, moe_num_experts=COUNT, moe_k=2, moe_intermediate_size=32, moe_layer_start_index=1),
    "nemotron_h": dict(
        {key: value for key, value in _HEADS.items() if key != "num_hidden_layers"},
        n_routed_experts=COUNT,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        layers_block_type=["moe", "attention"],
    ),
    "phimoe": dict(_LLAMA, **_LOCAL),
    "minimax": dict(_HEADS, **_LOCAL, layer_types=["linear_attention", "full_attention"]),
    "flex_olmo": dict(_LLAMA, num_experts=COUNT, num_experts_per_tok=2),
    "dots1": dict(_HEADS, **_ROUTED),
    "jamba_moe": dict(_JAMBA, model_type="jamba", num_experts=COUNT, expert_layer_period=2, expert_layer_offset=1),
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "mamba": _STATES,
    "mamba2": dict(_STATES, num_heads=8, head_dim=16, n_groups=1, expand=2),
    "falcon_mamba": _STATES,
    "bamba": dict(_LLAMA, **_MAMBA, attn_layer_indices=[1]),
    "falcon_h1": dict(_HEADS, **_MAMBA, mamba_d_ssm=128),
    "lfm2": dict(_LLAMA, layer_types=["conv", "full_attention"], block_multiple_of=32),
    "granite4": dict(
        _LLAMA,
        **_MAMBA,
        model_type="granitemoehybrid",
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=32,
    ),
    "recurrent_gemma": dict(_LLAMA, lru_width=64, attention_window_size=16, block_types=["recurrent", "attention"]),
    "zamba2": dict(
        _LLAMA,
        num_key_value_heads=4,
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        layers_block_type=["mamba", "hybrid"],
        num_mem_blocks=1,
    ),
    "jamba": dict(_JAMBA, num_experts=1),
    "xlstm": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 4, "qk_dim_factor": 1.0},
    "qwen3_5_text": dict(_HEADS, **_LINEAR),
    "olmo_hybrid": dict(_LLAMA, layer_types=["linear_attention", "full_attention"]),
}
PLAIN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("olmo2", "cohere", "cohere2", "nemotron", "stablelm", "starcoder2", "phi", "granite", "exaone4"),
            *("apertus", "arcee", "ernie4_5", "bitnet"),
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("ministral", "gemma", "glm4", "hunyuan_v1_dense", "seed_oss", "helium", "vaultgemma"), _HEADS),
    "gemma4_text": dict(
        _HEADS,
        global_head_dim=16,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCABULARY,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "persimmon": dict(_LLAMA, num_key_value_heads=4),
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "gptj": _OLD,
    "codegen": _OLD,
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 128,
        "window_size": 16,
    },
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_MASKED: dict[str, Any] = dict(_ENCODER, head="AutoModelForMaskedLM")
_DISENTANGLED: dict[str, Any] = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
ENCODERS: dict[str, dict[str, Any]] = {  # and classifiers; `head` is the auto class
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "mpnet"), _MASKED),
    **dict.fromkeys(("nomic_bert", "gte", "jina_embeddings_v3"), _MASKED),  # whose files hold q, k and v in one tensor
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "head": "AutoModelForMaskedLM"},
    "modernbert": dict(_MASKED, cls_token_id=256, sep_token_id=257, global_attn_every_n_layers=2, local_attention=16),
    "deberta-v2": dict(_MASKED, **_DISENTANGLED),
    "bert_classifier": dict(_ENCODER, model_type="bert", head="AutoModelForSequenceClassification", num_labels=3),
    "deberta_classifier": dict(
        _ENCODER, **_DISENTANGLED, model_type="deberta-v2", head="AutoModelForSequenceClassification"
    ),
    "bert_tagger": dict(_ENCODER, model_type="bert", head="AutoModelForTokenClassification", num_labels=5),
    "bert_body": dict(_ENCODER, model_type="bert", head="AutoModel"),
    "llama_classifier": dict(_LLAMA, model_type="llama", head="AutoModelForSequenceClassification", num_labels=3),
    "llama_body": dict(_LLAMA, model_type="llama", head="AutoModel"),
}
REFUSED: dict[str, dict[str, Any]] = {
    "jetmoe": dict(_LLAMA, **_LOCAL, kv_channels=16),
    "rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64},
    "gemma3n_text": dict(
        _HEADS,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCABULARY,
        altup_num_inputs=2,
        laurel_rank=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    ),
}
ZOO = MIXTURES | HYBRIDS | PLAIN | ENCODERS | REFUSED
TURNED = {"gpt_oss", "llama4_text"}  # their parameters are [experts, in, out]
NO_GATE = {"nemotron_h"}
EVERY = (*FAMILY_CONFIGS, *ZOO)  # family there is a tiny model of


def zoo(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A two-block model of a row of `ZOO` in float32, with random weights; `changes` go to its config.

    Matrices are normal with deviation 0.1, so that routers tell tokens apart.
    """
    settings = _TOKENS | ZOO[family] | changes
    loader = getattr(transformers, settings.pop("head", "AutoModelForCausalLM"))
    config = AutoConfig.for_model(settings.pop("model_type", family), **settings)
    torch.manual_seed(seed)
    model: PreTrainedModel = loader.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 0.1 * noise if parameter.dim() > 1 else parameter.data + 0.05 * noise
    return model.eval()


def save_zoo(family: str, path: Path, **changes: Any) -> Path:
    """Write `zoo(family, **changes)` with a tokenizer as a Hugging Face folder at `path`, and return `path`."""
    zoo(family, **changes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def save_any(family: str, path: Path, **changes: Any) -> Path:
    """Write the tiny model of a family of EVERY, with a tokenizer that merges, to `path`, and return `path`."""
    (save_tiny if family in FAMILY_CONFIGS else save_zoo)(family, path, **changes)
    merging_tokenizer().save_pretrained(path)
    return path


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer()` with one merge: llama.cpp loads none without."""
    fast = tiny_tokenizer()
    state = json.loads(fast.backend_tokenizer.to_str())
    state["model"]["vocab"] |= {"<s>": 256, "</s>": 257, "th": 258}
    state["model"]["merges"] = [["t", "h"]]
    fast._tokenizer = Tokenizer.from_str(json.dumps(state))
    return fast


def expert_slices(family: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the matrices and biases of each expert by the names that they have here, cut by hand."""
    found: dict[str, Tensor] = {}
    for name, whole in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if not leaf.startswith(("gate_up_proj", "up_proj", "down_proj")) or whole.dim() != 3 - leaf.endswith("_bias"):
            continue
        kind = "bias" if leaf.endswith("_bias") else "weight"
        for number in range(COUNT):
            value = whole[number].T if family in TURNED and kind == "weight" else whole[number]
            width = len(value) // 2
            if family in NO_GATE or leaf.startswith("down"):
                parts = {leaf.removesuffix("_bias"): value}
            elif family == "gpt_oss":
                parts = {"gate_proj": value[0::2], "up_proj": value[1::2]}
            else:
                parts = {"gate_proj": value[:width], "up_proj": value[width:]}
            found |= {f"{path}.{number}.{part}.{kind}": piece for part, piece in parts.items()}
    return found


def text_for_calibration(folder: Path) -> Path:
    """Write a text to a file in `folder`, and return its path."""
    path = folder / "text.txt"
    path.write_text("".join(f"{number}. {SENTENCE}" for number in range(90)))
    return path
