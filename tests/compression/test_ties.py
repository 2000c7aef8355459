"""Blocks that have their matrices in common: what is stored, that it loads, trains, resumes and leaves again dense."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

import llmcompress as lc
from llmcompress.compression import run as compression_run
from llmcompress.compression.job import prepare
from llmcompress.compression.plan import plan_of
from llmcompress.compression.ties import common_matrices, groups_of
from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.read import read_recipe
from llmcompress.recipe.sections import Tie
from llmcompress.weight.modules import TiedMatrix, compressed_linears, multiplying, ties_of
from tests.tiers import tiered, tiered_nightly
from tests.tiny import save_tiny, tiny

TEXT = "Forty farms bring their corn to the mill by the river, and the miller counts every sack of it. "
FULL = {"method": "svd", "rank": 16, "factor_bits": 16}
IDS = torch.arange(24).reshape(2, 12) + 40


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of four blocks and a text."""
    folder = tmp_path_factory.mktemp("ties")
    save_tiny("llama", folder / "dense", num_hidden_layers=4, dtype="float32")
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    return folder


def recipe(place: Path, text: bool = False, rules: Any = None, **tie: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"version": 1, "name": "tied", "gates": {"kl": None, "perplexity_ratio": None}}
    if text:
        asked["calibration"] = {"dataset": str(place / "text.txt"), "samples": 4, "length": 32, "held_out": 1}
    if rules is not None:
        asked["rules"] = rules
    return asked | {"tie": {"blocks": 2, **tie}}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def weights(model: Any, name: str) -> torch.Tensor:
    found: torch.Tensor = model.get_submodule(name).weight.detach()
    return found


@pytest.mark.parametrize(
    ("tie", "wanted"),
    [
        (Tie(blocks=3), ((0, 1, 2), (3, 4), (5, 6))),
        (Tie(blocks=3, pattern="loop"), ((0, 3, 6), (1, 4), (2, 5))),
        (Tie(blocks=7), ((0,), (1,), (2,), (3,), (4,), (5,), (6,))),
        (Tie(blocks=1), ((0, 1, 2, 3, 4, 5, 6),)),
    ],
)
def test_groups(tie: Tie, wanted: tuple[tuple[int, ...], ...]) -> None:
    assert groups_of(tie, 7) == wanted


@pytest.mark.parametrize("start", tiered(["average", "first", "stepwise"], "stepwise".__eq__))
@pytest.mark.parametrize("pattern", ["neighbours", "loop"])
def test_terms_of_full_rank_give_the_dense_model(place: Path, tmp_path: Path, start: str, pattern: str) -> None:
    asked = recipe(place, start=start, pattern=pattern, term=dict(FULL, rank=32))
    with pytest.raises(RecipeError, match=r"rank 32 is larger than the matrix \[16, 32\]"):
        plan_of(prepare(resolve(place / "dense"), read_recipe(asked)))
    dense = loaded(place / "dense")
    for name, module in dense.named_modules():  # full for k and v, of sixteen rows; the others are made as thin
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers"):
            u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            module.weight.data = (u[:, :8] * s[:8]) @ v[:8]
    dense.save_pretrained(tmp_path / "thin")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "thin" / name).write_bytes((place / "dense" / name).read_bytes())
    # the mean and what is left of it have at most twice the rank
    lc.compress(tmp_path / "thin", recipe(place, start=start, pattern=pattern, term=FULL), tmp_path / "out")
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(dense), rtol=0.02, atol=0.02)


def test_what_is_in_common_is_stored_and_held_once(place: Path, tmp_path: Path) -> None:
    done = lc.compress(place / "dense", recipe(place, start="first"), tmp_path / "out")
    model, dense = loaded(tmp_path / "out"), loaded(place / "dense")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for block in range(4):
        own = stored[f"model.layers.{block}.mlp.up_proj.weight"]
        assert own.numel() == 0, "nothing of its own"
        common = stored[f"model.tied.{block // 2}_mlp_up_proj.weight"].view(torch.bfloat16).reshape(48, 32)
        assert torch.equal(common, weights(dense, f"model.layers.{block // 2 * 2}.mlp.up_proj").bfloat16())
        assert stored[f"model.layers.{block}.input_layernorm.weight"].numel() == 32, "norms are each block's own"
    assert sum(isinstance(module, TiedMatrix) for module in model.modules()) == 14
    pair = [model.get_submodule(f"model.layers.{block}.mlp.up_proj") for block in (0, 1)]
    assert pair[0].base is pair[1].base
    assert done.report.bpw == 8.0, "sixteen bits for two blocks"
    assert done.report.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert sum(parameter.numel() for parameter in dense.parameters()) == model.num_parameters()


