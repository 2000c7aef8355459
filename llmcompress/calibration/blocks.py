"""Decoder blocks that run on their own: loaded one at a time, called with the arguments that `block_calls` records.

A thread can read the next block's tensors meanwhile: compressing on a GPU leaves the host idle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError, NumericsError
from llmcompress.models.dense.experts import Experts, experts_of, holder
from llmcompress.models.dense.model import DenseModel
from llmcompress.runtime.memory import trim_memory
from llmcompress.runtime.phases import phase
from llmcompress.runtime.precision import is_finite, products
from llmcompress.weight.modules import decoded

TOKENS_PER_BATCH = 2048

Read = Callable[[str], Tensor]
Visit = Callable[[str, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class Call:
    """Arguments of a block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Calls:
    """Arguments of every block: shared by all batches of a size, or where they depend on the tokens, by first row."""

    model_type: str
    shared: dict[int, list[Call]]
    own: dict[int, list[Call]]

    def of(self, index: int, size: int, rows: slice | None) -> Call:
        """Return a block's arguments for `size` sequences: the `rows` of all sequences, or None for any sequences.

        Raises InputError for None if the arguments depend on the tokens.
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
    """Sequences that pass a block together, either all for calibration or all held out."""

    rows: slice
    held_out: bool

    @property
    def size(self) -> int:
        """The number of sequences."""
        return int(self.rows.stop - self.rows.start)


def in_batches(count: int, held_out: int, size: int) -> list[RowBatch]:
    """Return batches of at most `size` of `count` rows; the last `held_out` rows are held out."""
    parts = ((0, count - held_out, False), (count - held_out, count, True))
    return [
        RowBatch(slice(first, min(first + size, stop)), held)
        for start, stop, held in parts
        for first in range(start, stop, size)
    ]


@dataclass(frozen=True)
class BlockForward:
    """A loaded block, ready to be called on hidden states alone."""

    module: nn.Module
    path: str
    calls: Calls
    index: int
    dtype: torch.dtype = torch.float32  # of products; hidden states and weights are float32 in any case

    @phase("forward")
    def __call__(
        self,
        hidden: Tensor,
        rows: slice | None = None,
        visit: Visit | None = None,
        names: tuple[str, ...] = (),
        stop_at: str | None = None,
    ) -> Tensor:
        """Return the block's outputs for `hidden [sequences, length, width]`, the `rows` of all; None for any.

        `visit(name, input [sequences, length, in], None)` is called for each linear in `names` when the block calls
        it. For a linear of an expert, which may get no call, it is `visit(name, input [tokens, in], tokens)` with the
        indices of its tokens among `sequences * length`. At the linear `stop_at` the forward ends, with no outputs.

        Raises InputError for a linear that is not called once, NumericsError for NaN or Inf.
        """
        call, visited = self.calls.of(self.index, len(hidden), rows), []
        experts = experts_of(self.module)

        def hook(name: str, routed: Experts | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def visit_input(_: nn.Module, args: tuple[Any, ...]) -> None:
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

            return visit_input

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
        self._check_calls(Counter(visited), names, experts)
        states = hidden_of(output, hidden, self.path)
        if not is_finite(states):
            raise NumericsError(_overflow(self.path, "its outputs"))
        return states

    def _check_calls(self, calls: Counter[str], names: tuple[str, ...], experts: Mapping[str, Experts]) -> None:
        """Raise InputError for a linear that was not called once, unless it is one of an expert without tokens."""
        for name in (name for name in names if calls[name] != 1):
            if calls[name] or holder(name.removeprefix(f"{self.path}."), experts) is None:
                raise InputError(
                    f"{name} is called {calls[name]} times by its block, exactly once was expected; leave the layer "
                    f"out of the recipe or choose a model of a known family"
                )


def hidden_of(output: Any, hidden: Tensor, path: str) -> Tensor:
    """Return the hidden states in a block's `output` for `hidden`. Raises InputError if their shapes differ."""
    states: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    if states.shape != hidden.shape:
        raise InputError(
            f"{path} turns hidden states of shape {list(hidden.shape)} into {list(states.shape)}, so it cannot be run "
            f"on its own; choose a model of a known family"
        )
    return states


