"""Functions of transformers and PEFT that take a payload for a matrix, replaced by ones that know payloads.

They are replaced once their modules are imported (`import_hooks.py`), since neither library has a hook for these
questions. PEFT's merges, and adapters that compute with a dense weight, are refused; `lora.fold` merges instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import signature
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from warnings import warn

import torch
from torch import nn

from llmcompress.errors import InputError, first_line, is_out_of_memory
from llmcompress.models.files.integrity import INDEX, RANK, files_beyond
from llmcompress.weight.modules import (
    CompressedEmbedding,
    CompressedLinear,
    CompressedModule,
    TiedMatrix,
    compressed_modules,
    put,
)

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer

BERTS_TABLE = "embeddings.word_embeddings"
FROM_WEIGHTS = ("pissa", "olora", "corda", "loftq")  # beginnings of `init_lora_weights` that factor the dense weight
UNSUITED = (AttributeError, IndexError, RuntimeError, TypeError)  # of a layer whose weight is no matrix


def mend_models() -> None:
    """Let the methods of transformers' models know payloads."""
    _count_in_transformers()
    _save_what_loads()
    _cast_what_is_dense()
    _resize_tables()
    _fetch_one_size()


def mend_trainer() -> None:
    """Let `Trainer`, and the trainers of TRL, know payloads."""
    _evaluate_in_trainer()
    from transformers.trainer import Trainer

    for name in ("train", "evaluate", "predict"):
        setattr(Trainer, name, _with_what_multiplies(getattr(Trainer, name)))


def mend_peft_models() -> None:
    """Let PEFT's models know payloads."""
    _count_in_peft()
    _find_tables_for_prompts()


def mend_peft_tuners() -> None:
    """Let PEFT's adapters know payloads."""
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import save_and_load

    save_and_load.get_embedding_layer_name = _without_payloads(save_and_load.get_embedding_layer_name)
    BaseTuner.inject_adapter = _with_trial(BaseTuner.inject_adapter)  # type: ignore[method-assign]
    BaseTuner._check_merge_allowed = _with_refusal(BaseTuner._check_merge_allowed)  # type: ignore[method-assign]


def uncounted_weights(model: nn.Module, exclude_embeddings: bool = False) -> int:
    """Return the weights of compressed modules beyond their payloads' bytes, which are counted as weights.

    A linear has as many as its dense form, whatever it has in common with others.
    """
    modules = {id(module.get_parameter("weight")): module for module in reversed(compressed_modules(model).values())}
    return sum(
        (0 if isinstance(module, TiedMatrix) else prod(module.layout.size)) - module.get_parameter("weight").numel()
        for module in modules.values()
        if not (exclude_embeddings and isinstance(module, nn.Embedding))
    )


