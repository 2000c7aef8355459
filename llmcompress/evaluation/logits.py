"""Logits of windows of tokens, from a model in memory or on disk.

A dense model on disk runs block by block, for all windows at once, and is never in memory as a whole. A compressed one
in memory runs likewise, and decodes its linears on the way. The logits equal those of the whole model. Those of a large
vocabulary come in parts, a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from llmcompress.calibration.streaming import States, StreamedModel, from_disk, in_memory, position_parts
from llmcompress.errors import InputError
from llmcompress.models.dense.load import check_fits, check_outline, load_model, passes_by_block
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import DenseModel, open_source
from llmcompress.models.dense.skeleton import check_causal
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.progress import count_each
from llmcompress.weight.modules import compressed_linears, decoded

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Counting = Callable[[int, int], None]  # (done, in all)


@dataclass(frozen=True)
class OnDisk:
    """A dense model that is read while it is scored, and the device that runs it."""

    source: DenseModel
    device: str

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self.source.config

    def load(self) -> PreTrainedModel:
        """Return the whole model, in float32.

        Raises MemoryLimitError if it does not fit, and what `load_model` raises.
        """
        check_fits(self.device, "reading it whole", [self.source.place])
        return self.source.load(self.device)


Readable: TypeAlias = "PreTrainedModel | OnDisk"


def open_model(place: Place, device: str, whole: bool = False) -> Readable:
    """Return the model of a place, to be scored. One that passes by block stays on disk, unless `whole`.

    Raises InputError for a model that cannot be loaded.
    """
    if (outline := check_outline(place)) is not None:
        check_causal(outline.config, "scoring")
    if not whole and passes_by_block(place.folder):
        device_of(device)
        return OnDisk(open_source(place), device)
    return load_model(place, device)


@torch.no_grad()
def window_logits(
    model: Readable, ids: Tensor, batch_size: int = 1, blocks: Counting | None = None
) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
    """Yield windows [batch, length] with their logits, on the device of the model.

    The logits are [batch, positions, vocabulary] of consecutive positions, to be read before the next windows are.

    `blocks` receives (blocks, blocks in all) of a model that runs block by block. A model whose blocks cannot be run
    one by one is read whole.
    """
    passed = _run_blocks(model, ids, batch_size, blocks) if len(ids) else None
    if passed is not None:
        streamed, states = passed
        with closing(streamed.logits(states)) as logits:
            for batch, batch_logits in zip(states.batches, logits):
                yield ids[batch.rows].to(streamed.device), batch_logits
    elif len(ids):
        whole = model.load() if isinstance(model, OnDisk) else model
        with decoded(whole):
            for batch in ids.to(whole.device).split(batch_size):
                logits = whole(input_ids=batch, use_cache=False).logits
                yield batch, (logits[:, part] for part in position_parts(whole.config, *batch.shape))


def _run_blocks(
    model: Readable, ids: Tensor, batch_size: int, blocks: Counting | None
) -> tuple[StreamedModel, States] | None:
    """Return the states after all blocks; None for a model that has to be, or already is, whole in memory."""
    if not isinstance(model, OnDisk) and not _streams(model):
        return None
    try:
        streamed = by_blocks(model)
        states = streamed.embed(ids, batch_size)
        for index in count_each(range(streamed.depth), "block"):
            streamed.advance(states, index)
            if blocks is not None:
                blocks(index + 1, streamed.depth)
    except InputError:
        return None  # other faults are raised again when it is read whole
    return streamed, states


def by_blocks(model: Readable) -> StreamedModel:
    """Return a model whose blocks are held one at a time. Raises InputError if they cannot be told apart."""
    return from_disk(model.source, device_of(model.device)) if isinstance(model, OnDisk) else in_memory(model)


def _streams(model: PreTrainedModel) -> bool:
    """True if a model in memory has linears to decode."""
    linears = compressed_linears(model).values()
    return model.dtype == torch.float32 and any(linear.ready is None for linear in linears)
