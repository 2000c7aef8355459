"""Scales of input channels: the dense model must compute what it did, and rounding must hurt it less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import repeat_kv

import llmcompress as lc
from llmcompress.calibration.blocks import load
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import Block, InputGroup, walk
from llmcompress.compression.awq import ScaledChannels, producer_rows, round_to, scale_channels
from llmcompress.compression.rotation import rotated_source
from llmcompress.errors import RecipeError
from llmcompress.methods.grids.rtn import RTN, rtn
from llmcompress.methods.layer import Layer, relative_error, step
from llmcompress.methods.moments import STATISTICS, Moments
from llmcompress.models.dense.families import FAMILIES, Architecture, architecture
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Dense
from tests.tiny import VOCABULARY, save_tiny

FUSIBLE = [name for name, family in FAMILIES.items() if family.producers]
GRID = {"method": "rtn", "bits": 3, "group_size": 16}
TEXT = "The quick brown fox jumps over the lazy dog, and 42 grey geese fly past the old mill by the river. "
BIASES = {"attention_bias": True, "mlp_bias": True}


def with_outliers(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> DenseModel:
    """A tiny model some of whose channels are far louder than others, as those of large models are."""
    save_tiny(family, folder, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[::7] *= 30
        if "v_proj.weight" in name or "up_proj.weight" in name:
            parameter.data[::5] *= 20
    model.to(dtype).save_pretrained(folder)
    return resolve(str(folder))


def blocks(source: DenseModel, arch: Architecture) -> Iterator[Block]:
    """Without a cap, as what a token counts for would depend on the scales."""
    ids = torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
    yield from walk(source, arch, ids, Statistics(needs=STATISTICS, cap=None, cross=True), held_out=2)


def scaled_blocks(source: DenseModel, steps: tuple[Any, ...] = (step(GRID),)) -> Iterator[tuple[Block, ScaledChannels]]:
    arch = architecture(source.config, source.skeleton())
    for block in blocks(source, arch):
        yield block, scale_channels(block, source, arch, dict.fromkeys(arch.linears(), steps))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(torch.arange(40)[None] * 5 % VOCABULARY).logits


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *(pytest.param(name, {}, marks=() if name == "llama" else pytest.mark.slow) for name in FUSIBLE),
        pytest.param("llama", BIASES, marks=pytest.mark.slow),
        pytest.param("llama", {"num_key_value_heads": 1, "head_dim": 4}, marks=pytest.mark.slow),
    ],
)
def test_logits_stay(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = with_outliers(family, tmp_path, **changes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = logits(model)
    for block, done in scaled_blocks(source):
        model.get_submodule(block.path).load_state_dict(block.module.state_dict())
        assert len(done.notes) == 4 and not all("exponent 0," in note for note in done.notes)
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits(model) / scale, expected / scale, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_logits_stay_of_a_rotated_model(tmp_path: Path) -> None:
    source = rotated_source(with_outliers("llama", tmp_path), seed=0, untie=False)
    model = source.skeleton()
    load(model, "", source, torch.device("cpu"))
    expected = logits(model)
    for block, _ in scaled_blocks(source):
        model.get_submodule(block.path).load_state_dict(block.module.state_dict())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_moments_follow_the_inputs(tmp_path: Path) -> None:
    """The inputs that the block's linears then read have the moments that `scale_channels` leaves."""
    source = with_outliers("llama", tmp_path)
    arch = architecture(source.config, source.skeleton())
    for block, _ in scaled_blocks(source):
        again = next(one for one in blocks(_as_in(source, block), arch) if one.index == block.index)
        for mine, theirs in zip(block.groups, again.groups, strict=True):
            assert mine.held_out is not None and theirs.held_out is not None
            _assert_close(mine.held_out.outer, theirs.held_out.outer)
            for statistic in STATISTICS:
                _assert_close(getattr(mine.inputs, statistic), getattr(theirs.inputs, statistic))
        break


