"""Experts pruned: what stays is, bit for bit, what a hand cuts out of transformers' parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.models.files.file_names import EXPERTS
from llmcompress.surgery.edited_model import NewTensor, writing_model
from llmcompress.surgery.experts.job import ExpertsReport, open_job
from llmcompress.surgery.experts.mixture import open_mixture
from llmcompress.surgery.experts.prune import plan_fewer_experts
from tests.compression.test_towers import saved
from tests.models.test_experts import DAMAGES
from tests.surgery.experts.checkpoints import load_complete, logits, random_ids
from tests.tiers import tiered, tiered_nightly
from tests.tiny import save_tiny
from tests.zoo import COUNT, MIXTURES, save_zoo, text_for_calibration

FAMILIES = tiered(MIXTURES, {"mixtral", "deepseek_v3"}.__contains__)
KEEP = 3
GEMMA = {"enable_moe_block": True, "num_experts": COUNT, "top_k_experts": 2, "moe_intermediate_size": 32}
GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}


def kept_experts(report: ExpertsReport) -> dict[str, list[int]]:
    """Return the numbers of the experts that stay, by the path of their list."""
    return {block.path: [row.number for row in block.experts if row.fate == "kept"] for block in report.blocks}


def cut_by_hand(dense: PreTrainedModel, small: PreTrainedModel, stay: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return the parameters that the small model must have: of the dense ones, the entries of the experts that stay."""
    found = {}
    for name, value in dense.state_dict().items():
        wanted = small.state_dict()[name].shape
        path = next((path for path in stay if name.startswith(f"{path.rpartition('.')[0]}.")), "")
        for axis in [axis for axis, size in enumerate(value.shape) if size != wanted[axis]]:
            value = value.index_select(axis, torch.tensor(stay[path]))
        found[name] = value
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "gemma4_text"])
def test_pruned_checkpoint_equals_a_manual_selection(family: str, tmp_path: Path) -> None:
    save_zoo(family, tmp_path / "dense", **(GEMMA if family == "gemma4_text" else {}))
    text = str(text_for_calibration(tmp_path))
    report = lc.prune_experts(tmp_path / "dense", tmp_path / "out", keep=KEEP, text=text, samples=4)
    small = load_complete(tmp_path / "out")
    stay = kept_experts(report)
    assert stay and all(len(numbers) == KEEP for numbers in stay.values())
    by_hand = cut_by_hand(load_complete(tmp_path / "dense"), small, stay)
    assert by_hand.keys() == small.state_dict().keys()
    assert all(torch.equal(value, by_hand[name]) for name, value in small.state_dict().items())
    assert logits(small).isfinite().all()
    assert KEEP in vars(small.config).values() and COUNT not in [vars(small.config).get(key) for key in COUNTS]
    before, after = (set(load_file(tmp_path / place / "model.safetensors")) for place in ("dense", "out"))
    assert after <= before  # names as on the Hub
    written = json.loads((tmp_path / "out" / EXPERTS).read_text())
    assert written == report.to_json() | {"output": None} | {"warnings": list(report.warnings)} | {
        "blocks": json.loads(json.dumps(report.to_json()["blocks"]))
    }


COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@pytest.mark.parametrize(
    "family", tiered_nightly(["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"], lambda family: family == "mixtral")
)
def test_pruned_checkpoint_loads_without_llmcompress(family: str, tmp_path: Path) -> None:
    save_zoo(family, tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.prune_experts(tmp_path / "dense", tmp_path / "out", keep=0.75, text=text, samples=4)
    dense, config = load_complete(tmp_path / "dense"), AutoConfig.from_pretrained(tmp_path / "out")
    by_hand: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    by_hand.load_state_dict(cut_by_hand(dense, by_hand, kept_experts(report)))
    torch.save(random_ids(), tmp_path / "ids")
    program = (
        "import sys, torch, transformers as t\n"
        f"model = t.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, dtype=torch.float32)\n"
        f"with torch.no_grad(): found = model(input_ids=torch.load({str(tmp_path / 'ids')!r})).logits\n"
        f"torch.save(found, {str(tmp_path / 'logits')!r})\n"
        "assert not [name for name in sys.modules if name.startswith('llmcompress.models.dense.model')]\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits"), logits(by_hand))


