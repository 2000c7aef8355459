"""Decoder blocks that run on their own: loaded one at a time, called with the very arguments the model would pass.

The arguments are recorded once, by letting the model's own forward run with recorders in the place of its blocks
(rotary embeddings, masks by layer type and the like are thereby right without knowing the family). A model whose
blocks cannot be run that way is refused.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.architecture import Architecture
from llmcompress.errors import InputError, NumericsError
from llmcompress.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Call:
    """What a model's forward passes to a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Rows of the sequences that go through a block together: never calibration and held-out ones at once."""

    rows: slice
    held_out: bool

    @property
    def size(self) -> int:
        """Number of sequences."""
        return int(self.rows.stop - self.rows.start)


Calls = dict[int, list[Call]]  # by number of sequences in the batch, then by block
Visit = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Run:
    """A loaded block, ready to be called on hidden states alone."""

    module: nn.Module
    path: str
    calls: dict[int, Call]

    def __call__(self, hidden: Tensor, visit: Visit | None = None, names: tuple[str, ...] = ()) -> Tensor:
        """The block's outputs for `hidden [sequences, length, width]`.

        `visit(name, input [sequences, length, in])` is called for each linear in `names` as the block calls it.
        """
        call, visited = self.calls[len(hidden)], []

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def seen(_: nn.Module, args: tuple[Any, ...]) -> None:
                visited.append(name)
                if not args[0].isfinite().all():
                    raise NumericsError(_overflow(name, "its inputs"))
                if visit is not None:
                    visit(name, args[0].reshape(*hidden.shape[:2], -1))

            return seen

        handles = []
        try:
            for name in names:
                linear = self.module.get_submodule(name.removeprefix(f"{self.path}."))
                handles.append(linear.register_forward_pre_hook(hook(name)))
            output = self.module(hidden, *call.args, **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if sorted(visited) != sorted(names):
            odd = next(name for name in names if visited.count(name) != 1)
            raise InputError(
                f"{odd} is called {visited.count(odd)} times by its block, exactly once was expected; leave the layer "
                f"out of the recipe or choose a model of a known family"
            )
        output = output[0] if isinstance(output, tuple) else output
        if output.shape != hidden.shape:
            raise InputError(
                f"{self.path} turns hidden states of shape {list(hidden.shape)} into {list(output.shape)}, so it "
                f"cannot be run on its own; choose a model of a known family"
            )
        if not output.isfinite().all():
            raise NumericsError(_overflow(self.path, "its outputs"))
        return output


class _Recorder(nn.Module):
    """Stands in for a block in the model's own forward: hands hidden states on untouched, keeps its arguments."""

    def __init__(self, block: nn.Module, tape: list[tuple[Tensor, Call]]):
        super().__init__()
        self.__dict__.update(block=block, tape=tape)  # not as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)  # models read things like `attention_type` off their blocks

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states, as they came."""
        hidden = args[0] if args else kwargs.pop("hidden_states")
        self.tape.append((hidden, Call(args[1:], kwargs)))
        return hidden


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    source: Source,
    arch: Architecture,
    sequences: Tensor,
    batches: list[Batch],
    device: torch.device,
) -> tuple[Tensor, Calls]:
    """The first block's inputs `[sequences, length, width]` float32, and the arguments of every block.

    Everything that comes before and after the blocks is loaded for it, and dropped again.
    """
    body, stack = model.base_model, model.get_submodule(arch.stack)
    blocks = list(stack.children())
    tape: list[tuple[Tensor, Call]] = []
    calls: Calls = {}
    hidden = torch.empty(0)
    load(body, "" if body is model else model.base_model_prefix, source, device, skip=stack)
    try:
        for index, block in enumerate(blocks):
            setattr(stack, str(index), _Recorder(block, tape))
        for batch in batches:
            tape.clear()
            body(input_ids=sequences[batch.rows].to(device), use_cache=False)
            _check_tape(tape, arch, calls.get(batch.size))
            if not calls:
                hidden = tape[0][0].new_empty(*sequences.shape, tape[0][0].shape[-1], dtype=torch.float32)
            hidden[batch.rows] = tape[0][0]
            calls.setdefault(batch.size, [call for _, call in tape])
    finally:
        for index, block in enumerate(blocks):
            setattr(stack, str(index), block)
    drop(body, skip=stack)
    return hidden, calls


def _check_tape(tape: list[tuple[Tensor, Call]], arch: Architecture, known: list[Call] | None) -> None:
    """Refuses a model whose blocks cannot be run one after the other with recorded arguments."""
    from transformers.cache_utils import Cache

    way_out = f"so the blocks of model type {arch.model_type!r} cannot be run on their own; choose a known family"
    if len(tape) != len(arch.blocks):
        raise InputError(f"the model calls {len(tape)} blocks where it has {len(arch.blocks)}, {way_out}")
    first = tape[0][0]
    for layout, (hidden, call) in zip(arch.blocks, tape, strict=True):
        if hidden is not first:
            raise InputError(f"the model changes the hidden states before {layout.path}, {way_out}")
        if any(isinstance(value, Cache) for value in (*call.args, *call.kwargs.values())):
            raise InputError(f"the model gives {layout.path} a cache although it was told not to, {way_out}")
    for layout, (_, call), before in zip(arch.blocks, tape, known or (), strict=False):
        if not _same((call.args, call.kwargs), (before.args, before.kwargs)):
            raise InputError(f"the model gives {layout.path} arguments that depend on the tokens, {way_out}")


def _same(a: Any, b: Any) -> bool:
    """Whether two nested arguments are equal."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def load(module: nn.Module, path: str, source: Source, device: torch.device, skip: nn.Module | None = None) -> None:
    """Reads the weights of `module`, at module path `path`, in float32; `skip` is a part that stays as it is."""
    for owner_path, owner in _owners(module, path, skip):
        for leaf, _ in list(owner.named_parameters(recurse=False)):
            name = f"{owner_path}.{leaf}".lstrip(".")
            value = source.read(name).to(device, torch.float32)
            if not value.isfinite().all():
                raise NumericsError(f"{name} holds NaN or Inf in {source.folder}; use an undamaged checkpoint")
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            name = f"{owner_path}.{leaf}".lstrip(".")
            value = source.read(name).to(buffer.dtype) if name in source.tensors else buffer
            setattr(owner, leaf, value.to(device))


def drop(module: nn.Module, skip: nn.Module | None = None) -> None:
    """Puts the weights of `module` back on meta, and gives the memory back to the system."""
    for _, owner in _owners(module, "", skip):
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, leaf, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    # glibc keeps what lies between long-lived allocations: without this, 24 blocks of 28 MB left 370 MB behind
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _owners(module: nn.Module, path: str, skip: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Every module below `module`, with its path, but those inside `skip`."""
    skipped = set() if skip is None else set(skip.modules())
    for owner_path, owner in module.named_modules(prefix=path):
        if owner not in skipped:
            yield owner_path, owner


def _overflow(name: str, what: str) -> str:
    return (
        f"{name}: {what} became NaN or Inf during calibration; compress the layers before it less, or check that the "
        f"checkpoint works in float32"
    )
