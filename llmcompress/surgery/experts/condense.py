"""Blocks condensed: a few experts that are always on, in one dense layer, instead of a router and all its experts.

A block's experts become y = sum of w_e f_e(x) over its shared experts and a few routed ones, with constant weights
(CD-MoE, arXiv 2412.00069). That sum is one gated layer whose neurons are those of the experts one after the other, w_e
folded into the columns of `down_proj`, so it is stored as the model stores a dense layer.

Experts are added one by one, each time the one that leaves the least change of the block's output, relative to its
size and averaged over tokens. Two things differ from the paper. All weights are fitted again by least squares each
time, where it takes the router's mean weights. The change is measured as it is, where it compares softmaxes of hidden
states. All of it comes from the products of the experts' outputs with each other and with the block's, so no output is
kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration.walk import Progress
from llmcompress.errors import RecipeError
from llmcompress.models.dense.experts import DOWN, GATE, UP
from llmcompress.models.files.staging import check_output
from llmcompress.runtime.devices import device_of
from llmcompress.surgery.edited_model import ChangedConfig, Made, changed
from llmcompress.surgery.experts.finish import finished
from llmcompress.surgery.experts.mixture import ExpertMixture, open_mixture
from llmcompress.surgery.experts.report import (
    SAMPLES,
    BlockFate,
    ExpertsReport,
    Fate,
    calibration_for,
    fates,
    text_for,
)
from llmcompress.surgery.experts.storage import candidates, check_storable, dense_changes, shared_of
from llmcompress.surgery.experts.usage import Usage, Visit, damage_of, usage, visits

NUMBERS = 2**24  # of experts' outputs that are held at a time


def condense_experts(
    model: str | Path,
    output: str | Path | None = None,
    *,
    blocks: Iterable[int] | None = None,
    count: int | None = None,
    experts: int | None = None,
    text: str = "stdlib",
    samples: int = SAMPLES,
    revision: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ExpertsReport:
    """Write a mixture some of whose blocks have one dense layer for their experts; stock transformers loads it.

    Args:
        model: a folder or a Hub id (`org/name` or `org/name@revision`).
        output: a new or empty folder; None to look at the plan and write nothing.
        blocks: numbers of the blocks that are condensed; or
        count: so many of them, those that it changes least.
        experts: routed experts that stay in a condensed block, beside the shared ones; by default as many as a token is
            given.
        text: what is read, as `dataset` of a recipe's calibration.
        samples: sequences of 512 tokens that are read, a fifth of them to judge on.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives (blocks walked, blocks, tokens per second).

    Returns:
        The fate of every expert, the predicted damage to each block, and the bytes before and after.

    Raises:
        RecipeError: for blocks that cannot be condensed, and for a number of experts that there are not.
        InputError: for a type of model that cannot have such blocks, for one that is damaged, and for text that cannot
            serve.
        DiskError: for an output that cannot be written; then nothing is left behind.
    """
    place = device_of(device)
    if output is not None:
        check_output(Path(output), 0)
    mixture = open_mixture(model, revision)
    check_storable(mixture)
    some = candidates(mixture, blocks, count)
    each = _check_experts(mixture, mixture.chosen if experts is None else experts)
    tokens = text_for(mixture, calibration_for(mixture, text, samples))
    width = _width(mixture, each)
    change = changed(mixture.source, dense_changes(mixture, some, width))
    looks = [_looked_at(mixture, visit, some, each, change) for visit in visits(mixture, tokens, place, progress)]
    costs = {look.block: look.cost for look in looks if look.cost is not None}
    chosen = sorted(sorted(costs, key=costs.__getitem__)[: len(some) if count is None else count])
    change = changed(mixture.source, dense_changes(mixture, chosen, width))
    going = [look.found for look in looks if look.found is not None and look.block in chosen]
    made = {name: part for one in going for name, part in _made(mixture, one, change).items()}
    made |= _padded(mixture, change, made)
    rows = [_fate(mixture, look, look.block in chosen) for look in looks]
    settings = {"blocks": chosen, "experts": each}
    return finished("condense", mixture, change, made, tokens, rows, settings, mixture.experts, output)


def _check_experts(mixture: ExpertMixture, each: int) -> int:
    """Return the number of experts that stay on. Raises RecipeError for one that a block does not have."""
    if not 0 < each <= mixture.experts:
        raise RecipeError(
            f"experts is {each}, where a block has {mixture.experts}; give a number from 1 to {mixture.experts}"
        )
    return each


@dataclass(frozen=True, eq=False)
class _Condensed:
    """A block that is condensed. `path`: of its experts; `shared`: names of its shared experts; `experts`: numbers of
    the routed ones; `weights`: of the shared ones, then of these."""

    path: str
    shared: tuple[str, ...]
    experts: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def parts(self) -> list[str]:
        """The module paths of all of them."""
        parent = self.path.rpartition(".")[0]
        return [*(f"{parent}.{name}" for name in self.shared), *(f"{self.path}.{number}" for number in self.experts)]


@dataclass(frozen=True, eq=False)
class _Look:
    """A block with experts, and what condensing it would make of it and cost; None where it may not be."""

    block: int
    used: Usage
    found: _Condensed | None = None
    cost: float | None = None


def _looked_at(mixture: ExpertMixture, visit: Visit, some: Sequence[int], each: int, change: ChangedConfig) -> _Look:
    """Condense a loaded block, if it is among `some`, to `each` experts, and return what that costs."""
    used = usage(visit)
    if visit.block.index not in some:
        return _Look(visit.block.index, used)
    found = _condensed(visit, each)
    cost = damage_of(visit, change.model(_made(mixture, found, change)), change.skeleton)
    return _Look(visit.block.index, used, found, cost)


def _width(mixture: ExpertMixture, experts: int) -> int:
    """Return the neurons of a condensed block."""
    path = next(iter(mixture.layers.values()))
    parent = mixture.source.skeleton().get_submodule(path.rpartition(".")[0])
    shared = [f"{path.rpartition('.')[0]}.{name}" for name in shared_of(parent)]
    wide = {part: mixture.source.tensors[f"{part}.{UP}.weight"].shape[0] for part in (*shared, f"{path}.0")}
    return sum(wide[part] for part in shared) + experts * wide[f"{path}.0"]


@torch.no_grad()
def _condensed(visit: Visit, count: int) -> _Condensed:
    """Choose `count` experts of a block, and the constant weights."""
    parent = visit.path.rpartition(".")[0]
    module = visit.block.module.get_submodule(parent.removeprefix(f"{visit.block.path}."))
    shared = shared_of(module)
    products = _products(visit, module, [*shared.values(), *visit.experts])
    chosen = list(range(len(shared)))
    for _ in range(count):
        rest = [one for one in range(len(products) - 1) if one not in chosen]
        chosen.append(min(rest, key=lambda one: float(fitted(products, [*chosen, one])[1])))
    weights, _ = fitted(products, chosen)
    numbers = tuple(one - len(shared) for one in chosen[len(shared) :])
    return _Condensed(visit.path, tuple(shared), numbers, tuple(weights.tolist()))


def fitted(products: Tensor, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the weights of the `chosen` outputs whose sum comes closest to the target, and the squared distance.

    `products`: of all outputs with each other, float64 `[outputs + 1, outputs + 1]`, the target last.
    """
    some = torch.tensor(chosen, dtype=torch.long)
    target = products[some, -1]
    weights = torch.linalg.pinv(products[some][:, some], hermitian=True) @ target
    return weights, products[-1, -1] - target @ weights


