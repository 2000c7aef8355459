"""LoRA adapters of PEFT on a compressed model: training them, and folding them into the weights as low-rank terms.

Folding is exact, unlike a merge into codes.

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
    """Replace a compressed output head, inside the context, by a frozen linear with the decoded `weight`.

    It is for trainers that multiply by `lm_head.weight` instead of calling the head, such as TRL's. Adapters may be
    saved inside the context, the model only after it.

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
        put(model, name, head)


def fold(model: PeftModel) -> PreTrainedModel:
    """Fold the active LoRA adapter into the compressed weights, as low-rank terms in the adapter's own dtype.

    Args:
        model: A PEFT model around a compressed model. It must not be used afterwards.

    Returns:
        The model below, whose compressed weights include the adapter.

    Raises:
        InputError: The adapter is not plain LoRA on compressed linears, or touches no layer.
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
    known = base.config.quantization_config
    base.config.quantization_config = LLMCompressConfig(**table_entry(table, known.sizes, known.ties))
    found: PreTrainedModel = base
    return found


def _term(name: str, module: Any, adapter: str) -> LowRank:
    """Return the term that a LoRA layer adds: `B A` times its scaling."""
    if not isinstance(module.get_base_layer(), CompressedLinear):
        raise InputError(f"{name} is not compressed; merge adapters of dense layers with PEFT's merge_and_unload")
    if adapter not in module.lora_A or getattr(module, "use_dora", {}).get(adapter) or module.lora_bias.get(adapter):
        raise InputError(f"{name}: only plain LoRA can be folded (no DoRA, no bias); keep the adapter beside the model")
    right: Tensor = module.lora_A[adapter].weight.detach()
    left: Tensor = module.lora_B[adapter].weight.detach() * module.scaling[adapter]
    return LowRank(Dense(left.clone()), Dense(right.clone()))
