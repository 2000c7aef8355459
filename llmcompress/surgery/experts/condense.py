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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration.walk import Progress
from llmcompress.errors import InputError, RecipeError, list_names
from llmcompress.models.dense.experts import DOWN, GATE, UP, Experts, Form
from llmcompress.models.dense.model import DenseModel
from llmcompress.runtime.precision import fast_float32
from llmcompress.surgery.edited_model import ChangedConfig, NewTensor, change_config
from llmcompress.surgery.experts.job import (
    SAMPLES,
    BlockFate,
    ExpertsOutcome,
    ExpertsReport,
    Fate,
    expert_fates,
    open_job,
)
from llmcompress.surgery.experts.mixture import ExpertBlock, ExpertMixture, Usage
from llmcompress.surgery.judged_walk import Visit

NUMBERS = 2**24  # of experts' outputs that are held at a time
DENSE_LIST, DENSE_FIRST = "mlp_only_layers", "first_k_dense_replace"  # entries of configs, see `dense blocks`
KINDS = "mlp_layer_types"
WIDTH = "intermediate_size"
SHARED = ("shared_expert", "shared_experts")
ROUTERS = ("gate", "router", "shared_expert_gate")


@fast_float32()
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
        blocks: numbers of the blocks to condense; or
        count: number of blocks to condense, the least damaged ones.
        experts: routed experts that stay in a condensed block, beside the shared ones; by default as many as a token is
            given.
        text: the text to read, as `dataset` of a recipe's calibration.
        samples: sequences of 512 tokens to read, a fifth of them to judge on.
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
    job = open_job(model, output, text, samples, revision, device, progress)
    mixture = job.mixture
    check_storable(mixture)
    candidates = candidate_blocks(mixture, blocks, count)
    each = mixture.chosen if experts is None else experts
    if not 0 < each <= mixture.experts:
        raise RecipeError(
            f"experts is {each}, where a block has {mixture.experts}; give a number from 1 to {mixture.experts}"
        )
    width = _width(mixture, each)
    change = change_config(mixture.source, _dense_changes(mixture, candidates, width))
    tried = [_try_block(mixture, block, candidates, each, change) for block in job.blocks()]
    costs = {trial.block: trial.damage for trial in tried if trial.damage is not None}
    chosen = sorted(sorted(costs, key=costs.__getitem__)[: len(candidates) if count is None else count])
    change = change_config(mixture.source, _dense_changes(mixture, chosen, width))
    new: dict[str, NewTensor] = {}
    for trial in tried:
        if trial.layer is not None and trial.block in chosen:
            new |= trial.layer.new_tensors(mixture, change)
    new |= _widen_dense_layers(mixture, change, new)
    rows = [_block_fate(mixture, trial, trial.block in chosen) for trial in tried]
    settings = {"blocks": chosen, "experts": each}
    return job.write(change, new, ExpertsOutcome("condense", settings, mixture.experts, rows))


def _width(mixture: ExpertMixture, experts: int) -> int:
    """Return the neurons of a condensed block."""
    path = next(iter(mixture.layers.values()))
    parent = path.rpartition(".")[0]
    shared = shared_experts(mixture.source.skeleton().get_submodule(parent))
    parts = [*(f"{parent}.{name}" for name in shared), *[f"{path}.0"] * experts]
    return sum(mixture.source.tensors[f"{part}.{UP}.weight"].shape[0] for part in parts)


@dataclass(frozen=True, eq=False)
class CondensedLayer:
    """A dense layer for the experts at `path`. `shared`: names of its shared experts; `experts`: numbers of the routed
    ones; `weights`: of the shared ones, then of these."""

    path: str
    shared: tuple[str, ...]
    experts: tuple[int, ...]
    weights: tuple[float, ...]

    def new_tensors(self, mixture: ExpertMixture, change: ChangedConfig) -> dict[str, NewTensor]:
        """Return the tensors of the layer."""
        parent = self.path.rpartition(".")[0]
        width = change.skeleton.get_submodule(parent).get_submodule(UP).get_parameter("weight").shape[0]
        new = {}
        for leaf in (GATE, UP, DOWN):
            matrix = partial(self._matrix, mixture, leaf, width)
            new[f"{parent}.{leaf}.weight"] = NewTensor(f"{self.path}.0.{leaf}.weight", matrix)
        return new

    def _matrix(self, mixture: ExpertMixture, leaf: str, width: int) -> Tensor:
        """Return a matrix of the layer, `width` neurons wide; neurons of no expert are zero."""
        parent = self.path.rpartition(".")[0]
        paths = [*(f"{parent}.{name}" for name in self.shared), *(f"{self.path}.{number}" for number in self.experts)]
        parts = [mixture.source.read(f"{path}.{leaf}.weight") for path in paths]
        if leaf != DOWN:
            return _pad(torch.cat(parts), 0, width)
        scaled = [(part.float() * weight).to(part.dtype) for part, weight in zip(parts, self.weights, strict=True)]
        return _pad(torch.cat(scaled, 1), 1, width)


