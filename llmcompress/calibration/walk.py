"""The walk: a model streamed through calibration one decoder block at a time.

    for block in walk(source, arch, sequences, Statistics(needs=frozenset({"outer"})), held_out=16):
        for group in block.groups:
            weights = {name: compress(block.weight(name), group.inputs) for name in group.names}
        swap(block, weights)  # the caller edits `block.module`; the walk moves on with what it has become

A block is loaded in float32, run once on the sequences to gather the moments of its linears' inputs, handed to the
caller, run again with what the caller swapped in, and dropped. The outputs of the second run are the next block's
inputs, so later layers see the errors of earlier ones. Peak memory is one block, or a pair, the hidden states of all
sequences and the statistics of one block, whatever the depth of the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.calibration.block_calls import embed, head_inputs
from llmcompress.calibration.blocks import (
    TOKENS_PER_BATCH,
    BlockForward,
    RowBatch,
    drop,
    for_products,
    in_batches,
    load,
    prefetching,
    stored_names,
)
from llmcompress.calibration.gather import (
    HELD_OUT,
    HiddenStreams,
    InputGroup,
    Statistics,
    Wanted,
    add_batch,
    gather,
    wanted_of,
)
from llmcompress.calibration.input_scales import key_value_scales, sample_inputs
from llmcompress.calibration.ranks import sum_over_ranks
from llmcompress.errors import InputError
from llmcompress.methods.moments import Moments, RunningMoments
from llmcompress.models.dense.config import context_length
from llmcompress.models.dense.families import Architecture, Linear
from llmcompress.models.dense.model import DenseModel
from llmcompress.runtime.memory import trim_memory
from llmcompress.runtime.phases import phase
from llmcompress.runtime.progress import count_steps
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.weight.inputs import InputFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, float], None]  # (blocks done, blocks, tokens per second)


@dataclass(frozen=True)
class Execution:
    """The device, precision and processes of a walk.

    `dtype`: of a block's products. `batch_size`: sequences per forward; None for 2048 tokens. `ranks`: processes with
    sequences of their own, whose moments are added up. `progress` is called after each block. `read_ahead`: see
    `prefetching`. `prepare` may change a block, but not what it computes, by samples of inputs before it is gathered.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int | None = None
    ranks: Ranks = ALONE
    progress: Progress | None = None
    read_ahead: bool | None = None
    prepare: Callable[[Block], None] | None = None


NO_STATISTICS, ON_CPU = Statistics(), Execution()


@dataclass(eq=False)
class Block:
    """One decoder block while the walk stands at it: loaded in float32, its input moments gathered.

    `hidden [sequences, length, width]` is the buffer of the block's inputs, calibration sequences first; it holds the
    outputs once the walk has moved on, when `groups` and `wanted` are dropped. `wanted`, as large: outputs of the block
    in the dense model, for blocks that learn. `model`: the model around the block, the rest of it on meta. `kv_scales`:
    see `key_value_scales`.
    """

    index: int
    path: str
    module: nn.Module
    groups: tuple[InputGroup, ...]
    hidden: Tensor
    linears: dict[str, Linear] = field(repr=False)
    model: PreTrainedModel = field(repr=False)
    run: BlockForward | None = field(default=None, repr=False)  # on hidden states alone; None without sequences
    wanted: Tensor | None = field(default=None, repr=False)
    gather: Callable[[tuple[str, ...]], InputGroup] | None = field(default=None, repr=False)  # moments once more
    before: Block | None = field(default=None, repr=False)  # still loaded, with its own inputs, in a window of two
    kv_scales: dict[str, list[float]] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """Return the dense matrix `[out, in]` of the linear at module path `name`, float32; not to be written to."""
        module = self.module.get_submodule(name.removeprefix(f"{self.path}."))
        weight = module.get_parameter("weight").detach()
        return weight.T.contiguous() if self.linears[name].transposed else weight


def walk(
    source: DenseModel,
    arch: Architecture,
    sequences: Tensor | None,
    statistics: Statistics = NO_STATISTICS,
    execution: Execution = ON_CPU,
    *,
    held_out: int = 0,
    window: int = 0,
    finished: int = 0,
) -> Iterator[Block]:
    """Yield the blocks in order, with the moments of their linears' inputs, then each table that has needs by name.

    `sequences`: token ids `[sequences, length]`, the last `held_out` of which are only measured on. None for methods
    without data: nothing is run, and moments are empty. `window`: number of blocks that learn together; from 1 on there
    is `Block.wanted`, for held-out sequences too, with 2 also `Block.before`, which may change as well. The first
    `finished` blocks come without moments, to be made what they were in an earlier walk; without data they are left
    out.

    Raises InputError for sequences or blocks that do not suit, NumericsError, naming the layer, for what is not finite.
    """
    if (statistics.cross or window) and statistics.prefix == "dense":
        raise ValueError("a dense stream beside a dense prefix would be the same stream twice, pairs of no use")
    way = _Walk(source, arch, source.skeleton(), statistics, execution, torch.device(execution.device), finished)
    if sequences is None:
        yield from way.without_data()
    else:
        _check_sequences(way.model, sequences, held_out)
        yield from way.with_data(sequences, held_out, window)


