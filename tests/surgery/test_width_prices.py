"""Blocks with widths of their own: chosen by measured damage, loaded with llmcompress, and a dense model elsewhere."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.benchmark.candidate import describe_folder
from llmcompress.data.calibration import calibration_tokens
from llmcompress.distillation.run import distill
from llmcompress.errors import InputError
from llmcompress.evaluation.distance import kl_divergence
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import open_source
from llmcompress.surgery.judged_walk import JudgedWalk
from llmcompress.surgery.unit_choice import UnitScore
from llmcompress.surgery.units import NEURONS, Part, plan_narrowing
from llmcompress.surgery.width_prices import WidthPrices, measure_widths, widths_to_try
from tests.surgery.test_narrow import IDS, logits
from tests.tiers import tiered, tiered_nightly
from tests.tiny import FAMILY_CONFIGS, save_tiny, tiny, tiny_tokenizer

UNABLE = ("gpt2", "opt")
IDLE = 24  # of the 48 neurons of the first block


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text file."""
    (tmp_path / "text.txt").write_text("".join(f"{number} sacks of corn. " for number in range(900)))
    return str(tmp_path / "text.txt")


@torch.no_grad()
def with_idle(family: str, folder: Path) -> Path:
    """Save a tiny model half of whose first block's neurons are read by nobody."""
    model = tiny(family)
    source = open_source(locate(save_tiny(family, folder)))
    reader = architecture(source.config, source.skeleton()).blocks[0].groups[-1][0]
    weight = model.get_submodule(reader.name).get_parameter("weight")
    (weight.T if reader.transposed else weight)[:, :IDLE] = 0
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("family", tiered_nightly(["llama", "phi3", "qwen2"], "phi3".__eq__))
def test_per_block_removes_idle_neurons_of_one_block_without_a_change(family: str, tmp_path: Path, text: str) -> None:
    """And equal widths would have hurt the other block."""
    whole = with_idle(family, tmp_path / "whole")
    done = lc.narrow(whole, tmp_path / "slim", neurons=36, per_block=True, text=text, samples=8)
    assert [[part.kept for part in block.parts] for block in done.blocks] == [[tuple(range(IDLE, 48))], []]
    assert done.after == {"neurons": 36} and done.per_block and done.blocks[1].damage == 0.0
    assert done.damage == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(logits(tmp_path / "slim"), logits(whole), rtol=1e-4, atol=1e-4)
    equal = lc.narrow(whole, neurons=36, text=text, samples=8)
    assert equal.bytes_after == done.bytes_after and equal.blocks[1].damage > 1e-6
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert next(config[key] for key in NEURONS if key in config) == 48
    weights = sum(path.stat().st_size for path in (tmp_path / "slim").glob("*.safetensors"))
    assert 0 < weights - done.bytes_after < 8192


