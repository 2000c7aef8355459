"""Mixtures of experts, the whole way: every expert's every matrix is planned, compressed, stored and handed on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.compression.plan import Plan
from llmcompress.errors import InputError
from llmcompress.formats.export import FORMATS
from llmcompress.models.files.file_names import ALLOCATION
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import compressed_linears, decoded
from tests.tiers import tiered, tiered_nightly
from tests.zoo import COUNT, MIXTURES, NO_GATE, expert_slices, save_zoo, text_for_calibration, zoo

ONE_BLOCK = {  # of the two has experts
    *("deepseek_v2", "deepseek_v3", "llama4_text", "lfm2_moe", "glm4_moe", "ernie4_5_moe", "nemotron_h", "dots1"),
    "jamba_moe",
}
PER_TOKEN = {"ernie4_5_moe": "moe_k"}  # entry of the config; num_experts_per_tok in others
SLOW = ("deepseek_v3", "gpt_oss", "llama4_text", "qwen2_moe", "granitemoe", "jamba_moe", "phimoe")
FAMILIES = tiered(MIXTURES, "mixtral".__eq__, slow=SLOW.__contains__)
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Made:
    """A tiny mixture at `dense`, compressed to `out`, its plan, and its text."""

    family: str
    dense: Path
    out: Path
    plan: Plan
    text: Path


def recipe(text: Path, *steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(text), "samples": 6, "length": 48, "held_out": 2}
    rules = [{"match": "*", "steps": list(steps) or [{"method": "gptq", "bits": 4, "group_size": 16}]}]
    return {"version": 1, "calibration": calibration, "rules": rules, **more}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A mixture of each family, made when it is first asked for."""
    made: dict[str, Made] = {}

    def get(family: str) -> Made:
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            text = text_for_calibration(place)
            source, asked = save_zoo(family, place / "dense"), recipe(text)
            plan = lc.plan(source, asked)
            lc.compress(source, asked, place / "out")
            made[family] = Made(family, source, place / "out", plan, text)
        return made[family]

    return get


def matrices(family: str) -> set[str]:
    """Return the names of all matrices of experts, counted from the config."""
    names = {name.removesuffix(".weight") for name in expert_slices(family, zoo(family)) if name.endswith(".weight")}
    blocks, each = 1 if family in ONE_BLOCK else 2, 2 if family in NO_GATE else 3
    assert len(names) == blocks * COUNT * each
    return names


def ids() -> Tensor:
    return torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=ids()).logits
    return found


def with_decoded_weights(family: str, folder: Path) -> PreTrainedModel:
    """Return transformers' dense model, each compressed matrix of `folder` decoded and put into its parameters."""
    model = zoo(family)
    pieces = expert_slices(family, model)  # windows into the parameters
    with torch.no_grad():
        for name, layer in compressed_linears(AutoModelForCausalLM.from_pretrained(folder)).items():
            weight = f"{name}.weight"
            place = pieces[weight] if weight in pieces else model.get_parameter(weight)
            place.copy_(dense(layer.expression()))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_every_expert_is_planned_and_compressed(family: str, make: Callable[[str], Made]) -> None:
    made = make(family)
    rows = {row.name: row for row in lc.read(made.out).layers}
    wanted = matrices(family)
    assert wanted <= rows.keys()
    assert [row.name for row in made.plan.layers] == list(rows)
    assert all(0 < rows[name].error < 0.2 and rows[name].bpw < 6 for name in wanted)
    stored = {name for path in made.out.glob("*.safetensors") for name in load_file(path)}
    assert {f"{name}.weight" for name in wanted} <= stored


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_stay_dense_and_are_named(family: str, make: Callable[[str], Made]) -> None:
    made = make(family)
    before = zoo(family).state_dict()
    routers = {name for name in before if name.endswith((".gate.weight", "shared_expert_gate.weight", "router.weight"))}
    report, model = lc.read(made.out), AutoModelForCausalLM.from_pretrained(made.out)
    after = model.state_dict()
    assert routers and all(torch.equal(after[name], before[name]) for name in routers)
    assert {f"{name} stays dense" for name in routers} <= set(report.warnings)