def _products(visit: Visit, module: nn.Module, parts: Sequence[nn.Module]) -> Tensor:
    """Return the products of the outputs that `parts` have on all tokens, and of that of the `module` that they are
    in, with each other, as `fitted` reads them; tokens are divided by the norm of the block's output."""
    total = torch.zeros(len(parts) + 1, len(parts) + 1, dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((args[0].flatten(0, -2), (output[0] if isinstance(output, tuple) else output).flatten(0, -2)))

    handle = module.register_forward_hook(keep)
    try:
        for batch in (batch for batch in visit.batches if not batch.held_out):
            output = visit.run(visit.block.hidden[batch.rows], batch.rows)
            inputs, target = seen.pop()
            norms = output.flatten(0, 1).norm(dim=-1, keepdim=True).clamp_min(1e-30)
            size = max(1, NUMBERS // (len(total) * target.shape[1]))
            for x, y, norm in zip(inputs.split(size), target.split(size), norms.split(size), strict=True):
                together = torch.stack([*(part(x) for part in parts), y]) / norm
                flat = together.flatten(1).double()
                total += (flat @ flat.T).cpu()
    finally:
        handle.remove()
    return total


def _made(mixture: ExpertMixture, one: _Condensed, change: ChangedConfig) -> dict[str, Made]:
    """Return the tensors of the dense layer that stands for a block's experts."""
    parent = one.path.rpartition(".")[0]
    wide = change.skeleton.get_submodule(parent).get_submodule(UP).get_parameter("weight").shape[0]
    return {
        f"{parent}.{leaf}.weight": Made(f"{one.path}.0.{leaf}.weight", partial(_folded, mixture, one, leaf, wide))
        for leaf in (GATE, UP, DOWN)
    }


def _folded(mixture: ExpertMixture, one: _Condensed, leaf: str, width: int) -> Tensor:
    """Return a matrix of the dense layer, `width` neurons wide; what is left of them is zero."""
    parts = [mixture.source.read(f"{part}.{leaf}.weight") for part in one.parts]
    if leaf != DOWN:
        return _wider(torch.cat(parts), 0, width)
    scaled = [(part.float() * weight).to(part.dtype) for part, weight in zip(parts, one.weights, strict=True)]
    return _wider(torch.cat(scaled, 1), 1, width)


def _wider(matrix: Tensor, axis: int, width: int) -> Tensor:
    """Return a matrix with zeros appended along an axis, up to that width."""
    size = list(matrix.shape)
    size[axis] = width - size[axis]
    return torch.cat([matrix, matrix.new_zeros(size)], axis)


def _padded(mixture: ExpertMixture, change: ChangedConfig, made: dict[str, Made]) -> dict[str, Made]:
    """Return the matrices of dense layers that were there before, as wide as the condensed ones."""
    found = {}
    for name, header in change.model(made).tensors.items():
        before = mixture.source.tensors.get(name)
        if name in made or before is None or before.shape == header.shape:
            continue
        axis = next(axis for axis, size in enumerate(header.shape) if before.shape[axis] != size)
        found[name] = Made(name, partial(_longer, mixture, name, axis, header.shape[axis]))
    return found


def _longer(mixture: ExpertMixture, name: str, axis: int, width: int) -> Tensor:
    return _wider(mixture.source.read(name), axis, width)


def _fate(mixture: ExpertMixture, look: _Look, is_chosen: bool) -> BlockFate:
    """Return the row of a block in the report."""
    path, found = mixture.layers[look.block], look.found
    if found is None or look.cost is None or not is_chosen:
        fate: dict[int, Fate] = dict.fromkeys(range(mixture.experts), "kept")
        numbers = {one: one for one in fate}
        return BlockFate(look.block, path, 0.0, fates(look.used, fate, becomes=numbers), considered=look.cost)
    shared, routed = found.weights[: len(found.shared)], found.weights[len(found.shared) :]
    fate = {one: "folded" if one in found.experts else "dropped" for one in range(mixture.experts)}
    weights = dict(zip(found.experts, routed, strict=True))
    return BlockFate(look.block, path, look.cost, fates(look.used, fate, weight=weights), shared, look.cost)