@dataclass(frozen=True, eq=False)
class _CondensedBlock:
    """A block with experts, the layer that condenses it, and the damage of that; None where it is no candidate."""

    block: int
    usage: Usage
    layer: CondensedLayer | None = None
    damage: float | None = None


def _try_block(
    mixture: ExpertMixture, block: ExpertBlock, candidates: Sequence[int], each: int, change: ChangedConfig
) -> _CondensedBlock:
    """Condense a loaded block to `each` experts, if it is a candidate, and measure the damage."""
    if block.number not in candidates:
        return _CondensedBlock(block.number, block.usage)
    layer = _choose_experts(block, each)
    damage = block.visit.damage_by(change.model(layer.new_tensors(mixture, change)), change.skeleton)
    return _CondensedBlock(block.number, block.usage, layer, damage)


@torch.no_grad()
def _choose_experts(block: ExpertBlock, count: int) -> CondensedLayer:
    """Choose `count` experts of a block, and the constant weights."""
    path, loaded = block.path, block.visit.block
    module = loaded.module.get_submodule(path.rpartition(".")[0].removeprefix(f"{loaded.path}."))
    shared = shared_experts(module)
    products = _products(block.visit, module, [*shared.values(), *block.experts])
    chosen = list(range(len(shared)))
    for _ in range(count):
        rest = [number for number in range(len(products) - 1) if number not in chosen]
        chosen.append(min(rest, key=lambda number: float(fit_weights(products, [*chosen, number])[1])))
    weights, _ = fit_weights(products, chosen)
    experts = tuple(number - len(shared) for number in chosen[len(shared) :])
    return CondensedLayer(path, tuple(shared), experts, tuple(weights.tolist()))


