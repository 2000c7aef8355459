"""Decoder blocks that run on their own: loaded one at a time, called with the very arguments the model would pass.

The arguments are recorded once, by letting the model's own forward run with recorders in the place of its blocks
(rotary embeddings, masks by layer type and the like are thereby right without knowing the family). A model whose
blocks cannot be run that way is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError, NumericsError
from llmcompress.models.dense import DenseModel
from llmcompress.models.experts import Experts, experts_of, holder
from llmcompress.models.families import Architecture, name_of
from llmcompress.models.hidden_states import body
from llmcompress.runtime.memory import trim_memory
from llmcompress.runtime.precision import products

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Call:
    """The arguments that a model's forward passes to a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class RowBatch:
    """Rows of the sequences that go through a block together: never calibration and held-out ones at once."""

    rows: slice
    held_out: bool

    @property
    def size(self) -> int:
        """Number of sequences."""
        return int(self.rows.stop - self.rows.start)


def in_batches(count: int, held_out: int, size: int) -> list[RowBatch]:
    """Batches of at most `size` of `count` rows, of which the last `held_out` are held out."""
    parts = ((0, count - held_out, False), (count - held_out, count, True))
    return [
        RowBatch(slice(first, min(first + size, stop)), held)
        for start, stop, held in parts
        for first in range(start, stop, size)
    ]


Calls = dict[int, list[Call]]  # by number of sequences in the batch, then by block
Visit = Callable[[str, Tensor, Tensor | None], None]
ROUNDING = 1e-5  # of arguments that a model computes again for every batch


