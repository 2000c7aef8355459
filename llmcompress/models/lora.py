"""Adapters of PEFT on a compressed model: trained by trainers that read the head's matrix, and folded into the weights
as low-rank terms, exactly, unlike a merge into codes.

with lc.plain_head(model):
    trainer = SFTTrainer(model, peft_config=LoraConfig(...), ...)
    trainer.train()
model = lc.fold(trainer.model)
model.save_pretrained("folded")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.models.hf_quantizer import LLMCompressConfig, table_entry
from llmcompress.weight.modules import CompressedLinear, compressed_linears, put
from llmcompress.weight.nodes import Dense, LowRank
from llmcompress.weight.sums import plus

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@contextmanager
def plain_head(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, a compressed output head is a linear whose `weight` is the decoded matrix, frozen.

    For trainers that multiply by that matrix themselves instead of calling the head, as TRL's do. Adapters may be saved
    meanwhile, the model only afterwards.
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
        put(model, name, head)


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
        folded = CompressedLinear.of(plus(layers[name].expression(), term), layers[name].bias)
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
