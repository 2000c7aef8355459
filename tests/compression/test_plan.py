"""The cost of a plan: large models have many matrices, but of few shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import llmcompress as lc
from llmcompress.compression import plan
from llmcompress.compression.job import prepare
from llmcompress.compression.plan import plan_of
from llmcompress.errors import InputError
from llmcompress.methods.layer import sketch
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.read import read_recipe
from llmcompress.weight.expression import bits
from llmcompress.weight.nodes import shown_count
from tests.tiny import save_tiny, tiny, tiny_tokenizer
from tests.zoo import save_any, save_zoo

PRUNED = {"method": "magnitude", "sparsity": 0.5}
GRID = {"method": "rtn", "bits": 3, "group_size": 16}
RULES = [{"match": "*.1.mlp.*", "steps": [GRID]}, {"match": "*", "steps": [PRUNED]}]


def test_each_shape_is_sketched_once_for_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path, num_hidden_layers=5)
    asked = read_recipe({"version": 1, "name": "two", "rules": RULES})
    job = prepare(resolve(tmp_path), asked)
    linears = job.arch.linears()
    separate = {name: bits(sketch(name, linears[name].shape, steps)) for name, steps in job.steps.items()}
    sketched: list[str] = []

    def counted(name: str, *rest: object) -> object:
        sketched.append(name)
        return sketch(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(plan, "sketch", counted)
    assert {row.name: row.bits for row in plan_of(job).layers} == separate
    assert len(sketched) == len({(linears[name].shape, steps) for name, steps in job.steps.items()}) < len(separate)


@pytest.mark.parametrize("family, width", [("qwen3_moe", 64), ("deepseek_v3", 64), ("gpt2", 32)])
def test_each_token_takes_as_many_numbers_as_hidden_states_are_wide(family: str, width: int, tmp_path: Path) -> None:
    """Experts and latents of these are narrower."""
    source = resolve(save_any(family, tmp_path))
    asked = {"version": 1, "rules": RULES[1:], "gates": {"kl": None, "perplexity_ratio": None}}
    few, many = (
        plan_of(prepare(source, read_recipe(asked | {"calibration": {"samples": samples, "length": 512}})))
        for samples in (100, 1100)
    )
    assert many.peak_memory_bytes - few.peak_memory_bytes == 4 * width * 512_000


def test_processes_hold_their_share_of_the_hidden_states(tmp_path: Path) -> None:
    asked = {"version": 1, "rules": RULES[1:], "gates": {"kl": None, "perplexity_ratio": None}}
    text = {"samples": 1003, "length": 512, "held_out": 3}  # 250 to fit to and one held out for each of four
    job = prepare(resolve(save_tiny("llama", tmp_path)), read_recipe(asked | {"calibration": text}))
    width = job.source.config.hidden_size
    alone, shared = plan_of(job).peak_memory_bytes, plan_of(job, processes=4).peak_memory_bytes
    assert alone - shared == 4 * width * 512 * (1003 - 251)


@pytest.mark.parametrize("shown", [torch.arange(7) % 3 == 0, torch.arange(35).view(5, 7) % 4 == 0])
def test_stored_elements_are_counted_as_a_sum_counts_them(shown: Tensor) -> None:
    assert shown_count(shown, (5, 7)) == int(shown.expand(5, 7).sum())


def test_what_becomes_larger_is_told_by_plan_and_report(tmp_path: Path) -> None:
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    shares = {"*.q_proj": 0.0, "*.k_proj": 0.01, "*.v_proj": 0.5, "*.o_proj": 1 / 16}
    rules = [{"match": name, "steps": [PRUNED | {"sparsity": share}]} for name, share in shares.items()]
    asked = {"version": 1, "rules": [*rules, {"match": "*", "steps": [GRID]}]}
    zero = "self_attn.q_proj: sparsity 0 prunes nothing, and its mask takes a bit per weight: 17 for 16"
    few = "self_attn.k_proj: its 16.844 bits per weight are more than the 16 of the dense model"
    expected = {f"model.layers.{block}.{sentence}" for block in (0, 1) for sentence in (zero, few)}
    planned, report = lc.plan(tmp_path / "dense", asked), lc.compress(tmp_path / "dense", asked).report
    for warnings in (planned.warnings, report.warnings):
        assert {one for one in warnings if "sparsity" in one or "bits per weight" in one} == expected


def test_a_term_for_what_is_lost_before_anything_is_lost_is_told(tmp_path: Path) -> None:
    folder, turn, svd = save_tiny("llama", tmp_path), {"method": "rotate"}, {"method": "svd", "rank": 1}
    empty = {"*.q_proj": [svd, GRID], "*.k_proj": [turn, svd, GRID]}
    useful = {"*.v_proj": [turn, GRID, svd], "*.o_proj": [PRUNED | {"sparsity": 0.5}, svd, GRID]}
    rules = [{"match": match, "steps": steps} for match, steps in (empty | useful | {"*": [GRID]}).items()]
    warnings = lc.plan(str(folder), {"version": 1, "rules": rules}).warnings
    assert [sentence for sentence in warnings if "is lost" in sentence] == [
        f"model.layers.{block}.self_attn.{name}: svd comes before anything is lost, so its term holds nothing; "
        f"put it last"
        for block in (0, 1)
        for name in ("q_proj", "k_proj")
    ]


def test_substitutes_of_types_are_told_by_plan_and_report(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", intermediate_size=256)
    steps = {"*.down_proj": [{"method": "gguf", "type": "IQ4_XS"}], "*.up_proj": [{"method": "gguf", "type": "IQ4_XS"}]}
    recipe = {"version": 1, "rules": [{"match": match, "steps": steps[match]} for match in steps]}
    expected = [
        f"model.layers.{block}.mlp.up_proj: superblocks of 256 columns do not fill its width 32, so it becomes IQ4_NL, "
        f"not IQ4_XS"
        for block in (0, 1)
    ]
    report = lc.compress(str(folder), recipe, tmp_path / "out").report
    for warnings in (lc.plan(str(folder), recipe).warnings, report.warnings):
        assert [one for one in warnings if "superblocks" in one] == expected


def test_blocks_with_weights_in_common_are_refused(tmp_path: Path) -> None:
    """Zamba 2 uses one block of attention again and again."""
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    source = save_zoo("zamba2", tmp_path / "model", num_hidden_layers=4, layers_block_type=kinds)
    with pytest.raises(
        InputError, match=r"blocks of .* have weights in common \(.*\), so they cannot be compressed apa"
    ):
        lc.plan(source, "gptq-4-g64")
