"""The parts of a training that DeepSpeed shares out, without processes (`test_processes` has them): pieces of
parameters, the precision of products, and which of its ways are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from llmcompress.distillation.parallel import launch
from llmcompress.distillation.parallel.deepspeed import gather_piece, run_in_precision, take_piece
from llmcompress.distillation.parallel.launch import check_experts, check_partitioning, check_sharding
from llmcompress.distillation.parallel.strategy import Strategy
from llmcompress.distillation.run import distill
from llmcompress.errors import RecipeError
from llmcompress.recipe.distillation import Distillation
from tests.distillation.test_processes import launch_environment, sharding


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (4, 3)])
def test_pieces_of_all_processes_are_the_whole(shape: tuple[int, ...]) -> None:
    processes, size = 3, 6
    parameter, value = nn.Parameter(torch.zeros(shape)), torch.randn(shape)
    each: list[Any] = [SimpleNamespace(num_processes=processes, process_index=number) for number in range(processes)]
    found = [take_piece(one, value, size) for one in each]
    assert [piece.shape for piece in found] == [(size,)] * processes
    gathering: Any = SimpleNamespace(gather=lambda piece: torch.cat(found))
    assert torch.equal(gather_piece(gathering, found[0], parameter), value)


@pytest.mark.parametrize("enabled", [False, True])
def test_products_keep_the_precision_at_hand(enabled: bool) -> None:
    def ending_autocast(run: Callable[[], Tensor]) -> Tensor:
        """As DeepSpeed calls its module."""
        with torch.autocast("cpu", enabled=False):
            return run()

    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        found = run_in_precision(ending_autocast, torch.device("cpu"), lambda: torch.ones(2, 2) @ torch.ones(2, 2))
    assert found.dtype == (torch.bfloat16 if enabled else torch.float32)


def test_a_step_without_a_finite_gradient_moves_nothing() -> None:
    parameter = nn.Parameter(torch.ones(2))
    student: Any = SimpleNamespace(named_parameters=lambda: {"weight": parameter}, relaxed={})
    alone: Any = SimpleNamespace(num_processes=1)
    strategy = Strategy(alone, student, Any, nn.Identity(), torch.optim.AdamW([parameter], lr=0.1))
    parameter.grad = torch.tensor([1.0, math.inf])
    assert strategy.step(1.0) == math.inf
    assert torch.equal(parameter, torch.ones(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert strategy.step(1.0) == 5
    assert bool((parameter < 1).all())


def accelerator(plugin: Any, distributed_type: DistributedType = DistributedType.DEEPSPEED) -> Any:
    """As much of an Accelerator that has DeepSpeed as is asked."""
    return SimpleNamespace(distributed_type=distributed_type, state=SimpleNamespace(deepspeed_plugin=plugin))


def test_the_recipes_micro_batch_is_set_in_deepspeeds_config(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launch_environment("deepspeed.yaml", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4").items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    check_partitioning(accelerator(plugin), Distillation(batch=6, micro_batch=3))
    assert plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == 3
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == 1
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0", "zero_stage: 0"),
        (
            "ACCELERATE_DEEPSPEED_ZERO_STAGE",
            "3",
            "zero_stage: 3; .* or with fsdp2.yaml beside it, which shares out the models",
        ),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer_device: cpu"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device: cpu"),
    ],
)
def test_other_ways_of_deepspeed_are_refused(
    name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, usual in launch_environment("deepspeed.yaml", **{name: value}).items():
        monkeypatch.setenv(key, usual)
    with pytest.raises(RecipeError, match=sentence):
        check_partitioning(accelerator(DeepSpeedPlugin()), Distillation())


def test_moments_in_blocks_are_not_shared_out() -> None:
    with pytest.raises(RecipeError, match="optimizer: adamw_8bit keeps moments in blocks of whole tensors"):
        check_partitioning(accelerator(DeepSpeedPlugin(zero_stage=2)), Distillation(optimizer="adamw_8bit"))
    with pytest.raises(RecipeError, match="optimizer: adamw_8bit keeps moments in blocks of whole tensors"):
        check_sharding(sharding(FullyShardedDataParallelPlugin(fsdp_version=2)), Distillation(optimizer="adamw_8bit"))


def test_codes_are_not_frozen_in_pieces() -> None:
    recipe = Distillation(rates={"codes": 1e-3}, freezing={})
    with pytest.raises(RecipeError, match="freezing removes gradients of single codes"):
        check_partitioning(accelerator(DeepSpeedPlugin(zero_stage=2)), recipe)


def test_experts_do_not_train_in_pieces() -> None:
    with pytest.raises(RecipeError, match="mixes gradients of experts where processes reach different ones; launch"):
        check_experts(accelerator(DeepSpeedPlugin(zero_stage=2)))


def test_deepspeed_is_for_gpus() -> None:
    with pytest.raises(RecipeError, match="DeepSpeed, which Accelerate does on GPUs only; choose --device cuda"):
        check_partitioning(accelerator(None, DistributedType.MULTI_CPU), Distillation())


@pytest.mark.parametrize(
    "installed, environment, sentence",
    [
        (False, {}, r'DeepSpeed, which is not installed; run pip install "llmcompress\[deepspeed\]"'),
        (True, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}, "leave deepspeed_config_file out"),
    ],
)
def test_deepspeed_settings_are_checked_before_models_load(
    installed: bool, environment: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (environment | {"ACCELERATE_USE_DEEPSPEED": "true"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "find_spec", lambda name: name if installed else None)
    with pytest.raises(RecipeError, match=sentence):
        distill(tmp_path / "absent", tmp_path / "absent", {"version": 1}, tmp_path / "out")