@torch.no_grad()
@pytest.mark.parametrize("family", tiered(["llama", "qwen2", "qwen3"], "qwen3".__eq__))
def test_per_block_removes_an_idle_head_of_one_block_without_a_change(family: str, tmp_path: Path, text: str) -> None:
    """The key-value head of one block that nobody reads; it generates with a cache, and zeros fill it up again."""
    model = tiny(family)
    source = open_source(locate(save_tiny(family, tmp_path / "whole")))
    reader = architecture(source.config, source.skeleton()).blocks[1].groups[1][0]
    model.get_submodule(reader.name).get_parameter("weight")[:, : reader.shape[1] // 2] = 0
    model.save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    asked: dict[str, Any] = {"kv_heads": 1, "neurons": 44, "per_block": True, "text": text, "samples": 8}
    done = lc.narrow(tmp_path / "whole", tmp_path / "slim", **asked)
    gone = {(block.block, part.part): part.kept for block in done.blocks for part in block.parts}
    assert gone[1, "kv_heads"] == (1,) and done.after["kv_heads"] <= 1.5
    assert done.bytes_after <= lc.narrow(tmp_path / "whole", neurons=44, kv_heads=1, text=text, samples=8).bytes_after
    slim: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype=torch.float32)
    said = slim.generate(IDS, max_new_tokens=5, do_sample=False)
    plain = slim.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(said, plain)
    lc.export(tmp_path / "slim", tmp_path / "filled", "dense")
    torch.testing.assert_close(logits(tmp_path / "filled"), logits(tmp_path / "slim"), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_measure_widths_equals_whole_forwards(tmp_path: Path, text: str) -> None:
    """The KL of a model that transformers runs with one block's layer refitted to fewer neurons."""
    folder = save_tiny("llama", tmp_path / "whole")
    source = open_source(locate(folder))
    arch = architecture(source.config, source.skeleton())
    asked = lc.Calibration(dataset=text, samples=9, length=64, held_out=1)
    tokens = calibration_tokens(asked, source.tokenizer(), source.load, source.config)
    cuts = plan_narrowing(source, arch, 24, 1).cuts
    judged = JudgedWalk(source, arch, tokens, torch.device("cpu"))
    found = measure_widths(judged, cuts, {"kv_heads": (2, 1), "neurons": (48, 24, 8)}, UnitScore())
    damages = found.damages[1]["neurons"]
    assert found.damages[0]["neurons"][0] == found.damages[0]["kv_heads"][0] == 0.0 and damages[2] > damages[1] > 0
    window = tokens.sequences[-1:]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    states = model(tokens.sequences[:-1], output_hidden_states=True).hidden_states[1]
    block, before = model.model.layers[1], model(window).logits[0, :-1].log_softmax(-1)
    inputs: list[torch.Tensor] = []
    handle = block.mlp.down_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    places = torch.arange(states.shape[1])[None]
    block(states, position_embeddings=model.model.rotary_emb(states, places))
    handle.remove()
    x, weight = inputs[0].flatten(0, 1).double(), block.mlp.down_proj.weight.double()
    hessian = x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(48)
    energy = hessian.diagonal() * weight.square().sum(0)
    for width, damage in zip((24, 8), damages[1:], strict=True):
        kept = energy.argsort()[-width:].sort().values
        fitted = torch.zeros_like(weight)
        fitted[:, kept] = weight @ hessian[:, kept] @ hessian[kept][:, kept].inverse()
        block.mlp.down_proj.weight.copy_(fitted)
        after = model(window).logits[0, :-1].log_softmax(-1)
        assert damage == pytest.approx(float(kl_divergence(before, after).mean()), rel=0.02)


def test_choose_widths_equals_the_best_of_all_choices() -> None:
    """Beside every choice there is; a damage that falls with fewer neurons, which is noise, is not believed."""
    widths: dict[Part, tuple[int, ...]] = {"kv_heads": (3, 2, 1), "neurons": (48, 36, 30, 12)}
    weights: dict[Part, int] = {"kv_heads": 20, "neurons": 3}
    heads = ((0.0, 0.2, 0.7), (0.0, 0.01, 0.9), (0.0, 0.4, 0.5))
    neurons = ((0.0, 0.1, 0.5, 0.4), (0.0, 0.3, 0.6, 2.0), (0.0, 0.0, 0.0, 0.1))
    damages: list[dict[Part, tuple[float, ...]]] = []
    for one, other in zip(heads, neurons, strict=True):
        damages.append({"kv_heads": one, "neurons": other})
    found, damage = WidthPrices(widths, weights, tuple(damages)).choose_widths({"kv_heads": 2, "neurons": 30})
    rising = [[max(row[: place + 1]) for place in range(len(row))] for row in (*heads, *neurons)]
    costs = [[20 * each for each in widths["kv_heads"]]] * 3 + [[3 * each for each in widths["neurons"]]] * 3
    most = 3 * (2 * 20 + 30 * 3)
    sums = [
        sum(row[each] for row, each in zip(rising, choice, strict=True))
        for choice in product(*map(range, map(len, rising)))
        if sum(row[each] for row, each in zip(costs, choice, strict=True)) <= most
    ]
    assert damage == min(sums)
    assert sum(block["kv_heads"] * 20 + block["neurons"] * 3 for block in found) <= most
    assert sum(block["kv_heads"] for block in found) != 6  # weights moved between heads and neurons


def test_widths_to_try_are_multiples_and_include_the_mean() -> None:
    assert widths_to_try(1536, 1120, 32) == (1536, 1408, 1280, 1152, 1120, 1024, 768, 512, 256)
    assert widths_to_try(6, 5, 1) == (6, 5, 4, 3, 2, 1)


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `dense` model, one with widths by block in `slim`, and a text."""
    folder = tmp_path_factory.mktemp("slim")
    (folder / "text.txt").write_text("".join(f"{number} sacks of corn. " for number in range(900)))
    how: dict[str, Any] = {"text": str(folder / "text.txt"), "samples": 8}
    lc.narrow(with_idle("llama", folder / "dense"), folder / "slim", neurons=36, per_block=True, **how)
    return folder


def test_model_with_widths_by_block_opens_as_dense(slim: Path) -> None:
    source = open_source(locate(slim / "slim"))
    assert source.tensors["model.layers.0.mlp.down_proj.weight"].shape == (32, 24)
    candidate = describe_folder(locate(slim / "slim"), "bfloat16")
    assert (candidate.kind, candidate.bytes, candidate.bpw) == ("dense", source.bytes, 32.0)
    protocol = lc.Protocol((slim / "text.txt").read_text(), windows=2, length=32)
    found = lc.score(slim / "slim", protocol, against=str(slim / "dense"))
    assert found["kl"] == pytest.approx(0.0, abs=1e-5)


@torch.no_grad()
def test_model_with_widths_by_block_is_saved_by_transformers(slim: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(slim / "slim", dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(slim / "slim"))


@pytest.mark.slow
@torch.no_grad()
def test_model_with_widths_by_block_is_compressed(slim: Path, tmp_path: Path) -> None:
    """Some of its matrices, so that dense ones with sizes of their own stay beside them."""
    data = {"dataset": str(slim / "text.txt"), "samples": 8, "length": 32, "held_out": 2}
    rules = [{"match": "*.down_proj", "steps": [{"method": "gptq", "bits": 8, "group_size": 8}]}]
    asked = {"version": 1, "rules": [*rules, {"match": "*", "steps": []}], "calibration": data}
    lc.compress(slim / "slim", asked, tmp_path / "small")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "CompressedLinear"
    assert model.model.layers[0].mlp.up_proj.weight.shape == (24, 32)
    wanted = AutoModelForCausalLM.from_pretrained(slim / "slim", dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=0, atol=0.05)
    with pytest.raises(InputError, match="widths of their own"):
        lc.export(tmp_path / "small", tmp_path / "out", "compressed-tensors")
    done = lc.export(tmp_path / "small", tmp_path / "filled", "dense")
    assert "3 matrices of narrower blocks filled up with zeros" in done.changed
    torch.testing.assert_close(logits(tmp_path / "filled"), model(IDS).logits, rtol=0, atol=0.05)
    assert "quantization_config" not in json.loads((tmp_path / "filled" / "config.json").read_text())


@pytest.mark.slow
def test_model_with_widths_by_block_is_distilled_in_its_shapes(slim: Path, tmp_path: Path) -> None:
    data = {"dataset": str(slim / "text.txt"), "samples": 12, "length": 32, "held_out": 2}
    asked = {"version": 1, "data": data, "rates": {"weights": 1e-3, "norms": 1e-3}, "batch": 2, "steps": 3}
    distill(slim / "slim", slim / "dense", asked, tmp_path / "mended")
    before, after = (open_source(locate(folder)).tensors for folder in (slim / "slim", tmp_path / "mended"))
    assert {name: header.shape for name, header in after.items()} == {name: one.shape for name, one in before.items()}
    assert logits(tmp_path / "mended").isfinite().all()


def test_commands_that_would_lose_widths_by_block_refuse(slim: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="widths of their own"):
        lc.narrow(slim / "slim", tmp_path / "out", neurons=12, text=text, samples=8)
    with pytest.raises(InputError, match="widths of their own"):
        lc.drop_blocks(slim / "slim", [1], tmp_path / "out")
    with pytest.raises(InputError, match="widths of their own"):
        lc.export(slim / "slim", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", tiered(sorted(FAMILY_CONFIGS), {"llama", "phi3", "gpt2"}.__contains__))
def test_per_block_works_for_a_family_or_refuses_it_first(
    family: str, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some store matrices turned, some run on nothing but values; these are refused before anything is measured."""
    whole = with_idle(family, tmp_path / "whole")
    how: dict[str, Any] = {"neurons": 36, "per_block": True, "text": text, "samples": 8}
    if family in UNABLE:
        monkeypatch.setattr("llmcompress.surgery.narrow.measure_widths", None)
        with pytest.raises(InputError, match="cannot have widths of their own; narrow all blocks alike"):
            lc.narrow(whole, **how)
    else:
        assert lc.narrow(whole, **how).per_block
