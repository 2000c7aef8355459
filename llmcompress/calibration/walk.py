"""The walk: a model streamed through calibration one decoder block at a time.

    for block in walk(source, arch, sequences, held_out=16, needs=frozenset({"outer"})):
        for group in block.groups:
            weights = {name: compressed(block.weight(name), group.inputs) for name in group.names}
        swap(block, weights)  # the caller edits `block.module`; the walk moves on with what it has become

Peak memory is one block, or a pair, the hidden states of all sequences, and the statistics of one block, whatever the
depth of the model. A block is loaded in float32, run once on the sequences to gather the moments of its linears'
inputs, handed to the caller, run again with what the caller swapped in, and dropped; the second run's outputs are the
next block's inputs, so later layers see the errors of earlier ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

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
    stored_names,
)
from llmcompress.calibration.gather import (
    HELD_OUT,
    HiddenStreams,
    InputGroup,
    Needs,
    add_batch,
    gather,
    wanted_of,
)
from llmcompress.calibration.gradients import Importance
from llmcompress.calibration.prefetch import reading_ahead
from llmcompress.calibration.ranks import added
from llmcompress.errors import InputError
from llmcompress.methods.moments import Moments, RunningMoments
from llmcompress.models.dense.families import Architecture, Linear
from llmcompress.models.dense.model import DenseModel
from llmcompress.recipe.calibration import TokenWeights
from llmcompress.runtime.memory import trim_memory
from llmcompress.runtime.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, float], None]  # (blocks done, blocks, tokens per second)


@dataclass(eq=False)
class Block:
    """One decoder block while the walk stands at it: loaded in float32, its input moments gathered.

    `hidden [sequences, length, width]` is the buffer of the block's inputs, calibration sequences first; it holds the
    outputs once the walk has moved on. `wanted`, as large: what the dense block gives in the dense model, if the walk
    was asked for it. Everything else here is dropped then. `model`: that the block is in, the rest of it on meta.
    """

    index: int
    path: str
    module: nn.Module
    groups: tuple[InputGroup, ...]
    hidden: Tensor
    linears: dict[str, Linear] = field(repr=False)
    model: PreTrainedModel = field(repr=False)
    run: BlockForward | None = field(default=None, repr=False)  # on hidden states alone; None where nothing runs
    wanted: Tensor | None = field(default=None, repr=False)
    gather: Callable[[tuple[str, ...]], InputGroup] | None = field(default=None, repr=False)
    before: Block | None = field(default=None, repr=False)  # still loaded, with its own inputs, if it was asked for

    def weight(self, name: str) -> Tensor:
        """Return the dense matrix `[out, in]` of the linear at module path `name`, float32; not to be written to."""
        module = self.module.get_submodule(name.removeprefix(f"{self.path}."))
        weight = module.get_parameter("weight").detach()
        return weight.T.contiguous() if self.linears[name].transposed else weight


def walk(
    source: DenseModel,
    arch: Architecture,
    sequences: Tensor | None,
    *,
    held_out: int = 0,
    needs: Needs = frozenset(),
    cap: float | None = 4.0,
    weights: TokenWeights | None = None,
    importance: Importance | None = None,
    prefix: Literal["compressed", "dense"] = "compressed",
    dense_stream: bool = False,
    outputs: bool = False,
    pairs: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    finished: int = 0,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
    read_ahead: bool | None = None,
) -> Iterator[Block]:
    """Yield the blocks in order, with the moments of their linears' inputs, then each table that `needs` names as one.

    `sequences`: token ids `[sequences, length]`, the last `held_out` of which are only measured on; None for methods
    without data: then nothing is run, and moments are empty. `needs`: the statistics every linear's method reads, or
    those of each linear by module path; groups that are not named are left out. `cap`: see `moments.capped_weights`;
    None: none. `weights`: of tokens; by gradient, `importance` is that of the sequences. `prefix`: whether inputs come
    from the blocks as the caller left them, or from the dense ones. `dense_stream`: carry the dense model's hidden
    states beside the others, for `cross`; `outputs`: for `Block.wanted`, of held-out sequences too; `pairs`: for
    `Block.before`, which may change as well. `dtype`: of a block's products. `batch_size`: sequences per forward (2048
    tokens). `finished`: so many blocks come without moments, to be made what they were in an earlier walk, or not at
    all where nothing depends on them. `ranks`: processes with sequences of their own; moments are those of all of them.
    `progress(blocks done, blocks, tokens per second)` is called after each. `read_ahead`: see `prefetch`.

    Raises InputError for sequences or blocks that do not suit, NumericsError, naming the layer, for what is not finite.
    """
    if (dense_stream or outputs or pairs) and prefix == "dense":
        raise ValueError("a dense stream beside a dense prefix would be the same stream twice, pairs of no use")
    model, device = source.skeleton(), torch.device(device)
    if sequences is None:
        yield from _without_data(model, source, arch, needs, finished, device, progress, read_ahead)
        return
    _check_sequences(model, sequences, held_out)
    batches = in_batches(len(sequences), held_out, batch_size or max(1, TOKENS_PER_BATCH // sequences.shape[1]))
    hidden, calls, extra = embed(model, source, arch, sequences, batches, device)
    beside = hidden[: len(hidden) if outputs else len(hidden) - held_out].clone() if outputs or dense_stream else None
    behind = hidden.clone() if pairs else None
    streams = HiddenStreams(batches, hidden, beside, behind, cap, weights, prefix == "dense", ranks, importance)
    before, told = None, _paced(progress, len(arch.blocks), sequences.numel() * ranks.count)
    for index, module in _filled(model, source, arch, hidden.device, read_ahead):
        run = BlockForward(module, arch.blocks[index].path, calls, index, dtype)
        block = _block(model, arch, index, run, {} if index < finished else needs, streams, outputs, before)
        yield block
        before = _leave(block, run, streams, index + 1 == len(arch.blocks))
        told(index + 1)
    ends = _gather_ends(model, source, arch, needs, finished, streams, extra)
    del hidden, beside, before, streams, block  # tables are large
    for index, group in ends.items():
        yield from _table(model, source, index, group, torch.device(device))


def _paced(progress: Progress | None, blocks: int, tokens: int) -> Callable[[int], None]:
    """Return a function that reports so many blocks done, and how many of the `tokens` of each went by in a second."""
    started = time.monotonic()

    def told(done: int) -> None:
        if progress is not None:
            progress(done, blocks, done * tokens / (time.monotonic() - started))

    return told


def _filled(
    model: PreTrainedModel,
    source: DenseModel,
    arch: Architecture,
    device: torch.device,
    read_ahead: bool | None,
    first: int = 0,
) -> Iterator[tuple[int, nn.Module]]:
    """Yield the number of each block from the `first` on, and the block with its dense weights; the next one is read
    while the caller works on it, where that is asked for."""
    with reading_ahead(source, device, read_ahead) as ahead:
        for index in range(first, len(arch.blocks)):
            path = arch.blocks[index].path
            module = model.get_submodule(path)
            load(module, path, source, device, read=ahead.take())
            if index + 1 < len(arch.blocks):
                following = arch.blocks[index + 1].path
                ahead.start(stored_names(model.get_submodule(following), following, source))
            yield index, module


def _block(
    model: PreTrainedModel,
    arch: Architecture,
    index: int,
    run: BlockForward,
    needs: Needs,
    streams: HiddenStreams,
    outputs: bool,
    before: Block | None,
) -> Block:
    """A block that was just loaded, with the moments of its linears' inputs."""
    wanted = wanted_of(arch.blocks[index], needs)
    groups = gather(run, wanted, streams)
    trim_memory()

    def again(names: tuple[str, ...]) -> InputGroup:
        alone = replace(streams, dense=None, keep_outputs=False)
        [group] = gather(run, {names: wanted[names] - {"cross"}}, alone)
        return group

    dense = streams.dense if outputs else None
    return Block(index, run.path, run.module, groups, streams.hidden, arch.linears(), model, run, dense, again, before)


