"""Experts merged: those with alike outputs become one, the average of their matrices.

Experts are clustered by their mean outputs over all tokens of the text, by average linkage of Euclidean distances, and
averaged with the shares of tokens that each is given (HC-SMoE, arXiv 2410.08589). Before that, the neurons of each are
permuted to match the neurons of the cluster's most used expert best (as MC-SMoE, arXiv 2310.01334). A permutation
changes nothing in an expert, while averages of neurons that do not match are useless.

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
from llmcompress.models.dense.experts import DOWN, Experts
from llmcompress.models.dense.model import DenseModel
from llmcompress.runtime.precision import fast_float32
from llmcompress.surgery.edited_model import NewTensor
from llmcompress.surgery.experts.job import (
    SAMPLES,
    ExpertFate,
    ExpertsOutcome,
    ExpertsReport,
    Fate,
    expert_fates,
    open_job,
)
from llmcompress.surgery.experts.mixture import ExpertBlock
from llmcompress.surgery.experts.prune import plan_fewer_experts

Clusters = tuple[tuple[int, ...], ...]  # of experts, the most used one first; in the order of the most used ones


@fast_float32()
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
        text: the text to read, as `dataset` of a recipe's calibration.
        samples: sequences of 512 tokens to read, a fifth of them to judge on.
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
    job = open_job(model, output, text, samples, revision, device, progress)
    mixture = job.mixture
    plan = plan_fewer_experts(mixture, job.count_of(keep, "keep"))

    def treat(block: ExpertBlock) -> tuple[dict[str, NewTensor], tuple[ExpertFate, ...]]:
        counts = block.usage.counts
        clusters = cluster_experts(mean_outputs(block), counts, plan.keep, mixture.groups)
        new = plan.new_tensors(block.path, tuple(members[0] for members in clusters))
        for number, members in enumerate(clusters):
            if len(members) > 1:
                new |= _averages(mixture.source, new, f"{block.path}.{number}", _orders(block.experts, members), counts)
        fate: dict[int, Fate] = {
            number: "merged" if len(members) > 1 else "kept" for members in clusters for number in members
        }
        becomes = {old: number for number, members in enumerate(clusters) for old in members}
        return new, expert_fates(block.usage, fate, becomes=becomes)

    new, blocks = job.change_blocks(plan.change, treat)
    return job.write(plan.change, new, ExpertsOutcome("merge", {"keep": plan.keep}, plan.keep, blocks))


@torch.no_grad()
def mean_outputs(block: ExpertBlock) -> Tensor:
    """Return the mean output of each expert over all tokens of the calibration, float64 `[experts, width]`."""
    visit, experts = block.visit, block.experts
    seen: list[Tensor] = []

    def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = (*args, *kwargs.values())[0]
        seen.append(x.view(len(experts), -1, x.shape[-1]).sum(0) if experts.form.sorted else x)

    total, count = torch.zeros((), dtype=torch.float64), 0  # experts may read and give fewer numbers than the block
    with experts.register_forward_pre_hook(keep_input, with_kwargs=True):
        for batch in visit.calibrating:
            visit.run(visit.block.hidden[batch.rows], batch.rows)
            x = seen.pop()
            total = total + torch.stack([expert(x).sum(0, dtype=torch.float64) for expert in experts]).cpu()
            count += len(x)
    return total / count


def cluster_experts(features: Tensor, counts: Tensor, keep: int, groups: int) -> Clusters:
    """Return `keep` clusters of experts with alike `features [experts, n]`, as many in each group of the router.

    `counts [experts]`: tokens given to each, by which the first of a cluster is chosen.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage

    size = len(features) // groups
    clusters: list[tuple[int, ...]] = []
    for start in range(0, len(features), size):
        labels = cut_tree(linkage(features[start : start + size].numpy(), "average"), keep // groups)[:, 0]
        for label in sorted(set(labels.tolist())):
            members = [start + number for number in range(size) if labels[number] == label]
            clusters.append(tuple(sorted(members, key=lambda number: (-int(counts[number]), number))))
    return tuple(sorted(clusters))


@torch.no_grad()
def _orders(experts: Experts, members: tuple[int, ...]) -> dict[int, Tensor]:
    """Return the permutation `[width]` by which each member's neurons match the first member's best."""
    from scipy.optimize import linear_sum_assignment

    first, orders = _neurons(experts[members[0]]), {}
    for number in members:
        products = (first @ _neurons(experts[number]).T).cpu().numpy()
        orders[number] = torch.from_numpy(linear_sum_assignment(products, maximize=True)[1])
    return orders


def _neurons(expert: nn.Module) -> Tensor:
    """Return the weights of each neuron, `[width, weights]`."""
    weights = [(name, value.detach()) for name, value in expert.named_parameters() if name.endswith(".weight")]
    return torch.cat([value.T if name.startswith(DOWN) else value for name, value in weights], 1)


def _averages(
    source: DenseModel, new: Mapping[str, NewTensor], path: str, orders: Mapping[int, Tensor], counts: Tensor
) -> dict[str, NewTensor]:
    """Return the tensors of the expert at `path`, the average of several weighed by their `counts` of tokens.

    `new`: its tensors before; `orders`: the neurons of those experts.
    """
    shares = counts[list(orders)].double()
    shares = shares / shares.sum() if shares.any() else torch.full_like(shares, 1 / len(orders))
    weights = dict(zip(orders, shares.tolist(), strict=True))
    averages = {}
    for name, tensor in new.items():
        if name.startswith(f"{path}."):
            leaf = name.removeprefix(f"{path}.")
            read = partial(_average, source, path.rpartition(".")[0], leaf, orders, weights)
            averages[name] = NewTensor(tensor.like, read)
    return averages


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
