"""Hidden states between decoder blocks, recorded while a model's own forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llmcompress.errors import RecipeError, list_names
from llmcompress.models.dense.families import block_stack

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def body(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal language model below its output head: the model itself if it has none.

    Of a model with images or sound, that is the part that reads text.
    """
    if model.config.get_text_config(decoder=True) is not model.config:
        return cast("PreTrainedModel", model.get_decoder())
    found = model.base_model
    inner = getattr(model, "model", None)  # of Llama 4, whose prefix is that of a model with images
    return cast("PreTrainedModel", found if inner is None or found is not model else inner)


def depth(model: PreTrainedModel) -> int:
    """Return the number of decoder blocks of a model."""
    return len(list(model.get_submodule(block_stack(model.config, model)).children()))


@contextmanager
def states_between(model: PreTrainedModel, numbers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Record hidden states `[sequences, length, width]` of every forward of `model` inside the context.

    The yielded map has the input of each block in `numbers`. The number of blocks itself stands for the last block's
    output, before the final norm. A later forward overwrites the states; so does activation recomputation, with the
    same values.
    """
    found: dict[int, Tensor] = {}
    blocks = list(model.get_submodule(block_stack(model.config, model)).children())
    handles = []
    try:
        for number in numbers:
            if number < len(blocks):
                handles.append(blocks[number].register_forward_pre_hook(_input(found, number), with_kwargs=True))
            else:
                handles.append(blocks[-1].register_forward_hook(_output(found, number)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Reached(Exception):
    """The block is there that a forward was to run until."""


def run_until(model: PreTrainedModel, number: int, forward: Callable[[], object]) -> None:
    """Run `forward`, one of `model`, up to the input of block `number`, which hooks before still see; no block from
    there on runs."""

    def stop(*_: object) -> None:
        raise _Reached

    block = list(model.get_submodule(block_stack(model.config, model)).children())[number]
    handle = block.register_forward_pre_hook(stop)
    try:
        forward()
    except _Reached:
        pass
    finally:
        handle.remove()


def _input(found: dict[int, Tensor], number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[number] = args[0] if args else kwargs["hidden_states"]

    return seen


def _output(found: dict[int, Tensor], number: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def seen(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found[number] = output[0] if isinstance(output, tuple) else output

    return seen


KEPT = "llmcompress_kept_blocks"  # in config.json: numbers in the original model, ascending


def kept_blocks(config: PreTrainedConfig) -> tuple[int, ...] | None:
    """Return the numbers of the original model's blocks that a shortened one kept; None if its config has no list."""
    found: Sequence[int] | None = getattr(config, KEPT, None)
    return None if found is None else tuple(found)


def matched_blocks(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[int, int]:
    """Return the teacher's block for each of the student's blocks. Raises RecipeError if that is not known."""
    few, many = depth(student), depth(teacher)
    theirs = kept_blocks(teacher.config) or tuple(range(many))
    mine = kept_blocks(student.config) or (theirs if few == many else None)
    if mine is None:
        raise RecipeError(
            f"the student has {few} blocks, the teacher {many}, and the student's config.json does not say which "
            f"blocks were kept; drop blocks with `llmcompress drop`, or add {KEPT} to config.json"
        )
    numbers = {original: number for number, original in enumerate(theirs)}
    strange = [str(original) for original in mine if original not in numbers]
    if len(mine) != few or strange:
        raise RecipeError(
            f"the student's {KEPT} has {len(mine)} blocks for its {few}, of which the teacher lacks "
            f"{list_names(strange)}; distil from the model that the student was made from"
        )
    return {number: numbers[original] for number, original in enumerate(mine)}


def original_name(student: PreTrainedModel, name: str, blocks: Mapping[int, int]) -> str:
    """Return the teacher's name of the student's module `name`; `blocks` comes from `matched_blocks`."""
    stack = block_stack(student.config, student)
    number, _, rest = name.removeprefix(f"{stack}.").partition(".")
    return f"{stack}.{blocks[int(number)]}.{rest}" if name.startswith(f"{stack}.") else name
