"""Experts merged: copies become one without a loss, and averages are those of matched neurons."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch

import llmcompress as lc
from llmcompress.errors import InputError, RecipeError
from llmcompress.surgery.experts.merge import cluster_experts
from tests.surgery.experts.checkpoints import load_complete, logits
from tests.tiers import tiered
from tests.tiny import save_tiny
from tests.zoo import COUNT, MIXTURES, save_zoo, text_for_calibration

FAMILIES = tiered(MIXTURES, {"mixtral", "gpt_oss"}.__contains__)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_merge_of_a_copy_with_permuted_neurons_is_exact(family: str, tmp_path: Path) -> None:
    """Whichever of the two a token is given: its router row is a copy too, so the one that is left takes its place."""
    save_zoo(family, tmp_path / "dense", num_experts_per_tok=1, norm_topk_prob=True)
    model = load_complete(tmp_path / "dense")
    for block in model.model.layers:
        if hasattr(block.mlp, "experts"):
            gates, down = block.mlp.experts.gate_up_proj.data, block.mlp.experts.down_proj.data
            order = torch.randperm(down.shape[2], generator=torch.Generator().manual_seed(3))
            gates[2] = gates[1][torch.cat([order, order + len(order)])]
            down[2] = down[1][:, order]
            block.mlp.gate.weight.data[2] = block.mlp.gate.weight.data[1]
    model.save_pretrained(tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.merge_experts(tmp_path / "dense", tmp_path / "out", keep=COUNT - 1, text=text, samples=4)
    for block in report.blocks:
        assert [row.number for row in block.experts if row.fate == "merged"] == [1, 2] and block.damage < 1e-9
    torch.testing.assert_close(logits(load_complete(tmp_path / "out")), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_mixtures_load_with_fewer_experts(family: str, tmp_path: Path) -> None:
    save_zoo(family, tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.merge_experts(tmp_path / "dense", tmp_path / "out", keep=3, text=text, samples=4)
    assert logits(load_complete(tmp_path / "out")).isfinite().all()
    for block in report.blocks:
        assert {row.becomes for row in block.experts} == {0, 1, 2}
        assert len([row for row in block.experts if row.fate == "merged"]) == 2


def test_experts_between_projections_are_merged(tmp_path: Path) -> None:
    save_zoo("nemotron_h", tmp_path / "dense", moe_latent_size=24)
    text = str(text_for_calibration(tmp_path))
    report = lc.merge_experts(tmp_path / "dense", tmp_path / "out", keep=3, text=text, samples=4)
    assert report.blocks and logits(load_complete(tmp_path / "out")).isfinite().all()


@torch.no_grad()
def test_merged_expert_averages_the_best_matched_neurons(tmp_path: Path) -> None:
    """Of experts with five neurons, by trying every order; the router row is that of the most used one."""
    save_zoo("qwen3_moe", tmp_path / "dense", moe_intermediate_size=5)
    text = str(text_for_calibration(tmp_path))
    report = lc.merge_experts(tmp_path / "dense", tmp_path / "out", keep=3, text=text, samples=4)
    dense, out = load_complete(tmp_path / "dense"), load_complete(tmp_path / "out")
    for block in report.blocks:
        old, new = dense.model.layers[block.block].mlp, out.model.layers[block.block].mlp
        pair = sorted((row for row in block.experts if row.fate == "merged"), key=lambda row: -row.tokens)
        first, other = (row.number for row in pair)
        gates, downs = old.experts.gate_up_proj, old.experts.down_proj
        split = {one: torch.cat([*gates[one].chunk(2), downs[one].T], 1) for one in (first, other)}
        best = max(permutations(range(5)), key=lambda order: float((split[first] * split[other][list(order)]).sum()))
        share = pair[0].tokens / (pair[0].tokens + pair[1].tokens)
        wanted = share * split[first] + (1 - share) * split[other][list(best)]
        place = pair[0].becomes
        found = torch.cat([*new.experts.gate_up_proj[place].chunk(2), new.experts.down_proj[place].T], 1)
        torch.testing.assert_close(found, wanted)
        assert torch.equal(new.gate.weight[place], old.gate.weight[first])


def test_cluster_experts_equals_stepwise_average_linkage() -> None:
    features = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(features, features)
    for keep in range(1, 9):
        slow = [{number} for number in range(9)]
        while len(slow) > keep:
            pairs = [(a, b) for a in range(len(slow)) for b in range(a)]
            a, b = min(pairs, key=lambda pair: float(distances[list(slow[pair[0]])][:, list(slow[pair[1]])].mean()))
            slow[b] |= slow.pop(a)
        found = cluster_experts(features, torch.arange(9), keep, 1)
        assert {frozenset(each) for each in found} == {frozenset(each) for each in slow}
        assert all(each[0] == max(each) for each in found)  # which has the most tokens


def test_cluster_experts_stays_within_router_groups() -> None:
    features = torch.tensor([0.0, 9.0, 20.0, 40.0, 0.0, 9.0, 20.0, 40.0], dtype=torch.float64)[:, None]
    found = cluster_experts(features, torch.ones(8), 4, 2)
    assert found == ((0, 1, 2), (3,), (4, 5, 6), (7,))


def test_merge_refuses_impossible_numbers_and_other_models(tmp_path: Path) -> None:
    save_zoo("mixtral", tmp_path / "dense")
    with pytest.raises(RecipeError, match="each token of .* goes to 2 experts, so 1 are too few"):
        lc.merge_experts(tmp_path / "dense", keep=1)
    with pytest.raises(InputError, match="is no mixture of experts"):
        lc.merge_experts(save_tiny("llama", tmp_path / "llama"), keep=3)