def chosen_by(model: PreTrainedModel, tokens: Tensor, layers: dict[int, str]) -> dict[str, set[int]]:
    """The experts that routers choose for any of the tokens, by the path of a block's, in transformers' own forward."""
    found: dict[str, set[int]] = {path: set() for path in layers.values()}

    def seen(path: str) -> Callable[..., None]:
        return lambda _module, args: found[path].update(args[1].flatten().tolist())

    handles = [model.get_submodule(path).register_forward_pre_hook(seen(path)) for path in found]
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    "family, more",
    [
        ("mixtral", {"num_local_experts": 8}),
        ("qwen3_moe", {"num_experts": 8, "norm_topk_prob": True}),
        ("deepseek_v3", GROUPED | {"n_group": 1}),
        ("deepseek_v3", GROUPED),
    ],
    ids=["mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v3 in groups"],
)
def test_removing_unused_experts_changes_no_logits(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Routers that normalise the weights of the chosen do not notice its absence."""
    save_zoo(family, tmp_path / "dense", **more)
    mixture, dense = open_mixture(tmp_path / "dense"), load_complete(tmp_path / "dense")
    tokens = random_ids(3)[:1]
    used = chosen_by(dense, tokens, mixture.layers)
    plan, new = plan_fewer_experts(mixture, 6), dict[str, NewTensor]()
    for path, numbers in used.items():
        halves = [range(4), range(4, 8)]
        stay = {number for half in halves for number in sorted(half, key=lambda one: one not in numbers)[:3]}
        assert numbers <= stay and len(numbers) < 8
        new |= plan.new_tensors(path, tuple(sorted(stay)))
    with writing_model(plan.change.complete(new), plan.change.skeleton, tmp_path / "out") as files:
        files.finish()
    assert load_complete(tmp_path / "out").config.num_experts_per_tok == dense.config.num_experts_per_tok
    torch.testing.assert_close(
        logits(load_complete(tmp_path / "out"), tokens), logits(dense, tokens), rtol=1e-5, atol=1e-5
    )


# --- scores -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_one_token(model: Any, tokens: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mean router weight and REAP's score of each expert, from one token and one expert at a time, float64."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _module, args: calls.append(args))
    for sequence in tokens:
        model(input_ids=sequence[None])
    handle.remove()
    counts, weights, norms = (torch.zeros(len(module.gate_up_proj), dtype=torch.float64) for _ in range(3))
    for x, index, weight in calls:
        for token in range(len(x)):
            for expert, share in zip(index[token].tolist(), weight[token].double().tolist(), strict=True):
                gate, up = (module.gate_up_proj[expert].double() @ x[token].double()).chunk(2)
                output = module.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up)
                counts[expert] += 1
                weights[expert] += share
                norms[expert] += share * output.norm()
    return counts, weights / counts.clamp_min(1), norms / counts.clamp_min(1)


@pytest.mark.parametrize("family", tiered(["qwen3_moe", "deepseek_v3"], "deepseek_v3".__eq__))
def test_expert_scores_equal_those_of_single_tokens(family: str, tmp_path: Path) -> None:
    save_zoo(family, tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.prune_experts(tmp_path / "dense", keep=KEEP, text=text, samples=3)
    tokens = open_job(tmp_path / "dense", None, text, 3, None, "cpu", None).tokens
    assert tokens.held_out == 1
    model = load_complete(tmp_path / "dense")
    for block in report.blocks:
        counts, weights, scores = by_one_token(model, tokens.sequences[:-1], block.path)
        assert [row.tokens for row in block.experts] == counts.tolist()
        for row, weight, score in zip(block.experts, weights.tolist(), scores.tolist(), strict=True):
            assert row.router_weight == pytest.approx(weight, rel=1e-4) and row.score == pytest.approx(score, rel=1e-4)
        best = sorted(range(COUNT), key=lambda number: -scores[number])[:KEEP]
        assert kept_experts(report)[block.path] == sorted(best)
        often = lc.prune_experts(tmp_path / "dense", keep=KEEP, text=text, samples=3, by="frequency")
        most = sorted(range(COUNT), key=lambda number: -counts[number])[:KEEP]
        assert kept_experts(often)[block.path] == sorted(most)


@torch.no_grad()
def test_predicted_damage_is_that_of_the_written_block(tmp_path: Path) -> None:
    """Of the first one, which no other change reaches."""
    save_zoo("qwen3_moe", tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.prune_experts(tmp_path / "dense", tmp_path / "out", keep=2, text=text, samples=10)
    tokens = open_job(tmp_path / "dense", None, text, 10, None, "cpu", None).tokens.sequences[-2:]
    states = []
    for place in ("dense", "out"):
        states.append(
            load_complete(tmp_path / place)(input_ids=tokens, output_hidden_states=True).hidden_states[1].double()
        )
    shares = (states[1] - states[0]).square().sum(-1) / states[0].square().sum(-1)
    assert report.blocks[0].damage == pytest.approx(float(shares.mean()), rel=1e-4)


@pytest.mark.slow
def test_random_scores_repeat_with_the_seed(tmp_path: Path) -> None:
    save_zoo("olmoe", tmp_path / "dense", num_experts=8)
    text = str(text_for_calibration(tmp_path))
    found = [
        kept_experts(lc.prune_experts(tmp_path / "dense", keep=4, text=text, samples=2, by="random", seed=seed))
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


# --- forms of storage -------------------------------------------------------------------------------------------------


def test_each_router_group_keeps_as_many_experts(tmp_path: Path) -> None:
    save_zoo("deepseek_v3", tmp_path / "dense", **GROUPED)
    text = str(text_for_calibration(tmp_path))
    report = lc.prune_experts(tmp_path / "dense", tmp_path / "out", keep=4, text=text, samples=2)
    for numbers in kept_experts(report).values():
        assert len([number for number in numbers if number < 4]) == 2 and len(numbers) == 4
    assert (
        load_complete(tmp_path / "out").config.n_group == 2 and logits(load_complete(tmp_path / "out")).isfinite().all()
    )


def test_pruned_tensors_keep_their_dtype(tmp_path: Path) -> None:
    save_zoo("qwen3_moe", tmp_path / "dense")
    load_complete(tmp_path / "dense").bfloat16().save_pretrained(tmp_path / "dense")
    text = str(text_for_calibration(tmp_path))
    report = lc.prune_experts(tmp_path / "dense", tmp_path / "out", keep=KEEP, text=text, samples=2)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert report.bytes_after == sum(2 * value.numel() for value in tensors.values())


@pytest.mark.slow
def test_the_tower_of_a_model_with_images_is_pruned(tmp_path: Path) -> None:
    dense = saved("qwen3_vl_moe", tmp_path / "dense")
    report = lc.prune_experts(tmp_path / "dense", tmp_path / "out", keep=3, text="builtin", samples=2)
    small = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(small) is type(dense)
    by_hand = cut_by_hand(dense, small, kept_experts(report))
    assert all(torch.equal(value, by_hand[name]) for name, value in small.state_dict().items())


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, sentence",
    [
        ({"keep": 4}, "keep is 4, where a block has 4 experts; give a share below 1, or a whole number from 1 to 3"),
        ({"keep": 9}, "keep is 9, where a block has 4 experts"),
        ({"keep": 0}, "keep is 0, where a block has 4 experts"),
        ({"keep": 2.5}, r"keep is 2\.5, where a block has 4 experts"),
        ({"keep": 1}, "each token of .* goes to 2 experts, so 1 are too few; keep at least 2"),
        ({"keep": 3, "by": "luck"}, "by is 'luck'; choose one of reap, frequency, random"),
        ({"keep": 3, "samples": 1}, "1 samples of text leave none to judge on; ask for at least 2"),
    ],
)
def test_prune_refuses_impossible_numbers(asked: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    save_zoo("mixtral", tmp_path / "dense")
    with pytest.raises(RecipeError, match=sentence):
        lc.prune_experts(tmp_path / "dense", tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [5, 2])
def test_prune_refuses_unequal_or_too_small_groups(keep: int, tmp_path: Path) -> None:
    save_zoo("deepseek_v3", tmp_path / "dense", **GROUPED)
    with pytest.raises(RecipeError, match="choose 1 of 2 groups .* keep a multiple of 2, at least 4"):
        lc.prune_experts(tmp_path / "dense", keep=keep)


@pytest.mark.parametrize(
    "damage", ["fewer experts announced", "more experts announced", "an expert of another width", "no router"]
)
def test_prune_refuses_damaged_mixtures(damage: str, tmp_path: Path) -> None:
    folder = save_zoo("mixtral", tmp_path / "model")
    change, sentence = DAMAGES[damage]
    change(folder)
    with pytest.raises(InputError, match=sentence):
        lc.prune_experts(folder, tmp_path / "out", keep=3)


def test_prune_refuses_models_without_experts_and_full_folders(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama")
    with pytest.raises(InputError, match=r"is no mixture of experts \(model type 'llama'\).*; choose a mixture"):
        lc.prune_experts(tmp_path / "llama", keep=3)
    save_zoo("mixtral", tmp_path / "mixtral")
    with pytest.raises(DiskError, match="exists already"):
        lc.prune_experts(tmp_path / "mixtral", tmp_path / "llama", keep=3)
