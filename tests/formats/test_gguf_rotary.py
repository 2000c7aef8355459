"""Rotary positions in GGUF: llama.cpp's formula on what the file says, against transformers, and llama.cpp itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmcompress.errors import InputError
from llmcompress.formats.export import export
from llmcompress.formats.gguf.families import FAMILIES
from llmcompress.formats.gguf.model import GGUFModel, gguf_model
from llmcompress.models.dense.model import resolve
from tests.formats.gguf_files import (
    GRID,
    byte_level,
    compressed,
    engine,
    gguf,
    in_float32,
    largest_difference,
    run,
    tiny_llama,
)
from tests.formats.test_gguf_families import CASES, GEMMA, HEADS, LINEAR, OLDER, PLAIN, SIZES, YARN, every, long_rope
from tests.tiers import tiered_nightly
from tests.tiny import tiny

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = YARN | {"factor": 8.0}
LONG = long_rope(64, 16)["rope_parameters"]
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # every parameter of every type, by a name: type, change
    "plain theta": (PLAIN, {"rope_theta": 300.0}),
    "linear": (LINEAR, {}),
    "linear theta": (LINEAR, {"rope_theta": 300.0}),
    "linear factor": (LINEAR, {"factor": 3.0}),
    "llama3": (LLAMA3, {}),
    "llama3 theta": (LLAMA3, {"rope_theta": 10000.0}),
    "llama3 factor": (LLAMA3, {"factor": 8.0}),
    "llama3 low": (LLAMA3, {"low_freq_factor": 0.5}),
    "llama3 high": (LLAMA3, {"high_freq_factor": 2.0}),
    "llama3 first length": (LLAMA3, {"original_max_position_embeddings": 32}),
    "yarn": (YARN, {}),
    "yarn theta": (YARN, {"rope_theta": 500.0}),
    "yarn factor": (YARN, {"factor": 2.0}),
    "yarn ratio": (YARN, {"factor": None}),
    "yarn first length": (YARN, {"original_max_position_embeddings": 512}),
    "yarn attention": (YARN, {"attention_factor": 2.0}),
    "yarn no attention": (YARN, {"attention_factor": 1.0}),
    "yarn mscale": (YARN, {"mscale": 2.0, "mscale_all_dim": 0.5}),
    "yarn mscale alone": (YARN, {"mscale": 2.0}),
    "yarn fast": (YARN, {"beta_fast": 1.5}),
    "yarn slow": (YARN, {"beta_slow": 0.25}),
    "yarn betas": (YARN, {"beta_fast": 4, "beta_slow": 0.5}),
    "yarn truncate": (YARN, {"truncate": False}),
    "yarn all": (YARN, {"beta_fast": 4, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.5}),
}
BY_DIVISORS = ("llama3", "yarn fast", "yarn slow", "yarn betas", "yarn truncate", "yarn all")  # begin of names


def rotated(model: GGUFModel, folder: Path) -> tuple[Tensor, float]:
    """Return the frequencies `[width / 2]` and the factor by which llama.cpp rotates, of what the file says."""
    writer = gguf.GGUFWriter(folder / "model.gguf", model.architecture)
    model.describe(writer, 640)
    told = {key.partition(".rope.")[2]: entry.value for key, entry in writer.kv_data[0].items() if ".rope." in key}
    width, base = told["dimension_count"], told["freq_base"]
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    for divisors in model.rotary.divisors().values():
        frequencies /= divisors
    kind, factor, attention = (
        told.get("scaling.type"),
        told.get("scaling.factor", 1),
        told.get("scaling.attn_factor", 1),
    )
    if kind == "linear":
        return frequencies / factor, attention
    if kind is None:
        return frequencies, attention
    length = told["scaling.original_context_length"]

    def place(turns: float) -> float:
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(0, math.floor(place(32))), min(width - 1, math.ceil(place(1)))
    ramp = ((torch.arange(width // 2) - low) / max(0.001, high - low)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, attention * (1 + 0.1 * math.log(factor))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_rotary_equals_transformers_or_is_refused(family: str, name: str, tmp_path: Path) -> None:
    rotary, change = CHANGES[name]
    config = AutoConfig.for_model(family, **(CASES[family][0] | {"rope_parameters": rotary | change}))
    if name.startswith(BY_DIVISORS) and not FAMILIES[family].divisors:
        with pytest.raises(InputError, match=f"rotary positions of type '{rotary['rope_type']}'.*; export to dense"):
            gguf_model(tmp_path, config.to_dict())
        return
    found, factor = rotated(gguf_model(tmp_path, config.to_dict()), tmp_path)
    expected, attention = 300.0 ** -(torch.arange(0, 16, 2) / 16), 1.0
    if rotary is not PLAIN:
        expected, attention = ROPE_INIT_FUNCTIONS[rotary["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=0)
    assert math.isclose(factor, attention, rel_tol=1e-6)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        SIZES | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
        "the unknown parameter llama_4_scaling",
    ),
    (
        "llama",
        SIZES | {"rope_parameters": LONG | {"partial_rotary_factor": 1.0}},
        "rotary positions of type 'longrope'",
    ),
    ("gpt_neox", OLDER | {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.45}}, "rotary positions on 7 of 16"),
    (
        "olmo3",
        SIZES | every(4, 4) | {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": LINEAR}},
        "rotary positions of type 'linear' in layers with a window",
    ),
    (
        "olmo3",
        SIZES | every(4, 4) | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN}},
        "rope_theta 10000.0 in layers with a window and 1000.0 in others",
    ),
    (
        "gemma3_text",
        GEMMA
        | every(6, 6)
        | {"rope_parameters": {"full_attention": YARN | {"attention_factor": 2.0}, "sliding_attention": PLAIN}},
        "the attention factor 2 in layers that attend to all tokens",
    ),
    ("exaone4", SIZES | every(4, 4) | {"sliding_window": 64}, "sliding_window 64"),
    (
        "exaone4",
        SIZES | {"sliding_window": None, "num_hidden_layers": 64, "layer_types": ["full_attention"] * 64},
        "64 layers, at which llama.cpp takes",
    ),
    ("qwen2", SIZES | {"head_dim": 32}, "4 heads of 32 numbers, not of 64 in all"),
    ("smollm3", HEADS | {"num_hidden_layers": 4, "attention_bias": True}, "attention_bias True"),
]


@pytest.mark.parametrize("family, sizes, reason", REFUSED, ids=[reason for _, _, reason in REFUSED])
def test_gguf_model_refuses_rotary_positions_that_llama_cpp_misreads(
    family: str, sizes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(family, **sizes).to_dict()
    with pytest.raises(InputError, match=f"has {reason}.*, which cannot go to GGUF here; export to dense instead"):
        gguf_model(tmp_path, config)


def test_longrope_note_names_the_context_length(tmp_path: Path) -> None:
    [note] = gguf_model(tmp_path, AutoConfig.for_model("phi3", **CASES["phi3"][1]).to_dict()).rotary.notes()
    assert note == "llama.cpp takes the long factors of positions where its context, not a text, exceeds 16"
    assert not list(gguf_model(tmp_path, AutoConfig.for_model("llama", **SIZES).to_dict()).rotary.notes())


LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA31 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
FULL = {"full_attention": LINEAR | {"rope_theta": 1e6}, "sliding_attention": PLAIN}


def exported(family: str, place: Path, **sizes: Any) -> Path:
    """Return the GGUF file of a compressed tiny model."""
    source = tiny_llama(place / "dense", family, **sizes)
    export(compressed(source, place / "small", ("*", [GRID])), place / "out", "gguf", allow_dense=True)
    return place / "out" / "model.gguf"


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"rope_parameters": LLAMA31}),
        ("llama", {"rope_parameters": LINEAR}),
        ("llama", {"rope_parameters": YARN}),
        ("gemma3_text", GEMMA | every(6, 6) | {"rope_parameters": FULL}),
        ("stablelm", {"rope_parameters": PLAIN | {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}),
    ],
)
def test_scaled_positions_are_read_back(
    family: str, sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    config = resolve(str(exported(family, tmp_path, **sizes))).config
    wanted, nested = sizes["rope_parameters"], "full_attention" in sizes["rope_parameters"]
    for kind in wanted if nested else [None]:
        told, expected = (at[kind] if kind else at for at in (config.rope_parameters, wanted))
        assert {key: told.get(key) for key in expected} == pytest.approx(expected), kind
    assert getattr(config, "query_pre_attn_scalar", None) == sizes.get("query_pre_attn_scalar")


@pytest.mark.parametrize(
    ("family", "sizes", "sentence"),
    [
        ("llama", {"rope_parameters": LLAMA3}, "scales rotary positions by rope_freqs.weight"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 2.0}}, "has rotary positions of type 'yarn'"),
        ("llama", {"attention_bias": True}, "has biases that transformers passes over, blk.0.attn_"),
        ("phi3", long_rope(64, 16), "rotates 8 numbers of a head, and transformers reads 16"),
    ],
)
def test_what_no_reader_says_is_refused(
    family: str, sizes: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    file = exported(family, tmp_path, **sizes)
    with pytest.raises(InputError, match=f"{sentence}.*; give the folder or the Hub id of the model"):
        resolve(str(file))
    assert not [path for path in (tmp_path / "cache").glob("*") if path.is_dir()]


# --- the engine -----------------------------------------------------------------------------------------------------


def difference(family: str, sizes: dict[str, Any], place: Path) -> float:
    """Of the log-probabilities of llama.cpp and transformers, all in float32."""
    dense = tiny(family, **sizes)
    dense.save_pretrained(place / "dense")
    byte_level(("words",)).save_pretrained(place / "dense")
    kinds = (".q_proj", ".query_key_value", ".qkv_proj", ".c_attn")
    layers = [name for name, _ in dense.named_modules() if name.endswith(kinds)][:1]
    model = in_float32(compressed(place / "dense", place / "small", (layers, [GRID])), layers, place / "float32")
    export(place / "float32", place / "out", "gguf")
    ids = [(number * 37) % 640 for number in range(1, 33)]
    return largest_difference(run(place / "out", 256), model, ids, 640)


def tolerance(family: str) -> float:
    """llama.cpp looks GELU up in float16."""
    return 1e-3 if FAMILIES[family].activation in ("silu", "relu2") else 2e-2


@engine
@pytest.mark.parametrize("name", tiered_nightly(CHANGES, [*CHANGES][::3].__contains__))
def test_llama_cpp_computes_every_parameter(name: str, tmp_path: Path) -> None:
    rotary, change = CHANGES[name]
    assert difference("llama", SIZES | {"rope_parameters": rotary | change}, tmp_path) < 1e-3


def with_rotary(family: str, rotary: dict[str, Any]) -> dict[str, Any]:
    """Sizes of a family whose layers that attend to all tokens have these rotary positions."""
    sizes = CASES[family][0]
    plain = type(AutoConfig.for_model(family, **sizes))().rope_parameters
    part = (sizes.get("rope_parameters") or plain).get("partial_rotary_factor")
    rotary = rotary | ({"partial_rotary_factor": part} if part else {})
    nested = "full_attention" in plain
    heads = {"head_dim": 16} if family == "mixtral" else {}  # transformers' YaRN cannot do without
    return (
        sizes
        | heads
        | {"rope_parameters": {"full_attention": rotary, "sliding_attention": PLAIN} if nested else rotary}
    )


SCALED = [(family, "yarn" if family == "gemma3_text" else "yarn attention") for family in FAMILIES]
SCALED += [(family, name) for family, row in FAMILIES.items() for name in ("llama3", "yarn all") if row.divisors]
SCALED = [(family, name) for family, name in SCALED if family not in ("gpt2", "phi3")]  # without, or longrope alone


@engine
@pytest.mark.parametrize("case", tiered_nightly(SCALED, SCALED[::3].__contains__), ids=" ".join)
def test_llama_cpp_rotates_every_family(case: tuple[str, str], tmp_path: Path) -> None:
    family, name = case
    rotary, change = CHANGES[name]
    assert difference(family, with_rotary(family, rotary | change), tmp_path) < tolerance(family)


@engine
def test_llama_cpp_takes_phis_attention_factor(tmp_path: Path) -> None:
    sizes = SIZES | long_rope(64, 16)
    sizes["rope_parameters"] = sizes["rope_parameters"] | {"attention_factor": 1.5}
    assert difference("phi3", sizes, tmp_path) < 1e-3


def changed_facts(family: str) -> dict[str, Any]:
    """Sizes of a family with other values of all that its row writes or that tensors show."""
    config = AutoConfig.for_model(family, **CASES[family][0])
    row = FAMILIES[family]
    changes: dict[str, Any] = {}
    for entry in row.read - {"no_rope_layers", "num_kv_heads"}:
        match getattr(config, entry):
            case bool() as value:
                changes[entry] = not value
            case int() as value:
                changes[entry] = value + 1
            case float() as value:
                changes[entry] = 0.1 if "eps" in entry else value * 1.5
    return CASES[family][0] | changes


@engine
@pytest.mark.parametrize("family", tiered_nightly(FAMILIES, [*FAMILIES][::2].__contains__))
def test_llama_cpp_computes_every_written_entry(family: str, tmp_path: Path) -> None:
    assert difference(family, changed_facts(family), tmp_path) < tolerance(family)