@pytest.mark.parametrize("family", [case for case in FAMILIES if case.id != "phimoe"])  # which always asks two
def test_eight_bits_are_close_to_dense_where_all_experts_are_asked(family: str, tmp_path: Path) -> None:
    """Routing cannot flip then."""
    source = save_zoo(family, tmp_path / "dense", **{PER_TOKEN.get(family, "num_experts_per_tok"): COUNT})
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 8, "group_size": 16}]}]
    lc.compress(source, {"version": 1, "rules": rules}, tmp_path / "out")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", source))
    wanted = logits(theirs)
    assert float((logits(ours) - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_computes_what_its_decoded_weights_do(
    family: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    made = make(family)
    wanted = logits(with_decoded_weights(family, made.out))
    model = AutoModelForCausalLM.from_pretrained(made.out)
    found = logits(model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with decoded(model):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), found)
    torch.testing.assert_close(logits(model.dequantize()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiered_nightly(["mixtral", "gpt_oss"], "mixtral".__eq__))
def test_a_fresh_process_loads_it(family: str, make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make(family)
    torch.save(ids(), tmp_path / "ids")
    program = (
        "import torch, llmcompress; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(made.out)!r})\n"
        f"ids = torch.load({str(tmp_path / 'ids')!r})\n"
        f"with torch.no_grad(): torch.save(model(input_ids=ids).logits, {str(tmp_path / 'logits')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    wanted = logits(with_decoded_weights(family, made.out))
    torch.testing.assert_close(torch.load(tmp_path / "logits"), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_export_has_the_names_of_the_original_and_the_decoded_values(
    family: str, make: Callable[[str], Made], tmp_path: Path
) -> None:
    made = make(family)
    lc.export(made.out, tmp_path / "plain", "dense")
    before, after = load_file(made.dense / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS)
    assert {name: value.shape for name, value in before.items()} == {name: t.shape for name, t in after.items()}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, output_loading_info=True
    )
    model, found = loaded
    assert not found["missing_keys"] and not found["unexpected_keys"]
    wanted = with_decoded_weights(family, made.out)
    names = {row.name for row in lc.read(made.out).layers}
    pieces, decoded_pieces = expert_slices(family, model), expert_slices(family, wanted)
    for name in (f"{name}.weight" for name in names):
        here = pieces[name] if name in pieces else model.get_parameter(name)
        there = decoded_pieces[name] if name in decoded_pieces else wanted.get_parameter(name)
        assert torch.equal(here, there.bfloat16().float()), name


@pytest.mark.parametrize("to", [door for door in FORMATS if door not in ("dense", "gguf", "compressed-tensors")])
def test_other_exports_refuse(to: str, make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make("mixtral")
    with pytest.raises(InputError, match=rf"is a mixture of experts \(.*\), which cannot go to {to} yet; ") as caught:
        lc.export(made.out, tmp_path / "other", to, allow_dense=to != "peft")
    assert "\n" not in str(caught.value) and not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_target_gives_every_expert_a_price(family: str, make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make(family)
    options = [[{"method": "rtn", "bits": bits, "group_size": 16}] for bits in (2, 4, 8)]
    asked = recipe(made.text) | {"rules": [], "target": {"bpw": 5.0}, "options": options}
    report = lc.compress(made.dense, asked, tmp_path / "out").report
    assert 0.98 * 5.0 <= report.bpw <= 5.0
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / ALLOCATION).read_text())["matrices"]}
    wanted = matrices(family)
    assert wanted <= rows.keys()
    assert all(len(rows[name]["offers"]) == len(options) for name in wanted)
    assert len({rows[name]["chosen"] for name in wanted}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_distillation_trains_scales_of_experts(family: str, make: Callable[[str], Made], tmp_path: Path) -> None:
    made = make(family)
    data = {"dataset": str(made.text), "samples": 28, "length": 48, "held_out": 4}
    taught = {"version": 1, "data": data, "rates": {"scales": 5e-3}, "steps": 6, "batch": 4, "compute": "float32"}
    done = lc.distill(made.out, made.dense, taught, tmp_path / "taught")
    assert done.history[-1]["kl"] < done.history[0]["kl"]
    before, after = (
        compressed_linears(AutoModelForCausalLM.from_pretrained(folder)) for folder in (made.out, tmp_path / "taught")
    )
    for name in matrices(family):
        old, new = dense(before[name].expression()), dense(after[name].expression())
        assert not torch.equal(old, new), name
        assert torch.equal(old == 0, new == 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_lora_trains_on_attention(family: str, make: Callable[[str], Made]) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(make(family).out)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    learn = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert len(learn) == 2 * 2 * 2 and all("self_attn" in name and "lora" in name for name in learn)
    optimizer, losses = torch.optim.Adam(learn.values(), 1e-2), []
    for _ in range(8):
        loss = adapted(input_ids=ids(), labels=ids()).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.02
