"""Every family that can go to GGUF: what the table says against gguf's own tables, and the model in llama.cpp."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from llmcompress.errors import InputError
from llmcompress.formats.export import export
from llmcompress.formats.gguf.families import FAMILIES
from llmcompress.formats.gguf.model import gguf_model
from llmcompress.models.dense.experts import unfuse
from tests.formats.gguf_files import (
    GRID,
    byte_level,
    compressed,
    engine,
    gguf,
    in_float32,
    largest_difference,
    run,
)
from tests.tiny import tiny

OLDER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "vocab_size": 640,
}
SIZES = OLDER | {"num_key_value_heads": 2}
HEADS = SIZES | {"head_dim": 32}
WHOLE = SIZES | {"head_dim": 16}
GEMMA = HEADS | {"query_pre_attn_scalar": 32, "sliding_window": 8}
GPT2 = {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 640}
FALCON = {key: value for key, value in OLDER.items() if key != "intermediate_size"}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
HALF = {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FACTORS = {"long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}


def long_rope(positions: int, first: int) -> dict[str, Any]:
    """Phi's rotary positions, on half of each head: other frequencies in contexts of more than `first` tokens."""
    rope = PLAIN | FACTORS | {"rope_type": "longrope", "partial_rotary_factor": 0.5, "factor": positions / first}
    first_positions = {"original_max_position_embeddings": first}
    return {"rope_parameters": rope | first_positions, "max_position_embeddings": positions} | first_positions


def every(period: int, layers: int) -> dict[str, Any]:
    """`layers` of which the last of each `period` attends to all tokens."""
    kinds = ["sliding_attention"] * (period - 1) + ["full_attention"]
    return {"layer_types": (kinds * layers)[:layers], "num_hidden_layers": layers, "sliding_window": 8}


FULL = {"layer_types": ["full_attention"] * 2, "sliding_window": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "pad_token_id": None}
OLMOE = {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0}
TWO_ROPES = {"rope_parameters": {"sliding_attention": PLAIN | {"rope_theta": 100.0}, "full_attention": LINEAR}}

CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [SIZES | {"rope_parameters": YARN}],
    "mistral": [SIZES | {"sliding_window": None}],
    "smollm3": [SIZES | {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}],
    "granite": [SIZES | GRANITE, SIZES | TIED],
    "arcee": [HEADS, HEADS | TIED],
    "olmo": [SIZES | {"clip_qkv": 1.5}, SIZES | TIED],
    "olmo2": [SIZES],
    "olmo3": [SIZES | every(4, 4)],
    "qwen2": [SIZES | FULL | {"use_sliding_window": False}, SIZES | FULL | TIED | {"rope_parameters": YARN}],
    "qwen3": [HEADS, HEADS | UNTIED],
    "qwen3_moe": [HEADS | EXPERTS | {"norm_topk_prob": True}, HEADS | EXPERTS | TIED | {"norm_topk_prob": True}],
    "qwen2_moe": [SIZES | EXPERTS | {"shared_expert_intermediate_size": 96}],
    "olmoe": [OLDER | OLMOE],
    "mixtral": [SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}],
    "seed_oss": [HEADS, HEADS | TIED],
    "ernie4_5": [HEADS, HEADS | UNTIED],
    "exaone4": [SIZES | FULL, SIZES | FULL | TIED],
    "gemma": [HEADS],
    "gemma2": [GEMMA | every(2, 2)],
    "gemma3_text": [GEMMA | every(6, 6) | TWO_ROPES | {"final_logit_softcapping": 20.0}],
    "phi": [SIZES | HALF],
    "phi3": [SIZES | TIED, SIZES | long_rope(64, 16), SIZES | long_rope(1024, 512)],
    "glm": [WHOLE | HALF, WHOLE | HALF | TIED],
    "glm4": [HEADS | HALF, HEADS | HALF | TIED],
    "starcoder2": [SIZES, SIZES | UNTIED],
    "stablelm": [SIZES | HALF, SIZES | HALF | {"use_parallel_residual": True, "use_qkv_bias": True}],
    "cohere": [SIZES | {"logit_scale": 0.5}],
    "cohere2": [WHOLE | every(4, 4) | {"logit_scale": 0.5}],
    "nemotron": [WHOLE | HALF],
    "gpt2": [GPT2, GPT2 | UNTIED],
    "gpt_neox": [OLDER | HALF, OLDER | {"use_parallel_residual": False}],
    "falcon": [FALCON, FALCON | UNTIED | {"new_decoder_architecture": True, "num_kv_heads": 2}],
}
PAIRS = [(family, number) for family, sizes in CASES.items() for number in range(len(sizes))]
EVERY = pytest.mark.parametrize("family, number", PAIRS, ids=[f"{family}-{number}" for family, number in PAIRS])


