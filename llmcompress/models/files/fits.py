"""The check that models fit into a machine's memory, before they are loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from llmcompress.errors import InputError, MemoryLimitError
from llmcompress.models.dense.families import block_stack
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import check_outline
from llmcompress.models.files.integrity import weight_files
from llmcompress.runtime.memory import total_memory


def check_fits(
    device: str,
    doing: str,
    whole: Sequence[Place] = (),
    passing: Sequence[Place] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise MemoryLimitError if models in a `dtype`, `whole` ones and those `passing` block by block, do not fit into
    the machine's memory together.

    Of those that pass, a compressed one is in memory as it is stored, beside the block that is decoded. `doing` is the
    beginning of the sentence.
    """
    if device != "cpu":
        return
    there = total_memory()
    sizes = {place.name: _held(place, place in whole, dtype.itemsize) for place in (*whole, *passing)}
    if sum(sizes.values()) > there:
        held = " and ".join(f"{name} ({size / 1e9:.1f} GB)" for name, size in sizes.items())
        kind = str(dtype).removeprefix("torch.")
        raise MemoryLimitError(
            f"{doing} holds {held} in {kind}, and this machine has {there / 1e9:.1f} GB; take a larger "
            f"machine, or a device with --device"
        )


def _held(place: Place, whole: bool, each: int) -> int:
    """Return the bytes that a model takes; `each`: those of a weight."""
    is_dense, model = check_outline(place)
    if model is None:
        return 0
    if whole:
        return each * _weights(model)
    try:
        blocks = model.get_submodule(block_stack(model.config, model))
    except InputError:
        return each * _weights(model)  # it cannot pass block by block
    largest = max(map(_weights, blocks.children()))
    tables = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    stored = 0 if is_dense else sum(path.stat().st_size for path in weight_files(place.folder))
    return stored + each * max(largest, *map(_weights, tables))


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
