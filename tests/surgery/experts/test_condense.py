"""Condensed blocks: one dense layer that computes the sum of its experts, each times its constant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmcompress as lc
from llmcompress.errors import InputError, RecipeError
from llmcompress.surgery.experts.condense import fit_weights
from llmcompress.surgery.experts.job import BlockFate, open_job
from tests.surgery.experts.checkpoints import load_complete, logits
from tests.tiers import tiered
from tests.zoo import COUNT, save_zoo, text_for_calibration

STORABLE = ("qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1")
FAMILIES = tiered(STORABLE, {"qwen3_moe", "deepseek_v3"}.__contains__)


class Constant(nn.Module):
    """The experts of a block with constant weights, in float64: the slow form of a condensed block."""

    def __init__(self, block: Any, fate: BlockFate) -> None:
        super().__init__()
        self.experts = block.experts
        self.weights = {row.number: row.weight for row in fate.experts if row.fate == "folded"}
        shared = [
            child for name, child in block.named_children() if name.startswith("shared_expert") and "gate" not in name
        ]
        self.shared = list(zip(shared, fate.shared_weights, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x, dtype=torch.float64)
        for number, weight in self.weights.items():
            gate, up = (x.double() @ self.experts.gate_up_proj[number].double().T).chunk(2, -1)
            assert weight is not None
            total += weight * (nn.functional.silu(gate) * up) @ self.experts.down_proj[number].double().T
        for module, weight in self.shared:
            gate, up = (x.double() @ linear.weight.double().T for linear in (module.gate_proj, module.up_proj))
            total += weight * (nn.functional.silu(gate) * up) @ module.down_proj.weight.double().T
        return total.to(x.dtype)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_condensed_layer_is_the_weighted_sum_of_experts(family: str, tmp_path: Path) -> None:
    save_zoo(family, tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.condense_experts(tmp_path / "dense", tmp_path / "out", count=1, experts=3, text=text, samples=4)
    dense, out = load_complete(tmp_path / "dense"), load_complete(tmp_path / "out")
    [fate] = [block for block in report.blocks if block.block in report.settings["blocks"]]
    assert len([row for row in fate.experts if row.fate == "folded"]) == 3
    layer, block = out.model.layers[fate.block].mlp, dense.model.layers[fate.block]
    assert not hasattr(layer, "experts")
    slow = Constant(block.mlp, fate)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x), slow(x), rtol=1e-5, atol=1e-6)
    block.mlp = slow
    torch.testing.assert_close(logits(out), logits(dense), rtol=1e-4, atol=1e-4)
    assert report.bytes_after == sum(4 * value.numel() for value in out.state_dict().values())


def test_condensed_blocks_are_dense_in_every_entry_of_the_config(tmp_path: Path) -> None:
    """DeepSeek-V3.2 has a number of dense blocks and a list of the kinds of all; the list counts."""
    more = {"num_key_value_heads": 4, "index_head_dim": 16, "index_n_heads": 2}
    save_zoo("deepseek_v3", tmp_path / "dense", model_type="deepseek_v32", num_hidden_layers=3, **more)
    text = str(text_for_calibration(tmp_path))
    lc.condense_experts(tmp_path / "dense", tmp_path / "out", count=1, text=text, samples=4)
    out = load_complete(tmp_path / "out")
    assert (out.config.first_k_dense_replace, out.config.mlp_layer_types) == (2, ["dense", "dense", "sparse"])
    assert [hasattr(layer.mlp, "experts") for layer in out.model.layers] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_condense_is_exact_for_uniform_routing(family: str, tmp_path: Path) -> None:
    """Routers that weigh all experts alike, which every token is given, leave nothing to lose."""
    save_zoo(family, tmp_path / "dense", num_experts_per_tok=COUNT)
    model = load_complete(tmp_path / "dense")
    for name, value in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            value.data.zero_()
    model.save_pretrained(tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.condense_experts(tmp_path / "dense", tmp_path / "out", count=1, text=text, samples=6)
    [fate] = [block for block in report.blocks if block.block in report.settings["blocks"]]
    assert fate.damage < 1e-9
    torch.testing.assert_close(logits(load_complete(tmp_path / "out")), logits(model), rtol=1e-3, atol=1e-4)


def test_fit_weights_equals_least_squares() -> None:
    outputs = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = torch.cat([outputs, target[None]])
    weights, error = fit_weights(together @ together.T, [0, 3, 4])
    slow = torch.linalg.lstsq(outputs[[0, 3, 4]].T, target[:, None]).solution[:, 0]
    torch.testing.assert_close(weights, slow)
    torch.testing.assert_close(error, (target - outputs[[0, 3, 4]].T @ slow).square().sum())


@torch.no_grad()
def test_condense_chooses_the_best_single_expert(tmp_path: Path) -> None:
    """By trying each on all tokens, in float64; and its weight is the best one."""
    save_zoo("qwen3_moe", tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.condense_experts(tmp_path / "dense", blocks=[0], experts=1, text=text, samples=4)
    tokens = open_job(tmp_path / "dense", None, text, 4, None, "cpu", None).tokens
    model = load_complete(tmp_path / "dense")
    block, seen = model.model.layers[0], []
    block.mlp.register_forward_hook(lambda _module, args, output: seen.append((args[0][0], output[0])))
    sizes = []
    for sequence in tokens.sequences[: -tokens.held_out]:
        sizes.append(model(input_ids=sequence[None], output_hidden_states=True).hidden_states[1][0].norm(dim=-1))
    size = torch.cat(sizes).double()[:, None]
    x, y = (torch.cat(parts).double() for parts in zip(*seen, strict=True))
    errors, weights = [], []
    for number in range(COUNT):
        gate, up = (x @ block.mlp.experts.gate_up_proj[number].double().T).chunk(2, -1)
        f = (nn.functional.silu(gate) * up) @ block.mlp.experts.down_proj[number].double().T
        weights.append(float((f * y / size**2).sum() / (f / size).square().sum()))
        errors.append(float(((y - weights[-1] * f) / size).square().sum()))
    best = min(range(COUNT), key=errors.__getitem__)
    [row] = [row for row in report.blocks[0].experts if row.fate == "folded"]
    assert row.number == best and row.weight == pytest.approx(weights[best], rel=1e-4)


def test_condense_count_takes_the_least_damaged_blocks(tmp_path: Path) -> None:
    save_zoo("qwen3_moe", tmp_path / "dense", num_hidden_layers=4)
    text = str(text_for_calibration(tmp_path))
    report = lc.condense_experts(tmp_path / "dense", tmp_path / "out", count=2, text=text, samples=4)
    harm = {block.block: block.considered for block in report.blocks}
    assert None not in harm.values()
    assert report.settings["blocks"] == sorted(sorted(harm, key=lambda one: harm[one] or 0.0)[:2])
    out = load_complete(tmp_path / "out")
    assert out.config.mlp_only_layers == report.settings["blocks"]
    for block in report.blocks:
        is_chosen = block.block in report.settings["blocks"]
        assert block.damage == (block.considered if is_chosen else 0.0)
        assert hasattr(out.model.layers[block.block].mlp, "experts") == (not is_chosen)


@torch.no_grad()
@pytest.mark.slow
def test_condense_widens_dense_blocks_without_a_change(tmp_path: Path) -> None:
    """They become as wide as the condensed ones, by neurons of zero; or these become as wide as they are."""
    text = str(text_for_calibration(tmp_path))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    for width, wide in ((48, 96), (200, 200)):
        place = tmp_path / str(width)
        more = {"num_hidden_layers": 3, "mlp_only_layers": [1], "intermediate_size": width}
        save_zoo("qwen3_moe", place / "dense", **more)
        lc.condense_experts(place / "dense", place / "out", blocks=[2], experts=3, text=text, samples=2)
        dense, out = load_complete(place / "dense"), load_complete(place / "out")
        assert out.config.mlp_only_layers == [1, 2] and out.config.intermediate_size == wide
        torch.testing.assert_close(out.model.layers[1].mlp(x), dense.model.layers[1].mlp(x))
        assert out.model.layers[2].mlp.up_proj.weight[96:].eq(0).all()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose first block has no experts."""
    folder = tmp_path_factory.mktemp("condense") / "dense"
    save_zoo("deepseek_v3", folder, num_hidden_layers=4)
    return folder


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss", "granitemoe"])
def test_condense_refuses_types_without_dense_blocks(family: str, tmp_path: Path) -> None:
    save_zoo(family, tmp_path / "dense")
    with pytest.raises(InputError, match=f"model type '{family}' cannot say .*; prune or replace its experts instead"):
        lc.condense_experts(tmp_path / "dense", tmp_path / "out", count=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "asked, sentence",
    [
        ({}, "exactly one of them"),
        ({"blocks": [1], "count": 1}, "exactly one of them"),
        ({"count": 4}, "4 of the 3 blocks with experts cannot be condensed"),
        ({"count": 0}, "0 of the 3 blocks"),
        ({"blocks": [0]}, "block 0 of .* has no experts; those with some are 1, 2, 3"),
        ({"blocks": []}, "block none of .* has no experts"),
        ({"blocks": [2]}, r"only the first blocks .* can be dense \(first_k_dense_replace\); condense 1 instead"),
        ({"count": 1, "experts": 5}, "experts is 5, where a block has 4; give a number from 1 to 4"),
    ],
)
def test_condense_refuses_impossible_blocks(asked: dict[str, Any], sentence: str, four_blocks: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        lc.condense_experts(four_blocks, **asked)
