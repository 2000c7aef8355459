"""LoRA adapters of PEFT on a compressed model: training them, and folding them into the weights as low-rank terms.

Folding is exact, unlike a merge into codes.

trainer = SFTTrainer(model, peft_config=LoraConfig(...), ...)
trainer.train()
model = lc.fold(trainer.model)
model.save_pretrained("folded")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError, list_names
from llmcompress.models.transformers.dequantize import check_in_memory
from llmcompress.models.transformers.saving import describe_modules
from llmcompress.weight.algebra import add_term
from llmcompress.weight.modules import (
    CompressedEmbedding,
    CompressedLinear,
    CompressedModule,
    compressed_modules,
    multiplying,
    put,
    with_weight,
)
from llmcompress.weight.nodes import Dense, LowRank

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@contextmanager
def plain_head(model: PreTrainedModel) -> Iterator[None]:
    """Replace a compressed output head, inside the context, by a frozen linear with the decoded `weight`.

    It is for code that multiplies by `lm_head.weight` instead of calling the head; the trainers of TRL run in it by
    themselves. Adapters may be saved inside the context, the model only after it.

    Args:
        model: A compressed model, edited in place. One with a dense head stays as it is.

    Yields:
        Nothing; the head is put back in the end.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, CompressedLinear):
        yield
        return
    [name] = [name for name, module in model.named_modules() if module is head]
    plain = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
    dtype = model.get_input_embeddings()(torch.zeros(1, dtype=torch.long, device=head.W_q.device)).dtype
    plain.weight = nn.Parameter(head.dequantize().to(dtype), requires_grad=False)
    plain.bias = head.bias
    put(model, name, plain)
    try:
        yield
    finally:
        put(model, name, head.to(plain.weight.device))  # a trainer may have moved the rest


def fold(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Fold the active LoRA adapters into the compressed weights, as low-rank terms in the adapters' own dtype.

    What was adapted beside them becomes part of the model too: PEFT merges into dense layers, and modules that were
    trained whole take their places. A head that was tied to the token table has a matrix of its own afterwards, if
    one of both was adapted.

    Args:
        model: A compressed model with adapters, by PEFT's `get_peft_model` or its own `add_adapter`. It must not be
            used afterwards.

    Returns:
        The model below, whose weights include the adapters.

    Raises:
        InputError: The adapters of compressed layers are not plain LoRA, they are beside inputs that are rounded, or
            there are none; or the model is offloaded. Nothing is changed then.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    whole: Any = model
    base: Any = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    if not compressed_modules(base):
        raise InputError("the model is not compressed; merge adapters of dense layers with PEFT's merge_and_unload")
    adapters = _active(model)
    trained = {name: module for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}
    inside: set[nn.Module] = {part for wrapper in trained.values() for part in wrapper.modules()}
    adapted: dict[str, Any] = {
        name: module
        for name, module in base.named_modules()
        if module not in inside and isinstance(module, BaseTunerLayer)
    }
    known = [module._get_available_adapters() for module in (*adapted.values(), *trained.values())]
    if not set(adapters) & set().union(*known):
        raise InputError(
            f"the adapter {list_names(adapters)} touches no layer of the model; load the one that was trained"
        )
    check_in_memory(compressed_modules(base).values(), "take adapters in")
    terms = {name: _terms(name, module, adapters) for name, module in adapted.items()}
    fast: list[Any] = [layer.fast for layer in multiplying(base).values() if layer.fast is not None]
    for name, module in adapted.items():
        put(base, name, module.get_base_layer())  # which knows what it has in common with others
        put(base, name, _fold_layer(module, terms[name], adapters))
    for name, wrapper in trained.items():
        put(base, name, wrapper.unload_and_optionally_merge_module(True, False, adapters))
    vars(base).pop("peft_config", None)
    base._hf_peft_config_loaded = False
    _untie(base)
    base.config.quantization_config = base.hf_quantizer.quantization_config = describe_modules(base)
    if fast:
        from llmcompress.kernels.accelerate import accelerate  # a compiler is for those who run a model

        accelerate(base, fast[0].mode)  # the layers are new
    found: PreTrainedModel = base
    return found


def _active(model: Any) -> list[str]:
    """Return the names of the active adapters."""
    if not getattr(model, "peft_config", None):
        raise InputError("the model has no adapter; fold the one that PEFT's get_peft_model returned")
    active = model.active_adapters
    return list(active() if callable(active) else active)


def _terms(name: str, module: Any, adapters: Sequence[str]) -> list[LowRank]:
    """Return the terms that adapters add to a layer's compressed weight; none for a dense one."""
    from peft.tuners.lora import LoraLayer

    base = module.get_base_layer()
    if not isinstance(base, CompressedModule):
        return []
    if not isinstance(module, LoraLayer):
        raise InputError(f"{name}: only plain LoRA can be folded; keep the adapter beside the model")
    if base.layout.inputs is not None and set(adapters) & module.r.keys():
        raise InputError(
            f"{name}: its inputs are rounded, which the adapter's are not; keep the adapter beside the model"
        )
    return [_term(name, module, adapter) for adapter in adapters if adapter in module.r]


def _term(name: str, module: Any, adapter: str) -> LowRank:
    """Return the term that a LoRA layer adds: `B A` times its scaling, `A' B'` for the rows of a table."""
    if adapter in module.lora_variant or module.lora_bias.get(adapter):
        raise InputError(f"{name}: only plain LoRA can be folded (no DoRA, no bias); keep the adapter beside the model")
    if adapter in module.lora_embedding_A:
        left: Tensor = module.lora_embedding_A[adapter].detach().T
        right: Tensor = module.lora_embedding_B[adapter].detach().T
    else:
        left, right = module.lora_B[adapter].weight.detach(), module.lora_A[adapter].weight.detach()
    return LowRank(Dense((left * module.scaling[adapter]).contiguous()), Dense(right.clone().contiguous()))


def _fold_layer(module: Any, terms: Sequence[LowRank], adapters: Sequence[str]) -> nn.Module:
    """Return the layer below an adapted one, with its terms in its weight; a dense one as PEFT merges it."""
    layer: nn.Module = module.get_base_layer()
    if not isinstance(layer, (CompressedLinear, CompressedEmbedding)):
        layer.weight = nn.Parameter(layer.get_parameter("weight").detach().clone())  # that it may be tied to stays
        module.merge(adapter_names=list(adapters))
        return layer
    return with_weight(layer, reduce(add_term, terms, layer.expression())) if terms else layer


def _untie(model: PreTrainedModel) -> None:
    """Let the config of a model say that a head is its own, if it no longer has the matrix of the table."""
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    tensor = model.get_parameter_or_buffer
    if all(tensor(alias) is tensor(origin) for alias, origin in ties.items()):
        return
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