def test_the_average_and_its_blocks(place: Path, tmp_path: Path) -> None:
    lc.compress(place / "dense", recipe(place, pattern="loop"), tmp_path / "out")
    dense, found = loaded(place / "dense"), loaded(tmp_path / "out").dequantize()
    for block in range(4):
        pair = [weights(dense, f"model.layers.{n}.self_attn.q_proj") for n in (block % 2, block % 2 + 2)]
        assert torch.equal(weights(found, f"model.layers.{block}.self_attn.q_proj"), (sum(pair) / 2).bfloat16().float())
    assert not any(isinstance(module, TiedMatrix) for module in found.modules())


def test_stepwise_takes_blocks_from_the_first_to_the_last(place: Path, tmp_path: Path) -> None:
    lc.compress(place / "dense", recipe(place, pattern="loop", start="stepwise"), tmp_path / "out")
    dense, found = loaded(place / "dense"), loaded(tmp_path / "out").dequantize()
    for block in range(4):
        wanted = weights(dense, f"model.layers.{3 * (block % 2)}.mlp.down_proj").bfloat16().float()
        assert torch.equal(weights(found, f"model.layers.{block}.mlp.down_proj"), wanted)


RULES = [{"match": "*", "steps": [{"method": "rotate"}, {"method": "gptq", "bits": 3}]}]
TERM = {"method": "eora", "rank": 4, "factor_bits": 4}


@pytest.fixture(scope="module")
def quantized(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of blocks with three bits in common, and four-bit terms of their own."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    lc.compress(place / "dense", recipe(place, True, RULES, term=TERM), out)
    return out


def test_a_plan_is_what_is_stored(place: Path, quantized: Path) -> None:
    asked = read_recipe(recipe(place, True, RULES, term=TERM))
    planned, report = plan_of(prepare(resolve(place / "dense"), asked)), lc.read(quantized)
    assert planned.bpw == report.bpw
    assert {row.name: row.bpw for row in planned.layers} == {row.name: row.bpw for row in report.layers}
    assert [row.description for row in planned.layers] == [row.stored for row in report.layers]
    first, second = (row for row in report.layers if row.name.endswith(("0.mlp.up_proj", "1.mlp.up_proj")))
    assert first.bpw > 3 and second.bpw < 3 and second.stored.startswith("tied + rank 4")
    assert 0 < first.error < 1 and 0 < second.error < 1 and second.error_heldout is not None


def test_a_term_of_its_own_is_worth_something(place: Path, quantized: Path, tmp_path: Path) -> None:
    lc.compress(place / "dense", recipe(place, True, RULES), tmp_path / "plain")
    with_term, without = (
        {row.name: row.error for row in lc.read(folder).layers} for folder in (quantized, tmp_path / "plain")
    )
    assert all(with_term[name] < without[name] for name in with_term)


def test_it_saves_and_loads_as_it_is(quantized: Path, tmp_path: Path) -> None:
    model = loaded(quantized)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (quantized, tmp_path / "again")]
    assert abs(sizes[0] - sizes[1]) < 1000
    body = AutoModel.from_pretrained(quantized, dtype=torch.float32)
    with torch.no_grad():
        wanted = model.model(input_ids=IDS).last_hidden_state
        assert torch.equal(body(input_ids=IDS).last_hidden_state, wanted)
    with torch.no_grad(), lc.decoded(model):
        torch.testing.assert_close(model(input_ids=IDS).logits, logits(loaded(quantized)), rtol=1e-3, atol=1e-3)


def test_it_leaves_as_a_dense_checkpoint(quantized: Path, tmp_path: Path) -> None:
    lc.export(quantized, tmp_path / "dense", "dense")
    found, wanted = loaded(tmp_path / "dense"), loaded(quantized).dequantize()
    assert not multiplying(found)
    torch.testing.assert_close(logits(found), logits(wanted), rtol=0.05, atol=0.05)


