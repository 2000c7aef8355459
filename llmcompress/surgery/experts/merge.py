"""Experts merged: those with alike outputs become one, the average of their matrices.

Experts are clustered by their mean outputs over all tokens of the text, by average linkage of Euclidean distances, and
averaged with the shares of tokens that each is given (HC-SMoE, arXiv 2410.08589). Before that, the neurons of each are
put into the order in which they match those of the cluster's most used expert best (as MC-SMoE, arXiv 2310.01334):
swapping neurons changes nothing in an expert, but an average of neurons that do not match is no neuron.

The papers keep the router and let several of its rows lead to one expert. No config can say that, so a cluster keeps
the row of its most used expert, and stock transformers loads the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration.walk import Progress
from llmcompress.models.dense.experts import DOWN
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.files.staging import check_output
from llmcompress.runtime.devices import device_of
from llmcompress.surgery.edited_model import Made
from llmcompress.surgery.experts.finish import finished
from llmcompress.surgery.experts.mixture import number_of, open_mixture
from llmcompress.surgery.experts.prune import Smaller, smaller
from llmcompress.surgery.experts.report import (
    SAMPLES,
    BlockFate,
    ExpertFate,
    ExpertsReport,
    Fate,
    calibration_for,
    fates,
    text_for,
)
from llmcompress.surgery.experts.usage import Usage, Visit, damage_of, usage, visits

Clusters = tuple[tuple[int, ...], ...]  # of experts, the most used one first; in the order of the most used ones


def merge_experts(
    model: str | Path,
    output: str | Path | None = None,
    *,
    keep: float,
    text: str = "stdlib",
    samples: int = SAMPLES,
    revision: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ExpertsReport:
    """Write a mixture in which experts with alike outputs are one; stock transformers loads it.

    Args:
        model: a folder or a Hub id (`org/name` or `org/name@revision`).
        output: a new or empty folder; None to look at the plan and write nothing.
        keep: experts that each block has then, or their share below 1.
        text: what is read, as `dataset` of a recipe's calibration.
        samples: sequences of 512 tokens that are read, a fifth of them to judge on.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives (blocks walked, blocks, tokens per second).

    Returns:
        The fate of every expert, the predicted damage to each block, and the bytes before and after.

    Raises:
        RecipeError: for a number of experts that cannot stay.
        InputError: for a model that is no mixture or is damaged, and for text that cannot serve.
        DiskError: for an output that cannot be written; then nothing is left behind.
    """
    place = device_of(device)
    if output is not None:
        check_output(Path(output), 0)
    mixture = open_mixture(model, revision)
    plan = smaller(mixture, number_of(keep, mixture.experts, "keep"))
    tokens = text_for(mixture, calibration_for(mixture, text, samples))
    blocks: list[BlockFate] = []
    made: dict[str, Made] = {}
    for visit in visits(mixture, tokens, place, progress):
        used = usage(visit)
        clusters = clustered(mean_outputs(visit), used.counts, plan.keep, mixture.groups)
        mine = _made(plan, visit, used, clusters)
        cost = damage_of(visit, plan.change.model(mine), plan.change.skeleton)
        blocks.append(BlockFate(visit.block.index, visit.path, cost, _fates(used, clusters)))
        made |= mine
    return finished("merge", mixture, plan.change, made, tokens, blocks, {"keep": plan.keep}, plan.keep, output)


@torch.no_grad()
def mean_outputs(visit: Visit) -> Tensor:
    """Return the mean output of each expert over all tokens of the calibration, float64 `[experts, width]`."""
    experts = visit.experts
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = (*args, *kwargs.values())[0]
        seen.append(x.view(len(experts), -1, x.shape[-1]).sum(0) if experts.form.sorted else x)

    handle = experts.register_forward_pre_hook(keep, with_kwargs=True)
    total, count = torch.zeros(len(experts), visit.block.hidden.shape[2], dtype=torch.float64), 0
    try:
        for batch in (batch for batch in visit.batches if not batch.held_out):
            visit.run(visit.block.hidden[batch.rows], batch.rows)
            x = seen.pop()
            total += torch.stack([expert(x).sum(0, dtype=torch.float64) for expert in experts]).cpu()
            count += len(x)
    finally:
        handle.remove()
    return total / count


def clustered(features: Tensor, counts: Tensor, keep: int, groups: int) -> Clusters:
    """Return `keep` clusters of experts with alike `features [experts, n]`, as many in each group of the router.

    `counts [experts]`: tokens given to each, by which the first of a cluster is chosen.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    size = len(features) // groups
    found: list[tuple[int, ...]] = []
    for start in range(0, len(features), size):
        labels = cut_tree(linkage(features[start : start + size].numpy(), "average"), keep // groups)[:, 0]
        for label in sorted(set(labels.tolist())):
            members = [start + number for number in range(size) if labels[number] == label]
            found.append(tuple(sorted(members, key=lambda number: (-int(counts[number]), number))))
    return tuple(sorted(found))


def _fates(used: Usage, clusters: Clusters) -> tuple[ExpertFate, ...]:
    """Return the rows of the report."""
    fate: dict[int, Fate] = {one: "merged" if len(each) > 1 else "kept" for each in clusters for one in each}
    return fates(used, fate, becomes={one: new for new, each in enumerate(clusters) for one in each})


def _made(plan: Smaller, visit: Visit, used: Usage, clusters: Clusters) -> dict[str, Made]:
    """Return the tensors of a block whose clusters are merged."""
    source, path = plan.mixture.source, visit.path
    made = plan.made(path, tuple(each[0] for each in clusters))
    for new, members in enumerate(clusters):
        if len(members) == 1:
            continue
        orders = {one: _order(visit, members[0], one) for one in members}
        counts = used.counts[list(members)].double()
        shares = counts / counts.sum() if counts.any() else torch.full_like(counts, 1 / len(members))
        weights = dict(zip(members, shares.tolist(), strict=True))
        for name in [name for name in made if name.startswith(f"{path}.{new}.")]:
            leaf = name.removeprefix(f"{path}.{new}.")
            made[name] = Made(made[name].like, partial(_average, source, path, leaf, orders, weights))
    return made


@torch.no_grad()
def _order(visit: Visit, first: int, other: int) -> Tensor:
    """Return the neurons of an expert, `[width]`, in the order in which they match those of the first one best."""
    from scipy.optimize import linear_sum_assignment

    ours, theirs = (
        torch.cat([value.detach().T if name.startswith(DOWN) else value.detach() for name, value in weights], 1)
        for weights in (
            [pair for pair in visit.experts[number].named_parameters() if pair[0].endswith(".weight")]
            for number in (first, other)
        )
    )
    return torch.from_numpy(linear_sum_assignment((ours @ theirs.T).cpu().numpy(), maximize=True)[1])


def _average(
    source: DenseModel, path: str, leaf: str, orders: Mapping[int, Tensor], weights: Mapping[int, float]
) -> Tensor:
    """Return the weighted mean of a tensor of several experts, their neurons in the given orders."""
    values = [source.read(f"{path}.{number}.{leaf}") for number in orders]
    parts = []
    for value, (number, order) in zip(values, orders.items(), strict=True):
        if leaf == f"{DOWN}.weight":
            value = value[:, order]
        elif not leaf.startswith(DOWN):
            value = value[order]
        parts.append(value.float() * weights[number])
    return torch.stack(parts).sum(0).to(values[0].dtype)
