"""The arguments that a model's forward passes to its decoder blocks, recorded by stand-ins for the blocks.

So rotary embeddings, masks by layer type and the like are right for every family. A model whose blocks cannot be run
one by one is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llmcompress.calibration.blocks import Call, Calls, RowBatch, drop, load
from llmcompress.errors import InputError, is_out_of_memory
from llmcompress.models.dense.blocks import arguments_of, body
from llmcompress.models.dense.families import Architecture, name_of
from llmcompress.models.dense.model import DenseModel
from llmcompress.weight.modules import put

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDING = 1e-5  # relative, of arguments that a model computes again for every batch
EXTRA = (0, 2, 1)  # numbers of values that blocks return after the hidden states; 0: no tuple


class _ForwardRecord:
    """The calls of one forward. Refuses models whose blocks cannot be run one after the other."""

    def __init__(self, model_type: str, extra: int, known: list[Call] | None) -> None:
        self.model_type, self.extra, self.known = model_type, extra, known
        self.hidden = torch.empty(0)
        self.calls: list[Call] = []
        self.depends = False  # on the tokens: some arguments differ from the `known` ones

    def add(self, path: str, hidden: Tensor, call: Call) -> None:
        """Record the call of the block at `path`. Raises InputError for what the walk cannot repeat."""
        from transformers.cache_utils import Cache

        if not self.calls:
            self.hidden = hidden
        given = (*call.args, *call.kwargs.values())
        if hidden is not self.hidden:
            raise self.refusal(f"it changes the hidden states before {path}")
        if any(value is _MORE for value in given):
            raise self.refusal(f"{path} gets more than hidden states from the block before")
        if any(isinstance(value, Cache) for value in given):
            raise self.refusal(f"{path} gets a cache although none was asked for")
        if self.known is not None:
            before = self.known[len(self.calls)]
            self.depends |= not _equal((call.args, call.kwargs), (before.args, before.kwargs))
        self.calls.append(call)

    def refusal(self, why: str) -> InputError:
        """Return the error for a model that does not fit."""
        return InputError(
            f"the blocks of model type {self.model_type!r} cannot be run one by one ({why}); "
            f"choose a model of a known family"
        )


_MORE = object()  # stands for whatever blocks return after the hidden states


class _StandIn(nn.Module):
    """A stand-in for a block. Its other attributes are the block's, since models read things like `attention_type`."""

    def __init__(self, block: nn.Module, **held: Any) -> None:
        super().__init__()
        self.__dict__.update(held, block=block)  # the block not as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)


@contextmanager
def _stand_in(stack: nn.Module, others: Sequence[_StandIn]) -> Iterator[None]:
    """Put `others` in the places of the first blocks of `stack` while the context lasts."""
    blocks = list(stack.children())
    try:
        for index, other in enumerate(others):
            setattr(stack, str(index), other)
        yield
    finally:
        for index, block in enumerate(blocks):
            setattr(stack, str(index), block)


def _block_output(hidden: Tensor, extra: int) -> Tensor | tuple[Any, ...]:
    return (hidden, *[_MORE] * extra) if extra else hidden


class _Recorder(_StandIn):
    """A stand-in that hands hidden states on untouched and records the other arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        """Return the hidden states, as they came."""
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.record.add(self.path, hidden, Call(args[1:], kwargs))
        return _block_output(hidden, self.record.extra)


class _Replay(_StandIn):
    """A stand-in that returns the hidden states that it holds, whatever it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        """Return the hidden states."""
        return _block_output(self.hidden, self.extra)


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    source: DenseModel,
    arch: Architecture,
    sequences: Tensor,
    batches: list[RowBatch],
    device: torch.device,
    sizes: Collection[int] = (),
) -> tuple[Tensor, Calls, int]:
    """Return what `record_calls` does. Everything around the blocks is loaded for it, and dropped again."""
    below, stack = body(model), model.get_submodule(arch.stack)
    load(below, name_of(model, below), source, device, skip=[stack])
    try:
        return record_calls(model, arch.stack, sequences, batches, device, sizes)
    finally:
        drop(below, skip=[stack])


