"""Models that other libraries stored in few bits are read matrix by matrix as these libraries unpack them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    PreTrainedModel,
)
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.errors import InputError
from llmcompress.evaluation.protocol import Protocol
from llmcompress.models.dense import packed
from llmcompress.models.dense.model import resolve
from llmcompress.models.dense.packed import describe_few_bits
from llmcompress.surgery.block_choice import alike_blocks
from llmcompress.surgery.drop import drop_blocks
from tests.tiny import save_tiny
from tests.zoo import expert_slices, save_zoo

compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")
pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = "model.safetensors"
SIZES = {"hidden_size": 64, "intermediate_size": 96}
RECIPE: dict[str, Any] = {
    "version": 1,
    "rules": [{"match": "*_proj", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}],
}


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def store(folder: Path, pack: Callable[[Tensor], dict[str, Tensor]], **settings: Any) -> Path:
    """Store the linears of a folder as `pack` has them, by names that begin with theirs, and say so in its config."""
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        packed = pack(tensors.pop(name))
        tensors |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in packed.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    configure(folder, quantization_config=settings)
    return folder


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def reads(folder: Path, expected: PreTrainedModel) -> None:
    source, tensors = resolve(folder), expected.state_dict()
    assert {*source.tensors, *source.tied} == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(source.read(name), value), name
    whole = source.load().state_dict()
    assert all(torch.equal(whole[name], value.float()) for name, value in tensors.items())
    stored = load_file(folder / WEIGHTS).values()
    assert source.bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored)


def dense_copy(folder: Path, to: Path) -> Path:
    """Write the numbers that transformers finds in a folder as a dense one."""
    tensors = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    shutil.copytree(folder, to)
    save_file(dict(tensors), to / WEIGHTS, metadata={"format": "pt"})
    configure(to, quantization_config=None)
    return to


# --- FP8 ------------------------------------------------------------------------------------------------------------


def fp8(weight: Tensor, block: tuple[int, int] = (32, 32)) -> dict[str, Tensor]:
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=block)))
    return dict(quantize.convert({"weight": weight}))


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    folder = save_tiny("llama", tmp_path / "fp8", **SIZES)
    return store(folder, fp8, quant_method="fp8", weight_block_size=[32, 32], activation_scheme="dynamic")


def test_fp8_is_read_as_transformers_dequantizes_it(blocks: Path) -> None:
    reads(blocks, AutoModelForCausalLM.from_pretrained(blocks, dtype=torch.float32))
    source = resolve(blocks)
    assert source.notes == (describe_few_bits("FP8 in blocks, whose rounding of inputs is left out"),)
    assert "quantization_config" not in source.config_entries() and not hasattr(source.config, "quantization_config")


def test_blocks_at_the_edges_are_cut_off(tmp_path: Path) -> None:
    """Against the formula in float64; transformers itself refuses rows that do not fill blocks."""
    folder, random = save_tiny("llama", tmp_path / "fp8", **SIZES), torch.Generator().manual_seed(1)
    codes = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(folder / WEIGHTS).items()}
    scales = {}

    def pack(weight: Tensor) -> dict[str, Tensor]:
        blocks = (-(-weight.shape[0] // 40), -(-weight.shape[1] // 48))
        return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": torch.rand(blocks, generator=random)}

    store(folder, pack, quant_method="fp8", weight_block_size=[40, 48])
    scales = load_file(folder / WEIGHTS)
    source = resolve(folder)
    packed = [name for name in source.tensors if f"{name}_scale_inv" in scales]
    assert len(packed) == 14
    for name in packed:
        wide = scales[f"{name}_scale_inv"].double().repeat_interleave(40, 0).repeat_interleave(48, 1)
        rows, columns = codes[name].shape
        expected = codes[name].double() * wide[:rows, :columns]
        torch.testing.assert_close(source.read(name).double(), expected, rtol=1e-6, atol=0)


def test_one_scale_of_a_matrix_and_powers_of_two(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "fp8", **SIZES)
    before = {name: value.to(torch.float8_e4m3fn).float() for name, value in load_file(folder / WEIGHTS).items()}
    store(
        folder,
        lambda weight: {
            "weight": weight.to(torch.float8_e4m3fn),
            "weight_scale_inv": torch.tensor(0.5),
            "activation_scale": torch.tensor(1.0),
        },
        quant_method="fp8",
        activation_scheme="static",
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(resolve(folder).read(name), before[name] / 2)
    form = "FP8 of one scale, whose rounding of inputs is left out"
    assert resolve(folder).notes == (describe_few_bits(form),), "scales of inputs belong to the model"
    exponents = torch.full((-(-96 // 128), -(-64 // 128)), 130, dtype=torch.uint8)
    change(folder, lambda tensors: tensors.__setitem__(f"{name}_scale_inv", exponents))
    assert torch.equal(resolve(folder).read(name), before[name] * 8)


def test_bfloat16_is_rounded_to_once(blocks: Path) -> None:
    configure(blocks, dtype="bfloat16")
    expected = AutoModelForCausalLM.from_pretrained(blocks, dtype=torch.bfloat16).state_dict()
    source, name = resolve(blocks), "model.layers.1.self_attn.q_proj.weight"
    assert source.tensors[name].dtype == "BF16" and torch.equal(source.read(name), expected[name])


def test_experts_in_fp8_are_read_one_by_one(tmp_path: Path) -> None:
    folder = save_zoo("qwen3_moe", tmp_path / "moe")
    store(folder, fp8, quant_method="fp8", weight_block_size=[32, 32])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source, expected = resolve(folder), expert_slices("qwen3_moe", model)
    assert expected and all(torch.equal(source.read(name), value) for name, value in expected.items())


def test_a_packed_model_is_compressed_as_its_numbers(blocks: Path, tmp_path: Path) -> None:
    """The same bytes come out as from a dense folder of the same numbers."""
    results = [
        lc.compress(folder, RECIPE, tmp_path / f"from-{folder.name}")
        for folder in (blocks, dense_copy(blocks, tmp_path / "plain"))
    ]
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("from-fp8", "from-plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    form = "FP8 in blocks, whose rounding of inputs is left out"
    assert describe_few_bits(form) in results[0].report.warnings
    packing = json.loads((tmp_path / "from-fp8" / "config.json").read_text())["quantization_config"]
    assert packing["quant_method"] == "llmcompress" and "weight_block_size" not in packing
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "from-fp8")]).output
    assert "weights come from FP8 in blocks" in " ".join(shown.split())


def test_plans_count_what_stays_dense_as_numbers(blocks: Path, tmp_path: Path) -> None:
    recipe = RECIPE | {"rules": [RECIPE["rules"][0] | {"match": "*.down_proj"}]}
    first, second = (lc.plan(folder, recipe) for folder in (blocks, dense_copy(blocks, tmp_path / "plain")))
    assert first.bytes == second.bytes and first.dense_bytes < second.dense_bytes


@pytest.mark.slow
def test_a_packed_model_is_scored_as_its_numbers(blocks: Path, tmp_path: Path) -> None:
    plain, protocol = dense_copy(blocks, tmp_path / "plain"), Protocol(windows=2, length=32)
    lc.compress(blocks, RECIPE, tmp_path / "small")
    rows = lc.compare([blocks, plain, tmp_path / "small"], protocol)["models"]
    assert rows[1]["kl"] == 0 and rows[0]["perplexity"] == rows[1]["perplexity"] and rows[2]["kl"] > 0
    assert lc.score(tmp_path / "small", protocol, against=blocks)["kl"] == rows[2]["kl"]
    assert rows[0]["bpw"] < 9 < rows[1]["bpw"]


def test_blocks_of_a_packed_model_are_dropped(blocks: Path, tmp_path: Path) -> None:
    plain, name = dense_copy(blocks, tmp_path / "plain"), "self_attn.q_proj.weight"
    drop_blocks(blocks, [0], tmp_path / "short")
    assert "quantization_config" not in json.loads((tmp_path / "short" / "config.json").read_text())
    stays, whole = load_file(tmp_path / "short" / WEIGHTS), load_file(plain / WEIGHTS)
    assert torch.equal(stays[f"model.layers.0.{name}"], whole[f"model.layers.1.{name}"])


Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (
        lambda t: t.pop(f"{Q}_scale_inv"),
        "holds .*q_proj.weight without .*_scale_inv, its scales; download",
    ),
    "scales of another shape": (lambda t: t.__setitem__(f"{Q}_scale_inv", torch.ones(3, 2)), "no matrices in FP8"),
    "scales that are integers": (
        lambda t: t.__setitem__(f"{Q}_scale_inv", torch.ones(2, 2, dtype=torch.int32)),
        "no matrices in FP8",
    ),
    "a vector": (lambda t: t.__setitem__(Q, t[Q].flatten()), "no matrices in FP8"),
    "codes of another shape": (
        lambda t: t.update({Q: t[Q][:32].clone(), f"{Q}_scale_inv": torch.ones(1, 2)}),
        r"has shape \[32, 64\] where the config requires \[64, 64\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_fp8_is_refused_in_one_sentence(blocks: Path, damage: str) -> None:
    edit, sentence = DAMAGES[damage]
    change(blocks, edit)
    with pytest.raises(InputError, match=sentence) as caught:
        resolve(blocks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"quant_method": "fp8", "weight_block_size": [0, 32]}, r"gives weight_block_size as '\[0, 32\]'; correct it"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "gives weight_block_size as '128'; correct it"),
        ({"quant_method": "gptq"}, r"already compressed \(quant_method 'gptq'\); start from the dense checkpoint, or"),
        ({"quant_method": ["fp8"]}, "already compressed"),
    ],
)
def test_unknown_settings_are_refused_in_one_sentence(blocks: Path, settings: dict[str, Any], sentence: str) -> None:
    configure(blocks, quantization_config=settings)
    with pytest.raises(InputError, match=sentence):
        resolve(blocks)


def test_a_packed_student_is_refused(blocks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is stored by fp8, which training would not keep; compress it, then distil"):
        lc.distill(blocks, blocks, "scales-norms", tmp_path / "out")


# --- compressed-tensors ---------------------------------------------------------------------------------------------


def scheme(name: str) -> dict[str, Any]:
    """A preset of the library, with groups that fit into a tiny model."""
    preset = quantization.preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json", exclude_none=True)
    if preset["weights"]["strategy"] == "group" and preset["weights"]["group_size"] == 128:
        preset["weights"]["group_size"] = 32
    if preset["weights"]["strategy"] == "block":
        preset["weights"]["block_structure"] = [32, 32]
    return dict(preset)


def by_compressed_tensors(entries: dict[str, Any]) -> Callable[[Tensor], dict[str, Tensor]]:
    """The library's own packing of a matrix, with scales of the largest number in each group, row or block."""
    form = quantization.QuantizationScheme.model_validate(entries)
    arguments, kind = form.weights, infer_module_format(torch.nn.Linear, form).value
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)

    def pack(weight: Tensor) -> dict[str, Tensor]:
        size, factor = arguments.group_size or weight.shape[1], None
        if arguments.strategy == "block":
            parts = weight.unflatten(0, (-1, 32)).unflatten(2, (-1, 32)).transpose(1, 2).flatten(2)
        else:
            parts = weight.unflatten(1, (-1, size))
        low, high = parts.amin(-1), parts.amax(-1)
        if arguments.strategy == "tensor":
            low, high = weight.min()[None], weight.max()[None]
        if arguments.strategy == "tensor_group":
            factor = generate_gparam(weight.min()[None], weight.max()[None])
        scale, zero = calculate_qparams(low, high, arguments, global_scale=factor)
        whole = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        packed = compressor.compress(whole | ({} if factor is None else {"weight_global_scale": factor}), form)
        return {name: value for name, value in packed.items() if value is not None}

    return pack


