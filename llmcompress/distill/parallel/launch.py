"""The processes that train together, as `accelerate launch` or torchrun started them and an Accelerate config says.

Everything comes from the environment that a launcher sets; what could not be right is refused here, before any model is
read.
"""

from __future__ import annotations

import os
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
    patch_environment,
)
from torch.distributed.fsdp import CPUOffloadPolicy

from llmcompress.data.calibration import held_out_count
from llmcompress.distill.metrics import tracking
from llmcompress.distill.ready import check_ready
from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.distillation import Distillation
from llmcompress.runtime.devices import check_each, is_at, kind_of

FOREIGN = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
SHARDING = "ACCELERATE_USE_FSDP"
PARTITIONING = "ACCELERATE_USE_DEEPSPEED"
ZERO_STAGES = (1, 2)
WRITING = timedelta(days=7)  # how long processes wait for the one that caches the teacher; if it fails, they all end


def launched_accelerator(device: str, recipe: Distillation, output: Path) -> Accelerator:
    """The processes that a launcher started, or this one alone, on devices of the kind of `device`; files of trackers
    are to lie beside `output`.

    The recipe says what is computed in which precision, so a `mixed_precision` of the launcher changes nothing. Raises
    RecipeError as `check_ready` does, for a device that is not there, for an engine that cannot do it and where a batch
    cannot be shared, InputError for too little data.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    place = kind_of(device, processes)
    check_ready(recipe, device)
    for variable, name in FOREIGN.items():
        if _is_on(variable):
            raise RecipeError(
                f"{name} would keep what trains in a form of its own, where latents cannot be confined nor a state be "
                f"kept; launch with configs/accelerate/fsdp2.yaml, which shards, or ddp.yaml"
            )
    if _is_on(PARTITIONING):
        _check_deepspeed()
    _check_shares(recipe, processes)
    # packed codes are equal from the start
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if recipe.teacher.kind == "cached":
        handlers.append(InitProcessGroupKwargs(timeout=WRITING))
    named = {"ACCELERATE_TORCH_DEVICE": device} if "LOCAL_RANK" not in os.environ else {}  # else it gives one to each
    with patch_environment(**named):
        accelerator = Accelerator(
            cpu=place.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=handlers,
            **tracking(recipe, output),
        )
    check_each(accelerator.num_processes, processes, device)
    if not is_at(accelerator.device, place):
        raise RecipeError(
            f"Accelerate computes on {accelerator.device} in this Python process already, not on {device}; start the "
            f"distillation in a process of its own"
        )
    if _is_on(SHARDING):
        check_sharding(accelerator, recipe)
    if _is_on(PARTITIONING):
        check_partitioning(accelerator, recipe)
    return accelerator


def partitioned(accelerator: Accelerator) -> bool:
    """Whether every process is to hold whole models, and a share of the optimizer's part."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def sharded(accelerator: Accelerator) -> bool:
    """Whether every process is to hold a share of the models only."""
    return bool(accelerator.is_fsdp2)


