"""Moments of experts against float64 sums over the tokens that transformers' routers choose; those of starved ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llmcompress as lc
from llmcompress.calibration.gather import InputGroup, Statistics
from llmcompress.calibration.walk import Block, Execution, walk
from llmcompress.compression.block import swap
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.model import resolve
from llmcompress.weight.layout import pack_weight
from llmcompress.weight.nodes import Dense
from tests.zoo import COUNT, expert_slices, save_zoo, text_for_calibration, zoo

HELD_OUT = 2  # of the five sequences
ROUTERS = {
    "mixtral": "mlp.gate",
    "gpt_oss": "mlp.router",
    "deepseek_v3": "mlp.gate",
    "llama4_text": "feed_forward.router",
}
CHOSEN = {"llama4_text": 1}  # experts of a token; two in other families
NEEDS = frozenset({"outer"})


def sequences() -> Tensor:
    return torch.randint(0, 250, (5, 24), generator=torch.Generator().manual_seed(1))


def model_of(family: str, starving: bool = False) -> PreTrainedModel:
    """A tiny mixture. `starving`: the router of its first block sends no token to the last expert, few to the third."""
    model = zoo(family)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.tensor([0.1, -0.05, 0.0, 0.05]))
    if starving:
        model.get_parameter("model.layers.0.mlp.router.bias").data.copy_(torch.tensor([0.0, 0.0, -2.3, -1e4]))
    return model


def save(family: str, place: Path, starving: bool = False) -> Path:
    """Write `model_of` with a tokenizer."""
    save_zoo(family, place)
    model_of(family, starving).save_pretrained(place)
    return place


# --- the oracle -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Routed:
    """The tokens `[tokens, hidden]` before a block's experts, float64, and `[tokens, experts]`: True where chosen."""

    tokens: Tensor
    chosen: Tensor


def routed(family: str, model: PreTrainedModel, block: int, ids: Tensor) -> Routed:
    """Return what transformers' router of a block reads, and the experts with the largest logits."""
    router, seen = model.get_submodule(f"model.layers.{block}.{ROUTERS[family]}"), []
    handle = router.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    [tokens] = seen
    logits = tokens @ router.weight.detach().double().T
    if family == "gpt_oss":
        logits = logits + router.bias.detach().double()
    scores = logits.sigmoid() + router.e_score_correction_bias.double() if family == "deepseek_v3" else logits
    best = scores.topk(CHOSEN.get(family, 2), dim=1).indices
    if family == "llama4_text":
        tokens = tokens * logits.gather(1, best).sigmoid()
    return Routed(tokens, torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True))


def inner(family: str, matrices: dict[str, Tensor], expert: str, tokens: Tensor) -> Tensor:
    """Return what an expert's `down_proj` reads, in float64."""
    both = {part: matrices[f"{expert}.{part}.weight"].double() for part in ("gate_proj", "up_proj")}
    gate, up = tokens @ both["gate_proj"].T, tokens @ both["up_proj"].T
    if family == "gpt_oss":
        gate = (gate + matrices[f"{expert}.gate_proj.bias"].double()).clamp(max=7.0)
        up = (up + matrices[f"{expert}.up_proj.bias"].double()).clamp(-7.0, 7.0)
        return (up + 1) * gate * (1.702 * gate).sigmoid()
    return gate * gate.sigmoid() * up


def expected(
    family: str, matrices: dict[str, Tensor], group: InputGroup, found: Routed, fill: bool = True
) -> tuple[Tensor | None, int | None]:
    """Return the second moments of what a group of an expert reads, None without tokens, and how many came to it if
    they are few; `fill`: a starved expert gets all tokens besides, at the weight it lacks to a quarter of the average.
    """
    expert, _, leaf = group.names[0].rpartition(".")
    number = int(expert.rpartition(".")[2])

    def read(tokens: Tensor) -> Tensor:
        return inner(family, matrices, expert, tokens) if leaf == "down_proj" else tokens

    own = read(found.tokens[found.chosen[:, number]])
    count, least = len(own), float(found.chosen.sum()) / COUNT / 4
    if not fill:
        return (own.T @ own if count else None), None
    if count >= least:
        return own.T @ own, None
    everything = read(found.tokens)
    return own.T @ own + everything.T @ everything * (least - count) / len(everything), count


