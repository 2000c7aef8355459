"""The plug-in for vLLM: against a stand-in for its interfaces, and in its own Llama model where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.formats.vllm.plugin import register
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.pipeline.engines import compress_for
from llmcompress.recipe.read import read_recipe
from llmcompress.weight.expression import dense
from llmcompress.weight.layout import pack_weight
from tests.builders import codebook
from tests.formats import vllm_stand_in as vllm
from tests.formats.vllm_engine import TOKENS
from tests.rules.source_tree import ROOT
from tests.tiny import save_tiny

LATE = "llmcompress.formats.vllm.layers"
GRID = {"method": "rtn", "bits": 4, "group_size": 16}
TRELLIS = [{"method": "rotate"}, {"method": "trellis", "bits": 4, "memory": 8, "code": "linear"}]
RULES = [
    {"match": "*.0.*.k_proj", "steps": []},
    {"match": "*.up_proj", "steps": [{"method": "rotate"}, {"method": "rtn", "bits": 2}]},
    {"match": "*", "steps": [GRID, {"method": "svd", "rank": 3, "factor_bits": 16}]},
]
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model in which one part of a fused layer is dense; where head and table are tied, these are not."""
    place = tmp_path_factory.mktemp("model")
    source = save_tiny("llama", place / "dense", tie_word_embeddings=request.param)
    recipe: dict[str, Any] = {"version": 1, "rules": RULES, "embeddings": [GRID] if request.param else []}
    return lc.compress(source, recipe, place / "out").folder


@pytest.fixture
def config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The config that vLLM's loader would make of the model's config.json."""
    monkeypatch.delitem(sys.modules, LATE, raising=False)
    registered = vllm.install(monkeypatch)
    register()
    register()  # vLLM may do so in some processes
    entries = CompressedCheckpoint(folder)
    assert list(registered) == ["llmcompress"]
    made = registered["llmcompress"](entries.layouts)
    made.packed_modules_mapping = FUSED
    yield made
    del sys.modules[LATE]


def test_another_version_of_vllm_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, LATE, raising=False)
    vllm.install(monkeypatch)
    monkeypatch.setattr("llmcompress.runtime.engines.package_version", {"vllm": "0.40"}.get)
    register()
    register()
    del sys.modules[LATE]
    assert caplog.messages == ["vllm 0.40 was not tried, only 0.32 and 0.33; look at its answers before use"]


def test_config_json_is_read(folder: Path, config: Any) -> None:
    from llmcompress.models.files.reading import read_json

    entries = read_json(folder / "config.json")["quantization_config"]
    read = type(config).from_config(entries)
    assert read.layouts == config.layouts and read.get_name() == "llmcompress"
    with pytest.raises(InputError, match="format version 999"):
        type(config).from_config(entries | {"format_version": 999})
    with pytest.raises(InputError, match="vLLM does not read blocks that have matrices in common"):
        type(config).from_config(entries | {"ties": {"model.layers.0.mlp.up_proj": "model.layers.0.mlp.gate_proj"}})


def test_fused_linears_multiply_as_their_parts(folder: Path, config: Any) -> None:
    opened = CompressedCheckpoint(folder)
    x = torch.randn(5, 32)
    for parent, fused, sizes in (("self_attn", "qkv_proj", [32, 16, 16]), ("mlp", "gate_up_proj", [48, 48])):
        layer = vllm.LinearBase(32, sizes, config, f"model.layers.0.{parent}.{fused}")
        parts = []
        for number, part in enumerate(FUSED[fused]):
            name = f"model.layers.0.{parent}.{part}"
            stored = opened.read(f"{name}.weight")
            vllm.load(layer, "weight", stored, number if parent == "mlp" else part[0])
            parts.append(dense(opened.expression(name)) if name in opened.layouts else stored.float())
        vllm.finish(layer)
        torch.testing.assert_close(layer(x), x @ torch.cat(parts).T)
        assert layer.get_parameter("weight").dtype == torch.uint8 and len(list(layer.parameters())) == 1
        assert parent == "self_attn" or layer.decoders[0][1].fast is not None, "up_proj has a kernel"


def test_plain_linears_are_left_to_vllm(config: Any) -> None:
    layer = vllm.LinearBase(32, [16], config, "model.layers.0.self_attn.k_proj")
    assert type(layer.quant_method) is vllm.UnquantizedLinearMethod
    assert config.get_quant_method(torch.nn.Identity(), "model.layers.0.self_attn.attn") is None


def test_a_mamba_is_known_by_the_name_that_vllm_has(config: Any) -> None:
    """Its Granite 4 looks up `mixer`, and loads `mamba`."""
    layout, payload = pack_weight(codebook((48, 32), 200, 1, 1))
    config.layouts = {"model.layers.0.mamba.in_proj": layout}
    layer = vllm.LinearBase(32, [24, 24], config, "model.layers.0.mixer.in_proj")
    vllm.load(layer, "weight", payload)
    assert torch.equal(layer.get_parameter("weight"), payload)


@pytest.mark.parametrize("prefix", ["model.embed_tokens", ""])  # some of vLLM's models give no name
def test_tables_look_up_rows_and_serve_a_tied_head(folder: Path, config: Any, prefix: str) -> None:
    opened = CompressedCheckpoint(folder)
    table, head = vllm.VocabParallelEmbedding(264, 32, config, prefix), vllm.ParallelLMHead(264, 32, config, "lm_head")
    if "model.embed_tokens" not in opened.layouts:
        assert {type(table.quant_method).__name__, type(head.quant_method).__name__} == {
            "UnquantizedEmbeddingMethod",
            "HeadMethod",
        }
        return
    head = head.tie_weights(table)
    for name in ("weight", "like"):
        vllm.load(table, name, opened.read(f"model.embed_tokens.{name}"))
    vllm.finish(table)
    vllm.finish(head)
    expected, x = dense(opened.expression("model.embed_tokens")), torch.randn(3, 32)
    ids = torch.tensor([5, 263, 5, 0])
    torch.testing.assert_close(table(ids), expected[ids])
    torch.testing.assert_close(head.quant_method.apply(head, x), x @ expected.T)


def test_vllm_errors_say_what_cannot_be_loaded(folder: Path, config: Any) -> None:
    name = "model.layers.0.self_attn.o_proj"
    with pytest.raises(InputError, match="o_proj is one payload, which is not cut; set tensor_parallel_size to 1"):
        vllm.LinearBase(32, [32], config, name, ranks=2)
    with pytest.raises(InputError, match=r"o_proj is \(32, 32\) in config.json, \(64, 32\) in vLLM's model"):
        vllm.LinearBase(32, [64], config, name)
    with pytest.raises(InputError, match="vLLM fuses model.layers.0.mlp.gate_proj into model.layers.0.mlp, which"):
        config.get_quant_method(torch.nn.Identity(), "model.layers.0.mlp")
    config.packed_modules_mapping = {"in_proj_qkvz": ["o_proj", "in_proj_z"]}  # as of Qwen3.5: three parts and one
    with pytest.raises(InputError, match="vLLM has 4 parts of .*in_proj_qkvz, several of which are one payload"):
        vllm.LinearBase(32, [8, 8, 16, 16], config, "model.layers.0.self_attn.in_proj_qkvz")
    layer = vllm.LinearBase(32, [32], config, name)
    stored = CompressedCheckpoint(folder).read(f"{name}.weight")
    with pytest.raises(InputError, match="part 0 of .*o_proj is torch.uint8 .* in the file, not the"):
        vllm.load(layer, "weight", stored[:-8])
    with pytest.raises(InputError, match="part 0 of .*o_proj is torch.float32"):
        vllm.load(layer, "weight", torch.zeros(32, 32))


def test_a_payload_whose_rows_vllm_would_move_is_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon and Bloom store q, k and v head by head, and vLLM one after the other; one group of heads is both."""
    layout, payload = pack_weight(codebook((48, 32), 200, 1, 1))
    config.layouts = {(name := "transformer.h.0.self_attention.query_key_value"): layout}
    monkeypatch.setattr(vllm.LinearBase, "total_num_kv_heads", 1, raising=False)
    layer = vllm.LinearBase(32, [16, 16, 16], config, name)
    assert layer.get_parameter("weight").shape == payload.shape
    monkeypatch.setattr(vllm.LinearBase, "total_num_kv_heads", 2)
    with pytest.raises(InputError, match="vLLM moves rows of .*query_key_value, and a payload has none; export"):
        vllm.LinearBase(32, [16, 16, 16], config, name)


