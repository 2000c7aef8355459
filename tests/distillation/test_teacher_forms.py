"""A teacher as the Hub has it, in few bits, pickled, wrapped or as an adapter, teaches as the same in plain numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.distillation.context import TrainContext
from llmcompress.distillation.run import distill
from llmcompress.distillation.teacher.predictions import HeldOutTeacher
from llmcompress.errors import InputError
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.identity import teacher_digest
from tests.distillation import miniature
from tests.models.test_adapter import adapted, change_json
from tests.models.test_packed import by_compressed_tensors, fp8, scheme, store
from tests.tiers import tiered_nightly
from tests.tiny import save_tiny, tiny

pytestmark = pytest.mark.filterwarnings("ignore")
RULES = [{"match": "*_proj", "steps": [{"method": "rtn", "bits": 3, "group_size": 16}]}]
WEIGHTS = "model.safetensors"


def packed(folder: Path, form: str) -> Path:
    if form == "fp8":
        return store(folder, lambda weight: fp8(weight, (16, 16)), quant_method="fp8", weight_block_size=[16, 16])
    entries = scheme(form)
    if form == "W4A16":
        entries["weights"]["group_size"] = 16
    kind = "pack-quantized" if form == "W4A16" else "float-quantized"
    settings: dict[str, Any] = {"config_groups": {"one": entries}, "format": kind, "ignore": ["lm_head"]}
    settings |= {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    return store(folder, by_compressed_tensors(entries), **settings)


@pytest.mark.parametrize(
    "form",
    tiered_nightly(
        ["fp8", "W4A16", "FP8_DYNAMIC", "pickled", "wrapped", "adapter"], {"fp8", "W4A16", "adapter"}.__contains__
    ),
)
def test_a_teacher_of_another_form_teaches_as_its_numbers(form: str, tmp_path: Path) -> None:
    place = miniature.make(tmp_path / "place", RULES)
    teacher = shutil.copytree(place / "dense", tmp_path / "teacher")
    if form == "adapter":
        teacher = adapted(place / "dense", tmp_path / "adapter")
    elif form == "pickled":
        torch.save(load_file(teacher / WEIGHTS), teacher / "pytorch_model.bin")
        (teacher / WEIGHTS).unlink()
    elif form == "wrapped":
        tensors = {f"_orig_mod.{name}": value for name, value in load_file(teacher / WEIGHTS).items()}
        save_file(tensors, teacher / WEIGHTS, metadata={"format": "pt"})
    else:
        packed(teacher, form)
    plain, source = shutil.copytree(place / "dense", tmp_path / "plain"), resolve(teacher)
    save_file({name: source.read(name) for name in source.tensors}, plain / WEIGHTS, metadata={"format": "pt"})
    recipe = miniature.recipe(place, steps=2, evaluate_every=1)
    first, second = (distill(place / "small", each, recipe, tmp_path / f"by-{each.name}") for each in (teacher, plain))
    assert [row["kl"] for row in first.history] == pytest.approx([row["kl"] for row in second.history], rel=1e-4)
    if form in ("wrapped", "adapter"):
        with pytest.raises(InputError, match="cannot be quantized while it is loaded; save it as a plain model first"):
            distill(place / "small", teacher, recipe | {"teacher": {"bits": 8}}, tmp_path / "quantized")


def test_a_teacher_that_is_loaded_again_has_its_numbers(tmp_path: Path) -> None:
    """FP8 that rounds inputs, whose matrices would be codes: the cached teacher of a start at the residual."""
    place = locate(packed(save_tiny("llama", tmp_path / "fp8"), "FP8_DYNAMIC"))
    gone = HeldOutTeacher(tiny("llama"), ())
    run: Any = SimpleNamespace(
        teacher=gone, teacher_place=place, accelerator=SimpleNamespace(device="cpu"), dtype=torch.float32
    )
    source, model = resolve(place.folder), TrainContext.dense_teacher(run)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), source.read(name).float())


def test_an_adapter_is_part_of_what_identifies_a_teacher(tmp_path: Path) -> None:
    place = miniature.make(tmp_path / "place", RULES)
    folder = adapted(place / "dense", tmp_path / "adapter")
    found = locate(folder)
    digests = [teacher_digest(found.folder), teacher_digest(found.folder, found.adapter)]
    change_json(folder / "adapter_config.json", lora_alpha=6)
    assert len({*digests, teacher_digest(found.folder, found.adapter)}) == 3