def groups_of_experts(block: Block) -> Iterator[InputGroup]:
    for group in block.groups:
        if ".experts." in group.names[0] and "shared" not in group.names[0]:
            yield group


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "starving"),
    [("mixtral", False), ("gpt_oss", True), ("deepseek_v3", False), ("llama4_text", False)],
)
def test_moments_are_those_of_the_tokens_that_are_routed_to_an_expert(
    family: str, starving: bool, tmp_path: Path
) -> None:
    source, ids, plain = resolve(save(family, tmp_path / "model", starving)), sequences(), model_of(family, starving)
    arch, matrices = architecture(source.config, source.skeleton()), expert_slices(family, plain)
    met = 0
    starved: dict[str, int] = {}
    for block in walk(source, arch, ids, Statistics(needs=NEEDS, cap=None), Execution(batch_size=2), held_out=HELD_OUT):
        if not list(groups_of_experts(block)):
            continue
        found, beyond = (routed(family, plain, block.index, some) for some in (ids[:-HELD_OUT], ids[-HELD_OUT:]))
        for group in groups_of_experts(block):
            outer, few = expected(family, matrices, group, found)
            assert outer is not None and group.inputs.outer is not None
            torch.testing.assert_close(group.inputs.outer.double(), outer, rtol=1e-4, atol=1e-4)
            assert group.starved == few
            starved |= {} if few is None else {group.names[0]: few}
            held_out, _ = expected(family, matrices, group, beyond, fill=False)
            assert (group.held_out is None) == (held_out is None)
            if group.held_out is not None and group.held_out.outer is not None:
                torch.testing.assert_close(group.held_out.outer.double(), held_out, rtol=1e-4, atol=1e-4)
            met += 1
    assert met == 2 * COUNT * sum(f".{ROUTERS[family]}.weight" in name for name in plain.state_dict())
    if starving:
        first = {name: few for name, few in starved.items() if ".layers.0." in name}
        assert {name.split(".experts.")[1][0] for name in first} == {"2", "3"}
        assert {few > 0 for name, few in first.items() if ".experts.2." in name} == {True}


def test_the_weight_of_a_starved_expert_is_a_quarter_of_the_average(tmp_path: Path) -> None:
    """In `tokens`, on which the methods' damping and the number of samples rest."""
    source, ids = resolve(save("gpt_oss", tmp_path / "model", starving=True)), sequences()
    arch = architecture(source.config, source.skeleton())
    block = next(walk(source, arch, ids, Statistics(needs=NEEDS, cap=None)))
    average = ids.numel() * 2 / COUNT
    weights = {group.names[0]: group.inputs.tokens for group in groups_of_experts(block) if group.starved is not None}
    assert weights and all(weight == pytest.approx(average / 4) for weight in weights.values())


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_the_dense_stream_is_paired_by_token(family: str, tmp_path: Path) -> None:
    """A token that the dense model routes to other experts stands on both sides as it is here."""
    source, ids, plain = resolve(save(family, tmp_path / "model")), sequences(), model_of(family)
    arch, matrices = architecture(source.config, source.skeleton()), expert_slices(family, plain)
    other = model_of(family)
    needs, elsewhere = frozenset({"outer", "cross"}), 0
    for block in walk(source, arch, ids, Statistics(needs=needs, cap=None, cross=True), Execution(batch_size=2)):
        groups = list(groups_of_experts(block))
        here, there = (routed(family, model, block.index, ids) for model in (other, plain)) if groups else (None, None)
        for group in groups:
            assert here is not None and there is not None and group.inputs.cross is not None
            expert, _, leaf = group.names[0].rpartition(".")
            number = int(expert.rpartition(".")[2])

            def read(tokens: Tensor, expert: str = expert, leaf: str = leaf) -> Tensor:
                return inner(family, matrices, expert, tokens) if leaf == "down_proj" else tokens

            mine = here.chosen[:, number]
            both = there.chosen[mine, number]
            elsewhere += int((~both).sum())
            x = read(here.tokens[mine])
            beside = torch.where(both[:, None], read(there.tokens[mine]), x)
            cross = beside.T @ x
            if (few := group.starved) is not None:
                everything, least = read(here.tokens), float(here.chosen.sum()) / COUNT / 4
                cross = cross + everything.T @ everything * (least - few) / len(everything)
            torch.testing.assert_close(group.inputs.cross.double(), cross, rtol=1e-4, atol=1e-4)
        attention = [name for group in block.groups for name in group.names if ".self_attn." in name]
        halves = {name: (block.weight(name) * 0.5).bfloat16() for name in attention}
        swap(block, {name: pack_weight(Dense(half)) for name, half in halves.items()})
        for name, half in halves.items():
            other.get_parameter(f"{name}.weight").data.copy_(half.float())
    assert elsewhere > 10


def test_starved_experts_reach_the_report(tmp_path: Path) -> None:
    source = save("gpt_oss", tmp_path / "model", starving=True)
    recipe: dict[str, Any] = {
        "version": 1,
        "calibration": {"dataset": str(text_for_calibration(tmp_path)), "samples": 4, "length": 64, "held_out": 1},
        "rules": [{"match": "*", "steps": [{"method": "gptq", "bits": 4, "group_size": 16}]}],
    }
    report = lc.compress(source, recipe, tmp_path / "out").report
    starved = {row.name: row.starved for row in report.layers if row.starved is not None}
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        assert starved[f"model.layers.0.mlp.experts.3.{leaf}"] == 0
    counts: dict[str, set[int]] = {}
    for name, count in starved.items():
        assert ".experts." in name
        counts.setdefault(name.rpartition(".")[0], set()).add(count)
    assert all(len(found) == 1 for found in counts.values())  # the linears of an expert get the same tokens
    [sentence] = [warning for warning in report.warnings if "experts were given less" in warning]
    assert sentence.startswith(f"{len(counts)} experts ") and "model.layers.0.mlp.experts.3: 0" in sentence
    assert lc.read(tmp_path / "out") == report
