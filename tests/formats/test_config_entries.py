"""Entries of configs at every door: each is in a list, what an engine overlooks is refused, what is inert is inert."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.formats.config_entries import INERT, PARAMETERS, entries_of, entries_read, overlooked_entries
from llmcompress.formats.engine_configs import CHECKED, EXL3, MLX, EngineFamilies, readable_entries
from llmcompress.formats.export import export
from llmcompress.formats.gguf.families import FAMILIES
from llmcompress.formats.gguf.model import READ, gguf_model
from tests.formats.test_gguf_families import CASES, LINEAR, PLAIN, SIZES, YARN, every
from tests.tiny import save_tiny, tiny


class Row(NamedTuple):
    """A family at a door: the entries that go through, and those that must have a value."""

    door: str
    family: str
    read: set[str]
    fixed: Mapping[str, Any]


ROWS = [Row("GGUF", name, READ | row.read, row.fixed) for name, row in FAMILIES.items()]
ROWS += [Row("MLX", name, row.entries | CHECKED, row.fixed) for name, row in MLX.families.items()]
ROWS += [Row("EXL3", name, row.entries | CHECKED, row.fixed) for name, row in EXL3.families.items()]
EVERY_ROW = pytest.mark.parametrize("row", ROWS, ids=[f"{row.door}-{row.family}" for row in ROWS])


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **(CASES[family][0] | changes))


def another(value: Any) -> Any:
    """Return another value than this one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 7
        case _:
            return "another"


@EVERY_ROW
def test_every_entry_of_a_config_is_in_a_list(row: Row) -> None:
    """So a version of transformers that adds one fails here; until then it must have its default."""
    entries = entries_of(type(config_of(row.family)))
    assert entries - INERT - row.read - set(row.fixed) == set(), "put them into a list of the family's row"
    assert set(row.fixed) <= entries, "the class of the family does not have them"


@EVERY_ROW
def test_overlooked_entries_finds_each_changed_entry(row: Row) -> None:
    config = config_of(row.family)
    plain = type(config)()
    for entry in entries_of(type(config)) - INERT:
        entry = config.attribute_map.get(entry, entry)
        value = getattr(config, entry)
        config.__dict__[entry] = another(value)
        found = list(overlooked_entries(config, row.read, row.fixed))
        assert any(one.startswith(f"{entry} ") for one in found) == (entry in row.fixed), entry
        in_no_list = any(one.startswith(f"{entry} ") for one in overlooked_entries(config, set(), {}))
        assert in_no_list == (config.__dict__[entry] != getattr(plain, entry)), f"{entry} must have its default"
        config.__dict__[entry] = value
    for entry, value in {"is_causal": False, "attention_chunk_size": 3}.items():
        config.__dict__[entry] = value
        [found_last] = [one for one in overlooked_entries(config, row.read, row.fixed) if entry in one]
        assert found_last.endswith(f"{entry} {value!r}")
        del config.__dict__[entry]