@dataclass(frozen=True)
class BlockForward:
    """A loaded block, ready to be called on hidden states alone."""

    module: nn.Module
    path: str
    calls: dict[int, Call]
    dtype: torch.dtype = torch.float32  # of products; hidden states and weights are float32 in any case

    def __call__(
        self, hidden: Tensor, visit: Visit | None = None, names: tuple[str, ...] = (), stop_at: str | None = None
    ) -> Tensor:
        """The block's outputs for `hidden [sequences, length, width]`.

        `visit(name, input [sequences, length, in], None)` is called for each linear in `names` as the block calls it;
        for one of an expert, which may not be called at all, `visit(name, input [tokens, in], tokens)` with the indices
        of its tokens among `sequences * length`. `stop_at`, one of them: the block is left there, and nothing is
        returned.
        """
        call, visited = self.calls[len(hidden)], []
        experts = experts_of(self.module)

        def hook(name: str, routed: Experts | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def seen(_: nn.Module, args: tuple[Any, ...]) -> None:
                visited.append(name)
                if not _finite(args[0]):
                    raise NumericsError(_overflow(name, "its inputs"))
                if visit is not None:
                    with torch.autocast(hidden.device.type, enabled=False):  # statistics in bfloat16 are not positive
                        inputs = args[0].to(self.dtype)  # what the linear multiplies
                        if routed is None:
                            visit(name, inputs.reshape(*hidden.shape[:2], -1), None)
                        else:
                            visit(name, inputs, routed.tokens)
                if name == stop_at:
                    raise _Enough

            return seen

        handles = []
        try:
            for name in names:
                inside = name.removeprefix(f"{self.path}.")
                linear, path = self.module.get_submodule(inside), holder(inside, experts)
                handles.append(linear.register_forward_pre_hook(hook(name, None if path is None else experts[path])))
            with products(hidden.device, self.dtype):
                output = self.module(hidden, *call.args, **call.kwargs)
        except _Enough:
            return hidden.new_empty(0)
        finally:
            for handle in handles:
                handle.remove()
        often = Counter(visited)
        odd = next((n for n in names if often[n] != 1 and not _unrouted(n, often[n], self.path, experts)), None)
        if odd is not None:
            raise InputError(
                f"{odd} is called {often[odd]} times by its block, exactly once was expected; leave the layer "
                f"out of the recipe or choose a model of a known family"
            )
        output = output[0] if isinstance(output, (tuple, list)) else output
        if output.shape != hidden.shape:
            raise InputError(
                f"{self.path} turns hidden states of shape {list(hidden.shape)} into {list(output.shape)}, so it "
                f"cannot be run on its own; choose a model of a known family"
            )
        if not _finite(output):
            raise NumericsError(_overflow(self.path, "its outputs"))
        return output


def _unrouted(name: str, calls: int, path: str, experts: Mapping[str, Experts]) -> bool:
    """True if a linear of the block at `path` is one of an expert, and was not called since no token came to it."""
    return calls == 0 and holder(name.removeprefix(f"{path}."), experts) is not None


class _Enough(Exception):
    """Raised to leave a block's forward when the last wanted input has been seen."""


class _Tape:
    """The record of one forward, which refuses models whose blocks cannot be run one after the other."""

    def __init__(self, model_type: str, as_tuple: bool, known: list[Call] | None) -> None:
        self.model_type, self.as_tuple, self.known = model_type, as_tuple, known
        self.hidden = torch.empty(0)
        self.calls: list[Call] = []

    def record(self, path: str, hidden: Tensor, call: Call) -> None:
        """Note the call of the block at `path`."""
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
            if not _same((call.args, call.kwargs), (before.args, before.kwargs)):
                raise self.refusal(f"{path} gets arguments that depend on the tokens")
        self.calls.append(call)

    def refusal(self, why: str) -> InputError:
        """The error for a model that does not fit."""
        return InputError(
            f"the blocks of model type {self.model_type!r} cannot be run one by one ({why}); "
            f"choose a model of a known family"
        )


_MORE = object()  # stands for whatever blocks return after the hidden states


class _StandIn(nn.Module):
    """A stand-in for a block; whatever else is asked of it, the block answers."""

    def __init__(self, block: nn.Module, **held: Any) -> None:
        super().__init__()
        self.__dict__.update(held, block=block)  # the block not as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)  # models read things like `attention_type` off their blocks


@contextmanager
def _standing_in(stack: nn.Module, others: Sequence[_StandIn]) -> Iterator[None]:
    """Put `others` in the places of the blocks of `stack` while the context lasts."""
    blocks = list(stack.children())
    try:
        for index, other in enumerate(others):
            setattr(stack, str(index), other)
        yield
    finally:
        for index, block in enumerate(blocks):
            setattr(stack, str(index), block)


class _Recorder(_StandIn):
    """A stand-in for a block in the model's own forward: hands hidden states on untouched and keeps its arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        """The hidden states, as they came."""
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.tape.record(self.path, hidden, Call(args[1:], kwargs))
        return (hidden, _MORE, _MORE) if self.tape.as_tuple else hidden


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    source: DenseModel,
    arch: Architecture,
    sequences: Tensor,
    batches: list[RowBatch],
    device: torch.device,
) -> tuple[Tensor, Calls, bool]:
    """The first block's inputs `[sequences, length, width]` float32, the arguments of every block, and whether blocks
    return tuples.

    Everything that comes before and after the blocks is loaded for it, and dropped again.
    """
    below, stack = body(model), model.get_submodule(arch.stack)
    load(below, name_of(model, below), source, device, skip=[stack])
    try:
        return recorded(model, arch.stack, sequences, batches, device)
    finally:
        drop(below, skip=[stack])


@torch.no_grad()
def recorded(
    model: PreTrainedModel, stack: str, sequences: Tensor, batches: list[RowBatch], device: torch.device
) -> tuple[Tensor, Calls, bool]:
    """Return what `embed` does, for a model that is loaded already; `stack`: the module path of its list of blocks."""
    try:
        return *_record(model, stack, sequences, batches, device, as_tuple=False), False
    except InputError as error:
        try:  # blocks of older models return tuples
            return *_record(model, stack, sequences, batches, device, as_tuple=True), True
        except InputError:
            raise error from None


def _record(
    model: PreTrainedModel, path: str, sequences: Tensor, batches: list[RowBatch], device: torch.device, as_tuple: bool
) -> tuple[Tensor, Calls]:
    """Let the model's forward run on every batch with recorders for blocks."""
    stack = model.get_submodule(path)
    blocks = list(stack.children())
    calls: Calls = {}
    hidden = torch.empty(0)
    for batch in batches:
        tape = _Tape(model.config.model_type, as_tuple, calls.get(batch.size))
        recorders = [_Recorder(block, path=f"{path}.{index}", tape=tape) for index, block in enumerate(blocks)]
        try:
            with _standing_in(stack, recorders):
                body(model)(input_ids=sequences[batch.rows].to(device), use_cache=False)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise tape.refusal(f"its code fails with stand-ins for them: {reason}") from error
        if len(tape.calls) != len(blocks):
            raise tape.refusal(f"it calls {len(tape.calls)} of {len(blocks)}")
        if not calls:
            hidden = tape.hidden.new_empty(*sequences.shape, tape.hidden.shape[-1], dtype=torch.float32)
        hidden[batch.rows] = tape.hidden
        calls.setdefault(batch.size, tape.calls)
    return hidden, calls


class _Replay(_StandIn):
    """A stand-in that returns the hidden states it was given beforehand, whatever it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Any, ...]:
        """The hidden states."""
        return (self.hidden, _MORE, _MORE) if self.as_tuple else self.hidden


@torch.no_grad()
def head_inputs(
    model: PreTrainedModel,
    source: DenseModel,
    arch: Architecture,
    hidden: Tensor,
    batches: list[RowBatch],
    as_tuple: bool,
) -> Iterator[tuple[RowBatch, Tensor]]:
    """Yield the inputs of the output head, `[sequences, length, width]` a batch, from the last block's outputs."""
    below = body(model)
    stack = model.get_submodule(arch.stack)
    table = model.get_input_embeddings()
    width = int(table.get_parameter("weight").shape[1])
    load(below, name_of(model, below), source, hidden.device, skip=(stack, table))
    try:
        for batch in batches:
            answers = [_Replay(block, hidden=hidden[batch.rows], as_tuple=as_tuple) for block in stack.children()]
            nothing = hidden.new_zeros(batch.size, hidden.shape[1], width)
            with _standing_in(stack, answers):
                output = below(inputs_embeds=nothing, use_cache=False)[0]
            yield batch, output
    finally:
        drop(below, skip=(stack, table))


@contextmanager
def answered(model: PreTrainedModel, stack: str, count: int, hidden: Tensor, as_tuple: bool) -> Iterator[None]:
    """Make forwards of `model` skip its first `count` blocks while the context lasts: the next one gets `hidden`."""
    module = model.get_submodule(stack)
    blocks = list(module.children())[:count]
    with _standing_in(module, [_Replay(block, hidden=hidden, as_tuple=as_tuple) for block in blocks]):
        yield


def _same(a: Any, b: Any) -> bool:
    """True if two nested arguments are equal, floats up to rounding: a busy machine may share out the sines of a
    rotary embedding otherwise, which changes their last bits."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.allclose(a, b, ROUNDING, ROUNDING) if a.is_floating_point() else torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def load(
    module: nn.Module, path: str, source: DenseModel, device: torch.device, skip: Sequence[nn.Module] = ()
) -> None:
    """Read the weights of `module`, at module path `path`, in float32; `skip` are parts that stay as they are."""
    for owner_path, owner in _owners(module, path, skip):
        for leaf, _ in list(owner.named_parameters(recurse=False)):
            name = f"{owner_path}.{leaf}".lstrip(".")
            value = source.read(name).to(device, torch.float32)
            if not _finite(value):
                raise NumericsError(f"{name} holds NaN or Inf in {source.folder}; use an undamaged checkpoint")
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            name = f"{owner_path}.{leaf}".lstrip(".")
            value = source.read(name).to(buffer.dtype) if name in source.tensors else buffer
            setattr(owner, leaf, value.to(device))


def drop(module: nn.Module, skip: Sequence[nn.Module] = ()) -> None:
    """Put the weights of `module` back on meta, and free their memory."""
    for _, owner in _owners(module, "", skip):
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, leaf, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    trim_memory()


def _owners(module: nn.Module, path: str, skip: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every module below `module`, with its path, but those inside `skip`."""
    skipped = {inner for part in skip for inner in part.modules()}
    for owner_path, owner in module.named_modules(prefix=path):
        if owner not in skipped:
            yield owner_path, owner


def _finite(x: Tensor) -> bool:
    """True if `x` holds neither NaN nor Inf; in one pass and without temporaries, unlike `x.isfinite().all()`."""
    if not x.numel():
        return True
    low, high = x.aminmax()  # NaN wins in both
    return bool(low.isfinite() and high.isfinite())


def _overflow(name: str, what: str) -> str:
    return (
        f"{name}: {what} became NaN or Inf during calibration; compress the layers before it less, or check that the "
        f"checkpoint works in float32"
    )
