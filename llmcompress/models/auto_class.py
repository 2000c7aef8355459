"""The auto class of transformers that a checkpoint is loaded with: of language models, or of those that see or hear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def auto_class(config: PreTrainedConfig) -> Any:
    """Return `AutoModelForCausalLM`, or `AutoModelForMultimodalLM` for a checkpoint that is no plain language model."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    causal, multimodal = class_names(config)
    written = getattr(config, "architectures", None) or causal
    return AutoModelForMultimodalLM if multimodal and not set(written) & set(causal) else AutoModelForCausalLM


def class_names(config: PreTrainedConfig) -> tuple[list[str], list[str]]:
    """Return the classes that a model type has as a causal language model, and as one with images or sound."""
    from transformers.models.auto import modeling_auto

    tables = (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    found = [table.get(config.model_type) for table in tables]
    causal, multimodal = [[one] if isinstance(one, str) else list(one or ()) for one in found]
    return causal, multimodal
