"""Experts pruned: every block keeps the same number, and routers choose among the rest.

An expert is worth the mean over its tokens of the router's weight times the norm of its output (REAP, arXiv
2510.13999). Router rows and biases of the others go with them; nothing else changes, and experts that stay keep their
order. Where routers choose groups first, each group keeps as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.calibration.walk import Progress
from llmcompress.errors import InputError, RecipeError
from llmcompress.runtime.precision import fast_float32
from llmcompress.surgery.edited_model import ChangedConfig, NewTensor, change_config, select_entries
from llmcompress.surgery.experts.job import (
    SAMPLES,
    ExpertFate,
    ExpertsOutcome,
    ExpertsReport,
    Fate,
    expert_fates,
    open_job,
)
from llmcompress.surgery.experts.mixture import COUNTS, ExpertBlock, ExpertMixture, ExpertScore

GROUP_LEAST = 2  # a group is chosen by its two best experts (DeepSeek-V3)


@fast_float32()
def prune_experts(
    model: str | Path,
    output: str | Path | None = None,
    *,
    keep: float,
    by: str = "reap",
    text: str = "stdlib",
    samples: int = SAMPLES,
    seed: int = 0,
    revision: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ExpertsReport:
    """Write a mixture of experts with fewer experts in every block, one block at a time; stock transformers loads it.

    Args:
        model: a folder or a Hub id (`org/name` or `org/name@revision`).
        output: a new or empty folder; None to look at the plan and write nothing.
        keep: experts that stay in each block, or their share below 1.
        by: `reap`, `frequency`, or `random` as a control; see `surgery/experts/mixture.py`.
        text: the text to read, as `dataset` of a recipe's calibration.
        samples: sequences of 512 tokens to read, a fifth of them to judge on.
        seed: random seed of `by="random"`.
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
    score = ExpertScore(by, seed)
    job = open_job(model, output, text, samples, revision, device, progress)
    mixture = job.mixture
    plan = plan_fewer_experts(mixture, job.count_of(keep, "keep"))

    def treat(block: ExpertBlock) -> tuple[dict[str, NewTensor], tuple[ExpertFate, ...]]:
        scores = score.values(block)
        kept = _best_experts(scores, plan.keep, mixture.groups)
        fate: dict[int, Fate] = {number: "kept" if number in kept else "dropped" for number in range(mixture.experts)}
        becomes = {old: new for new, old in enumerate(kept)}
        return plan.new_tensors(block.path, kept), expert_fates(block.usage, fate, scores, becomes=becomes)

    new, blocks = job.change_blocks(plan.change, treat)
    settings = {"keep": plan.keep, "by": by, "seed": seed}
    return job.write(plan.change, new, ExpertsOutcome("prune", settings, plan.keep, blocks))


@dataclass(frozen=True, eq=False)
class FewerExperts:
    """The mixture with `keep` experts in each block. `axes`: the dimension that numbers experts, of each tensor outside
    them that has one."""

    mixture: ExpertMixture
    keep: int
    change: ChangedConfig
    axes: dict[str, int]

    def new_tensors(self, path: str, numbers: tuple[int, ...]) -> dict[str, NewTensor]:
        """Return the tensors of a block that has only these of its experts at `path`."""
        source = self.mixture.source
        block = next(f"{block.path}." for block in self.mixture.arch.blocks if path.startswith(f"{block.path}."))
        new = {}
        for name in source.tensors:
            if name.startswith(f"{path}."):
                number, _, leaf = name.removeprefix(f"{path}.").partition(".")
                if int(number) in numbers:
                    new[f"{path}.{numbers.index(int(number))}.{leaf}"] = NewTensor(name, partial(source.read, name))
            elif name in self.axes and name.startswith(block):
                rows = partial(select_entries, source, name, self.axes[name], torch.tensor(numbers))
                new[name] = NewTensor(name, rows)
        return new


def plan_fewer_experts(mixture: ExpertMixture, keep: int) -> FewerExperts:
    """Return the mixture with `keep` experts. Raises RecipeError where its routers could not choose from so few."""
    _check_count(mixture, keep)
    source, settings = mixture.source, mixture.settings
    changes = {key: keep for key in COUNTS if getattr(settings, key, None) == mixture.experts}
    change = change_config(source, changes)
    before = {name: tuple(value.shape) for name, value in source.skeleton().state_dict().items()}
    after = {name: tuple(value.shape) for name, value in change.skeleton.state_dict().items()}
    axes = {}
    for name in before.keys() & after.keys():
        pairs = list(zip(before[name], after[name], strict=True))
        other = [axis for axis, (old, size) in enumerate(pairs) if old != size]
        if not other or any(name.startswith(f"{path}.") for path in mixture.layers.values()):
            continue
        if len(other) > 1 or pairs[other[0]] != (mixture.experts, keep):
            raise InputError(
                f"{name} of {source.name} would become {list(after[name])} with {keep} experts, and it is not known "
                f"how; choose another model"
            )
        axes[name] = other[0]
    for path in mixture.layers.values():
        parent = path.rpartition(".")[0]
        if not any(name.startswith(f"{parent}.") for name in axes):
            raise InputError(
                f"{parent} of {source.name} has no router with an entry for each of its {mixture.experts} experts; "
                f"choose another model"
            )
    return FewerExperts(mixture, keep, change, axes)


def _check_count(mixture: ExpertMixture, keep: int) -> None:
    """Raise RecipeError where a token could not be given its experts any more."""
    name, groups = mixture.source.name, mixture.groups
    if keep < mixture.chosen:
        raise RecipeError(
            f"each token of {name} goes to {mixture.chosen} experts, so {keep} are too few; keep at least "
            f"{mixture.chosen}"
        )
    if groups > 1:
        each, used = keep // groups, getattr(mixture.settings, "topk_group", None) or groups
        if keep % groups or each < GROUP_LEAST or used * each < mixture.chosen:
            least = max(GROUP_LEAST, -(-mixture.chosen // used))
            raise RecipeError(
                f"routers of {name} choose {used} of {groups} groups before they choose {mixture.chosen} experts, so "
                f"{keep} experts do not do; keep a multiple of {groups}, at least {groups * least}"
            )


def _best_experts(scores: Tensor, keep: int, groups: int) -> tuple[int, ...]:
    """Return the numbers of the experts with the best scores, as many in each group, ascending; the first of equals."""
    size = len(scores) // groups
    order = scores.reshape(groups, size).argsort(descending=True, stable=True)[:, : keep // groups]
    chosen = order + size * torch.arange(groups)[:, None]
    return tuple(sorted(chosen.flatten().tolist()))
