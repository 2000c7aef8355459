"""The auto class of transformers that a checkpoint is loaded with, by the class that its config names.

That class may be one of language models, of those that see or hear, of encoders, of classifiers of text, or of bodies
without a head. Only the first two predict the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.models.dense.remote_code import AUTO_MAP

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CAUSAL, MULTIMODAL, MASKED = "AutoModelForCausalLM", "AutoModelForMultimodalLM", "AutoModelForMaskedLM"
BODY = "AutoModel"
HEADS = {  # auto class -> its table in transformers, the likelier first
    CAUSAL: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    MULTIMODAL: "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    MASKED: "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the auto class of a checkpoint."""
    import transformers

    return getattr(transformers, auto_name(config))


def auto_name(config: PreTrainedConfig) -> str:
    """Return the name of the auto class of a checkpoint: by its `architectures`, without them that of its likeliest
    task."""
    known, written = class_names(config), architectures(config)
    named = next((name for name, classes in known.items() if set(classes) & set(written)), None)
    if named is not None:
        return named
    return MULTIMODAL if MULTIMODAL in known and (written or CAUSAL not in known) else next(iter(known), CAUSAL)


def class_names(config: PreTrainedConfig) -> dict[str, list[str]]:
    """Return the classes of a model type, or of a model's own code, by auto class; bodies only of models of text."""
    from transformers.models.auto import modeling_auto

    own = getattr(config, AUTO_MAP, None)
    own = own if isinstance(own, dict) else {}
    found = {}
    for name, table in {**HEADS, BODY: "MODEL_MAPPING_NAMES"}.items():
        classes = getattr(modeling_auto, table).get(config.model_type) or ()
        coded = [str(own[name]).rpartition(".")[2]] if own.get(name) else []
        found[name] = [*([classes] if isinstance(classes, str) else classes), *coded]
    if not any(found[name] for name in HEADS):
        return {}
    return {name: classes for name, classes in found.items() if classes}


def architectures(config: PreTrainedConfig) -> Sequence[str]:
    """Return the class names that a config gives."""
    return getattr(config, "architectures", None) or []


def is_causal(config: PreTrainedConfig) -> bool:
    """True if a checkpoint predicts the next token."""
    return auto_name(config) in (CAUSAL, MULTIMODAL)


def check_causal(config: PreTrainedConfig, doing: str) -> None:
    """Raise InputError unless a checkpoint predicts the next token; `doing`: the beginning of the sentence."""
    if not is_causal(config):
        raise InputError(
            f"{doing} takes a model that predicts the next token, and a {architectures(config)[0]} does not; choose a "
            f"causal language model"
        )