FORMS = ("W4A16", "W4A16_ASYM", "W3A16", "W8A16", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16")


def ct_folder(name: str, folder: Path) -> Path:
    entries = scheme(name)
    form = infer_module_format(torch.nn.Linear, quantization.QuantizationScheme.model_validate(entries)).value
    settings = {"config_groups": {"group_0": entries}, "format": form, "quantization_status": "compressed"}
    save_tiny("llama", folder, **SIZES)
    return store(
        folder, by_compressed_tensors(entries), quant_method="compressed-tensors", ignore=["lm_head"], **settings
    )


@pytest.mark.parametrize("name", FORMS)
def test_compressed_tensors_is_read_as_transformers_dequantizes_it(name: str, tmp_path: Path) -> None:
    folder = ct_folder(name, tmp_path / name)
    asked = CompressedTensorsConfig(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=asked)
    reads(folder, expected)
    [note] = resolve(folder).notes
    assert "of compressed-tensors" in note and ("rounding of inputs" in note) == (name in ("FP8_DYNAMIC", "FP8_BLOCK"))


@pytest.mark.parametrize("name", ["FP8_DYNAMIC", "NVFP4"])  # one has codes as weights, one has no weights
def test_blocks_that_round_their_inputs_run_one_by_one(name: str, tmp_path: Path) -> None:
    folder = ct_folder(name, tmp_path / name)
    if name == "NVFP4":  # whose inputs have a scale
        parts = [key for key in load_file(folder / WEIGHTS) if key.endswith("weight_packed")]
        scales = {key.replace("weight_packed", "input_global_scale"): torch.tensor([100.0]) for key in parts}
        change(folder, lambda tensors: tensors.update(scales))
    source, plain = resolve(folder), shutil.copytree(folder, tmp_path / "plain")
    save_file({key: source.read(key) for key in source.tensors}, plain / WEIGHTS, metadata={"format": "pt"})
    configure(plain, quantization_config=None)
    blocks = lc.drift(folder, plain, Protocol(windows=1, length=32)).blocks
    assert blocks[0].error == 0 and all(0 < (block.error or 0) < 0.5 for block in blocks[1:])
    assert len(alike_blocks(folder, 1).cosines) == 2


def test_groups_of_two_forms_are_read_by_their_own(tmp_path: Path) -> None:
    """transformers unpacks all linears by one of them, so each is compared with a model of one form."""
    names, folders = ("W4A16", "FP8_DYNAMIC"), []
    for name in names:
        folders.append(ct_folder(name, tmp_path / name))
    alone = [resolve(folder) for folder in folders]
    tensors, mlp = (load_file(folder / WEIGHTS) for folder in folders)
    inside = {name: value for name, value in mlp.items() if ".mlp." in name}
    both = {name: value for name, value in tensors.items() if ".mlp." not in name} | inside
    save_file(both, folders[0] / WEIGHTS, metadata={"format": "pt"})
    groups = {"all": scheme("W4A16"), "mlp": scheme("FP8_DYNAMIC") | {"targets": ["re:.*mlp.*"]}}
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    configure(folders[0], quantization_config=settings)
    source = resolve(folders[0])
    for name in source.tensors:
        assert torch.equal(source.read(name), alone[".mlp." in name].read(name)), name
    [note] = source.notes
    assert "pack-quantized of compressed-tensors" in note and "float-quantized of compressed-tensors" in note


P = "model.layers.0.self_attn.q_proj.weight"
CT_DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{P}_scale"), r"lacks weights that its config requires: .*q_proj\.weight"),
    "no shape": (
        lambda t: t.pop(f"{P}_shape"),
        "stores weight_packed, weight_scale of .*q_proj, and",
    ),
    "an order of columns": (
        lambda t: t.update({f"{P}_g_idx": torch.arange(64)}),
        "stores weight_g_idx, .*q_proj",
    ),
    "scales of another shape": (lambda t: t.update({f"{P}_scale": torch.ones(64, 3)}), "are no matrices in pack-"),
    "another shape": (lambda t: t.update({f"{P}_shape": torch.tensor([64, 640])}), "are no matrices in pack-"),
    "a negative shape": (lambda t: t.update({f"{P}_shape": torch.tensor([64, -64])}), "are no matrices in pack-"),
    "a shape of floats": (lambda t: t.update({f"{P}_shape": torch.ones(2)}), "are no matrices in pack-"),
    "codes of bytes": (
        lambda t: t.update({f"{P}_packed": t[f"{P}_packed"].char()}),
        "are no matrices in pack-",
    ),
    "nothing": (lambda t: t.update({f"{P}_packed": torch.ones(0, 8, dtype=torch.int32)}), "are no matrices in pack-"),
}


