"""Experts as factors of low rank: a checkpoint like any compressed one, which a fresh process loads and distils."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.models.files.file_names import EXPERTS
from llmcompress.surgery.experts import replace
from llmcompress.surgery.experts.job import ExpertsReport
from llmcompress.surgery.experts.mixture import open_mixture
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import compressed_linears
from llmcompress.weight.nodes import LowRank, shape
from tests.tiers import tiered, tiered_nightly
from tests.tiny import save_tiny
from tests.zoo import NO_GATE, expert_slices, save_zoo, text_for_calibration, zoo

FAMILIES = tiered(("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss"), {"mixtral"}.__contains__)


def ids() -> Tensor:
    return torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))


def replaced(report: ExpertsReport) -> set[str]:
    """The module paths of the experts that became factors."""
    return {f"{block.path}.{row.number}" for block in report.blocks for row in block.experts if row.fate == "replaced"}


@pytest.mark.parametrize("family", FAMILIES)
def test_replace_stores_the_least_used_experts_as_factors_only(family: str, tmp_path: Path) -> None:
    save_zoo(family, tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    plan = lc.replace_experts(tmp_path / "dense", count=2, rank=4, text=text, samples=4, by="frequency")
    report = lc.replace_experts(
        tmp_path / "dense", tmp_path / "out", count=2, rank=4, text=text, samples=4, by="frequency"
    )
    assert plan.blocks == report.blocks and plan.bytes_after == report.bytes_after and plan.output is None
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers, names = compressed_linears(model), replaced(report)
    assert layers.keys() == {f"{name}.{leaf}" for name in names for leaf in ("gate_proj", "up_proj", "down_proj")}
    for layer in layers.values():
        expression = layer.expression()
        assert isinstance(expression, LowRank) and shape(expression.left)[1] == 4
    for block in report.blocks:
        seen = {row.number: row.tokens for row in block.experts}
        least = [number for number, _ in sorted(seen.items(), key=lambda pair: (pair[1], pair[0]))[:2]]
        assert {row.number for row in block.experts if row.fate == "replaced"} == set(least)
    whole = zoo(family)
    state = model.state_dict()
    for name, value in expert_slices(family, whole).items():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(state[name], value), name
    assert json.loads((tmp_path / "out" / EXPERTS).read_text())["way"] == "replace"
    assert lc.verify(tmp_path / "out").layers == len(layers)


@pytest.mark.parametrize("family", tiered_nightly(["qwen3_moe", "mixtral", "olmoe", "deepseek_v3"], "mixtral".__eq__))
def test_replaced_checkpoint_computes_its_factors_in_a_new_process(family: str, tmp_path: Path) -> None:
    save_zoo(family, tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    lc.replace_experts(tmp_path / "dense", tmp_path / "out", count=0.5, text=text, samples=4)
    torch.save(ids(), tmp_path / "ids")
    program = (
        "import torch, llmcompress; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"ids = torch.load({str(tmp_path / 'ids')!r})\n"
        f"with torch.no_grad(): torch.save(model(input_ids=ids).logits, {str(tmp_path / 'logits')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    whole = zoo(family)
    pieces = expert_slices(family, whole)  # windows into the parameters
    with torch.no_grad():
        for name, layer in compressed_linears(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).items():
            pieces[f"{name}.weight"].copy_(dense(layer.expression()))
        wanted = whole(input_ids=ids()).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits"), wanted, rtol=1e-4, atol=1e-4)


def test_replaced_experts_take_their_share_of_bytes(tmp_path: Path) -> None:
    save_zoo("qwen3_moe", tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.replace_experts(tmp_path / "dense", count=2, share=0.3, text=text, samples=2)
    rank = report.settings["rank"]
    assert rank == int(0.3 * 64 * 32 / (64 + 32))
    mixture = open_mixture(tmp_path / "dense")
    going = [name for name in mixture.source.tensors if name.rsplit(".", 2)[0] in replaced(report)]
    before = sum(mixture.source.tensors[name].bytes for name in going)
    assert before - (report.bytes_before - report.bytes_after) == len(going) * 2 * rank * (64 + 32)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_distillation_improves_replaced_experts(family: str, tmp_path: Path) -> None:
    save_zoo(family, tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    lc.replace_experts(tmp_path / "dense", tmp_path / "out", count=3, rank=2, text=text, samples=4)
    data = {"dataset": text, "samples": 28, "length": 48, "held_out": 4}
    rates = {"factors": 2e-2, "norms": 5e-3}
    asked = {"version": 1, "data": data, "rates": rates, "steps": 24, "batch": 4, "compute": "float32"}
    done = lc.distill(tmp_path / "out", tmp_path / "dense", asked, tmp_path / "mended")
    assert done.history[-1]["kl"] < 0.95 * done.history[0]["kl"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mended")
    assert all(isinstance(layer.expression(), LowRank) for layer in compressed_linears(again).values())


@pytest.mark.parametrize(
    "asked, sentence",
    [
        ({"count": 4}, "count is 4, where a block has 4 experts"),
        ({"count": 2, "share": 0.2, "rank": 3}, "share and rank say the same of factors; give one of them"),
        ({"count": 2, "share": 1.5}, r"share is 1\.5; give more than 0 and less than 1"),
        ({"count": 2, "rank": 0}, "rank is 0; give at least 1"),
        ({"count": 2, "rank": 33}, r"rank 33 is larger than the matrix \[64, 32\]; lower it"),
        ({"count": 2, "by": "luck"}, "by is 'luck'"),
    ],
)
def test_replace_refuses_impossible_numbers(asked: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    save_zoo("qwen3_moe", tmp_path / "dense")
    with pytest.raises(RecipeError, match=sentence):
        lc.replace_experts(tmp_path / "dense", tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_replace_refuses_models_without_experts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no mixture of experts"):
        lc.replace_experts(save_tiny("llama", tmp_path / "llama"), count=1)


@pytest.mark.slow
def test_replace_resumes_an_interrupted_run(tmp_path: Path) -> None:
    save_zoo("qwen3_moe", tmp_path / "dense")
    asked: dict[str, Any] = {"count": 2, "rank": 2, "text": str(text_for_calibration(tmp_path)), "samples": 2}
    calls = []

    def stop(done: int, total: int, speed: float) -> None:
        calls.append(done)
        if len(calls) == 4:  # two blocks are looked at, then compressed
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lc.replace_experts(tmp_path / "dense", tmp_path / "out", progress=stop, **asked)
    assert calls == [1, 2, 1, 2] and not (tmp_path / "out").exists()
    report = lc.replace_experts(tmp_path / "dense", tmp_path / "out", **asked)
    assert any("are from an earlier run, which was interrupted" in warning for warning in report.warnings)
    whole = lc.replace_experts(tmp_path / "dense", tmp_path / "whole", **asked)
    assert whole.blocks == report.blocks and lc.verify(tmp_path / "out").layers == lc.verify(tmp_path / "whole").layers


def test_replace_goes_on_in_its_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compressed model has its name already: the same call measures it, another one is refused."""
    save_zoo("mixtral", tmp_path / "dense")
    asked: dict[str, Any] = {"count": 2, "rank": 2, "text": str(text_for_calibration(tmp_path)), "samples": 2}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(replace, "judge", stop)
        lc.replace_experts(tmp_path / "dense", tmp_path / "out", **asked)
    written = (tmp_path / "out" / "model.safetensors").stat()
    with pytest.raises(DiskError, match="was left by a run with another recipe"):
        lc.replace_experts(tmp_path / "dense", tmp_path / "out", **asked | {"count": 1})
    report = lc.replace_experts(tmp_path / "dense", tmp_path / "out", **asked)
    assert (tmp_path / "out" / "model.safetensors").stat() == written
    gates = lc.read(tmp_path / "out").gates
    assert gates is not None and gates.measured and (tmp_path / "out" / EXPERTS).is_file()
    whole = lc.replace_experts(tmp_path / "dense", tmp_path / "whole", **asked)
    assert whole.blocks == report.blocks and whole.warnings == report.warnings
    with pytest.raises(DiskError, match="exists already"):
        lc.replace_experts(tmp_path / "dense", tmp_path / "out", **asked)


def test_replace_works_for_experts_without_gates(tmp_path: Path) -> None:
    [family] = NO_GATE
    save_zoo(family, tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.replace_experts(tmp_path / "dense", tmp_path / "out", count=1, rank=2, text=text, samples=2)
    layers = compressed_linears(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert {name.rpartition(".")[0] for name in layers} == replaced(report) and len(layers) == 2 * len(report.blocks)