def _assert_close(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None and expected is not None
    size = expected.abs().max()
    torch.testing.assert_close(found / size, expected / size, rtol=0, atol=1e-4)


def _as_in(source: DenseModel, block: Block) -> DenseModel:
    """The model on disk with this block's parameters."""
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    model.get_submodule(block.path).load_state_dict(block.module.state_dict())
    folder = source.folder / "changed"
    model.save_pretrained(folder)
    return resolve(str(folder))


def test_rounding_is_that_of_rtn() -> None:
    weight = torch.randn(9, 21, generator=torch.Generator().manual_seed(0))
    for config in (RTN(bits=3, group_size=8, symmetric=False), RTN(bits=2), RTN(bits="ternary", clip=False)):
        layer = Layer("layer", weight, Dense(weight.to(torch.bfloat16)), Moments(0.0))
        torch.testing.assert_close(round_to(weight, config.grid_format()), dense(rtn(layer, config).approx))


def test_producer_rows_are_those_that_attention_repeats() -> None:
    values = torch.arange(2 * 3).reshape(1, 2, 1, 3)  # two heads of three rows, for six query heads
    seen = repeat_kv(values, 3).transpose(1, 2).reshape(-1)
    assert torch.equal(producer_rows(6, 18, head_dim=3), seen)
    assert torch.equal(producer_rows(5, 5, head_dim=3), torch.arange(5))


@pytest.mark.slow
def test_exponents_are_the_best_and_never_harm(tmp_path: Path) -> None:
    """Each group again, one exponent after the other, by the method itself and the inputs' moments before scaling."""
    source = with_outliers("llama", tmp_path)
    arch = architecture(source.config, source.skeleton())
    for block in blocks(source, arch):
        groups, steps = block.groups, dict.fromkeys(arch.linears(), (step(GRID),))
        weights = {name: block.weight(name) for group in groups for name in group.names}
        notes = scale_channels(block, source, arch, steps).notes
        for group, note in zip(groups, notes, strict=True):
            shared = 2 if group.names[0].endswith("o_proj") else 1  # query heads that share values
            errors = [_error(weights, group, exponent / 20, shared) for exponent in range(20)]
            exponent, before, after = map(float, re.findall(r"\d+\.?\d*(?=,| *$)", note)[-3:])
            assert after == pytest.approx(min(errors), rel=2e-3) and after <= before
            assert before == pytest.approx(errors[0], rel=2e-3)
            assert errors[round(20 * exponent)] == pytest.approx(after, rel=2e-3)


def _error(weights: dict[str, Tensor], group: InputGroup, exponent: float, shared: int) -> float:
    assert group.inputs.outer is not None
    energy = group.inputs.outer.diagonal()
    if shared > 1:
        heads = energy.reshape(-1, shared, 8)  # of eight channels
        energy = heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)
    loudness = energy.sqrt() ** exponent
    scale = loudness / (loudness.max() * loudness.min()).sqrt()
    total = 0.0
    for name in group.names:
        scaled = weights[name] * scale
        layer = Layer(name, scaled, Dense(scaled.to(torch.bfloat16)), Moments(0.0))
        stored = dense(rtn(layer, RTN(**GRID)).approx) / scale
        total += relative_error(weights[name], stored, group.inputs)
    return total


def test_norms_are_exact_in_their_stored_dtype(tmp_path: Path) -> None:
    source = with_outliers("llama", tmp_path, torch.bfloat16)
    for block, done in scaled_blocks(source):
        for norm, first in (("input_layernorm", "self_attn.q_proj"), ("post_attention_layernorm", "mlp.gate_proj")):
            stored = done.tensors(block)[f"{block.path}.{norm}.weight"]
            assert stored.dtype == torch.bfloat16
            before = source.read(f"{block.path}.{first}.weight").float() * source.read(f"{block.path}.{norm}.weight")
            assert torch.equal(block.module.get_submodule(norm).weight, stored.float())
            torch.testing.assert_close(block.weight(f"{block.path}.{first}") * stored, before, rtol=1e-6, atol=0)


def test_linears_without_steps_are_stored_scaled(tmp_path: Path) -> None:
    source = with_outliers("llama", tmp_path)
    arch = architecture(source.config, source.skeleton())
    steps = {name: (step(GRID),) for name in arch.linears() if not name.endswith(("v_proj", "up_proj"))}
    for block in blocks(source, arch):
        changed = scale_channels(block, source, arch, steps).changed
        inner = {name.removeprefix(f"{block.path}.") for name in changed}
        norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
        assert inner == norms | {"self_attn.v_proj.weight", "mlp.up_proj.weight"}


def recipe(text: Path, grid: dict[str, Any], **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(text), "samples": 8, "length": 32, "held_out": 2}
    rules = [{"match": "*.1.mlp.up_proj", "steps": []}, {"match": "*", "steps": [grid]}]
    return {"version": 1, "name": "test", "calibration": calibration, "rules": rules, **more}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    return path