def test_every_family_is_tested() -> None:
    assert CASES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_use_architectures_and_facts_of_gguf(family: str) -> None:
    """Architectures, methods of the writer, and entries that the family's config has."""
    row, config = FAMILIES[family], tiny(family, **CASES[family][0]).config
    assert hasattr(gguf.MODEL_ARCH, row.architecture)
    assert all(callable(getattr(gguf.GGUFWriter, f"add_{method}")) for method in row.facts)
    asked = [entry for entry in row.facts.values() if isinstance(entry, str)] + list(row.fixed)
    assert [entry for entry in asked if not hasattr(config, entry)] == []


@EVERY
def test_every_tensor_has_a_unique_gguf_name(family: str, number: int, tmp_path: Path) -> None:
    dense = tiny(family, **CASES[family][number])
    model = gguf_model(tmp_path, dense.config.to_dict())
    head = {"lm_head.weight"} if dense.config.tie_word_embeddings else set()
    unfuse(dense)
    tensors = {re.sub(r"experts\.\d+\.", "experts.", tensor) for tensor in dense.state_dict()}  # of all are one
    names = [model.name(tensor) for tensor in tensors - head]
    assert len(set(names)) == len(names)
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[FAMILIES[family].architecture]]}
    layers = {name.replace(".0.", ".{bid}.").replace(".1.", ".{bid}.").rpartition(".")[0] for name in names}
    assert {name for name in layers if not any(digit in name for digit in "2345")} <= known


@engine
@EVERY
def test_llama_cpp_computes_the_same(family: str, number: int, tmp_path: Path) -> None:
    """All in float32, with a low-rank term beside one matrix; llama.cpp looks GELU up in float16, of tanh's form."""
    sizes = CASES[family][number]
    dense = tiny(family, **sizes)
    dense.save_pretrained(tmp_path / "dense")
    byte_level(("words",)).save_pretrained(tmp_path / "dense")
    kinds = (".q_proj", ".query_key_value", ".qkv_proj", ".c_attn")
    layers = [name for name, _ in dense.named_modules() if name.endswith(kinds)][:1]
    folder = compressed(tmp_path / "dense", tmp_path / "small", (layers, [GRID]))
    model = in_float32(folder, layers, tmp_path / "float32")
    export(tmp_path / "float32", tmp_path / "out", "gguf")
    ids = [(number * 37) % 640 for number in range(1, 33)]
    exact = FAMILIES[family].activation in ("silu", "relu2")
    assert largest_difference(run(tmp_path / "out"), model, ids, 640) < (1e-3 if exact else 2e-2)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", SIZES | every(2, 2), "attention to the last 8 tokens only"),
    ("qwen3", HEADS | {"attention_bias": True}, "attention_bias True"),
    ("gemma2", GEMMA | every(3, 3), "attention to all tokens in other layers than the last of every 2"),
    ("gemma2", GEMMA | every(2, 2) | {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar 7"),
    ("starcoder2", SIZES | {"hidden_act": "relu"}, "the activation 'relu'"),
    ("nemotron", HEADS | HALF, "4 heads of 32 numbers, not of 64 in all"),
    ("olmo2", SIZES | TIED, "a head that is the token table"),
    ("cohere", SIZES | UNTIED, "a head beside the token table"),
    ("smollm3", SIZES, "rotary positions left out in other layers than the last of every 4"),
    ("llama", SIZES | HALF, "rotary positions on 8 of 16 numbers of each head"),
    ("falcon", FALCON | {"alibi": True}, "alibi True"),
    ("olmoe", SIZES | OLMOE, "4 heads of queries for 2 of keys"),
    ("qwen3_moe", HEADS | EXPERTS | {"norm_topk_prob": False}, "norm_topk_prob False"),
    ("qwen3_moe", HEADS | EXPERTS | {"norm_topk_prob": True, "mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
]


@pytest.mark.parametrize("family, sizes, reason", REFUSED, ids=[reason for _, _, reason in REFUSED])
def test_gguf_model_refuses_models_that_llama_cpp_misreads(
    family: str, sizes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = tiny(family, **sizes).config.to_dict()
    with pytest.raises(InputError, match=f"has {reason}, which cannot go to GGUF here; export to dense instead"):
        gguf_model(tmp_path, config)


@pytest.mark.parametrize("family, layers", [("gemma2", 46), ("gemma3_text", 62)])
def test_wide_gemmas_divide_scores_otherwise(family: str, layers: int, tmp_path: Path) -> None:
    """Those of 27B, told by their depth: by the square root of the width for each head, 16 here."""
    sizes = GEMMA | every(FAMILIES[family].full_every or 1, layers)
    config = AutoConfig.for_model(family, **sizes | {"query_pre_attn_scalar": 16})
    assert gguf_model(tmp_path, config.to_dict()).head_dim == 32
    config.query_pre_attn_scalar = 32
    with pytest.raises(InputError, match="query_pre_attn_scalar 32"):
        gguf_model(tmp_path, config.to_dict())
