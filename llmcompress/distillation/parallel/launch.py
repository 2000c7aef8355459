"""The processes that train together, as `accelerate launch` or torchrun started them: their settings, which come from
the environment alone, and the refusal of settings that cannot work, before any model is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
    patch_environment,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from llmcompress.data.calibration import held_out_count
from llmcompress.distillation.metrics import tracker_arguments
from llmcompress.distillation.requirements import check_requirements
from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.library import library_folder
from llmcompress.runtime.devices import check_each, is_at, kind_of

FOREIGN = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
SHARDING = "ACCELERATE_USE_FSDP"
PARTITIONING = "ACCELERATE_USE_DEEPSPEED"
LAUNCHED = {"LOCAL_RANK", "WORLD_SIZE"}  # variables that launchers set
STATES = (AcceleratorState, GradientState, PartialState)
ZERO_STAGES = (1, 2)
PATIENCE = timedelta(days=7)  # of the processes that wait for the one that caches the teacher; if it fails, all end


def config_file(name: str) -> Path:
    """Return the Accelerate config `name` of the clone or of the installed package."""
    return library_folder() / "accelerate" / name


@contextmanager
def own_accelerate() -> Iterator[None]:
    """Give a process that no launcher started a state of Accelerate's of its own, and put back the one from before.

    The state belongs to the whole of Python: a trainer of before has set a device and a precision, and one of
    afterwards would find ours.
    """
    if LAUNCHED & os.environ.keys():
        yield
        return
    kept = [(state._shared_state, dict(state._shared_state)) for state in STATES]
    for shared, _ in kept:
        shared.clear()
    try:
        yield
    finally:
        for shared, before in kept:
            shared.clear()
            shared.update(before)


def launched_accelerator(device: str, recipe: Distillation, output: Path) -> Accelerator:
    """Return the processes that a launcher started, or this one alone, on devices of the kind of `device`. Files of
    trackers go beside `output`.

    The recipe sets the precision, so a `mixed_precision` of the launcher changes nothing. Raises RecipeError as
    `check_requirements` does, for a missing device, for unsuitable settings and for a batch that the processes cannot
    share, and InputError for too little data.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    place = kind_of(device, processes)
    check_requirements(recipe, device)
    for variable, name in FOREIGN.items():
        if _is_on(variable):
            raise RecipeError(
                f"{name} would keep parameters in a form of its own, in which latents cannot be clamped nor a state be "
                f"saved; launch with {config_file('fsdp2.yaml')}, which shards, or ddp.yaml beside it"
            )
    if _is_on(PARTITIONING):
        _check_deepspeed()
    _check_shares(recipe, processes)
    # packed codes are equal from the start
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if recipe.teacher.kind == "cached":
        handlers.append(InitProcessGroupKwargs(timeout=PATIENCE))
    # a launcher gives each process a device
    named = {"ACCELERATE_TORCH_DEVICE": device} if "LOCAL_RANK" not in os.environ else {}
    with patch_environment(**named):
        accelerator = Accelerator(
            cpu=place.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=handlers,
            **tracker_arguments(recipe, output),
        )
    accelerator.wait_for_everyone()  # a process that refuses at once would be gone before the others meet it
    check_each(accelerator.num_processes, processes, device)
    if not is_at(accelerator.device, place):
        raise RecipeError(
            f"Accelerate already computes on {accelerator.device} in this Python process, not on {device}; start the "
            f"distillation in a process of its own"
        )
    if _is_on(SHARDING):
        check_sharding(accelerator, recipe)
    if _is_on(PARTITIONING):
        check_partitioning(accelerator, recipe)
    return accelerator


def is_partitioned(accelerator: Accelerator) -> bool:
    """True if every process holds whole models and a share of the optimizer's state."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def is_sharded(accelerator: Accelerator) -> bool:
    """True if every process holds only a share of the models."""
    return bool(accelerator.is_fsdp2)


def loading_device(accelerator: Accelerator) -> str:
    """Return the device to load models on: the process's own, or the host's if the models are sharded."""
    return "cpu" if is_sharded(accelerator) else str(accelerator.device)


def receives_shares(accelerator: Accelerator) -> bool:
    """True if this process receives its shares of the models from the first one, and needs no whole model."""
    return is_sharded(accelerator) and not accelerator.is_main_process


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _check_deepspeed() -> None:
    if find_spec("deepspeed") is None:
        raise RecipeError(
            'the launcher asks for DeepSpeed, which is not installed; run pip install "llmcompress[deepspeed]", or '
            f"launch with {config_file('fsdp2.yaml')} or ddp.yaml beside it"
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise RecipeError(
            "a distillation sets DeepSpeed up itself; leave deepspeed_config_file out of the launcher's config, as in "
            f"{config_file('deepspeed.yaml')}"
        )


def _refuse(settings: dict[str, bool], instead: str) -> None:
    """Raise RecipeError for the first of a launcher's settings that is on."""
    for setting, on in settings.items():
        if on:
            raise RecipeError(f"a distillation cannot run with {setting}; launch with {instead}")