class _Enough(Exception):
    """Raised to end a block's forward after the last input of interest."""


@contextmanager
def for_products(run: BlockForward) -> Iterator[None]:
    """Hold a block's linears decoded and in the dtype of its products: autocast would convert them at every call."""
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
    read: Read | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """Load the weights of `module`, at module path `path`, in `dtype`, except the parts `skip`.

    `read` returns a tensor by name; None for the source's. `dtype`: None for that of the source. Raises NumericsError
    for NaN or Inf.
    """
    read = read or source.read
    for owner, leaf, name, held in list(_tensors(module, path, skip)):
        if isinstance(held, nn.Parameter):
            value = read(name).to(device, non_blocking=True)
            value = value if dtype is None else value.to(dtype)  # a host that converts takes 30 times as long
            if not is_finite(value):
                raise NumericsError(f"{name} holds NaN or Inf in {source.folder}; use an undamaged checkpoint")
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        else:
            value = read(name).to(held.dtype) if name in source.tensors else held
            setattr(owner, leaf, value.to(device))


def stored_names(module: nn.Module, path: str, source: DenseModel) -> list[str]:
    """Return the names of the tensors that `load` reads."""
    tensors = _tensors(module, path, ())
    return [name for _, _, name, held in tensors if isinstance(held, nn.Parameter) or name in source.tensors]


def _tensors(module: nn.Module, path: str, skip: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """Yield each parameter and buffer outside of `skip`: its owner, its name there, its name in the model, itself."""
    for owner_path, owner in _owners(module, path, skip):
        for leaf, held in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            yield owner, leaf, f"{owner_path}.{leaf}".lstrip("."), held


@dataclass(eq=False)
class Prefetcher:
    """The tensors of at most one block that a thread reads ahead; without a `pool`, nothing is read ahead.

    `pinned`: True if tensors lie in pinned memory, from which a GPU copies fastest.
    """

    source: DenseModel
    pool: ThreadPoolExecutor | None
    pinned: bool
    waiting: Future[dict[str, Tensor]] | None = None

    def start(self, names: Sequence[str]) -> None:
        """Begin to read these tensors. Raises ValueError if earlier ones were not taken."""
        if self.waiting is not None:
            raise ValueError("a block that was read ahead was not taken; take it first")
        if self.pool is not None:
            self.waiting = self.pool.submit(self._read, list(names))

    def take(self) -> Read:
        """Return a function that gives each prefetched tensor once and reads all others. Raises what reading raises."""
        waiting, self.waiting = self.waiting, None
        tensors = {} if waiting is None else waiting.result()
        return lambda name: tensors.pop(name) if name in tensors else self.source.read(name)

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        tensors = ((name, self.source.read(name)) for name in names)
        return {name: tensor.pin_memory() if self.pinned else tensor for name, tensor in tensors}


@contextmanager
def prefetching(source: DenseModel, device: torch.device, read_ahead: bool | None = None) -> Iterator[Prefetcher]:
    """Hold a prefetcher, which reads nothing ahead if `read_ahead` is false; None: true for a CUDA device."""
    if not (device.type == "cuda" if read_ahead is None else read_ahead):
        yield Prefetcher(source, None, False)
        return
    with ThreadPoolExecutor(1) as pool:
        yield Prefetcher(source, pool, device.type == "cuda")


def drop(module: nn.Module, skip: Sequence[nn.Module] = ()) -> None:
    """Put the weights of `module` back on meta and free their memory, except the parts `skip`."""
    for _, owner in _owners(module, "", skip):
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, leaf, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
    trim_memory()


def _owners(module: nn.Module, path: str, skip: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module outside of `skip`, with its path."""
    skipped = {inner for part in skip for inner in part.modules()}
    for owner_path, owner in module.named_modules(prefix=path):
        if owner not in skipped:
            yield owner_path, owner


def _overflow(name: str, what: str) -> str:
    return (
        f"{name}: {what} became NaN or Inf during calibration; compress the layers before it less, or check that the "
        f"checkpoint works in float32"
    )