def test_a_damaged_payload_is_not_served(tmp_path: Path, config: Any) -> None:
    """A code without an entry in its codebook would end the server."""
    layout, payload = pack_weight(codebook((48, 32), 200, 1, 1))
    config.layouts = {**config.layouts, (name := "model.layers.0.mlp.down_proj"): layout}
    layer = vllm.LinearBase(32, [48], config, name)
    vllm.load(layer, "weight", torch.full_like(payload, 255))
    with pytest.raises(InputError, match="the payload of .*down_proj is damaged .*codes: it has the code 255 of 200"):
        vllm.finish(layer)


def vllm_program() -> Path:
    """Return the Python of vLLM's environment."""
    program = ROOT / ".engines" / "vllm" / "bin" / "python"
    if not program.exists():
        pytest.skip("there is no vLLM here; research/engines/setup makes its environment")
    return program


@pytest.mark.slow
def test_vllms_llama_computes_our_logits(folder: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("vllm_llama.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([vllm_program(), script, folder, tmp_path / "logits"], check=True, env=environment)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(30)[None] * 7 % 256)
    torch.testing.assert_close(torch.load(tmp_path / "logits")[:, :264], ours.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["vllm-4", "vllm-fp8", "vllm-int8", None], ids=lambda name: name or "the plug-in")
def test_vllms_engine_answers_as_transformers(recipe: str | None, tmp_path: Path) -> None:
    """Log-probabilities of what `--for vllm` writes, and of a checkpoint of trellises, in vLLM's engine."""
    program = vllm_program()
    if recipe in ("vllm-4", "vllm-int8") and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("vLLM's build for CPUs multiplies integers on processors with AVX-512")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = save_tiny("llama", tmp_path / "dense", head_dim=32, **sizes)
    text = {"dataset": "stdlib", "samples": 4, "length": 32, "held_out": 1}
    if recipe is None:
        rules = [{"match": "*", "steps": TRELLIS}]
        lc.compress(source, {"version": 1, "calibration": text, "rules": rules, "embeddings": [GRID]}, tmp_path / "out")
    else:
        settings = [f"calibration.{key}={value}" for key, value in text.items()]
        compress_for("vllm", source, read_recipe(recipe, settings), tmp_path / "out")
    script = Path(__file__).with_name("vllm_engine.py")
    subprocess.run([program, script, tmp_path / "out", tmp_path / "answer.json"], check=True, cwd=tmp_path)
    answer = json.loads((tmp_path / "answer.json").read_text())
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    room = 0.15 if recipe == "vllm-fp8" else 0.05  # bfloat16; what it rounds otherwise may be a step of FP8 further on
    torch.testing.assert_close(torch.tensor(answer["scores"]), scores, rtol=0, atol=room)
