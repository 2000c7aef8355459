"""Work that several processes cannot do is refused before a model is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from llmcompress.distillation.parallel.launch import config_file, launched_accelerator
from llmcompress.distillation.run import distill
from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.distillation import Distillation


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"WORLD_SIZE": "5"}, "5 processes are more than the 4 sequences of a batch"),
        ({"WORLD_SIZE": "4"}, "batch 4 cannot be shared by 4 processes in parts of micro_batch 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM would keep parameters in a form of its own"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP, which Accelerate does on GPUs only"),
    ],
)
def test_impossible_launch_is_refused(
    environment: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = {"version": 1, "batch": 4, "micro_batch": 2}
    with pytest.raises(RecipeError, match=sentence):
        distill(tmp_path / "absent", tmp_path / "absent", recipe, tmp_path / "out")


def test_too_little_data_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    data = {"dataset": "text.txt", "samples": 10, "held_out": 4, "length": 32}
    recipe = Distillation(data=data, batch=8, micro_batch=2)
    with pytest.raises(InputError, match="6 sequences are too few for a batch of 8"):
        launched_accelerator("cpu", recipe, tmp_path / "out")


@pytest.mark.parametrize("name", ["cpu-ddp.yaml", "ddp.yaml", "fsdp2.yaml", "deepspeed.yaml"])
def test_configs_named_in_errors_exist(name: str) -> None:
    assert config_file(name).is_file()