@pytest.mark.parametrize("damage", CT_DAMAGES)
def test_damaged_compressed_tensors_are_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    folder = ct_folder("W4A16", tmp_path / "packed")
    edit, sentence = CT_DAMAGES[damage]
    change(folder, edit)
    with pytest.raises(InputError, match=sentence) as caught:
        resolve(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"config_groups": {"one": scheme("W4A16") | {"targets": ["re:.*mlp.*"]}}}, "has no group for .*self_attn"),
        ({"config_groups": 7}, "describes no model of compressed-tensors .*; correct it"),
        ({"config_groups": {"one": {"targets": ["Linear"], "weights": {"num_bits": "four"}}}}, "describes no model of"),
        (
            {"format": "marlin-24"},
            "is stored as 'marlin-24', which the installed compressed-tensors does not",
        ),
        ({"format": "a-new-form"}, "a-new-form"),
    ],
)
def test_unknown_compressed_tensors_are_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = ct_folder("W4A16", tmp_path / "packed")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    configure(folder, quantization_config=settings | changes)
    with pytest.raises(InputError, match=sentence) as caught:
        resolve(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ct_folder("W4A16", tmp_path / "packed")
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="by compressed-tensors, which is not installed; run `pip install"):
        resolve(folder)


# --- bitsandbytes ---------------------------------------------------------------------------------------------------

