"""A model's predictions, computed one decoder block at a time for all windows of tokens.

    model = from_disk(source, device)
    states = model.embed(ids, size=1)
    for index in range(model.depth):
        model.advance(states, index)
    for batch, parts in zip(states.batches, model.logits(states)):
        for logits in parts:  # of consecutive positions
            ...

Numbers are those of the whole model, computed in the same order. Memory holds one block and the hidden states, then
the layers after the blocks and at most LOGITS logits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from llmcompress.calibration.block_calls import part_for_text, record_calls, skip_blocks, without_table
from llmcompress.calibration.blocks import Calls, RowBatch, drop, hidden_of, in_batches, load
from llmcompress.calibration.head_rows import is_large_head, multiply_by_rows
from llmcompress.models.dense.blocks import body, depth
from llmcompress.models.dense.families import block_stack, name_of
from llmcompress.models.dense.model import DenseModel
from llmcompress.weight.modules import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

STEP = 32  # positions that a part is a multiple of, so that sums over fewer have their order
LOGITS = 1024 * 49152  # in memory at once, 201 MB in float32: of 1024 positions, or of 192 in a vocabulary of 262,144
Hold = Callable[[nn.Module, Sequence[nn.Module]], AbstractContextManager[None]]  # (module, its parts to leave out)


@dataclass(frozen=True, eq=False)
class States:
    """Hidden states `[windows, length, width]` on their way through the blocks, with the blocks' other arguments."""

    ids: Tensor  # the tokens `[windows, length]`
    batches: list[RowBatch]
    hidden: Tensor
    calls: Calls
    extra: int  # number of values that blocks return after the hidden states


@dataclass(frozen=True, eq=False)
class StreamedModel:
    """A causal language model whose parts are held one at a time. `stack`: the path of its blocks.

    They are float32 but for a large head, which stays as stored.
    """

    model: PreTrainedModel
    stack: str
    device: torch.device
    hold: Hold

    @property
    def depth(self) -> int:
        """The number of decoder blocks."""
        return depth(self.model)

    @torch.no_grad()
    def embed(self, ids: Tensor, size: int) -> States:
        """Return the first block's inputs for `ids [windows, length]`, which pass `size` windows at a time.

        Raises InputError for a model whose blocks cannot be run one by one.
        """
        batches = in_batches(len(ids), 0, size)
        with self.hold(body(self.model), [self._blocks()]):
            hidden, calls, extra = record_calls(self.model, self.stack, ids, batches, self.device)
        return States(ids, batches, hidden, calls, extra)

    @torch.no_grad()
    def advance(self, states: States, index: int) -> None:
        """Replace the hidden states, inputs of the block `index`, by its outputs."""
        block = self._blocks()[index]
        with self.hold(block, ()):
            for batch in states.batches:
                states.hidden[batch.rows] = run_block(block, index, states, states.hidden[batch.rows], batch.rows)

    def logits(self, states: States) -> Generator[Iterator[Tensor]]:
        """Yield the logits of each batch, from the outputs of the last block: parts to read before the next batch."""
        with self.at_the_end():
            for batch in states.batches:
                yield self.predict_parts(states, states.hidden[batch.rows], batch.rows)

    def predict_parts(self, states: States, hidden: Tensor, rows: slice) -> Iterator[Tensor]:
        """Yield the logits `[rows, positions, vocabulary]` of some windows in `position_parts`, `at_the_end`."""
        for positions in position_parts(self.model.config, *hidden.shape[:2]):
            yield self.predict(states, hidden, rows, positions)

    @contextmanager
    def at_the_end(self) -> Iterator[None]:
        """Hold the layers after the blocks while the context lasts."""
        with ExitStack() as stack:
            for module, skip in self._ends():
                stack.enter_context(self.hold(module, skip))
            yield

    def predict(self, states: States, hidden: Tensor, rows: slice, positions: slice) -> Tensor:
        """Return the logits `[rows, positions, vocabulary]` of some windows from their `hidden` states, `at_the_end`.

        They have a graph if the hidden states require gradients.
        """
        ids = states.ids[rows].to(self.device)
        known, extra = signature(self.model.forward).parameters, {}
        routers = {"output_router_logits": False} if "output_router_logits" in known else {}  # the stand-ins have none
        if positions != slice(0, ids.shape[1]) and "logits_to_keep" in known:
            extra["logits_to_keep"] = torch.arange(ids.shape[1], device=self.device)[positions]
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(hidden.requires_grad))
            stack.enter_context(skip_blocks(self.model, self.stack, self.depth, hidden, states.extra))
            stack.enter_context(without_table(self.model, self.device))
            logits: Tensor = self.model(input_ids=ids, use_cache=False, **routers, **extra).logits
            return logits if extra else logits[:, positions]

    def _blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model.get_submodule(self.stack))

    def _ends(self) -> list[tuple[nn.Module, Sequence[nn.Module]]]:
        """Return the modules that compute logits after the blocks, the head last, with their parts to leave out."""
        heads = [head for head in [self.model.get_output_embeddings()] if isinstance(head, nn.Module)]
        aside = (self._blocks(), self.model.get_input_embeddings(), *heads)
        return [(part_for_text(self.model), aside), *((head, ()) for head in heads)]


def position_parts(config: PreTrainedConfig, windows: int, length: int) -> list[slice]:
    """Return consecutive positions of windows, with at most LOGITS logits of all windows in each part."""
    count = positions_at_once(windows * config.get_text_config(decoder=True).vocab_size)
    return [slice(first, min(first + count, length)) for first in range(0, length, count)]


def positions_at_once(classes: int) -> int:
    """Return how many positions with so many logits each are in memory at once."""
    return max(LOGITS // classes // STEP * STEP, STEP)


def run_block(block: nn.Module, index: int, states: States, hidden: Tensor, rows: slice) -> Tensor:
    """Return the outputs of block number `index`, which is held, for the `hidden` states of some `rows`.

    Raises InputError for outputs of another shape.
    """
    call = states.calls.of(index, len(hidden), rows)
    return hidden_of(block(hidden, *call.args, **call.kwargs), hidden, f"block {index}")


def from_disk(source: DenseModel, device: torch.device) -> StreamedModel:
    """Return a dense model whose weights are read when needed, and dropped afterwards.

    Raises InputError for a model whose blocks cannot be told apart.
    """
    model = source.skeleton()

    @contextmanager
    def hold(module: nn.Module, skip: Sequence[nn.Module]) -> Iterator[None]:
        large = is_large_head(module)
        load(module, name_of(model, module), source, device, skip, dtype=None if large else torch.float32)
        try:
            with multiply_by_rows(cast(nn.Linear, module)) if large else nullcontext():
                yield
        finally:
            drop(module, skip)

    return StreamedModel(model, block_stack(source.config, model), device, hold)


def in_memory(model: PreTrainedModel) -> StreamedModel:
    """Return a compressed model in memory, whose linears are decoded when needed.

    Raises InputError for a model whose blocks cannot be told apart.
    """

    def hold(module: nn.Module, skip: Sequence[nn.Module]) -> AbstractContextManager[None]:
        return decoded(module, model.dtype, skip)

    return StreamedModel(model, block_stack(model.config, model), model.device, hold)