TURNED: dict[str, Any] = {"bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5, "use_cache": False}
TURNED |= {"output_hidden_states": True, "output_router_logits": True, "is_decoder": True, "pretraining_tp": 2}
TURNED |= {"reorder_and_upcast_attn": True, "summary_use_proj": False, "no_rope_layer_interval": 3}
TURNED |= {"max_window_layers": 1, "sliding_window_pattern": 5, "chunk_size_feed_forward": 2}


@pytest.mark.parametrize("family", CASES)
def test_inert_entries_change_no_prediction(family: str) -> None:
    plain = tiny(family, **CASES[family][0])
    entries = entries_of(type(plain.config)) & INERT
    dropped = {entry: 0.5 for entry in entries if entry.endswith(("dropout", "pdrop", "noise", "coef", "range"))}
    turned = tiny(family, **(CASES[family][0] | dropped | {e: v for e, v in TURNED.items() if e in entries}))
    turned.load_state_dict(plain.state_dict())
    ids = torch.arange(30)[None] * 37 % 640
    with torch.no_grad():
        torch.testing.assert_close(turned(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", CASES)
def test_overlooked_entries_ignores_entries_that_no_code_reads(family: str) -> None:
    """The names of what every family reads are found; entries of other programs, as on the Hub, change nothing."""
    config = config_of(family)
    read = entries_read(type(config))
    assert {"is_causal", "vocab_size", "rope_parameters", "attention_chunk_size"} <= read | {"rope_parameters"}
    config.__dict__ |= {"is_llama_config": True, "unsloth_version": "2026.1", "transformers.js_config": {"a": 1}}
    config.__dict__ |= {"mlp_type": "default", "layer_switch": 4, "use_parallel_block": True, "model_max_length": 8192}
    assert not [one for one in overlooked_entries(config, READ | FAMILIES[family].read, {}) if "unknown" in one]
    config.__dict__["attention_chunk_size"] = 8
    assert "the unknown entry attention_chunk_size 8" in set(overlooked_entries(config, READ, {}))


def test_every_parameter_of_rotary_positions_is_known() -> None:
    assert set(RopeParameters.__annotations__) <= PARAMETERS


REFUSED: list[tuple[EngineFamilies, str, dict[str, Any], str]] = [
    (MLX, "falcon", CASES["falcon"][0], "a falcon model, of which nobody here knows what MLX reads"),
    (MLX, "mistral", SIZES | {"sliding_window": 8}, "attention to the last 8 tokens only"),
    (MLX, "qwen2", SIZES | {"head_dim": 32}, "4 heads of 32 numbers, not of 64 in all"),
    (MLX, "cohere", SIZES | {"rope_parameters": LINEAR}, "rotary positions of type 'linear'"),
    (MLX, "starcoder2", SIZES | {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary"),
    (MLX, "llama", SIZES | {"rope_parameters": YARN | {"truncate": False}}, "truncate False"),
    (
        MLX,
        "llama",
        SIZES | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
        "llama_4_scaling_beta 0.1",
    ),
    (MLX, "llama", SIZES | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (
        MLX,
        "cohere2",
        SIZES | every(4, 4) | {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
        "pe",
    ),
    (EXL3, "llama", SIZES | {"rope_parameters": YARN | {"factor": 8.0}}, "a factor of 8 .* 4 times as long"),
    (EXL3, "gemma2", CASES["gemma2"][0] | every(3, 3), "in other layers than the last of every 2"),
    (EXL3, "gemma3_text", CASES["gemma3_text"][0], "base 100.0 in layers with a window"),
    (EXL3, "olmo3", CASES["olmo3"][0], "sliding_window 8"),
    (EXL3, "phi3", CASES["phi3"][1], "rotary positions of type 'longrope'"),
]


@pytest.mark.parametrize("engine, family, sizes, reason", REFUSED, ids=[f"{r[1]} {r[-1]}" for r in REFUSED])
def test_readable_entries_refuses_models_that_an_engine_misreads(
    engine: EngineFamilies, family: str, sizes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **sizes).to_dict()
    with pytest.raises(InputError, match=reason + ".*; export to dense instead"):
        readable_entries(tmp_path, config, engine)


def test_readable_entries_has_the_older_notation(tmp_path: Path) -> None:
    """Both engines read `rope_theta` and `rope_scaling`, and have other defaults than transformers."""
    config = {"model_type": "llama", "rope_parameters": YARN | {"rope_theta": 5e5, "attention_factor": 1.5}}
    found = readable_entries(tmp_path, config | {"max_position_embeddings": 64}, EXL3)
    assert found["rope_theta"] == 5e5 and found["tie_word_embeddings"] is False and found["head_dim"] == 128
    assert found["rope_scaling"]["type"] == "yarn" and found["rope_scaling"]["attention_factor"] == 1.5
    plain = readable_entries(tmp_path, {"model_type": "gemma3_text"}, MLX)
    assert (plain["rope_theta"], plain["rope_local_base_freq"], plain["rope_scaling"]) == (1e6, 1e4, None)
    assert plain["sliding_window_pattern"] == 6


@pytest.mark.parametrize("to", ["compressed-tensors", "dense"])
def test_export_keeps_every_entry_of_config_json(to: str, tmp_path: Path) -> None:
    """Those that only the loader of transformers knows, and those that nobody does."""
    rotary = YARN | {"beta_fast": 4, "attention_factor": 2.0, "truncate": False}
    source = save_tiny("llama", tmp_path / "dense", rope_parameters=rotary, attention_bias=True, dtype=torch.bfloat16)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_causal": False, "surprise": [1, 2]}))
    folder = lc.compress(
        source, {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 3}]}]}, tmp_path / "out"
    ).folder
    export(folder, tmp_path / "exported", to)
    before, after = (json.loads((place / "config.json").read_text()) for place in (source, tmp_path / "exported"))
    after |= {"dtype": before["dtype"], "quantization_config": None}
    assert (
        after == before | {"quantization_config": None}
        and after["rope_parameters"] == rotary
        and after["surprise"] == [1, 2]
    )


def test_gguf_model_refuses_an_unknown_entry(tmp_path: Path) -> None:
    config = config_of("llama").to_dict() | {"is_causal": False}
    with pytest.raises(InputError, match="has is_causal False, which cannot go to GGUF here; export to dense instead"):
        gguf_model(tmp_path, config)
