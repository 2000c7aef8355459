"""The refusal of what PEFT cannot do with compressed weights: merges, and adapters that compute with a dense weight.

It is imported together with PEFT's tuners (`import_hooks.py`). PEFT has no hook for others to forbid a merge or an
adapter, so its check and its injection are replaced by ones that know codes. `lora.fold` is the merge that works.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import save_and_load
from torch import nn

from llmcompress.errors import InputError, first_line, is_out_of_memory
from llmcompress.weight.modules import CompressedEmbedding, CompressedLinear, CompressedModule, compressed_modules, put

FROM_WEIGHTS = ("pissa", "olora", "corda", "loftq")  # beginnings of `init_lora_weights` that factor the dense weight
UNSUITED = (AttributeError, IndexError, RuntimeError, TypeError)  # of a layer whose weight is no matrix


def knowing_codes(allowed: Callable[[BaseTuner], None]) -> Callable[[BaseTuner], None]:
    """Return PEFT's check before a merge, extended to raise InputError for adapters on compressed weights."""

    @wraps(allowed)
    def check(tuner: BaseTuner) -> None:
        for name, module in tuner.model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), CompressedModule):
                raise InputError(
                    f"PEFT cannot merge an adapter into {name}, which is compressed; make plain LoRA part of the model "
                    "by llmcompress.fold, or save the adapter beside it"
                )
        allowed(tuner)

    return check


def trying_layers(inject: Callable[..., None]) -> Callable[..., None]:
    """Return PEFT's injection, extended to raise InputError for adapters that compressed layers cannot have.

    One layer of each kind is tried on one token, so that nobody finds out in training. The model is then as before.
    """

    @wraps(inject)
    def checked(tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not compressed_modules(model):
            return inject(tuner, model, adapter_name, *args, **kwargs)
        config = tuner.peft_config[adapter_name]
        _check_whole_modules(model, config)
        start = str(getattr(config, "init_lora_weights", ""))
        if start.startswith(FROM_WEIGHTS):
            raise InputError(_refusal(f"LoRA that starts from the weights ({start})", "they are codes"))
        adapted = {id(module) for module in model.modules() if isinstance(module, BaseTunerLayer)}
        try:
            inject(tuner, model, adapter_name, *args, **kwargs)
            _try(model, config.inference_mode)
        except UNSUITED as error:
            if is_out_of_memory(error):
                raise
            for name, module in list(model.named_modules()):
                if isinstance(module, BaseTunerLayer) and id(module) not in adapted:
                    put(model, name, module.get_base_layer())
            kind = type(config).__name__.removesuffix("Config")
            raise InputError(_refusal(f"{kind} adapters", first_line(error))) from error
        return None

    return checked


def _check_whole_modules(model: nn.Module, config: Any) -> None:
    """Raise InputError for a config that trains whole modules, or single tokens, where there are codes."""
    tokens = getattr(config, "trainable_token_indices", None)
    asked = {"modules_to_save": list(getattr(config, "modules_to_save", None) or ())}
    if isinstance(tokens, dict):
        asked["trainable_token_indices"] = list(tokens)
    elif tokens is not None:
        table = model.get_input_embeddings()  # type: ignore[operator]
        asked["trainable_token_indices"] = [name for name, module in model.named_modules() if module is table]
    for key, ends in asked.items():
        for name, module in model.named_modules():
            if name.endswith(tuple(ends)) and compressed_modules(module):
                raise InputError(
                    f"{key}: {name} has compressed weights, and codes cannot be trained; adapt it by LoRA "
                    "(target_modules), or make the model dense by model.dequantize() first"
                )


def _refusal(what: str, reason: str) -> str:
    return (
        f"PEFT cannot put {what} on compressed layers ({reason}); train plain LoRA, or make the model dense by "
        "model.dequantize() first"
    )


@torch.no_grad()
def _try(model: nn.Module, frozen: bool) -> None:
    """Run one adapted compressed layer of each kind on one token, unless parts of it are on meta."""
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


def without_payloads(name_of: Callable[..., str | None]) -> Callable[..., str | None]:
    """Return PEFT's name of a table that it would save beside an adapter, None for one that the adapter left alone
    because it is compressed."""

    @wraps(name_of)
    def name(model: nn.Module, layer: nn.Module, is_adapted: bool) -> str | None:
        is_payload = isinstance(getattr(layer, "base_layer", layer), CompressedModule)
        return None if is_payload else name_of(model, layer, is_adapted)

    return name


save_and_load.get_embedding_layer_name = without_payloads(save_and_load.get_embedding_layer_name)
BaseTuner.inject_adapter = trying_layers(BaseTuner.inject_adapter)  # type: ignore[method-assign]
BaseTuner._check_merge_allowed = knowing_codes(BaseTuner._check_merge_allowed)  # type: ignore[method-assign]
