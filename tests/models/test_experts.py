"""Experts as linears of their own against transformers' parameters of all of them, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.errors import InputError, NumericsError
from llmcompress.formats.export import export
from llmcompress.models.dense.experts import experts_of, fuse_experts, unfuse
from llmcompress.models.dense.model import resolve
from llmcompress.models.dense.packed import describe_few_bits
from tests.tiers import tiered
from tests.zoo import MIXTURES, expert_slices, save_zoo, zoo

FAST = {"mixtral", "gpt_oss", "llama4_text", "deepseek_v3"}  # of each form of storage
WEIGHTS = "model.safetensors"
FAMILIES = tiered(MIXTURES, FAST.__contains__)
RECIPE: dict[str, Any] = {
    "version": 1,
    "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}],
}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    found: Tensor = model(input_ids=ids).logits
    return found


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return "\n" not in text and not text.endswith(".") and len(text) < 600


@pytest.mark.parametrize("family", FAMILIES)
def test_unfused_experts_compute_the_same(family: str) -> None:
    """Up to the last bits: where a matrix lies in memory decides in which order some processors sum."""
    model = zoo(family)
    model.set_experts_implementation("eager")  # one expert after the other, as ours
    expected = logits(model)
    unfuse(model)
    assert experts_of(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_a_piece_of_the_parameters_and_they_are_made_of_the_pieces(family: str) -> None:
    model = zoo(family)
    before, expected = model.state_dict(), expert_slices(family, model)
    unfuse(model)
    after = model.state_dict()
    assert expected.keys() == after.keys() - before.keys()
    assert all(torch.equal(after[name], value) for name, value in expected.items())
    again = {
        f"{path}.{leaf}": value
        for path, experts in experts_of(model).items()
        for leaf, value in fuse_experts(experts, experts.state_dict().__getitem__).items()
    }
    assert again.keys() == before.keys() - after.keys()
    assert all(torch.equal(value, before[name]) for name, value in again.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", ["as on the Hub", "as in memory"])
def test_reads_what_the_model_holds(family: str, stored: str, tmp_path: Path) -> None:
    model, folder = zoo(family), save_zoo(family, tmp_path / family)
    if stored == "as in memory":
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    source, experts = resolve(folder), expert_slices(family, model)
    modules = {name.rsplit(".", 3)[0] for name in experts}
    plain = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in modules}
    assert {*source.tensors, *source.tied} == {*plain, *experts}
    assert all(torch.equal(source.read(name), value) for name, value in (plain | experts).items())
    assert not source.notes


def test_a_mixture_that_is_made_dense_is_saved_as_on_the_hub(tmp_path: Path) -> None:
    folder = lc.compress(save_zoo("mixtral", tmp_path / "dense"), RECIPE, tmp_path / "out").folder
    export(folder, tmp_path / "plain", "dense")
    AutoModelForCausalLM.from_pretrained(folder).dequantize().save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() == load_file(tmp_path / "plain" / WEIGHTS).keys()


# --- MXFP4 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return save_mxfp4(tmp_path / "gpt-oss")


def save_mxfp4(folder: Path, **changes: Any) -> Path:
    """A tiny gpt-oss with random experts in MXFP4."""
    random = torch.Generator().manual_seed(1)
    save_zoo("gpt_oss", folder, **changes)
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, out = tensors.pop(name).shape
        blocks = (experts, out, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*blocks, 16), generator=random, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 126, blocks, generator=random, dtype=torch.uint8)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    configure(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return folder


def test_mxfp4_is_read_as_transformers_dequantizes_it(released: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    source, expected = resolve(released), expert_slices("gpt_oss", model)
    assert all(torch.equal(source.read(name).float(), value) for name, value in expected.items())
    assert source.notes == (describe_few_bits("MXFP4"),) and "quantization_config" not in source.config_entries()
    stored = load_file(released / WEIGHTS).values()
    assert source.bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored)


def test_damaged_mxfp4_is_refused(released: Path) -> None:
    tensors = load_file(released / WEIGHTS)
    name = next(name for name in tensors if name.endswith("_scales"))
    for scales, sentence in (
        (tensors[name][:, 1:], "are no matrices in MXFP4; download the model again"),
        (tensors[name].to(torch.int32), "are no matrices in MXFP4; download the model again"),
        (None, "holds experts in a way that is not known; choose another model"),
    ):
        others = {key: value for key, value in tensors.items() if key != name}
        changed = others if scales is None else others | {name: scales.contiguous()}
        save_file(changed, released / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(InputError, match=sentence) as caught:
            resolve(released)
        assert one_sentence(caught.value)


def test_mxfp4_with_infinite_scales_is_refused(released: Path, tmp_path: Path) -> None:
    tensors = load_file(released / WEIGHTS)
    name = next(name for name in tensors if name.endswith("_scales"))
    tensors[name].fill_(255)
    save_file(tensors, released / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"experts\.0\.\w+\.weight holds NaN or Inf .*; use an undamaged"):
        lc.compress(released, RECIPE, tmp_path / "out")


# --- bad input ------------------------------------------------------------------------------------------------------


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: configure(folder, **changes)


def edited(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Return a change of the tensors on disk."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


MIXTRAL = "model.layers.0.block_sparse_moe"
DAMAGES = {
    "fewer experts announced": (
        configured(num_local_experts=2),
        "holds 3 experts or more in a block, where config.json announces 2; correct config.json or download",
    ),
    "more experts announced": (configured(num_local_experts=6), r"has shape \[4, 64\] .* requires \[6, 64\]; config"),
    "an expert missing": (
        edited(lambda t: [t.pop(f"{MIXTRAL}.experts.3.w{number}.weight") for number in (1, 2, 3)]),
        r"lacks weights that its config requires: .*experts\.3\.\w+\.weight.*; download the model again",
    ),
    "an expert of another width": (
        edited(lambda t: t.__setitem__(f"{MIXTRAL}.experts.1.w1.weight", torch.ones(80, 64))),
        r"experts\.1\.w1\.weight .*has shape \[80, 64\] where the config requires \[96, 64\]",
    ),
    "no router": (
        edited(lambda t: t.pop(f"{MIXTRAL}.gate.weight")),
        r"lacks weights that its config requires: .*\.gate\.weight",
    ),
    "integers": (
        edited(lambda t: t.__setitem__(f"{MIXTRAL}.experts.1.w1.weight", torch.ones(96, 64, dtype=torch.int8))),
        r"experts\.1\.w1\.weight .*is stored as I8, so it is already compressed",
    ),
    "a world of experts": (configured(num_local_experts=2**18), r"describes \d+ experts, which no model has; correct"),
    "a galaxy of experts": (configured(num_local_experts=2**60), "config.json"),
    "a negative number": (configured(num_local_experts=-4), "config.json"),
    "no experts": (configured(num_local_experts=0), "config.json"),
    "a word": (configured(num_local_experts="four"), r"config.json is not a valid config .*; correct it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_mixtures_are_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    folder = save_zoo("mixtral", tmp_path / "model")
    change, sentence = DAMAGES[damage]
    change(folder)
    with pytest.raises(InputError, match=sentence) as caught:
        lc.plan(folder, RECIPE)
    assert one_sentence(caught.value)


def test_fused_tensors_of_another_count_are_refused(tmp_path: Path) -> None:
    folder = save_zoo("gpt_oss", tmp_path / "model")
    configure(folder, num_local_experts=2)
    with pytest.raises(InputError, match="holds 4 experts or more in a block, where config.json announces 2"):
        resolve(folder)


def test_experts_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    folder = save_zoo("jetmoe", tmp_path / "model")
    with pytest.raises(InputError, match=r"holds its experts as \w+, which cannot be compressed yet") as caught:
        lc.plan(folder, RECIPE)
    assert one_sentence(caught.value)