@torch.no_grad()
def record_calls(
    model: PreTrainedModel,
    stack: str,
    sequences: Tensor,
    batches: list[RowBatch],
    device: torch.device,
    sizes: Collection[int] = (),
) -> tuple[Tensor, Calls, int]:
    """Return the first block's inputs, the arguments of every block, and how many values follow the hidden states.

    The inputs are float32 `[sequences, length, width]`; `stack` is the module path of the list of blocks; `sizes` are
    those of more batches, of any sequences. Raises InputError for a model whose blocks cannot be run one by one.
    """
    errors = []
    for extra in EXTRA:
        try:
            return *_record_batches(model, stack, sequences, batches, device, extra, sizes), extra
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _record_batches(
    model: PreTrainedModel,
    path: str,
    sequences: Tensor,
    batches: list[RowBatch],
    device: torch.device,
    extra: int,
    sizes: Collection[int],
) -> tuple[Tensor, Calls]:
    shared: dict[int, list[Call]] = {}
    own: dict[int, list[Call]] = {}
    hidden, depends = torch.empty(0), False
    for batch in batches:
        record = _record_forward(model, path, sequences[batch.rows].to(device), extra, shared.get(batch.size))
        depends |= record.depends
        if not own:
            hidden = record.hidden.new_empty(*sequences.shape, record.hidden.shape[-1], dtype=torch.float32)
        hidden[batch.rows] = record.hidden
        own[batch.rows.start] = record.calls if record.depends else shared.setdefault(batch.size, record.calls)
    for size in set(sizes) - shared.keys():
        ids = sequences[:1].repeat(size, 1).to(device)
        shared[size] = _record_forward(model, path, ids, extra, None).calls
    if batches and not depends:  # perhaps no two batches have one size
        first = batches[0]
        other = sequences[first.rows].roll(1, 1).to(device)
        depends = _record_forward(model, path, other, extra, shared[first.size]).depends
    return hidden, Calls(model.config.model_type, shared, own if depends else {})


def _record_forward(
    model: PreTrainedModel, path: str, ids: Tensor, extra: int, known: list[Call] | None
) -> _ForwardRecord:
    """Run the model's forward on `ids [sequences, length]` with recorders for blocks."""
    stack = model.get_submodule(path)
    blocks = list(stack.children())
    record = _ForwardRecord(model.config.model_type, extra, known)
    if sharing := getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        raise record.refusal(f"the last {sharing} read the keys and values of earlier ones")
    recorders = [_Recorder(block, path=f"{path}.{index}", record=record) for index, block in enumerate(blocks)]
    try:
        with _stand_in(stack, recorders):
            body(model)(input_ids=ids, use_cache=False)
    except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise record.refusal(f"its code fails with stand-ins for them: {reason}") from error
    if len(record.calls) != len(blocks):
        raise record.refusal(f"it calls {len(record.calls)} of {len(blocks)}")
    if record.hidden.shape[:-1] != ids.shape:
        raise record.refusal(f"its hidden states have the shape {list(record.hidden.shape)}")
    return record


@torch.no_grad()
def head_inputs(
    model: PreTrainedModel,
    source: DenseModel,
    arch: Architecture,
    hidden: Tensor,
    batches: list[RowBatch],
    extra: int,
) -> Iterator[tuple[RowBatch, Tensor]]:
    """Yield the output head's inputs `[sequences, length, width]` of each batch, from the last block's outputs.

    Some models have layers between `body` and their head, as ModernBERT does, so the forward is that of the model.
    """
    above, stack = part_for_text(model), model.get_submodule(arch.stack)
    head, count = cast(nn.Module, model.get_output_embeddings()), len(list(stack.children()))
    aside = (stack, model.get_input_embeddings(), head)
    load(above, name_of(model, above), source, hidden.device, skip=aside)
    try:
        for batch in batches:
            states = hidden[batch.rows]
            ids = torch.zeros(states.shape[:2], dtype=torch.long, device=hidden.device)
            with skip_blocks(model, arch.stack, count, states, extra), without_table(model, hidden.device):
                [inputs] = arguments_of(head, partial(model, input_ids=ids, use_cache=False))
            yield batch, inputs
    finally:
        drop(above, skip=aside)


def part_for_text(model: PreTrainedModel) -> PreTrainedModel:
    """Return what text passes: all of a model, or `body` of one that reads images or sounds, too."""
    return model if model.config.get_text_config(decoder=True) is model.config else body(model)


@contextmanager
def skip_blocks(model: PreTrainedModel, stack: str, count: int, hidden: Tensor, extra: int) -> Iterator[None]:
    """Skip the first `count` blocks in forwards of `model` while the context lasts: the next block gets `hidden`."""
    module = model.get_submodule(stack)
    blocks = list(module.children())[:count]
    with _stand_in(module, [_Replay(block, hidden=hidden, extra=extra) for block in blocks]):
        yield


@contextmanager
def without_table(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Embed every token as zeros while the context lasts, since the blocks' stand-ins ignore them."""
    table = cast(nn.Embedding, model.get_input_embeddings())
    place = name_of(model, table)
    put(model, place, _ZeroTable(table.embedding_dim, device))
    try:
        yield
    finally:
        put(model, place, table)


class _ZeroTable(nn.Module):
    """A token table of zeros, which takes no memory."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(width, device=device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return zeros `[..., width]` for token ids `[...]`."""
        row: Tensor = self.get_buffer("weight")
        return row.expand(*ids.shape, -1)


def _equal(a: Any, b: Any) -> bool:
    """True if two nested arguments are equal, floats up to rounding.

    The threads of a busy machine may split the sines of a rotary embedding differently, which changes their last bits.
    """
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.allclose(a, b, ROUNDING, ROUNDING) if a.is_floating_point() else torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(a == b)