def _check_whole_moments(recipe: Distillation) -> None:
    if recipe.optimizer != "adamw":
        raise RecipeError(
            f"optimizer: {recipe.optimizer} keeps moments in blocks of whole tensors, which cannot be shared out; use "
            f"adamw, or launch with {config_file('ddp.yaml')}"
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
    """Raise InputError if the training `sequences` do not fill a batch, which could leave a process without any."""
    batch = max(stage.batch for _, stage in recipe.stages())
    if sequences < batch:
        raise InputError(f"{sequences} sequences are too few for a batch of {batch}; use more data or a smaller batch")


def check_sharding(accelerator: Accelerator, recipe: Distillation) -> None:
    """Raise RecipeError unless the launcher's sharding is FSDP2 as tested, for one phase of training."""
    if accelerator.distributed_type != DistributedType.FSDP:
        raise RecipeError(
            "the launcher asks for FSDP, which Accelerate does on GPUs only; choose --device cuda, or launch with "
            f"{config_file('cpu-ddp.yaml')}"
        )
    plugin = accelerator.state.fsdp_plugin
    refused = {
        "fsdp_version: 1": plugin.fsdp_version != 2,
        "fsdp_cpu_ram_efficient_loading: true": plugin.cpu_ram_efficient_loading,
        "fsdp_offload_params: true": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: true": plugin.activation_checkpointing,
    }
    _refuse(refused, f"{config_file('fsdp2.yaml')} (checkpointing: true in the recipe recomputes activations)")
    _check_whole_moments(recipe)
    if any(stage.scales == "median" for _, stage in recipe.stages()):
        raise RecipeError(
            "scales: median requires whole groups of latents, which shares would split; use learned, or launch with "
            f"{config_file('ddp.yaml')}"
        )
    if recipe.teacher.kind == "cached":
        raise RecipeError(
            "models that are shared out run in all processes at once, but a single process caches a teacher; use "
            f"`teacher: {{kind: online}}`, or launch with {config_file('ddp.yaml')}"
        )
    if recipe.teacher.bits is not None:
        raise RecipeError(
            f"teacher: {{bits: {recipe.teacher.bits}}} requires a whole teacher in every process, and these share it "
            f"out; leave bits out, or launch with {config_file('ddp.yaml')}"
        )
    if len(recipe.stages()) > 1 or any(s.adapt and s.adapt.factor_bits < 16 for _, s in recipe.stages()):
        raise RecipeError(
            "models that were shared out cannot run after a phase, so no other phase can follow and no factors can be "
            "rounded; give each phase a recipe of its own, and factor_bits: 16"
        )


def check_experts(accelerator: Accelerator) -> None:
    """Raise RecipeError for processes that cannot train a mixture, since a step's text may reach experts in one alone.

    DeepSpeed joins the gradients that a process has; so does FSDP2 of a torch without the method that is asked for.
    """
    joins = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
    if is_partitioned(accelerator) or (is_sharded(accelerator) and not joins):
        raise RecipeError(
            "the launcher's way to share work mixes gradients of experts where processes reach different ones; launch "
            f"with {config_file('ddp.yaml')}, or with fsdp2.yaml beside it and the newest torch"
        )


def check_partitioning(accelerator: Accelerator, recipe: Distillation) -> None:
    """Raise RecipeError unless the launcher's DeepSpeed is ZeRO as tested; set the recipe's micro-batch in its config,
    which would guess it otherwise."""
    if not is_partitioned(accelerator):
        raise RecipeError(
            "the launcher asks for DeepSpeed, which Accelerate does on GPUs only; choose --device cuda, or launch with "
            f"{config_file('cpu-ddp.yaml')}"
        )
    plugin = accelerator.state.deepspeed_plugin
    refused = {
        f"zero_stage: {plugin.zero_stage}": plugin.zero_stage not in ZERO_STAGES,
        f"offload_optimizer_device: {plugin.offload_optimizer_device}": plugin.offload_optimizer_device != "none",
        f"offload_param_device: {plugin.offload_param_device}": plugin.offload_param_device != "none",
    }
    _refuse(refused, f"{config_file('deepspeed.yaml')}, or with fsdp2.yaml beside it, which shares out the models too")
    _check_whole_moments(recipe)
    if any(stage.freezing is not None for _, stage in recipe.stages()):
        raise RecipeError(
            "freezing removes gradients of single codes, which DeepSpeed keeps in pieces of its own; leave it out, or "
            f"launch with {config_file('fsdp2.yaml')} or ddp.yaml beside it"
        )
    if recipe.balance:
        raise RecipeError(
            "balance measures whole gradients, which DeepSpeed keeps in pieces of its own; leave it out, or launch "
            f"with {config_file('fsdp2.yaml')} or ddp.yaml beside it"
        )
    settings = {"train_micro_batch_size_per_gpu": recipe.micro_batch, "gradient_accumulation_steps": 1}
    plugin.deepspeed_config.update(settings)