BNB = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "uint8"},
    "int8": {"load_in_8bit": True},
}


def bnb_folder(name: str, folder: Path) -> Path:
    plain = save_tiny("llama", folder.with_name(f"plain-{name}"), **SIZES)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=BitsAndBytesConfig(**BNB[name])).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("name", BNB)
def test_bitsandbytes_is_read_as_it_dequantizes(name: str, tmp_path: Path) -> None:
    folder = bnb_folder(name, tmp_path / name)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    expected.dequantize(torch.float32)
    source, tensors = resolve(folder), expected.state_dict()
    for key, value in tensors.items():
        torch.testing.assert_close(source.read(key), value.to(source.read(key).dtype), rtol=0, atol=0)
    assert len(tensors) == len(source.tensors) and "bitsandbytes" in source.notes[0] and len(source.notes) == 1
    assert ("rounding of inputs" in source.notes[0]) == (name == "int8")


X = "model.layers.0.self_attn.q_proj.weight"


def about(tensors: dict[str, Tensor], **changes: Any) -> None:
    key = f"{X}.quant_state.bitsandbytes__nf4"
    entries = json.loads(bytes(tensors[key].tolist())) | changes
    tensors[key] = torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


BNB_DAMAGES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "a shape beyond the codes": lambda t: about(t, shape=[4096, 4096]),
    "a shape of words": lambda t: about(t, shape=["a", "b"]),
    "no shape": lambda t: about(t, shape=None),
    "blocks of nothing": lambda t: about(t, blocksize=0),
    "an unknown dtype": lambda t: about(t, dtype="complex64"),
    "no JSON": lambda t: t.update({f"{X}.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
    "few scales": lambda t: t.update({f"{X}.absmax": t[f"{X}.absmax"][:-1].clone()}),
    "no scales": lambda t: t.pop(f"{X}.absmax"),
    "a short table": lambda t: t.update({f"{X}.quant_map": torch.zeros(8)}),
    "few codes": lambda t: t.update({X: t[X][:-5].clone()}),
    "other codes": lambda t: t.update({X: t[X].int()}),
    "something else": lambda t: t.update({f"{X}.code": torch.ones(1)}),
}


@pytest.mark.parametrize("damage", BNB_DAMAGES)
def test_damaged_bitsandbytes_is_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    folder = bnb_folder("nf4", tmp_path / "nf4")
    change(folder, BNB_DAMAGES[damage])
    with pytest.raises(
        InputError, match="q_proj.weight in .* are no matrices in nf4 of bitsandbytes; download"
    ) as caught:
        resolve(folder)
    assert "\n" not in str(caught.value)
