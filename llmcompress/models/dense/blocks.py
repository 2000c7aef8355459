"""The decoder blocks of an open model: their hidden states, and a shortened student's blocks in its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llmcompress.errors import RecipeError, list_names
from llmcompress.models.dense.families import block_stack

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

KEPT = "llmcompress_kept_blocks"  # in config.json: numbers in the original model, ascending


def body(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal language model below its output head; of one with images or sound, the text part."""
    if model.config.get_text_config(decoder=True) is not model.config:
        return cast("PreTrainedModel", model.get_decoder())
    base = model.base_model
    inner = getattr(model, "model", None)  # of Llama 4, whose prefix is that of a model with images
    return cast("PreTrainedModel", base if inner is None or base is not model else inner)


def depth(model: PreTrainedModel) -> int:
    """Return the number of decoder blocks of a model."""
    return len(_blocks(model))


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return list(model.get_submodule(block_stack(model.config, model)).children())


@contextmanager
def states_between(model: PreTrainedModel, numbers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Record hidden states `[sequences, length, width]` of every forward of `model` inside the context.

    The yielded map has the input of each block in `numbers`. The number of blocks stands for the last block's output,
    before the final norm. A later forward overwrites the states; so does activation recomputation, with the same
    values.
    """
    states: dict[int, Tensor] = {}
    blocks = _blocks(model)
    with ExitStack() as hooks:
        for number in numbers:
            if number < len(blocks):
                record = partial(_record_input, states, number)
                hooks.enter_context(blocks[number].register_forward_pre_hook(record, with_kwargs=True))
            else:
                hooks.enter_context(blocks[-1].register_forward_hook(partial(_record_output, states, number)))
        yield states


def _record_input(
    states: dict[int, Tensor], number: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    states[number] = args[0] if args else kwargs["hidden_states"]


def _record_output(states: dict[int, Tensor], number: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    states[number] = output[0] if isinstance(output, tuple) else output


class _StopForward(Exception):
    """Ends a forward at the module that it was to run until; its only argument is what that module got."""


def run_until(model: PreTrainedModel, number: int, forward: Callable[[], object]) -> None:
    """Run `forward`, one of `model`, up to the input of block `number`; earlier hooks of that block still see it."""
    arguments_of(_blocks(model)[number], forward)


def arguments_of(module: nn.Module, forward: Callable[[], object]) -> tuple[Any, ...]:
    """Run `forward` up to the call of `module`, and return its positional arguments; none without a call."""

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise _StopForward(args)

    try:
        with module.register_forward_pre_hook(stop):
            forward()
    except _StopForward as stopped:
        return cast("tuple[Any, ...]", stopped.args[0])
    return ()


def kept_blocks(config: PreTrainedConfig) -> tuple[int, ...] | None:
    """Return the original model's numbers of a shortened model's blocks, None without a list in its config."""
    numbers = getattr(config, KEPT, None)
    return None if numbers is None else tuple(numbers)


def matched_blocks(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[int, int]:
    """Return the teacher's block for each of the student's blocks. Raises RecipeError if that is not known."""
    few, many = depth(student), depth(teacher)
    theirs = kept_blocks(teacher.config) or tuple(range(many))
    ours = kept_blocks(student.config) or (theirs if few == many else None)
    if ours is None:
        raise RecipeError(
            f"the student has {few} blocks, the teacher {many}, and the student's config.json does not say which "
            f"blocks were kept; drop blocks with `llmcompress drop`, or add {KEPT} to config.json"
        )
    numbers = {original: number for number, original in enumerate(theirs)}
    strange = [str(original) for original in ours if original not in numbers]
    if len(ours) != few or strange:
        raise RecipeError(
            f"the student's {KEPT} has {len(ours)} blocks for its {few}, of which the teacher lacks "
            f"{list_names(strange)}; distil from the model that the student was made from"
        )
    return {number: numbers[original] for number, original in enumerate(ours)}


def original_name(student: PreTrainedModel, name: str, blocks: Mapping[int, int]) -> str:
    """Return the teacher's name of the student's module `name`; `blocks` comes from `matched_blocks`."""
    stack = block_stack(student.config, student)
    number, _, rest = name.removeprefix(f"{stack}.").partition(".")
    return f"{stack}.{blocks[int(number)]}.{rest}" if name.startswith(f"{stack}.") else name