def fit_weights(products: Tensor, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the weights of the `chosen` outputs whose sum comes closest to the target, and the squared distance.

    `products`: of all outputs with each other, float64 `[outputs + 1, outputs + 1]`, the target last.
    """
    some = torch.tensor(chosen, dtype=torch.long)
    target = products[some, -1]
    weights = torch.linalg.pinv(products[some][:, some], hermitian=True) @ target
    return weights, products[-1, -1] - target @ weights


def _products(visit: Visit, module: nn.Module, parts: Sequence[nn.Module]) -> Tensor:
    """Return the products of the outputs of `parts` and, last, of their `module`, as `fit_weights` reads them.

    They are summed over all tokens, each divided by the norm of the block's output.
    """
    total = torch.zeros(len(parts) + 1, len(parts) + 1, dtype=torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []

    def keep_call(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((args[0].flatten(0, -2), (output[0] if isinstance(output, tuple) else output).flatten(0, -2)))

    with module.register_forward_hook(keep_call):
        for batch in visit.calibrating:
            output = visit.run(visit.block.hidden[batch.rows], batch.rows)
            inputs, target = seen.pop()
            norms = output.flatten(0, 1).norm(dim=-1, keepdim=True).clamp_min(1e-30)
            size = max(1, NUMBERS // (len(total) * target.shape[1]))
            for x, y, norm in zip(inputs.split(size), target.split(size), norms.split(size), strict=True):
                together = torch.stack([*(part(x) for part in parts), y]) / norm
                flat = together.flatten(1).double()
                total += (flat @ flat.T).cpu()
    return total


def _widen_dense_layers(
    mixture: ExpertMixture, change: ChangedConfig, new: Mapping[str, NewTensor]
) -> dict[str, NewTensor]:
    """Return the matrices of the model's own dense layers, as wide as the condensed ones."""
    source, wider = mixture.source, {}
    for name, header in change.model(new).tensors.items():
        before = source.tensors.get(name)
        if name in new or before is None or before.shape == header.shape:
            continue
        axis = next(axis for axis, size in enumerate(header.shape) if before.shape[axis] != size)
        wider[name] = NewTensor(name, partial(_read_padded, source, name, axis, header.shape[axis]))
    return wider


def _read_padded(source: DenseModel, name: str, axis: int, width: int) -> Tensor:
    return _pad(source.read(name), axis, width)


def _pad(matrix: Tensor, axis: int, width: int) -> Tensor:
    """Return a matrix with zeros appended along an axis, up to that width."""
    size = list(matrix.shape)
    size[axis] = width - size[axis]
    return torch.cat([matrix, matrix.new_zeros(size)], axis)


def _block_fate(mixture: ExpertMixture, trial: _CondensedBlock, is_chosen: bool) -> BlockFate:
    """Return the row of a block in the report."""
    path, layer, numbers = mixture.layers[trial.block], trial.layer, range(mixture.experts)
    if layer is None or trial.damage is None or not is_chosen:
        stays: dict[int, Fate] = dict.fromkeys(numbers, "kept")
        rows = expert_fates(trial.usage, stays, becomes={number: number for number in numbers})
        return BlockFate(trial.block, path, 0.0, rows, considered=trial.damage)
    shared, routed = layer.weights[: len(layer.shared)], layer.weights[len(layer.shared) :]
    fate: dict[int, Fate] = {number: "folded" if number in layer.experts else "dropped" for number in numbers}
    rows = expert_fates(trial.usage, fate, weight=dict(zip(layer.experts, routed, strict=True)))
    return BlockFate(trial.block, path, trial.damage, rows, shared, trial.damage)


# --- dense blocks -----------------------------------------------------------------------------------------------------
# A config names them by a list (`mlp_only_layers` of Qwen's mixtures), or by the number of those that come first
# (`first_k_dense_replace` of DeepSeek's kind); some also list the kind of each block, which then counts. All have one
# width.


def check_storable(mixture: ExpertMixture) -> None:
    """Raise InputError for a type of model that has no dense blocks, or other experts than dense layers have."""
    settings, kind = mixture.settings, mixture.source.config.model_type
    if not _lists_dense_blocks(mixture) and not isinstance(getattr(settings, DENSE_FIRST, None), int):
        raise InputError(
            f"a config of model type {kind!r} cannot say that some of its blocks have no experts, so a condensed "
            f"model would not load; prune or replace its experts instead"
        )
    skeleton = mixture.source.skeleton()
    for path in mixture.layers.values():
        parent = skeleton.get_submodule(path.rpartition(".")[0])
        experts = skeleton.get_submodule(path)
        form = experts.form if isinstance(experts, Experts) else Form(gated=False)
        known = {path.rpartition(".")[2], *SHARED, *ROUTERS}
        others = [name for name, child in parent.named_children() if name not in known and list(child.parameters())]
        if others or form.biased or form.sorted or not form.gated:
            raise InputError(
                f"{path} of {mixture.source.name} is not built of plain gated experts, so no dense layer can stand for "
                f"it; prune or replace its experts instead"
            )


def candidate_blocks(mixture: ExpertMixture, blocks: Iterable[int] | None, count: int | None) -> tuple[int, ...]:
    """Return the blocks that may be condensed: `blocks`, else all, or the first `count` where only first ones can be
    dense. Raises RecipeError for others."""
    with_experts = sorted(mixture.layers)
    if (blocks is None) == (count is None):
        raise RecipeError("give either the blocks to condense or how many, exactly one of them")
    first_only = not _lists_dense_blocks(mixture)
    if count is not None:
        if not 0 < count <= len(with_experts):
            raise RecipeError(
                f"{count} of the {len(with_experts)} blocks with experts cannot be condensed; name at least one"
            )
        return tuple(with_experts[:count] if first_only else with_experts)
    wanted = sorted(set(blocks or ()))
    absent = [number for number in wanted if number not in mixture.layers]
    if absent or not wanted:
        raise RecipeError(
            f"block {list_names(map(str, absent))} of {mixture.source.name} has no experts; those with some are "
            f"{list_names(map(str, with_experts), 100)}"
        )
    if first_only and wanted != with_experts[: len(wanted)]:
        raise RecipeError(
            f"only the first blocks of model type {mixture.source.config.model_type!r} can be dense ({DENSE_FIRST}); "
            f"condense {', '.join(map(str, with_experts[: len(wanted)]))} instead, or fewer"
        )
    return tuple(wanted)


def _lists_dense_blocks(mixture: ExpertMixture) -> bool:
    """True if any block can be dense, False if only the first ones can."""
    return isinstance(getattr(mixture.settings, DENSE_LIST, None), list)


def _dense_changes(mixture: ExpertMixture, blocks: Sequence[int], width: int) -> dict[str, Any]:
    """Return the entries of a config in which `blocks` are dense too, `width` wide or as wide as other dense ones."""
    settings = mixture.settings
    leaf = next(iter(mixture.layers.values())).rpartition(".")[0].rpartition(".")[2]
    others = [block.path for number, block in enumerate(mixture.arch.blocks) if number not in mixture.layers]
    if any(f"{path}.{leaf}.{GATE}.weight" in mixture.source.tensors for path in others):
        width = max(width, getattr(settings, WIDTH))
    if _lists_dense_blocks(mixture):
        return {DENSE_LIST: sorted({*getattr(settings, DENSE_LIST), *blocks}), WIDTH: width}
    kinds = enumerate(getattr(settings, KINDS, None) or ())
    listed = ["dense" if number in blocks else kind for number, kind in kinds]
    return {DENSE_FIRST: max(blocks) + 1, WIDTH: width} | ({KINDS: listed} if listed else {})


def shared_experts(parent: nn.Module) -> dict[str, nn.Module]:
    """Return the shared experts beside the routed ones, by name."""
    return {name: child for name, child in parent.named_children() if name in SHARED}
