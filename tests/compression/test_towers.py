"""Models with images or sound: the part that reads text is compressed, the rest stays, and the whole loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.errors import InputError
from tests.tiny import VOCABULARY, tiny_tokenizer

IMAGE = 260  # the token that stands for a piece of an image, or of sound
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
SEEN: dict[str, Any] = {  # two layers, as the text has
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": 261, "vision_start_token_id": 262}
TOWERS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": SEEN | {"model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    },
    "gemma3": {
        "text_config": TEXT | {"model_type": "gemma3_text", "head_dim": 8},
        "vision_config": SEEN | {"model_type": "siglip_vision_model"},
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 1,
    },
    "qwen2_vl": {
        "text_config": TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        "vision_config": {"depth": 2, "hidden_size": 32, "embed_dim": 32, "num_heads": 2},
        **QWEN,
    },
    "qwen3_vl_moe": {
        "text_config": TEXT
        | {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "deepstack_visual_indexes": [0],
        },
        **QWEN,
    },
    "llama4": {
        "text_config": TEXT
        | {"intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 2},
        "vision_config": SEEN
        | {
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        "image_token_index": IMAGE,
    },
    "qwen2_audio": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "audio_config": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48},
        "audio_token_index": IMAGE,
    },
}
RECIPE: dict[str, Any] = {
    "version": 1,
    "calibration": {"dataset": "builtin", "samples": 3, "length": 32, "held_out": 1},
    "rules": [{"match": "*", "steps": [{"method": "gptq", "bits": 4, "group_size": 16}]}],
}
NAMES = [pytest.param(name, marks=() if name == "llava" else pytest.mark.slow) for name in TOWERS]


def saved(name: str, place: Path) -> PreTrainedModel:
    """Write a random model of a type to `place`, and return it."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForMultimodalLM.from_config(AutoConfig.for_model(name, **TOWERS[name])).eval()
    for value in model.parameters():
        if value.dim() > 1:
            value.data.normal_(0, 0.1)
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return model


def logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_part_that_reads_text_is_compressed(name: str, tmp_path: Path) -> None:
    dense = saved(name, tmp_path / "dense")
    assert lc.plan(tmp_path / "dense", RECIPE).layers
    report = lc.compress(tmp_path / "dense", RECIPE, tmp_path / "out").report
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    assert type(model) is type(dense)
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    decoded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out").dequantize()
    torch.testing.assert_close(logits(model, input_ids=ids), logits(decoded, input_ids=ids), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(model, input_ids=ids), logits(dense, input_ids=ids))
    stack = report.layers[0].name.partition(".layers.")[0]
    assert all(row.name.startswith(f"{stack}.layers.") for row in report.layers)
    before, after = dense.state_dict(), model.state_dict()
    elsewhere = [key for key in before if not key.startswith(f"{stack}.")]
    assert len(elsewhere) > 10 and all(torch.equal(before[key], after[key]) for key in elsewhere)
    assert any("linears) stays dense" in warning for warning in report.warnings)


@pytest.mark.slow
def test_the_whole_takes_an_image(tmp_path: Path) -> None:
    dense = saved("llava", tmp_path / "dense")
    lc.compress(tmp_path / "dense", RECIPE, tmp_path / "out")
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    inputs = {"input_ids": torch.tensor([[256, *[IMAGE] * 4, 5, 6, 7]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    found, wanted = logits(model, **inputs), logits(dense, **inputs)
    assert float((found - wanted).norm() / wanted.norm()) < 0.5
    other = inputs | {"pixel_values": torch.zeros(1, 3, 28, 28)}
    assert float((found - logits(model, **other)).norm() / wanted.norm()) > 0.01


@pytest.mark.slow
def test_dense_export_loads_as_the_original(tmp_path: Path) -> None:
    saved("qwen3_vl_moe", tmp_path / "dense")
    lc.compress(tmp_path / "dense", RECIPE, tmp_path / "out")
    lc.export(tmp_path / "out", tmp_path / "plain", "dense")
    _, found = AutoModelForMultimodalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    names = [set(load_file(tmp_path / place / "model.safetensors")) for place in ("dense", "plain")]
    assert names[0] == names[1]


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BartForSequenceClassification"])
def test_encoders_with_decoders_are_refused(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind.partition("For")[0].lower())
    config.architectures = [kind]
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not a causal language model"):
        lc.plan(tmp_path, RECIPE)
