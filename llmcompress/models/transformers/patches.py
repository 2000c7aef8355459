"""Functions of transformers and PEFT that take a payload for a matrix, made to know better.

They are replaced once their modules are there (`import_hooks.py`), since neither has a hook for these questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn

from llmcompress.weight.modules import CompressedEmbedding, TiedMatrix, compressed_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

BERTS_TABLE = "embeddings.word_embeddings"


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


def mend_models() -> None:
    """Let the methods of transformers' models know payloads."""
    count_in_transformers()
    save_what_loads()
    resize_tables()


def mend_trainer() -> None:
    """Let `Trainer`, and the trainers of TRL, know payloads."""
    evaluate_in_trainer()
    show_heads_to_trl()


def mend_peft_models() -> None:
    """Let PEFT's models know payloads."""
    count_in_peft()
    prompts_beside_tables()


def count_in_transformers() -> None:
    """Let `model.num_parameters()` count weights."""
    from transformers.modeling_utils import PreTrainedModel

    count = PreTrainedModel.num_parameters

    @wraps(count)
    def num_parameters(self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        found = count(self, only_trainable, exclude_embeddings)
        return found if only_trainable else found + uncounted_weights(self, exclude_embeddings)

    PreTrainedModel.num_parameters = num_parameters  # type: ignore[method-assign]


def save_what_loads() -> None:
    """Let `save_pretrained` refuse a compressed model that a load would not give back, before it writes anything."""
    from transformers.modeling_utils import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    @wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        by_ours = type(vars(self).get("hf_quantizer")).__module__.startswith("llmcompress.")
        if not (by_ours or _is_ours(self)) or self._hf_peft_config_loaded:  # of one with adapters these alone are saved
            return save(self, *args, **kwargs)
        from llmcompress.models.transformers.saving import describe_while_saving  # other models are saved without it

        with describe_while_saving(self):
            return save(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def resize_tables() -> None:
    """Let `model.resize_token_embeddings` leave compressed tables alone, or make them dense to resize them."""
    from transformers.modeling_utils import PreTrainedModel

    resize = PreTrainedModel.resize_token_embeddings

    @wraps(resize)
    def resize_token_embeddings(
        self: PreTrainedModel,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        from llmcompress.models.transformers.dequantize import ready_to_resize

        if _is_ours(self) and not ready_to_resize(self, new_num_tokens, pad_to_multiple_of):
            return self.get_input_embeddings()
        return resize(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    PreTrainedModel.resize_token_embeddings = resize_token_embeddings  # type: ignore[method-assign]


def count_in_peft() -> None:
    """Let `print_trainable_parameters()` of PEFT count weights."""
    from peft.peft_model import PeftModel

    count = PeftModel.get_nb_trainable_parameters

    @wraps(count)
    def get_nb_trainable_parameters(self: PeftModel) -> tuple[int, int]:
        trainable, everything = count(self)
        return trainable, everything + uncounted_weights(self)

    PeftModel.get_nb_trainable_parameters = get_nb_trainable_parameters  # type: ignore[method-assign]


def prompts_beside_tables() -> None:
    """Let PEFT, which looks for the token table by the shape of its weight, find a compressed one for its prompts."""
    from peft.peft_model import PeftModel

    setup = PeftModel._setup_prompt_encoder

    @wraps(setup)
    def setup_prompt_encoder(self: PeftModel, adapter_name: str) -> None:
        base: Any = self.base_model
        table = base.get_input_embeddings() if _is_ours(base) else None
        if not isinstance(table, CompressedEmbedding):
            return setup(self, adapter_name)
        find = base.get_submodule
        vars(base)["get_submodule"] = lambda name: table if name == BERTS_TABLE else find(name)  # asked for first
        try:
            return setup(self, adapter_name)
        finally:
            del vars(base)["get_submodule"]

    PeftModel._setup_prompt_encoder = setup_prompt_encoder  # type: ignore[method-assign]


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


def show_heads_to_trl() -> None:
    """Let trainers of TRL, which multiply by the head's matrix themselves, run with plain heads."""
    from transformers.trainer import Trainer

    for name in ("train", "evaluate", "predict"):
        setattr(Trainer, name, _with_plain_heads(getattr(Trainer, name)))


def _with_plain_heads(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def run(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        with _plain_heads(self):
            return method(self, *args, **kwargs)

    return run


@contextmanager
def _plain_heads(trainer: Trainer) -> Iterator[None]:
    """Give the models of a trainer plain heads inside the context, if it is one of TRL's."""
    with ExitStack() as plain:
        if any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
            from llmcompress.models.transformers.lora import plain_head

            held: Iterable[Any] = (vars(trainer).get(name) for name in ("model", "ref_model", "teacher_model"))
            for model in held:
                if _is_ours(model) and hasattr(model, "get_output_embeddings"):
                    plain.enter_context(plain_head(model))
        yield


def _is_ours(model: Any) -> bool:
    return isinstance(model, nn.Module) and bool(compressed_modules(model))