@pytest.mark.parametrize(
    "fuse",
    [
        pytest.param({"awq": True}, id="awq", marks=pytest.mark.slow),
        pytest.param({"awq": True, "rotation": True}, id="both"),
    ],
)
def test_a_checkpoint_loads_and_computes_like_the_dense_model(fuse: dict[str, Any], tmp_path: Path, text: Path) -> None:
    """With biases, and with a linear that stays dense."""
    with_outliers("llama", tmp_path / "dense", **BIASES)
    grid = {"method": "gptq", "bits": 8, "group_size": 8}
    result = lc.compress(tmp_path / "dense", recipe(text, grid, fuse=fuse), tmp_path / "out")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert float((found - expected).norm() / expected.norm()) < 0.06  # of 8 bits, where scales differ by thousands
    assert len(result.report.fused) == 8 and "exponent" in result.report.fused[0]
    assert lc.read(tmp_path / "out") == result.report


@pytest.mark.slow
def test_layers_are_compressed_for_the_scaled_inputs(tmp_path: Path, text: Path) -> None:
    """The error that plain rounding leaves is the one that chose the scales. For linears that produce no input of
    others: rows of those are scaled after their own columns are."""
    with_outliers("llama", tmp_path / "dense")
    asked = recipe(text, GRID, fuse={"awq": True}, asymmetric=0.0, exact_errors=True)
    report = lc.compress(tmp_path / "dense", asked, tmp_path / "out").report
    errors = {row.name: row.error for row in report.layers}
    notes = dict(note.split(": channels scaled by", 1) for note in report.fused)
    found = [name for name in errors if name.endswith(("o_proj", "down_proj"))]
    assert len(found) == 4
    for name in found:
        assert errors[name] == pytest.approx(float(notes[name].rpartition(" then ")[2]), rel=2e-3)


@pytest.mark.slow
def test_layers_lose_less(tmp_path: Path, text: Path) -> None:
    with_outliers("llama", tmp_path / "dense")
    plain = lc.compress(tmp_path / "dense", recipe(text, GRID), tmp_path / "plain").report
    helped = lc.compress(tmp_path / "dense", recipe(text, GRID, fuse={"awq": True}), tmp_path / "helped").report
    assert helped.bpw == plain.bpw and helped.bytes <= plain.bytes + 4096  # the recipe in the header
    held_out = [sum(row.error_heldout or 0.0 for row in report.layers) for report in (helped, plain)]
    assert held_out[0] < 0.8 * held_out[1]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"calibration": None}, "awq requires calibration"),
        ({"fuse": {}}, "fuse.*it says nothing to fuse; set rotation: true or awq: true"),
        ({"fuse": {"awq": True, "untie": True}}, "fuse.*untie: only rotation: true needs a head of its own"),
        ({"rules": [{"match": "*", "steps": [{"method": "rotate"}, GRID]}]}, "first step of .*q_proj is rotate; use"),
        ({"rules": [], "target": {"bpw": 3}}, "fuse: a target measures the model as it is; leave one"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], complaint: str, tmp_path: Path, text: Path) -> None:
    folder = save_tiny("llama", tmp_path / "dense")
    with pytest.raises(RecipeError, match=complaint):
        lc.compress(folder, recipe(text, GRID) | {"fuse": {"awq": True}} | changes)


def test_other_families_are_refused(tmp_path: Path, text: Path) -> None:
    folder = save_tiny("opt", tmp_path / "dense")
    with pytest.raises(RecipeError, match="nothing can be fused into model type 'opt'"):
        lc.plan(folder, recipe(text, GRID, fuse={"awq": True}))


def test_outliers_of_rounded_inputs_are_smoothed(tmp_path: Path, text: Path) -> None:
    """The dense model stays, layers multiply inputs that hold more, and the whole model loses less."""
    source = with_outliers("llama", tmp_path / "dense", torch.bfloat16, **BIASES)
    grid = {"method": "rtn", "bits": 8, "narrow_range": True}
    plain = recipe(text, grid, asymmetric=0.25)
    plain["rules"] = [plain["rules"][1] | {"inputs": {"format": "int8", "scale": "tensor"}}]
    dense_logits = logits(AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32))
    lost = {}
    for name, more in (("plain", {}), ("smooth", {"fuse": {"awq": True}})):
        result = lc.compress(source.folder, plain | more, tmp_path / name)
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32))
        lost[name] = float((found - dense_logits).norm() / dense_logits.norm())
        assert bool(result.report.fused) == (name == "smooth")
    exponents = [
        float(exponent) for note in result.report.fused for exponent in re.findall("exponent ([0-9.]+),", note)
    ]
    assert max(exponents) > 0 and lost["smooth"] < 0.7 * lost["plain"], (lost, exponents)
