"""Fewer decoder blocks: the others close the gap, and their numbers and the config's lists follow.

No weight changes. config.json then lists under `KEPT` which of the original model's blocks are left, so that a
distillation can match the hidden states of teacher and student.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError, RecipeError, list_names
from llmcompress.models.dense.blocks import KEPT, kept_blocks
from llmcompress.models.dense.companions import companions
from llmcompress.models.dense.families import FAMILIES
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.models.dense.skeleton import check_causal
from llmcompress.models.files.checkpoint import PART, write_checkpoint
from llmcompress.models.files.tensor_files import shards
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.progress import count_each
from llmcompress.surgery.edited_model import check_equal_widths

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PER_BLOCK = ("layer_types", "no_rope_layers")  # lists of a config that have an entry for every block
BY_NUMBER = "scale_attn_by_inverse_layer_idx"  # GPT-2's: a block's result depends on its number


@dataclass(frozen=True)
class DropReport(JsonRecord):
    """The checkpoint that was written. Blocks are numbered from 0 as in `model`; bytes count the weights."""

    model: str
    output: str
    dropped: tuple[int, ...]
    kept: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    warnings: tuple[str, ...] = ()


def drop_blocks(
    model: str | Path,
    blocks: Iterable[int],
    output: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> DropReport:
    """Write a dense causal language model without some of its decoder blocks, one weight file's worth at a time.

    Args:
        model: a folder, a Hub id (`org/name` or `org/name@revision`) or `smollm2`.
        blocks: numbers of the blocks to drop, counted from 0.
        output: a new or empty folder.
        revision: a branch, tag or commit of a Hub model.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.

    Returns:
        The folder, and the blocks and bytes before and after.

    Raises:
        RecipeError: for blocks that cannot go.
        InputError: for a model whose blocks cannot be told apart.
        DiskError: for an output that cannot be written; then nothing is left behind.
    """
    source, target = resolve(model, revision, trust_remote_code), Path(output)
    stays = _staying_blocks(source, set(blocks))
    names, beside = _stored_names(source, stays), companions(source.folder, trust_remote_code)
    sizes = {name: source.tensors[name].bytes_of_numbers for name in names}
    with write_checkpoint(target, sum(sizes.values())) as writer:
        beside.copy(writer.folder)
        for part in count_each([*shards(sizes, PART)], "part written"):
            writer.add({names[name]: source.read(name) for name in part})
        size = writer.close()
        entries = source.config_entries() | _config_changes(source.config, stays)
        source.origin.write(writer)
        writer.write("config.json", json.dumps(entries, indent=1))
    dropped = tuple(sorted(set(blocks_of(source)) - set(stays)))
    return DropReport(source.name, str(target), dropped, stays, source.bytes, size, source.notes)


def blocks_of(source: DenseModel) -> range:
    """Return the numbers of a model's blocks. Raises InputError for a family that is not in the table."""
    config = source.config
    check_causal(config, "dropping blocks")
    if config.model_type not in FAMILIES:
        raise InputError(
            f"model type {config.model_type!r} is not in the table of families, so it is unknown what else depends on "
            f"the number of its blocks; choose one of {', '.join(FAMILIES)}"
        )
    return range(config.num_hidden_layers)


def _staying_blocks(source: DenseModel, dropped: set[int]) -> tuple[int, ...]:
    """Return the numbers of the blocks that stay. Raises RecipeError or InputError where the others cannot go."""
    check_equal_widths(source)
    blocks = blocks_of(source)
    if absent := sorted(dropped.difference(blocks)):
        raise RecipeError(
            f"{source.name} has no block {list_names(map(str, absent))}; its blocks are 0 to {len(blocks) - 1}"
        )
    stays = tuple(number for number in blocks if number not in dropped)
    if not dropped or not stays:
        raise RecipeError(
            f"{len(dropped)} of the {len(blocks)} blocks of {source.name} cannot be dropped; name at least one, not all"
        )
    if getattr(source.config, BY_NUMBER, False):
        raise InputError(
            f"{source.name} scales each block's attention by the block's number ({BY_NUMBER}), so no block can take "
            f"another's place; choose a model without it"
        )
    return stays


def _stored_names(source: DenseModel, stays: tuple[int, ...]) -> dict[str, str]:
    """Return the name in the new files of each tensor that stays, by the model's name of it."""
    numbers = {old: new for new, old in enumerate(stays)}
    stack = FAMILIES[source.config.model_type].blocks
    names = {}
    for name, header in source.tensors.items():
        inside = name.removeprefix(f"{stack}.")
        if inside == name:
            names[name] = header.key
            continue
        number, _, rest = inside.partition(".")
        if int(number) in numbers:  # the file may have another prefix before the same end
            names[name] = f"{header.key.removesuffix(inside)}{numbers[int(number)]}.{rest}"
    return names


def _config_changes(config: PreTrainedConfig, stays: tuple[int, ...]) -> dict[str, Any]:
    """Return the changed entries of the shortened model's config; a pattern is written as the list it stands for."""
    before = kept_blocks(config) or range(config.num_hidden_layers)
    length = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    lists = {name: getattr(config, name, None) for name in PER_BLOCK}
    sliced = {name: [entries[number] for number in stays] for name, entries in lists.items() if entries}
    return {length: len(stays), KEPT: [before[number] for number in stays], **sliced}
