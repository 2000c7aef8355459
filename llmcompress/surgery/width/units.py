"""The parts of a model that can become narrower, as data: neurons of its feed-forward layers, and key-value heads.

All blocks become equally narrow, since a config has one number for them, unless each is to have a width of its own.
Nothing here reads weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from llmcompress.errors import InputError, RecipeError
from llmcompress.models.dense.auto_class import check_causal
from llmcompress.models.dense.families import FAMILIES, LLAMA, Architecture, BlockLayout, Linear
from llmcompress.models.dense.model import DenseModel
from llmcompress.surgery.edited_model import ChangedConfig, Made, changed

Part = Literal["neurons", "kv_heads"]
NEURONS = ("intermediate_size", "ffn_dim", "n_inner")  # entries of configs
MULTIPLE = 32  # of neurons, which quantizers group and processors multiply, where a share is asked for


@dataclass(frozen=True)
class Cut:
    """Units of one kind in a block, which go with rows of `producers` and columns of the `consumer`.

    `units`: in the model; `keep`: of them; `parts`: runs of as many units that a producer's rows consist of.
    """

    part: Part
    consumer: Linear
    producers: tuple[Linear, ...]
    units: int
    keep: int

    @property
    def size(self) -> int:
        """Columns of the consumer that a unit has."""
        return self.consumer.shape[1] // self.units

    @property
    def weights(self) -> int:
        """The weights that go with one unit, with biases of its rows."""
        rows = sum(linear.shape[0] * (linear.shape[1] + linear.bias) for linear in self.producers)
        return (rows + self.consumer.shape[0] * self.consumer.shape[1]) // self.units

    def sizes(self) -> dict[str, list[int]]:
        """Return the narrower sizes `[out, in]` by linear."""
        found = {linear.name: [linear.shape[0] // self.units * self.keep, linear.shape[1]] for linear in self.producers}
        return found | {self.consumer.name: [self.consumer.shape[0], self.size * self.keep]}

    def tensors(self, source: DenseModel, kept: tuple[int, ...], weight: Tensor) -> dict[str, Made]:
        """Return the narrower tensors of one block; `weight`: of the consumer, `[out, in]`, to pick columns of."""
        name = f"{self.consumer.name}.weight"
        columns = weight[:, _entries(self.consumer.shape[1], self.units, 1, kept)].to(source.read(name).dtype)
        narrow = columns.T.contiguous() if self.consumer.transposed else columns.contiguous()
        made = {name: Made(name, lambda: narrow)}
        for producer in self.producers:
            rows = producer.shape[0]
            runs = rows // self.units if self.part == "neurons" else 1  # gate and up in one matrix: two runs of rows
            where = _entries(rows, self.units, runs, kept)
            kinds = ("weight", "bias") if producer.bias else ("weight",)
            for kind in kinds:
                name, axis = f"{producer.name}.{kind}", int(producer.transposed and kind == "weight")
                made[name] = Made(name, partial(_picked, source, name, axis, where))
        return made


def _entries(rows: int, units: int, runs: int, kept: tuple[int, ...]) -> Tensor:
    """Return the numbers of the rows that the `kept` units have, in order, of `runs` of so many units each."""
    return torch.arange(rows).reshape(runs, units, -1)[:, list(kept)].flatten()


def _picked(source: DenseModel, name: str, axis: int, where: Tensor) -> Tensor:
    """Return entries of a stored tensor along an axis."""
    return source.read(name).index_select(axis, where)


@dataclass(frozen=True, eq=False)
class Narrowing:
    """The plan of a narrower model. `cuts`: of each block, in the order in which a token meets them; `before` and
    `after`: units of each kind in every block, the latter on average where each has a width of its own; `changes`: to
    the config."""

    change: ChangedConfig
    cuts: tuple[tuple[Cut, ...], ...]
    before: Mapping[Part, int]
    after: Mapping[Part, float]
    changes: Mapping[str, Any]


def narrowing(
    source: DenseModel, arch: Architecture, neurons: float | None = None, kv_heads: int | None = None
) -> Narrowing:
    """Return the plan for a model with so many units in every block, from its config and headers alone.

    `neurons`: of a feed-forward layer that stay, or their share below 1; `kv_heads`: key-value heads that stay, each
    with the query heads that read it.

    Raises RecipeError for numbers that cannot stay, InputError for a model in which the parts cannot be told apart.
    """
    if neurons is None and kv_heads is None:
        raise RecipeError("nothing is to become narrower; say how many neurons or key-value heads stay")
    check_causal(source.config, "narrowing")
    if arch.family is None:
        raise InputError(
            f"model type {source.config.model_type!r} is not in the table of families, so it is unknown which of its "
            f"rows and columns belong together; choose one of {', '.join(FAMILIES)}"
        )
    first = arch.blocks[0]
    before: dict[Part, int] = {}
    after: dict[Part, int] = {}
    if kv_heads is not None:
        before["kv_heads"], after["kv_heads"] = _heads(source, arch), kv_heads
        _check_count(source, "key-value heads", kv_heads, before["kv_heads"])
    if neurons is not None:
        before["neurons"] = first.having("down")[0].shape[1]
        after["neurons"] = _count(neurons, before["neurons"])
        _check_count(source, "neurons", after["neurons"], before["neurons"])
    changes = _changes(source.config, arch, after)
    cuts = tuple(_cuts(block, before, after) for block in arch.blocks)
    return Narrowing(changed(source, changes), cuts, before, after, changes)


def check_unequal(arch: Architecture, plan: Narrowing) -> None:
    """Raise InputError for blocks that cannot have a width of their own."""
    narrow = {cut.part: cut.keep for cut in plan.cuts[0]}
    unequal(arch, plan, (narrow, *[plan.before] * (len(arch.blocks) - 1)))  # would refuse once the damage is measured


def unequal(arch: Architecture, plan: Narrowing, widths: Sequence[Mapping[Part, int]]) -> Narrowing:
    """Return the plan in which each block has `widths` of its own; the config tells the largest."""
    largest = {part: max(block[part] for block in widths) for part in plan.before}
    cuts, sizes = [], dict[str, list[int]]()
    for block, own in zip(arch.blocks, widths, strict=True):
        kept = _cuts(block, plan.before, own)
        cuts.append(tuple(cut for cut in kept if cut.keep < cut.units))
        for cut in kept:
            if cut.keep < largest[cut.part]:
                sizes |= cut.sizes()
    changes = _changes(plan.change.source.config, arch, largest)
    mean = {part: sum(block[part] for block in widths) / len(widths) for part in plan.before}
    return Narrowing(changed(plan.change.source, changes, sizes), tuple(cuts), plan.before, mean, plan.changes)


def _changes(config: Any, arch: Architecture, counts: Mapping[Part, int]) -> dict[str, Any]:
    """Return what a config tells of so many units of each kind in every block."""
    found: dict[str, Any] = {}
    if (heads := counts.get("kv_heads")) is not None:
        query, width = config.num_attention_heads, arch.blocks[0].having("output")[0].shape[1]
        each = query // config.num_key_value_heads
        found |= {"num_key_value_heads": heads, "num_attention_heads": each * heads, "head_dim": width // query}
    if (neurons := counts.get("neurons")) is not None:
        found[next(key for key in NEURONS if hasattr(config, key))] = neurons
    return found


def _cuts(block: BlockLayout, before: Mapping[Part, int], after: Mapping[Part, int]) -> tuple[Cut, ...]:
    places: dict[Part, tuple[Linear, tuple[Linear, ...]]] = {
        "kv_heads": (block.having("output")[0], block.having("query", "key", "value")),
        "neurons": (block.having("down")[0], block.having("gate", "up")),
    }
    return tuple(Cut(part, *places[part], before[part], after[part]) for part in before)


def _heads(source: DenseModel, arch: Architecture) -> int:
    """Return the number of key-value heads. Raises InputError where queries, keys and values are no linears of their
    own, or the config cannot say how long a head is."""
    settings = source.config
    if arch.family is None or arch.family.groups is not LLAMA:
        able = ", ".join(name for name, family in FAMILIES.items() if family.groups is LLAMA)
        raise InputError(
            f"heads of model type {settings.model_type!r} cannot go: its queries, keys and values are not of the kind "
            f"that is known; leave the heads, or choose one of {able}"
        )
    return int(settings.num_key_value_heads)


def _count(asked: float, total: int) -> int:
    """Return the number of neurons that a share below 1, or a count, stands for; a share's is a multiple of 32 where
    the model's is."""
    if asked >= 1:
        return int(asked) if asked == int(asked) else 0
    step = step_of(total)
    return max(step, round(asked * total / step) * step) if asked > 0 else 0


def step_of(total: int) -> int:
    """Return what numbers of neurons are multiples of where they are not named."""
    return MULTIPLE if total % MULTIPLE == 0 and total > MULTIPLE else 1


def _check_count(source: DenseModel, what: str, keep: int, total: int) -> None:
    if not 0 < keep < total:
        raise RecipeError(
            f"blocks of {source.name} have {total} {what}, so the number that stays is a whole one from 1 to "
            f"{total - 1}" + (", or a share below 1" if what == "neurons" else "")
        )