@dataclass(frozen=True, eq=False)
class _Walk:
    """The arguments of a walk, and the skeleton of its model."""

    source: DenseModel
    arch: Architecture
    model: PreTrainedModel
    statistics: Statistics
    execution: Execution
    device: torch.device
    finished: int

    def with_data(self, sequences: Tensor, held_out: int, window: int) -> Iterator[Block]:
        """Yield the blocks and tables of a walk with sequences."""
        execution, statistics = self.execution, self.statistics
        size = execution.batch_size or max(1, TOKENS_PER_BATCH // sequences.shape[1])
        batches = in_batches(len(sequences), held_out, size)
        drawn = range(1 if execution.ranks.count > 1 else size, size + 1)  # by a block that learns
        with phase("forward"):
            hidden, calls, extra = embed(
                self.model, self.source, self.arch, sequences, batches, self.device, drawn if window else ()
            )
        dense = None
        if window or statistics.cross:
            dense = hidden[: len(hidden) if window else len(hidden) - held_out].clone()
        behind = hidden.clone() if window > 1 else None
        keep_outputs = statistics.prefix == "dense"
        streams = HiddenStreams(batches, hidden, statistics, dense, behind, keep_outputs, execution.ranks)
        count_steps("block", len(self.arch.blocks))  # the first one may take long
        before, started = None, time.monotonic()
        tokens = sequences.numel() * execution.ranks.count
        for index, module in self._loaded_blocks(hidden.device):
            run = BlockForward(module, self.arch.blocks[index].path, calls, index, execution.dtype)
            block = self._gather_block(run, streams, bool(window), before)
            yield block
            before = _leave(block, run, streams, index + 1 == len(self.arch.blocks))
            self._report(index + 1, (index + 1) * tokens / (time.monotonic() - started))
        ends = self._gather_ends(streams, extra)
        del hidden, dense, behind, before, streams, block  # tables are large
        for index, group in ends.items():
            yield from self._table(index, group)

    def without_data(self) -> Iterator[Block]:
        """Yield the blocks and tables of a walk without sequences."""
        for index, module in self._loaded_blocks(self.device, self.finished):
            layout = self.arch.blocks[index]
            wanted = wanted_of(layout, self.statistics.needs)
            groups = tuple(InputGroup(names, Moments(0.0), None, format=self._format(names)) for names in wanted)
            yield Block(index, layout.path, module, groups, torch.empty(0), self.arch.linears(), self.model)
            drop(module)
            self._report(index + 1, 0.0)
        for index, name, _ in self._tables():
            yield from self._table(index, InputGroup((name,), Moments(0.0), None))

    def _format(self, names: tuple[str, ...]) -> InputFormat | None:
        """Return what the inputs of a group are rounded to, by no calibrated scale."""
        asked = [self.statistics.inputs[name].format for name in names if name in self.statistics.inputs]
        return InputFormat(asked[0]) if asked else None

    def _report(self, done: int, speed: float) -> None:
        if self.execution.progress is not None:
            self.execution.progress(done, len(self.arch.blocks), speed)

    def _loaded_blocks(self, device: torch.device, first: int = 0) -> Iterator[tuple[int, nn.Module]]:
        """Yield the number of each block from the `first` on, and the block with its dense weights."""
        with prefetching(self.source, device, self.execution.read_ahead) as ahead:
            for index in range(first, len(self.arch.blocks)):
                path = self.arch.blocks[index].path
                module = self.model.get_submodule(path)
                with phase("load"):
                    load(module, path, self.source, device, read=ahead.take())
                if index + 1 < len(self.arch.blocks):
                    following = self.arch.blocks[index + 1].path
                    ahead.start(stored_names(self.model.get_submodule(following), following, self.source))
                yield index, module

    def _gather_block(self, run: BlockForward, streams: HiddenStreams, learns: bool, before: Block | None) -> Block:
        """Return a block that was just loaded, with the moments of its linears' inputs."""
        needs = {} if run.index < self.finished else self.statistics.needs
        wanted = wanted_of(self.arch.blocks[run.index], needs)
        dense, linears = streams.dense if learns else None, self.arch.linears()
        where = run.index, run.path, run.module
        if self.execution.prepare is not None and wanted:
            known = self._look_ahead(run, wanted, streams)
            self.execution.prepare(Block(*where, known, streams.hidden, linears, self.model))
        scales: dict[str, list[float]] = {}
        if self.statistics.kv_cache and run.index >= self.finished:  # before the hidden states may move on
            scales = key_value_scales(run, streams.batches, streams.hidden, streams.ranks)
        groups = gather(run, wanted, streams)
        trim_memory()

        def gather_again(names: tuple[str, ...]) -> InputGroup:
            alone = replace(streams, dense=None, keep_outputs=False)
            rounded = any(name in self.statistics.inputs for name in names)  # then it is of the own inputs
            [group] = gather(run, {names: wanted[names] - ({"cross"} if not rounded else set())}, alone)
            return group

        return Block(*where, groups, streams.hidden, linears, self.model, run, dense, gather_again, before, scales)

    def _look_ahead(self, run: BlockForward, wanted: Wanted, streams: HiddenStreams) -> tuple[InputGroup, ...]:
        """Return what a block is prepared by: samples of inputs that will be rounded, else their moments."""
        if not self.statistics.inputs:
            outer = {names: frozenset({"outer"}) for names in wanted}
            return gather(run, outer, replace(streams, dense=None, keep_outputs=False))
        sampled = partial(sample_inputs, run, tuple(names[0] for names in wanted), streams.batches, streams.hidden)
        samples = streams.ranks.first(sampled)
        return tuple(InputGroup(names, Moments(0.0), None, sample=samples[names[0]]) for names in wanted)

    def _gather_ends(self, streams: HiddenStreams, extra: int) -> dict[int, InputGroup]:
        """Return the `_tables` by their number as a block, with the moments of the head's inputs."""
        groups = {}
        for number, name, statistics in self._tables():
            totals = {False: RunningMoments(HELD_OUT)}
            hidden, batches = streams.hidden, streams.batches
            inputs = head_inputs(self.model, self.source, self.arch, hidden, batches, extra) if statistics else ()
            for batch, x in inputs:
                add_batch(totals.setdefault(batch.held_out, RunningMoments(HELD_OUT)), x, self.statistics.cap)
            moments = sum_over_ranks(
                {held: sums.moments() for held, sums in totals.items()}, streams.ranks, streams.hidden.device
            )
            groups[number] = InputGroup((name,), moments[False], moments.get(True))
        return groups

    def _tables(self) -> list[tuple[int, str, frozenset[str]]]:
        """Return the token table and the output head that have needs by name and are not finished.

        Each with its number as a block, its name, and the statistics that its methods read: none for a table that is
        only looked up.
        """
        needs = self.statistics.needs
        named = needs if isinstance(needs, Mapping) else {}
        names = [name for name in (self.arch.embedding, self.arch.head) if name in named]
        numbered = enumerate(names, start=len(self.arch.blocks))
        return [(number, name, named[name]) for number, name in numbered if number >= self.finished]

    def _table(self, index: int, group: InputGroup) -> Iterator[Block]:
        """Yield the token table or the output head as a block of its own after all others."""
        [name] = group.names
        module = self.model.get_submodule(name)
        load(module, name, self.source, self.device)
        out, width = module.get_parameter("weight").shape
        nothing = torch.empty(0, device=self.device)
        yield Block(index, "", self.model, (group,), nothing, {name: Linear(name, (out, width))}, self.model)
        drop(module)


def _leave(block: Block, run: BlockForward, streams: HiddenStreams, last: bool) -> Block | None:
    """Move the hidden states on to the outputs of the block as it is now, and drop it.

    In a window of two the block before may have changed: its outputs are computed again, and it is dropped in place of
    this one, which is returned with its own inputs. After the `last` block none stays.
    """
    block.groups, block.wanted = (), None
    before, block.before = block.before, None
    with streams.ranks.agree_on_errors():
        if before is not None and before.run is not None:
            _advance(before.run, streams.batches, before.hidden)
            block.hidden.copy_(before.hidden)
            drop(before.module)
        if not streams.keep_outputs:
            _advance(run, streams.batches, block.hidden)
    if streams.behind is None or last:
        drop(block.module)
        return None
    return replace(block, hidden=streams.behind, gather=None)


@torch.no_grad()
def _advance(run: BlockForward, batches: list[RowBatch], hidden: Tensor) -> None:
    """Replace `hidden`, a block's inputs, by the outputs of the block as it is now."""
    with for_products(run):
        for batch in batches:
            hidden[batch.rows] = run(hidden[batch.rows], batch.rows)


def _check_sequences(model: PreTrainedModel, sequences: Tensor, held_out: int) -> None:
    count, length = sequences.shape
    if not 0 <= held_out < count:
        raise InputError(
            f"{held_out} of {count} calibration sequences are to be held out, so none is left to calibrate on; "
            f"hold out fewer or use more text"
        )
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    low, high = int(sequences.min()), int(sequences.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"the calibration text has token {high if high >= vocabulary else low} but the model's vocabulary ends at "
            f"{vocabulary - 1}; use the model's own tokenizer"
        )
    positions = context_length(model.config)
    if positions is not None and length > positions:
        raise InputError(
            f"calibration sequences of {length} tokens are longer than the model's {positions} positions; "
            f"set a length of at most {positions}"
        )
