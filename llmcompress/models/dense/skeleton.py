"""The model that a config describes, without its weights.

`outline` is for configs that nothing vouches for: it allocates nothing, and stops at more parameters than are stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmcompress.errors import InputError
from llmcompress.models.dense.auto_class import auto_class
from llmcompress.models.dense.experts import unfuse
from llmcompress.models.dense.remote_code import load_config, model_code

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SPARE = 500_000_000  # bytes that a load may take beside those on disk
MOST_LAYERS = 1024
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIZES = (
    "hidden_size",
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def config_errors() -> tuple[type[Exception], ...]:
    """Return the errors that transformers and torch raise for impossible values and missing requirements."""
    from huggingface_hub.errors import StrictDataclassError

    values = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
    code = (NameError, SyntaxError)  # of a model's own
    return (*values, *code, OSError, ImportError, MemoryError, StrictDataclassError)


def reason(error: Exception, most: int = 200) -> str:
    """Return the message of a library's error on one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= most else f"{text[:most]}...").rstrip(".")


def valid_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config of the model in `folder`. Raises InputError for one that transformers cannot read."""
    try:
        return load_config(folder, trust_remote_code)
    except config_errors() as error:
        raise InputError(f"{folder / 'config.json'} is not a valid config ({reason(error)}); correct it") from error


def check_numbers(number_of: Callable[[str], Any], place: str) -> None:
    """Raise InputError for sizes that no model has, before a config or a model is made of them.

    `number_of`: the value of an entry of the config by name, None without one; `place`: the config, for the sentence.
    """
    for key in (*LAYERS, *SIZES):
        value, most = number_of(key), MOST_LAYERS if key in LAYERS else 2**31
        each = value if isinstance(value, list) and len(value) <= MOST_LAYERS else [value]
        least = 0 if isinstance(value, list) else 1  # a list has a number for each block
        if not all(one is None or (type(one) is int and least <= one <= most) for one in each):
            raise InputError(
                f"{place} gives {key} as {str(value)[:50]!r}, which is no number from 1 to {most}; correct it"
            )


def dense_skeleton(
    config: PreTrainedConfig, folder: Path, unfused: bool = True, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model that a config describes, parameters on meta; `unfused`: with one linear for each matrix of its
    experts.

    Raises InputError if it cannot be built.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _built(config, folder, trust_remote_code)
    if unfused:
        unfuse(model)
    return model


def outline(
    config: PreTrainedConfig, folder: Path, stored: int, disk: int, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the model that a config describes, all of it on meta.

    Raises InputError if it cannot be built, if it has many more parameters than the `stored` tensors, and if its
    buffers take more memory than the `disk` bytes of the weights allow.
    """
    with _counted(folder, 2 * stored + 100), torch.device("meta"):  # tied ones are stored once
        model = _built(config, folder, trust_remote_code)
    check_buffers(model, str(folder / "config.json"), disk)
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


def _built(config: PreTrainedConfig, folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """Return a new model, whose weights nobody has drawn: there are none on meta, and to draw them takes longest."""
    from transformers.initialization import no_init_weights

    trusted = model_code(folder, trust_remote_code)
    try:
        with no_init_weights():
            model: PreTrainedModel = auto_class(config).from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trusted
            )
        model.tie_weights(recompute_mapping=False)  # which is left out with the drawing
        if torch.get_default_device().type != "meta":
            _fill_buffers(model)
    except config_errors() as error:
        raise InputError(
            f"{folder / 'config.json'} does not describe a {config.model_type} model that can be built "
            f"({reason(error)}); correct it"
        ) from error
    return model.eval()


def _fill_buffers(model: PreTrainedModel) -> None:
    """Let the model compute those buffers that it fills with its weights."""
    for module in model.modules():
        vars(module)["_is_hf_initialized"] = next(module.buffers(recurse=False), None) is None
    model.initialize_weights()


@contextmanager
def _counted(folder: Path, most: int) -> Iterator[None]:
    """Raise InputError as soon as a module is given more than `most` parameters in all."""
    count = 0

    def met(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += parameter is not None
        if count > most:
            raise InputError(
                f"{folder / 'config.json'} describes a model of more tensors than the weights beside it hold; "
                f"download the model again or correct it"
            )

    handle = nn.modules.module.register_module_parameter_registration_hook(met)
    try:
        yield
    finally:
        handle.remove()


def transposed_linears(folder: Path, trust_remote_code: bool = False) -> set[str]:
    """Return the module paths of linears whose weight is `[in, out]` in the model that `folder` describes."""
    from transformers.pytorch_utils import Conv1D

    model = described(folder, trust_remote_code=trust_remote_code)
    return {name for name, child in model.named_modules() if isinstance(child, Conv1D)}


def described(folder: Path, unfused: bool = True, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the dense model that the config in `folder`, of a dense or a compressed one, describes; see
    `dense_skeleton`."""
    config = load_config(folder, trust_remote_code)
    vars(config).pop("quantization_config", None)
    return dense_skeleton(config, folder, unfused, trust_remote_code)
