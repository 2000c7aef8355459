"""Decoder blocks that run on their own: loaded one at a time, called with the arguments that `block_calls` finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError, NumericsError
from llmcompress.models.dense.experts import Experts, experts_of, holder
from llmcompress.models.dense.model import DenseModel
from llmcompress.runtime.memory import trim_memory
from llmcompress.runtime.precision import is_finite, products
from llmcompress.weight.modules import decoded

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Call:
    """The arguments that a model's forward passes to a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Calls:
    """The arguments of every block: those that all batches of a size share, or those of each batch by its first row,
    where they depend on the tokens."""

    model_type: str
    shared: dict[int, list[Call]]
    own: dict[int, list[Call]]

    def of(self, index: int, size: int, rows: slice | None) -> Call:
        """Return the arguments of a block for `size` sequences, the `rows` of all; None for any.

        Raises InputError where they are not those of any.
        """
        if not self.own:
            return self.shared[size][index]
        if rows is None:
            raise InputError(
                f"the blocks of model type {self.model_type!r} get arguments that depend on the tokens, so they cannot "
                f"learn one by one; leave reconstruct: and blockwise: out"
            )
        return self.own[rows.start][index]


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


Visit = Callable[[str, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class BlockForward:
    """A loaded block, ready to be called on hidden states alone."""

    module: nn.Module
    path: str
    calls: Calls
    index: int
    dtype: torch.dtype = torch.float32  # of products; hidden states and weights are float32 in any case

    def __call__(
        self,
        hidden: Tensor,
        rows: slice | None = None,
        visit: Visit | None = None,
        names: tuple[str, ...] = (),
        stop_at: str | None = None,
    ) -> Tensor:
        """The block's outputs for `hidden [sequences, length, width]`, the `rows` of all sequences; None for any.

        `visit(name, input [sequences, length, in], None)` is called for each linear in `names` as the block calls it;
        for one of an expert, which may not be called at all, `visit(name, input [tokens, in], tokens)` with the indices
        of its tokens among `sequences * length`. `stop_at`, one of them: the block is left there, and nothing is
        returned.
        """
        call, visited = self.calls.of(self.index, len(hidden), rows), []
        experts = experts_of(self.module)

        def hook(name: str, routed: Experts | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def seen(_: nn.Module, args: tuple[Any, ...]) -> None:
                visited.append(name)
                if not is_finite(args[0]):
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
        found = hidden_of(output, hidden, self.path)
        if not is_finite(found):
            raise NumericsError(_overflow(self.path, "its outputs"))
        return found


def hidden_of(output: Any, hidden: Tensor, path: str) -> Tensor:
    """Return the hidden states in what the block at `path` gave for `hidden`. Raises InputError for another shape."""
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    if found.shape != hidden.shape:
        raise InputError(
            f"{path} turns hidden states of shape {list(hidden.shape)} into {list(found.shape)}, so it cannot be run "
            f"on its own; choose a model of a known family"
        )
    return found


def _unrouted(name: str, calls: int, path: str, experts: Mapping[str, Experts]) -> bool:
    """True if a linear of the block at `path` is one of an expert, and was not called since no token came to it."""
    return calls == 0 and holder(name.removeprefix(f"{path}."), experts) is not None


class _Enough(Exception):
    """Raised to leave a block's forward when the last wanted input has been seen."""


@contextmanager
def for_products(run: BlockForward) -> Iterator[None]:
    """Keep the weights of a block's linears decoded and in the dtype of its products, for more than one batch.

    Products are the same: autocast would turn the weights at every call.
    """
    linears = [inner for inner in run.module.modules() if type(inner) is nn.Linear]
    before = [linear.weight for linear in linears]
    with decoded(run.module, run.dtype):
        try:
            for linear in linears:
                linear.weight = nn.Parameter(linear.weight.to(run.dtype), requires_grad=False)
            yield
        finally:
            for linear, weight in zip(linears, before, strict=True):
                linear.weight = weight


def load(
    module: nn.Module,
    path: str,
    source: DenseModel,
    device: torch.device,
    skip: Sequence[nn.Module] = (),
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Read the weights of `module`, at module path `path`, in float32; `skip` are parts that stay as they are; `read`:
    in place of the source's, for what was read ahead."""
    read = read or source.read
    for owner, leaf, name, held in list(_tensors(module, path, skip)):
        if isinstance(held, nn.Parameter):
            value = read(name).to(device, non_blocking=True).float()  # a host that converts takes 30 times as long
            if not is_finite(value):
                raise NumericsError(f"{name} holds NaN or Inf in {source.folder}; use an undamaged checkpoint")
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        else:
            value = read(name).to(held.dtype) if name in source.tensors else held
            setattr(owner, leaf, value.to(device))


def stored_names(module: nn.Module, path: str, source: DenseModel) -> list[str]:
    """Return the names of the tensors that `load` reads."""
    found = _tensors(module, path, ())
    return [name for _, _, name, held in found if isinstance(held, nn.Parameter) or name in source.tensors]


def _tensors(module: nn.Module, path: str, skip: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """Every parameter and buffer below `module` but those inside `skip`: its owner, its name there, and its name in the
    model."""
    for owner_path, owner in _owners(module, path, skip):
        for leaf, held in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            yield owner, leaf, f"{owner_path}.{leaf}".lstrip("."), held


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


def _overflow(name: str, what: str) -> str:
    return (
        f"{name}: {what} became NaN or Inf during calibration; compress the layers before it less, or check that the "
        f"checkpoint works in float32"
    )