def loading_device(accelerator: Accelerator) -> str:
    """Where models are read to: the process's own device, or the host's memory, from where shares are handed out."""
    return "cpu" if sharded(accelerator) else str(accelerator.device)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _check_deepspeed() -> None:
    if find_spec("deepspeed") is None:
        raise RecipeError(
            'the launcher asks for DeepSpeed, which is not installed; run pip install "llmcompress[deepspeed]", or '
            "launch with configs/accelerate/fsdp2.yaml or ddp.yaml"
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise RecipeError(
            "a distillation sets DeepSpeed up itself; leave deepspeed_config_file out of the launcher's config, as in "
            "configs/accelerate/deepspeed.yaml"
        )


def _refuse(settings: dict[str, bool], instead: str) -> None:
    """Raises RecipeError for the first of a launcher's settings that is there."""
    for setting, there in settings.items():
        if there:
            raise RecipeError(f"a distillation cannot run with {setting}; launch with configs/accelerate/{instead}")


def _check_whole_moments(recipe: Distillation) -> None:
    if recipe.optimizer != "adamw":
        raise RecipeError(
            f"optimizer: {recipe.optimizer} keeps moments in blocks of whole tensors, which cannot be shared out; use "
            f"adamw, or launch with configs/accelerate/ddp.yaml"
        )


def _check_shares(recipe: Distillation, processes: int) -> None:
    for _, stage in recipe.stages():
        if processes > stage.batch:
            raise RecipeError(
                f"{processes} processes are more than the {stage.batch} sequences of a batch; start fewer, or raise "
                f"batch"
            )
        if stage.batch % (stage.micro_batch * processes):
            raise RecipeError(
                f"batch {stage.batch} cannot be shared by {processes} processes in parts of micro_batch "
                f"{stage.micro_batch}; choose a multiple of their product"
            )
    sources = recipe.data if isinstance(recipe.data, tuple) else (recipe.data,)
    counts = [source.samples - held_out_count(source.held_out, source.samples) for source in sources]
    check_enough(sum(counts), recipe)


def check_enough(sequences: int, recipe: Distillation) -> None:
    """Raises InputError where `sequences` to train on do not fill a batch, so that a process could be left without."""
    batch = max(stage.batch for _, stage in recipe.stages())
    if sequences < batch:
        raise InputError(f"{sequences} sequences are too few for a batch of {batch}; use more data or a smaller batch")


def check_sharding(accelerator: Accelerator, recipe: Distillation) -> None:
    """Raises RecipeError unless it is FSDP2 in the form that is known to be right, for one phase of training."""
    if accelerator.distributed_type != DistributedType.FSDP:
        raise RecipeError(
            "the launcher asks for FSDP, which Accelerate does on GPUs only; choose --device cuda, or launch with "
            "configs/accelerate/cpu-ddp.yaml"
        )
    plugin = accelerator.state.fsdp_plugin
    refused = {
        "fsdp_version: 1": plugin.fsdp_version != 2,
        "fsdp_cpu_ram_efficient_loading: true": plugin.cpu_ram_efficient_loading,
        "fsdp_offload_params: true": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: true": plugin.activation_checkpointing,
    }
    _refuse(refused, "fsdp2.yaml (activations are computed again where the recipe says checkpointing: true)")
    _check_whole_moments(recipe)
    if any(stage.scales == "median" for _, stage in recipe.stages()):
        raise RecipeError(
            "scales: median is of groups of latents, which shares would cut apart; use learned, or launch with "
            "configs/accelerate/ddp.yaml"
        )
    if recipe.teacher.kind == "cached":
        raise RecipeError(
            "models that are shared out read in step, while a teacher is cached by one process alone; use `teacher: "
            "{kind: online}`, or launch with configs/accelerate/ddp.yaml"
        )
    if recipe.teacher.bits is not None:
        raise RecipeError(
            f"teacher: {{bits: {recipe.teacher.bits}}} is held whole by every process, which models that are shared "
            f"out are not; leave bits out, or launch with configs/accelerate/ddp.yaml"
        )
    if len(recipe.stages()) > 1 or any(s.adapt and s.adapt.factor_bits < 16 for _, s in recipe.stages()):
        raise RecipeError(
            "models that were shared out cannot run any more after a phase, so neither can other phases, nor factors "
            "be rounded; give each phase a recipe of its own, and factor_bits: 16"
        )


def check_partitioning(accelerator: Accelerator, recipe: Distillation) -> None:
    """Raises RecipeError unless it is DeepSpeed's ZeRO in a form that is known to be right.

    Tells DeepSpeed what a recipe decides and it would guess: how many sequences it is given at once.
    """
    if not partitioned(accelerator):
        raise RecipeError(
            "the launcher asks for DeepSpeed, which Accelerate does on GPUs only; choose --device cuda, or launch with "
            "configs/accelerate/cpu-ddp.yaml"
        )
    plugin = accelerator.state.deepspeed_plugin
    refused = {
        f"zero_stage: {plugin.zero_stage}": plugin.zero_stage not in ZERO_STAGES,
        f"offload_optimizer_device: {plugin.offload_optimizer_device}": plugin.offload_optimizer_device != "none",
        f"offload_param_device: {plugin.offload_param_device}": plugin.offload_param_device != "none",
    }
    _refuse(refused, "deepspeed.yaml, or with fsdp2.yaml, which shares out the models too")
    _check_whole_moments(recipe)
    if any(stage.freezing is not None for _, stage in recipe.stages()):
        raise RecipeError(
            "freezing takes gradients of single codes away, which DeepSpeed keeps in pieces of its own; leave it out, "
            "or launch with configs/accelerate/fsdp2.yaml or ddp.yaml"
        )
    settings = {"train_micro_batch_size_per_gpu": recipe.micro_batch, "gradient_accumulation_steps": 1}
    plugin.deepspeed_config.update(settings)
