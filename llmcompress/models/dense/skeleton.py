"""The model that a config describes, without its weights, and the auto class of transformers that loads it.

A checkpoint may hold a language model, one that sees or hears, an encoder, a classifier of text, or a body without a
head. Only the first two predict the next token. `outline` is for configs that nothing vouches for: it allocates
nothing, and stops at more parameters than are stored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmcompress.errors import InputError
from llmcompress.models.dense.config import AUTO_MAP, MODEL, config_errors, load_config, model_code
from llmcompress.models.dense.experts import unfuse
from llmcompress.models.files.reading import error_text
from llmcompress.runtime.precision import ONE_BUILDER

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SPARE = 500_000_000  # bytes that a load may take beside those on disk
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
    """Return the name of a checkpoint's auto class: by its `architectures`, else by its likeliest task."""
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
    names = {}
    for name, table in {**HEADS, BODY: "MODEL_MAPPING_NAMES"}.items():
        classes = getattr(modeling_auto, table).get(config.model_type) or ()
        coded = [str(own[name]).rpartition(".")[2]] if own.get(name) else []
        names[name] = [*([classes] if isinstance(classes, str) else classes), *coded]
    if not any(names[name] for name in HEADS):
        return {}
    return {name: classes for name, classes in names.items() if classes}


def architectures(config: PreTrainedConfig) -> Sequence[str]:
    """Return the class names in a config."""
    return getattr(config, "architectures", None) or []


def is_causal(config: PreTrainedConfig) -> bool:
    """True if a checkpoint predicts the next token."""
    return auto_name(config) in (CAUSAL, MULTIMODAL)


def check_causal(config: PreTrainedConfig, doing: str) -> None:
    """Raise InputError unless a checkpoint predicts the next token; `doing`: the beginning of the message."""
    if not is_causal(config):
        raise InputError(
            f"{doing} takes a model that predicts the next token, and a {architectures(config)[0]} does not; choose a "
            f"causal language model"
        )


def dense_skeleton(
    config: PreTrainedConfig, folder: Path, unfused: bool = True, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model that a config describes, parameters on meta; `unfused`: with a linear for each expert's matrix.

    Raises InputError for a model that cannot be built.
    """
    with ONE_BUILDER, _without_numbers():
        model = _build(config, folder, trust_remote_code)
    if unfused:
        unfuse(model)
    return model


def folder_skeleton(folder: Path, unfused: bool = True, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the dense model of the config in `folder`, even of a compressed one; see `dense_skeleton`."""
    config = load_config(folder, trust_remote_code)
    vars(config).pop("quantization_config", None)
    return dense_skeleton(config, folder, unfused, trust_remote_code)


def transposed_linears(model: nn.Module) -> set[str]:
    """Return the module paths of linears whose weight is `[in, out]`."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, child in model.named_modules() if isinstance(child, Conv1D)}


def outline(
    config: PreTrainedConfig, folder: Path, stored: int, disk: int, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model that a config describes, all of it on meta.

    Raises InputError for a model that cannot be built, that has many more parameters than the `stored` tensors, or
    whose buffers take more memory than the `disk` bytes of the weights allow.
    """
    with ONE_BUILDER, _limit_parameters(folder, 2 * stored + 100), torch.device("meta"):  # tied ones are stored once
        model = _build(config, folder, trust_remote_code)
    check_buffers(model, str(folder / MODEL), disk)
    unfuse(model)
    return model


def check_buffers(model: nn.Module, place: str, disk: int) -> None:
    """Raise InputError if the buffers of a model on meta would take much more than the `disk` bytes of its weights."""
    needed = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if needed > disk + SPARE:
        raise InputError(
            f"{place} describes a model with {needed / 1e9:.1f} GB of buffers beside {disk / 1e9:.1f} GB of weights; "
            f"correct it"
        )


def _build(config: PreTrainedConfig, folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """Return a new model without drawing its weights, which takes longest; on meta it has none."""
    from transformers.initialization import no_init_weights

    trusted = model_code(folder, trust_remote_code)
    try:
        with no_init_weights():
            model: PreTrainedModel = auto_class(config).from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trusted
            )
        model.tie_weights(recompute_mapping=False)  # which is left out with the drawing
        if torch.get_default_device().type != "meta":  # let it compute the buffers that it fills with its weights
            for module in model.modules():
                vars(module)["_is_hf_initialized"] = next(module.buffers(recurse=False), None) is None
            model.initialize_weights()
    except config_errors() as error:
        raise InputError(
            f"{folder / MODEL} does not describe a {config.model_type} model that can be built ({error_text(error)}); "
            f"correct it"
        ) from error
    return model.eval()


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Hold the parameters of modules that this thread makes on meta."""
    builder = get_ident()

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or get_ident() != builder:
            return None  # it stays as it is
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    with nn.modules.module.register_module_parameter_registration_hook(empty):  # type: ignore[arg-type]  # or a new one
        yield


@contextmanager
def _limit_parameters(folder: Path, most: int) -> Iterator[None]:
    """Raise InputError as soon as modules of this thread are given more than `most` parameters in all."""
    count, builder = 0, get_ident()

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += parameter is not None and get_ident() == builder
        if count > most:
            raise InputError(
                f"{folder / MODEL} describes a model of more tensors than the weights beside it hold; download the "
                f"model again or correct it"
            )

    with nn.modules.module.register_module_parameter_registration_hook(register):
        yield