def _leave(block: Block, run: BlockForward, streams: HiddenStreams, last: bool) -> Block | None:
    """Move the hidden states on to the outputs of the block as it is now, and drop it.

    Where inputs stay `behind`, the block before may have changed: its outputs are computed again, and it is dropped in
    the place of this one, which is returned with its own inputs; after the `last` none stays.
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
    """Move `hidden` on to the outputs of the block as it is now."""
    with for_products(run):
        for batch in batches:
            hidden[batch.rows] = run(hidden[batch.rows], batch.rows)


def _gather_ends(
    model: PreTrainedModel,
    source: DenseModel,
    arch: Architecture,
    needs: Needs,
    finished: int,
    streams: HiddenStreams,
    extra: int,
) -> dict[int, InputGroup]:
    """The token table and the output head that `needs` names, those not `finished`, by their number as a block, with
    the moments of what the head reads.

    A table that is only looked up has none.
    """
    groups = {}
    for number, name, statistics in _tables(arch, needs, finished):
        totals = {False: RunningMoments(HELD_OUT)}
        inputs = head_inputs(model, source, arch, streams.hidden, streams.batches, extra) if statistics else ()
        for batch, x in inputs:
            add_batch(totals.setdefault(batch.held_out, RunningMoments(HELD_OUT)), x, streams.cap)
        found = added({held: sums.moments() for held, sums in totals.items()}, streams.ranks, streams.hidden.device)
        groups[number] = InputGroup((name,), found[False], found.get(True))
    return groups


def _tables(arch: Architecture, needs: Needs, finished: int) -> list[tuple[int, str, frozenset[str]]]:
    """The token table and the output head, those that the caller named and that are not `finished`: their number as a
    block, their name, and what their methods read."""
    named = needs if isinstance(needs, Mapping) else {}
    names = [name for name in (arch.embedding, arch.head) if name in named]
    numbered = enumerate(names, start=len(arch.blocks))
    return [(number, name, named[name]) for number, name in numbered if number >= finished]


def _table(
    model: PreTrainedModel, source: DenseModel, index: int, group: InputGroup, device: torch.device
) -> Iterator[Block]:
    """The token table or the output head, as a block of its own after all others."""
    [name] = group.names
    module = model.get_submodule(name)
    load(module, name, source, device)
    out, width = module.get_parameter("weight").shape
    nothing = torch.empty(0, device=device)
    yield Block(index, "", model, (group,), nothing, {name: Linear(name, (out, width))}, model)
    drop(module)


def _without_data(
    model: PreTrainedModel,
    source: DenseModel,
    arch: Architecture,
    needs: Needs,
    finished: int,
    device: torch.device,
    progress: Progress | None,
    read_ahead: bool | None,
) -> Iterator[Block]:
    linears = arch.linears()
    for index, module in _filled(model, source, arch, device, read_ahead, finished):
        layout = arch.blocks[index]
        groups = tuple(InputGroup(names, Moments(0.0), None) for names in wanted_of(layout, needs))
        yield Block(index, layout.path, module, groups, torch.empty(0), linears, model)
        drop(module)
        if progress is not None:
            progress(index + 1, len(arch.blocks), 0.0)
    for number, name, _ in _tables(arch, needs, finished):
        yield from _table(model, source, number, InputGroup((name,), Moments(0.0), None), device)


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
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise InputError(
            f"calibration sequences of {length} tokens are longer than the model's {positions} positions; "
            f"set a length of at most {positions}"
        )
