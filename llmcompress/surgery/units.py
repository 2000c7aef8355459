"""The parts of a model that can become narrower: neurons of its feed-forward layers, and key-value heads.

All blocks become equally narrow, since a config has one number for them, unless each is to have a width of its own.
Nothing here reads weights before a new tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from llmcompress.errors import InputError, RecipeError
from llmcompress.models.dense.families import FAMILIES, LLAMA, Architecture, BlockLayout, Linear
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.dense.skeleton import check_causal
from llmcompress.surgery.edited_model import ChangedConfig, NewTensor, change_config, select_entries

Part = Literal["neurons", "kv_heads"]
Widths = Mapping[Part, int]  # units of each kind in a block
NEURONS = ("intermediate_size", "ffn_dim", "n_inner")  # entries of configs
MULTIPLE = 32  # of neurons, which quantizers group and processors multiply, where a share is given


@dataclass(frozen=True)
class UnitCut:
    """Units of one kind in a block, of which `keep` stay; the others take rows of `producers` and columns of the
    `consumer` along."""

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
        """Weights of one unit, with the biases of its rows."""
        rows = sum(linear.shape[0] * (linear.shape[1] + linear.bias) for linear in self.producers)
        return (rows + self.consumer.shape[0] * self.consumer.shape[1]) // self.units

    def sizes(self) -> dict[str, list[int]]:
        """Return the narrower sizes `[out, in]` by linear."""
        rows = {linear.name: [linear.shape[0] // self.units * self.keep, linear.shape[1]] for linear in self.producers}
        return rows | {self.consumer.name: [self.consumer.shape[0], self.size * self.keep]}

    def new_tensors(self, source: DenseModel, numbers: tuple[int, ...], weight: Tensor) -> dict[str, NewTensor]:
        """Return the tensors of one block with the units of these `numbers`; `weight [out, in]`: of the consumer."""
        name = f"{self.consumer.name}.weight"
        columns = weight[:, _entries(self.consumer.shape[1], self.units, 1, numbers)].to(source.read(name).dtype)
        narrow = columns.T.contiguous() if self.consumer.transposed else columns.contiguous()
        new = {name: NewTensor(name, lambda: narrow)}
        for producer in self.producers:
            runs = producer.shape[0] // self.units if self.part == "neurons" else 1  # gate and up in one matrix: two
            rows = _entries(producer.shape[0], self.units, runs, numbers)
            for kind in ("weight", "bias") if producer.bias else ("weight",):
                name, axis = f"{producer.name}.{kind}", int(producer.transposed and kind == "weight")
                new[name] = NewTensor(name, partial(select_entries, source, name, axis, rows))
        return new


def _entries(rows: int, units: int, runs: int, numbers: tuple[int, ...]) -> Tensor:
    """Return the rows of some units, in order; the `rows` are `runs` of all units, one after another."""
    return torch.arange(rows).reshape(runs, units, -1)[:, list(numbers)].flatten()


@dataclass(frozen=True, eq=False)
class Narrowing:
    """The plan of a narrower model. `cuts`: of each block, in the order in which a token meets them; `before` and
    `after`: units of each kind in a block, the latter on average where each has a width of its own."""

    change: ChangedConfig
    cuts: tuple[tuple[UnitCut, ...], ...]
    before: Widths
    after: Mapping[Part, float]


def plan_narrowing(
    source: DenseModel, arch: Architecture, neurons: float | None = None, kv_heads: int | None = None
) -> Narrowing:
    """Return the plan for a model with fewer units in every block, from its config and headers alone.

    `neurons`: number or share below 1 that stays in each feed-forward layer; `kv_heads`: key-value heads that stay,
    each with the query heads that read it.

    Raises RecipeError for numbers that cannot stay, InputError for a model whose parts cannot be told apart.
    """
    if neurons is None and kv_heads is None:
        raise RecipeError("nothing is to become narrower; say how many neurons or key-value heads stay")
    check_causal(source.config, "narrowing")
    if arch.family is None:
        raise InputError(
            f"model type {source.config.model_type!r} is not in the table of families, so it is unknown which of its "
            f"rows and columns belong together; choose one of {', '.join(FAMILIES)}"
        )
    before: dict[Part, int] = {}
    after: dict[Part, int] = {}
    if kv_heads is not None:
        before["kv_heads"], after["kv_heads"] = _count_heads(source, arch), kv_heads
        _check_count(source, "key-value heads", kv_heads, before["kv_heads"])
    if neurons is not None:
        before["neurons"] = arch.blocks[0].having("down")[0].shape[1]
        after["neurons"] = _count_neurons(neurons, before["neurons"])
        _check_count(source, "neurons", after["neurons"], before["neurons"])
    change = change_config(source, _config_changes(source.config, arch, after))
    return Narrowing(change, tuple(_cuts(block, before, after) for block in arch.blocks), before, after)


def check_unequal_widths(arch: Architecture, plan: Narrowing) -> None:
    """Raise InputError for blocks that cannot have a width of their own."""
    narrow = {cut.part: cut.keep for cut in plan.cuts[0]}
    plan_unequal_widths(arch, plan, (narrow, *[plan.before] * (len(arch.blocks) - 1)))


def plan_unequal_widths(arch: Architecture, plan: Narrowing, widths: Sequence[Widths]) -> Narrowing:
    """Return the plan in which each block has `widths` of its own; the config tells the largest."""
    largest = {part: max(block[part] for block in widths) for part in plan.before}
    cuts, sizes = [], dict[str, list[int]]()
    for block, own in zip(arch.blocks, widths, strict=True):
        parts = _cuts(block, plan.before, own)
        cuts.append(tuple(cut for cut in parts if cut.keep < cut.units))
        for cut in parts:
            if cut.keep < largest[cut.part]:
                sizes |= cut.sizes()
    source = plan.change.source
    change = change_config(source, _config_changes(source.config, arch, largest), sizes)
    mean = {part: sum(block[part] for block in widths) / len(widths) for part in plan.before}
    return Narrowing(change, tuple(cuts), plan.before, mean)


def _config_changes(config: Any, arch: Architecture, counts: Widths) -> dict[str, Any]:
    """Return the entries of a config for `counts` units of each kind in every block."""
    changes: dict[str, Any] = {}
    if (heads := counts.get("kv_heads")) is not None:
        query, width = config.num_attention_heads, arch.blocks[0].having("output")[0].shape[1]
        each = query // config.num_key_value_heads
        changes |= {"num_key_value_heads": heads, "num_attention_heads": each * heads, "head_dim": width // query}
    if (neurons := counts.get("neurons")) is not None:
        changes[next(key for key in NEURONS if hasattr(config, key))] = neurons
    return changes


def _cuts(block: BlockLayout, before: Widths, after: Widths) -> tuple[UnitCut, ...]:
    places: dict[Part, tuple[Linear, tuple[Linear, ...]]] = {
        "kv_heads": (block.having("output")[0], block.having("query", "key", "value")),
        "neurons": (block.having("down")[0], block.having("gate", "up")),
    }
    return tuple(UnitCut(part, *places[part], before[part], after[part]) for part in before)


def _count_heads(source: DenseModel, arch: Architecture) -> int:
    """Return the number of key-value heads. Raises InputError unless queries, keys and values have linears of their
    own."""
    settings = source.config
    if arch.family is None or arch.family.groups is not LLAMA:
        able = ", ".join(name for name, family in FAMILIES.items() if family.groups is LLAMA)
        raise InputError(
            f"heads of model type {settings.model_type!r} cannot go: its queries, keys and values are not of the kind "
            f"that is known; leave the heads, or choose one of {able}"
        )
    return int(settings.num_key_value_heads)


def _count_neurons(wanted: float, total: int) -> int:
    """Return the number that a share below 1, or a count, stands for; 0 for neither."""
    if wanted >= 1:
        return int(wanted) if wanted == int(wanted) else 0
    step = neuron_step(total)
    return max(step, round(wanted * total / step) * step) if wanted > 0 else 0


def neuron_step(total: int) -> int:
    """Return the number of which a share of `total` neurons, or a width to try, is a multiple."""
    return MULTIPLE if total % MULTIPLE == 0 and total > MULTIPLE else 1


def _check_count(source: DenseModel, units: str, keep: int, total: int) -> None:
    if not 0 < keep < total:
        raise RecipeError(
            f"blocks of {source.name} have {total} {units}, so the number that stays is a whole one from 1 to "
            f"{total - 1}" + (", or a share below 1" if units == "neurons" else "")
        )