def test_adapters_of_peft_take_the_linears(quantized: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = loaded(quantized)
    wanted = logits(model)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert not any(".tied." in name for name, _ in adapted.named_parameters() if "lora_" in name)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data += 0.01
    with torch.no_grad():
        moved = adapted(input_ids=IDS).logits
        folded = lc.fold(adapted)(input_ids=IDS).logits
    assert not torch.allclose(moved, wanted)
    torch.testing.assert_close(folded, moved, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_what_is_in_common_trains_once(place: Path, quantized: Path, tmp_path: Path) -> None:
    data = {"dataset": str(place / "text.txt"), "samples": 12, "length": 32, "held_out": 4}
    asked = {"data": data, "batch": 4, "steps": 8, "evaluate_every": 8, "compute": "float32"}
    asked |= {"rates": {"scales": 2e-3, "factors": 2e-3, "norms": 1e-3}}
    done = lc.distill(quantized, place / "dense", {"version": 1, "seed": 5, **asked}, tmp_path / "out")
    assert done.history[-1]["kl"] < done.history[0]["kl"]
    before, after = loaded(quantized), loaded(tmp_path / "out")
    assert ties_of(before) == ties_of(after)
    moved = [
        not torch.equal(old.payload()["inner_scale"], multiplying(after)[name].payload()["inner_scale"])
        for name, old in multiplying(before).items()
        if isinstance(old, TiedMatrix)
    ]
    assert all(moved)
    reports = [lc.read(folder) for folder in (quantized, tmp_path / "out")]
    assert [(row.bpw, row.stored) for row in reports[0].layers] == [(row.bpw, row.stored) for row in reports[1].layers]
    assert done.history[-1]["kl"] == pytest.approx(held_out_kl(place, tmp_path / "out", done), rel=1e-3)


def held_out_kl(place: Path, folder: Path, done: Any) -> float:
    """Return the KL that a second, idle distillation measures at its start."""
    data = {"dataset": str(place / "text.txt"), "samples": 12, "length": 32, "held_out": 4}
    asked = {"version": 1, "seed": 5, "data": data, "batch": 4, "steps": 1, "compute": "float32"}
    again = lc.distill(folder, place / "dense", asked | {"rates": {"norms": 1e-9}}, folder.with_name("idle"))
    return float(again.history[0]["kl"])


def test_the_gradient_is_the_sum_over_the_depths() -> None:
    from llmcompress.weight.modules import CompressedLinear, add_module, tie
    from llmcompress.weight.nodes import Dense, Zero
    from llmcompress.weight.trainable.relax import Relaxation, relaxed_module

    torch.manual_seed(0)
    value = torch.randn(8, 8)
    model = torch.nn.Module()
    add_module(model, "tied.one", TiedMatrix.of(Dense(value)))
    for name in "ab":
        add_module(model, f"blocks.{name}", CompressedLinear.of(Zero((8, 8))))
    tie(model, {"blocks.a": "tied.one", "blocks.b": "tied.one"})
    trained: Any = relaxed_module(multiplying(model)["tied.one"], Relaxation(frozenset({"values"})))
    model.get_submodule("tied").add_module("one", trained)
    tie(model, {"blocks.a": "tied.one", "blocks.b": "tied.one"})
    x = torch.randn(5, 8)
    model.get_submodule("blocks.b")(model.get_submodule("blocks.a")(x)).square().sum().backward()
    both = [value.clone().requires_grad_() for _ in range(2)]
    (x @ both[0].T @ both[1].T).square().sum().backward()
    [found] = [parameter.grad for parameter in trained.parameters()]
    torch.testing.assert_close(found.reshape(8, 8), both[0].grad + both[1].grad)


@pytest.mark.parametrize("text", tiered_nightly([True, False], bool))
def test_a_cut_run_resumes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bool) -> None:
    rules = RULES if text else [{"match": "*", "steps": [{"method": "rtn", "bits": 3}]}]
    term = TERM if text else {"method": "svd", "rank": 4}
    asked = recipe(place, text, rules, term=term, pattern="loop")
    whole = lc.compress(place / "dense", asked, tmp_path / "whole")
    find, count = compression_run.compress_block, 0

    def cut(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return find(*arguments)

    monkeypatch.setattr(compression_run, "compress_block", cut)
    with pytest.raises(KeyboardInterrupt):
        lc.compress(place / "dense", asked, tmp_path / "cut")
    monkeypatch.setattr(compression_run, "compress_block", find)
    again = lc.compress(place / "dense", asked, tmp_path / "cut")
    assert any("3 of 4 blocks" in warning for warning in again.report.warnings)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert whole.report.layers == again.report.layers


def test_a_run_that_ends_while_it_is_merged_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(place, True, RULES, term=TERM, pattern="loop")
    lc.compress(place / "dense", asked, tmp_path / "whole")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DiskError):
        patch.setattr("llmcompress.models.files.checkpoint.seal", full)
        lc.compress(place / "dense", asked, tmp_path / "cut")
    lc.compress(place / "dense", asked, tmp_path / "cut")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_a_rule_without_steps_leaves_its_layers_alone(place: Path, tmp_path: Path) -> None:
    rules = [{"match": "*.down_proj", "steps": []}]
    done = lc.compress(place / "dense", recipe(place, rules=rules), tmp_path / "out")
    assert "model.layers.3.mlp.down_proj stays dense" in done.report.warnings
    assert len(done.report.layers) == 24
    assert "model.layers.0.mlp.down_proj" not in compressed_linears(loaded(tmp_path / "out"))


def test_transposed_linears_and_biases(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path / "dense", n_layer=4)
    asked = recipe(tmp_path, start="first", term={"method": "svd", "rank": 32, "factor_bits": 16})
    lc.compress(tmp_path / "dense", asked, tmp_path / "out")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(loaded(tmp_path / "dense")), rtol=0.02, atol=0.02
    )
    assert "transformer.tied.1_mlp_c_fc.weight" in loaded(tmp_path / "out").state_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie": {"blocks": 5}}, "the model has 4 blocks, so not 5 of them"),
        ({"tie": {"blocks": 2, "term": {"method": "rtn", "bits": 2}}}, "rtn adds no low-rank term"),
        ({"tie": {"blocks": 2, "term": {"method": "svd", "share": 0.1}}}, "give its rank"),
        ({"rules": [{"match": "*.1.mlp.*", "steps": [{"method": "rtn", "bits": 2}]}]}, "are one matrix"),
        ({"fuse": {"awq": True}}, "awq gives every block scales of its own"),
    ],
)
def test_bad_input(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare(resolve(place / "dense"), read_recipe(recipe(place, True) | changes))


def test_what_does_not_go_with_ties(place: Path) -> None:
    sections: tuple[dict[str, Any], ...] = ({"target": {"bpw": 2}}, {"reconstruct": {}})
    for section in sections:
        with pytest.raises(RecipeError, match="does not go with blocks that share matrices"):
            read_recipe(recipe(place, True) | section)


def test_blocks_that_differ(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=4)
    save_tiny("llama", tmp_path / "dense", num_hidden_layers=4)
    source = resolve(tmp_path / "dense")
    job = prepare(source, read_recipe(recipe(tmp_path)))
    assert model.config.num_hidden_layers == 4
    blocks = list(job.arch.blocks)
    [first, *rest] = blocks[1].groups
    blocks[1] = replace(blocks[1], groups=(tuple(replace(linear, shape=(8, 32)) for linear in first), *rest))
    with pytest.raises(RecipeError, match="puts like ones together"):
        common_matrices(Tie(blocks=2), replace(job.arch, blocks=tuple(blocks)), job.assignment.steps, ())


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ({"model.layers.0.mlp.up_proj": "model.tied.9"}, "which is no matrix of it"),
        ({"model.layers.0.mlp.up_proj": "model.tied.0_mlp_down_proj"}, "another size"),
        ({"model.layers.0.mlp.up_proj": 3}, "which is no matrix of it"),
        ([], "config.json"),
    ],
)
def test_a_damaged_map(quantized: Path, tmp_path: Path, ties: Any, message: str) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in quantized.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ties"] = ties
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        loaded(folder)
