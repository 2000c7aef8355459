"""Tiny random models of every family, built from their configs, and a byte-level tokenizer: no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 264  # 256 bytes, <s>, </s>, and a few rows no token uses (padded vocabularies exist)

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_WINDOWED = ["sliding_attention", "full_attention"]
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": dict(_LLAMA, sliding_window=8),
    "smollm3": dict(_LLAMA, no_rope_layers=[1, 0]),
    "qwen2": dict(_LLAMA, use_sliding_window=True, sliding_window=8, layer_types=_WINDOWED),
    "qwen3": dict(_LLAMA, head_dim=8, tie_word_embeddings=True),
    "gemma2": dict(
        _LLAMA,
        head_dim=8,
        sliding_window=8,
        layer_types=_WINDOWED,
        query_pre_attn_scalar=8,
    ),
    "gemma3_text": dict(
        _LLAMA,
        head_dim=8,
        sliding_window=8,
        layer_types=_WINDOWED,
        query_pre_attn_scalar=8,
    ),
    "phi3": _LLAMA,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A two-block causal language model of width 32 in float32, with random weights; `changes` go to its config.

    `family` is a row of `FAMILY_CONFIGS`, or any model type whose config takes `changes`.
    """
    settings = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    config = AutoConfig.for_model(family, **(settings | FAMILY_CONFIGS.get(family, {}) | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms too: what is all zeros or ones cannot show a mistake
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, `<s>` put first (as Llama's tokenizer does), a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 256)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=64,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(family: str, path: Path, tokenizer: bool = True, **changes: Any) -> Path:
    """Writes `tiny(family, **changes)` as a Hugging Face folder at `path`, and returns `path`."""
    shard_size = changes.pop("max_shard_size", "1GB")
    tiny(family, **changes).save_pretrained(path, max_shard_size=shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(path)
    return path
