"""Trained LoRA adapters of PEFT, folded into a compressed model as low-rank terms: exact, unlike a merge into codes.

model = lc.fold(peft_model)
model.save_pretrained("folded")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.hf import LLMCompressConfig, table_entry
from llmcompress.modules import CompressedLinear, compressed_linears, put
from llmcompress.weight import Dense, LowRank, Sum, Weight

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def fold(model: PeftModel) -> PreTrainedModel:
    """The model below, its active LoRA adapter now part of its compressed weights, stored in the adapter's own dtype.

    The PEFT model is used up. Raises InputError for adapters that are no plain LoRA on compressed linears.
    """
    from peft.tuners.lora import LoraLayer

    adapter = str(model.active_adapter)
    whole: nn.Module = model.get_base_model()
    adapted = {name: module for name, module in whole.named_modules() if isinstance(module, LoraLayer)}
    terms = {name: _term(name, module, adapter) for name, module in adapted.items()}
    if not terms:
        raise InputError(f"the adapter {adapter!r} touches no layer of the model; load the one that was trained")
    base: Any = model.unload()
    layers, table = compressed_linears(base), base.config.quantization_config.table()
    for name, term in terms.items():
        folded = CompressedLinear.of(_plus(layers[name].expression(), term), layers[name].bias)
        put(base, name, folded)
        table[name] = folded.layout
    base.config.quantization_config = LLMCompressConfig(**table_entry(table, base.config.quantization_config.sizes))
    found: PreTrainedModel = base
    return found


def _term(name: str, module: Any, adapter: str) -> LowRank:
    """What a LoRA layer adds, `B A` times its scaling."""
    if not isinstance(module.get_base_layer(), CompressedLinear):
        raise InputError(f"{name} is not compressed; merge adapters of dense layers with PEFT's merge_and_unload")
    if adapter not in module.lora_A or getattr(module, "use_dora", {}).get(adapter) or module.lora_bias.get(adapter):
        raise InputError(f"{name}: only plain LoRA can be folded (no DoRA, no bias); keep the adapter beside the model")
    right: Tensor = module.lora_A[adapter].weight.detach()
    left: Tensor = module.lora_B[adapter].weight.detach() * module.scaling[adapter]
    return LowRank(Dense(left.clone()), Dense(right.clone()))


def _plus(w: Weight, term: LowRank) -> Weight:
    return Sum((*w.parts, term)) if isinstance(w, Sum) else Sum((w, term))