def _count_in_transformers() -> None:
    """Let `model.num_parameters()` count weights."""
    from transformers.modeling_utils import PreTrainedModel

    count = PreTrainedModel.num_parameters

    @wraps(count)
    def num_parameters(self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        counted = count(self, only_trainable, exclude_embeddings)
        return counted if only_trainable else counted + uncounted_weights(self, exclude_embeddings)

    PreTrainedModel.num_parameters = num_parameters  # type: ignore[method-assign]


def _save_what_loads() -> None:
    """Let `save_pretrained` refuse a compressed model that a load would not give back, before it writes anything."""
    from transformers.modeling_utils import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    @wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        by_ours = type(vars(self).get("hf_quantizer")).__module__.startswith("llmcompress.")
        if not (by_ours or _is_ours(self)) or self._hf_peft_config_loaded:  # of one with adapters these alone are saved
            if not _is_ours(self) and _names_ours(self.config):
                vars(self.config).pop("quantization_config")  # a dense model, made from the config of a compressed one
            save(self, *args, **kwargs)
            return
        from llmcompress.models.transformers import saving  # other models are saved without it

        given = signature(save).bind(self, *args, **kwargs)
        given.arguments["save_original_format"] = False  # our files have the names of modules, whatever was loaded
        with saving.describe_while_saving(self, given.arguments.get("state_dict") or {}):
            save(*given.args, **given.kwargs)
        if given.arguments.get("is_main_process", True):
            saving.remove_stale_files(Path(given.arguments["save_directory"]))

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _cast_what_is_dense() -> None:
    """Let `model.half()` and `model.float()` cast what is dense, as `model.to(dtype)` does; payloads are bytes."""
    from transformers.modeling_utils import PreTrainedModel

    def with_ours(cast: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        return wraps(cast)(lambda model, *args: (plain if _is_ours(model) else cast)(model, *args))

    for name in ("half", "float"):
        setattr(PreTrainedModel, name, with_ours(getattr(PreTrainedModel, name), getattr(nn.Module, name)))


def _fetch_one_size() -> None:
    """Let a load at a RANK download and open those files alone that this size of the model is in."""
    from transformers import modeling_utils

    fetch = modeling_utils.get_checkpoint_shard_files

    @wraps(fetch)
    def get_checkpoint_shard_files(model: Any, index: Any, *args: Any, **kwargs: Any) -> Any:
        if not (beyond := files_beyond(Path(index).parent, RANK.get())):
            return fetch(model, index, *args, **kwargs)
        entries = json.loads(Path(index).read_text(encoding="utf-8"))
        entries["weight_map"] = {name: file for name, file in entries["weight_map"].items() if file not in beyond}
        with TemporaryDirectory() as folder:
            (smaller := Path(folder) / INDEX).write_text(json.dumps(entries), encoding="utf-8")
            return fetch(model, smaller, *args, **kwargs)

    modeling_utils.get_checkpoint_shard_files = get_checkpoint_shard_files  # type: ignore[assignment]


def _resize_tables() -> None:
    """Let `model.resize_token_embeddings` leave compressed tables alone, or make them dense to resize them."""
    from transformers.modeling_utils import PreTrainedModel

    resize = PreTrainedModel.resize_token_embeddings

    @wraps(resize)
    def resize_token_embeddings(
        self: PreTrainedModel,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        from llmcompress.models.transformers.dequantize import ready_to_resize

        if _is_ours(self) and not ready_to_resize(self, new_num_tokens, pad_to_multiple_of):
            return self.get_input_embeddings()
        return resize(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    PreTrainedModel.resize_token_embeddings = resize_token_embeddings  # type: ignore[method-assign]


def _count_in_peft() -> None:
    """Let `print_trainable_parameters()` of PEFT count weights."""
    from peft.peft_model import PeftModel

    count = PeftModel.get_nb_trainable_parameters

    @wraps(count)
    def get_nb_trainable_parameters(self: PeftModel) -> tuple[int, int]:
        trainable, everything = count(self)
        return trainable, everything + uncounted_weights(self)

    PeftModel.get_nb_trainable_parameters = get_nb_trainable_parameters  # type: ignore[method-assign]


def _find_tables_for_prompts() -> None:
    """Let PEFT, which looks for the token table by the shape of its weight, find a compressed one for its prompts."""
    from peft.peft_model import PeftModel

    setup = PeftModel._setup_prompt_encoder

    @wraps(setup)
    def setup_prompt_encoder(self: PeftModel, adapter_name: str) -> None:
        base: Any = self.base_model
        table = base.get_input_embeddings() if _is_ours(base) else None
        if not isinstance(table, CompressedEmbedding):
            return setup(self, adapter_name)
        find = base.get_submodule
        vars(base)["get_submodule"] = lambda name: table if name == BERTS_TABLE else find(name)  # the first name tried
        try:
            return setup(self, adapter_name)
        finally:
            del vars(base)["get_submodule"]

    PeftModel._setup_prompt_encoder = setup_prompt_encoder  # type: ignore[method-assign]


def _evaluate_in_trainer() -> None:
    """Let `Trainer` hold a compressed model without adapters, to evaluate it: it is refused when training begins."""
    from transformers import trainer

    if not hasattr(trainer, "validate_quantization_for_training"):  # another release, which checks elsewhere
        return
    validate, train = trainer.validate_quantization_for_training, trainer.Trainer.train

    @wraps(validate)
    def validate_later(model: Any) -> None:
        if not _is_ours(model):
            validate(model)

    @wraps(train)
    def train_validated(self: trainer.Trainer, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self.model):
            validate(self.model)
        return train(self, *args, **kwargs)

    trainer.validate_quantization_for_training = validate_later
    trainer.Trainer.train = train_validated  # type: ignore[method-assign]


def _with_what_multiplies(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of `Trainer` that runs compressed models on one device, with plain heads for trainers of TRL."""

    @wraps(method)
    def run(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.args.n_gpu > 1 and _is_ours(self.model):  # DataParallel's copies lack their payloads
            warn(
                f"one of {self.args.n_gpu} GPUs is used; start with torchrun or accelerate launch to use all",
                stacklevel=2,
            )
            self.args._n_gpu = 1
            self._train_batch_size = self.args.train_batch_size
        with _plain_heads(self):
            return method(self, *args, **kwargs)

    return run


@contextmanager
def _plain_heads(trainer: Trainer) -> Iterator[None]:
    """Give the models of a trainer of TRL plain heads inside the context."""
    with ExitStack() as plain:
        if any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
            from llmcompress.models.transformers.lora import plain_head

            held: Iterable[Any] = (vars(trainer).get(name) for name in ("model", "ref_model", "teacher_model"))
            for model in held:
                if _is_ours(model) and hasattr(model, "get_output_embeddings"):
                    plain.enter_context(plain_head(model))
        yield


def _with_refusal(check: Callable[[BaseTuner], None]) -> Callable[[BaseTuner], None]:
    """Return PEFT's check before a merge, extended to raise InputError for adapters on compressed weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    @wraps(check)
    def refuse_codes(tuner: BaseTuner) -> None:
        for name, module in tuner.model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), CompressedModule):
                raise InputError(
                    f"PEFT cannot merge an adapter into {name}, which is compressed; make plain LoRA part of the model "
                    "by llmcompress.fold, or save the adapter beside it"
                )
        check(tuner)

    return refuse_codes


def _with_trial(inject: Callable[..., None]) -> Callable[..., None]:
    """Return PEFT's injection, extended to raise InputError for adapters that compressed layers cannot have.

    One layer of each kind is tried on one token, so that a fault shows before training. The model is then as before.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    @wraps(inject)
    def inject_and_try(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not compressed_modules(model):
            return inject(tuner, model, adapter_name, *args, **kwargs)
        config = tuner.peft_config[adapter_name]
        _check_whole_modules(model, config)
        start = str(getattr(config, "init_lora_weights", ""))
        if start.startswith(FROM_WEIGHTS):
            raise _adapter_refusal(f"LoRA that starts from the weights ({start})", "they are codes")
        adapted = {id(module) for module in model.modules() if isinstance(module, BaseTunerLayer)}
        try:
            inject(tuner, model, adapter_name, *args, **kwargs)
            _try_layers(model, config.inference_mode)
        except UNSUITED as error:
            if is_out_of_memory(error):
                raise
            for name, module in list(model.named_modules()):
                if isinstance(module, BaseTunerLayer) and id(module) not in adapted:
                    put(model, name, module.get_base_layer())
            kind = type(config).__name__.removesuffix("Config")
            raise _adapter_refusal(f"{kind} adapters", first_line(error)) from error
        return None

    return inject_and_try


def _check_whole_modules(model: nn.Module, config: Any) -> None:
    """Raise InputError for a config that trains whole modules, or single tokens, that are codes."""
    tokens = getattr(config, "trainable_token_indices", None)
    wanted = {"modules_to_save": list(getattr(config, "modules_to_save", None) or ())}
    if isinstance(tokens, dict):
        wanted["trainable_token_indices"] = list(tokens)
    elif tokens is not None:
        table = model.get_input_embeddings()  # type: ignore[operator]
        wanted["trainable_token_indices"] = [name for name, module in model.named_modules() if module is table]
    for key, ends in wanted.items():
        for name, module in model.named_modules():
            if name.endswith(tuple(ends)) and compressed_modules(module):
                raise InputError(
                    f"{key}: {name} has compressed weights, and codes cannot be trained; adapt it by LoRA "
                    "(target_modules), or make the model dense by model.dequantize() first"
                )


def _adapter_refusal(what: str, reason: str) -> InputError:
    return InputError(
        f"PEFT cannot put {what} on compressed layers ({reason}); train plain LoRA, or make the model dense by "
        "model.dequantize() first"
    )


@torch.no_grad()
def _try_layers(model: nn.Module, frozen: bool) -> None:
    """Run one adapted compressed layer of each kind on one token, unless parts of it are on meta."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tried: set[type[nn.Module]] = set()
    for layer in model.modules():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if not isinstance(base, (CompressedLinear, CompressedEmbedding)) or type(layer) in tried:
            continue
        tried.add(type(layer))
        values = list(layer.parameters())
        if any(value.is_meta for value in values):
            continue
        if not frozen and not any(value.requires_grad for value in values):
            raise TypeError("nothing in it can be trained")
        dtype = next((value.dtype for value in values if value.is_floating_point()), torch.float32)
        training = layer.training
        layer.eval()  # without dropout, which would draw random numbers
        device = base.get_parameter("weight").device
        if isinstance(base, CompressedEmbedding):
            layer(torch.zeros(1, 1, dtype=torch.long, device=device))
        else:
            layer(torch.zeros(1, 1, base.in_features, dtype=dtype, device=device))
        layer.train(training)


def _without_payloads(name_of: Callable[..., str | None]) -> Callable[..., str | None]:
    """Return PEFT's name of a table to save beside an adapter, extended to return None for a compressed one."""

    @wraps(name_of)
    def name(model: nn.Module, layer: nn.Module, is_adapted: bool) -> str | None:
        is_payload = isinstance(getattr(layer, "base_layer", layer), CompressedModule)
        return None if is_payload else name_of(model, layer, is_adapted)

    return name


def _names_ours(config: PreTrainedConfig) -> bool:
    """True for the config of a compressed model."""
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return method == "llmcompress"


def _is_ours(model: Any) -> bool:
    return isinstance(model, nn.Module) and bool(compressed_modules(model))
