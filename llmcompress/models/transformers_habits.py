"""Functions of transformers and PEFT that take a payload for a matrix, made to know better.

They are replaced once their modules are there (`import_hooks.py`), since neither has a hook for these questions.
"""

from __future__ import annotations

from functools import wraps
from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn

from llmcompress.weight.modules import TiedMatrix, compressed_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def uncounted_weights(model: nn.Module, exclude_embeddings: bool = False) -> int:
    """Return the weights that compressed modules hold beyond their payloads' bytes, which are counted as weights.

    A linear has as many as its dense form, whatever it has in common with others.
    """
    modules = {id(module.get_parameter("weight")): module for module in reversed(compressed_modules(model).values())}
    return sum(
        (0 if isinstance(module, TiedMatrix) else prod(module.layout.size)) - module.get_parameter("weight").numel()
        for module in modules.values()
        if not (exclude_embeddings and isinstance(module, nn.Embedding))
    )


def count_in_transformers() -> None:
    """Let `model.num_parameters()` count weights."""
    from transformers.modeling_utils import PreTrainedModel

    count = PreTrainedModel.num_parameters

    @wraps(count)
    def num_parameters(self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        found = count(self, only_trainable, exclude_embeddings)
        return found if only_trainable else found + uncounted_weights(self, exclude_embeddings)

    PreTrainedModel.num_parameters = num_parameters  # type: ignore[method-assign]


def count_in_peft() -> None:
    """Let `print_trainable_parameters()` of PEFT count weights."""
    from peft.peft_model import PeftModel

    count = PeftModel.get_nb_trainable_parameters

    @wraps(count)
    def get_nb_trainable_parameters(self: PeftModel) -> tuple[int, int]:
        trainable, everything = count(self)
        return trainable, everything + uncounted_weights(self)

    PeftModel.get_nb_trainable_parameters = get_nb_trainable_parameters  # type: ignore[method-assign]


def evaluate_in_trainer() -> None:
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


def _is_ours(model: Any) -> bool:
    return isinstance(model, nn.Module) and bool(compressed_modules(model))
