"""A mixture of experts on disk, and the use that its routers make of experts on a text."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration.dry_run import probe_architecture
from llmcompress.errors import InputError, RecipeError, list_names
from llmcompress.models.dense.config import MODEL, TOKENIZER, needs_code
from llmcompress.models.dense.experts import PER_TOKEN, Experts, experts_of
from llmcompress.models.dense.families import Architecture, architecture
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import DenseModel, open_source
from llmcompress.runtime.seeding import generator
from llmcompress.surgery.judged_walk import Visit

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # entries of configs
GROUPS = "n_group"  # of experts: a token first chooses some of the groups
BY = ("reap", "frequency", "random")  # scores


@dataclass(frozen=True, eq=False)
class ExpertMixture:
    """A model with experts. `layers`: the module path of each block's experts, by the block's number; `experts`: in
    each of them; `chosen`: experts of a token; `groups`: equal runs of experts, of which a token chooses some."""

    source: DenseModel
    arch: Architecture
    layers: dict[int, str]
    experts: int
    chosen: int
    groups: int

    @property
    def settings(self) -> Any:
        """The config of the part of the model that reads text."""
        return self.source.config.get_text_config(decoder=True)


def open_mixture(model: str | Path, revision: str | None = None) -> ExpertMixture:
    """Return the mixture that `model` names, checked by its config and tensor headers alone.

    Raises InputError for a model that cannot be opened or walked, that needs Python code of its own, that has no
    experts, or whose blocks do not all have the same number of them.
    """
    place = locate(model, revision)
    if needs_code(place.folder, MODEL) or needs_code(place.folder, TOKENIZER):
        raise InputError(
            f"{place.folder} needs Python code of its own, trusted or not, and what that does with experts is not "
            f"known; choose a mixture that transformers itself has a class for"
        )
    source = open_source(place)
    skeleton = source.skeleton()
    arch = architecture(source.config, skeleton)
    experts = experts_of(skeleton)
    layers = _by_block(experts, arch, source.name)
    if not layers:
        raise InputError(
            f"{source.name} is no mixture of experts (model type {source.config.model_type!r}), so it has none to "
            f"take away; choose a mixture, or `llmcompress drop` for its blocks"
        )
    counts = sorted({experts[path].num_experts for path in layers.values()})
    settings = source.config.get_text_config(decoder=True)
    chosen = next((getattr(settings, key) for key in PER_TOKEN if isinstance(getattr(settings, key, None), int)), None)
    if len(counts) != 1 or chosen is None:
        what = (
            f"blocks of {list_names(map(str, counts))} experts"
            if len(counts) != 1
            else f"none of {', '.join(PER_TOKEN)}"
        )
        raise InputError(f"{source.folder / 'config.json'} describes {what}, which is not known; choose another model")
    if arch.family is None:
        arch = probe_architecture(source, arch, True)
    return ExpertMixture(source, arch, layers, counts[0], chosen, getattr(settings, GROUPS, None) or 1)


def _by_block(experts: dict[str, Experts], arch: Architecture, name: str) -> dict[int, str]:
    """Return the module path of the experts of each block. Raises InputError for a block with two lists of them."""
    layers: dict[int, str] = {}
    for path in experts:
        number = next((i for i, block in enumerate(arch.blocks) if path.startswith(f"{block.path}.")), None)
        if number is None or number in layers:
            raise InputError(
                f"{path} of {name} is not the only list of experts in a decoder block, so it is not known what its "
                f"router chooses from; choose another model"
            )
        layers[number] = path
    return layers


# --- the use of experts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertScore:
    """The worth of experts, by which some go. Raises RecipeError for another name.

    `reap`: the mean over an expert's tokens of the router's weight times the norm of its output (REAP, arXiv
    2510.13999), 0 without tokens; `frequency`: the share of all tokens that are routed to it; `random`: the control,
    drawn by `seed`.
    """

    by: str = "reap"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise RecipeError(f"by is {self.by!r}; choose one of {', '.join(BY)}")

    def values(self, block: ExpertBlock) -> Tensor:
        """Return the scores of a block's experts, float64 `[experts]`."""
        usage = block.usage
        if self.by == "random":
            return torch.rand(len(usage.counts), dtype=torch.float64, generator=generator(self.seed, block.path))
        if self.by == "frequency":
            return usage.counts.double() / usage.tokens
        return usage.outputs / usage.counts.clamp_min(1)


@dataclass(frozen=True, eq=False)
class Usage:
    """The use of a block's experts on the calibration text, each a tensor `[experts]`.

    `counts`: tokens routed to it; `weights`: the sum of the router's weights for it; `outputs`: the sum of weight times
    norm of its output. Where inputs are scaled by these weights (Llama 4), each weight counts as 1.
    """

    tokens: int
    counts: Tensor
    weights: Tensor
    outputs: Tensor


@dataclass(frozen=True, eq=False)
class ExpertBlock:
    """A loaded block, and its experts at the module path `path` with their use."""

    visit: Visit
    path: str
    experts: Experts
    usage: Usage

    @property
    def number(self) -> int:
        """The number of the block in the model."""
        return self.visit.block.index


def open_block(visit: Visit, path: str) -> ExpertBlock:
    """Return a loaded block with the use of its experts at `path`."""
    experts = visit.block.module.get_submodule(path.removeprefix(f"{visit.block.path}."))
    if not isinstance(experts, Experts):
        raise InputError(f"{path} holds no experts; choose another model")
    return ExpertBlock(visit, path, experts, _measure_usage(visit, experts))


@torch.no_grad()
def _measure_usage(visit: Visit, experts: Experts) -> Usage:
    tokens = sum(batch.size for batch in visit.calibrating) * visit.block.hidden.shape[1]
    zeros = partial(torch.zeros, experts.num_experts)
    usage = Usage(tokens, zeros(dtype=torch.long), zeros(dtype=torch.float64), zeros(dtype=torch.float64))
    routes: list[tuple[Any, ...]] = []  # of the call at hand: the numbers and weights of each token's experts

    def see_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routes[:] = [(*args, *kwargs.values())[1:]]

    def add_output(number: int, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Add the output `[tokens, width]` of an expert on its tokens, in their order."""
        norms = output.double().norm(dim=-1).cpu()
        weights = torch.ones_like(norms)
        if len(routes[0]) == 2:
            index, given = routes[0]
            weights = given[index == number].double().cpu()
        usage.counts[number] += len(norms)
        usage.weights[number] += weights.sum()
        usage.outputs[number] += (weights * norms).sum()

    with ExitStack() as hooks:
        hooks.enter_context(experts.register_forward_pre_hook(see_call, with_kwargs=True))
        for number, expert in enumerate(experts):
            hooks.enter_context(expert.register_forward_hook(partial(add_output, number)))
        for batch in visit.calibrating:
            visit.run(visit.block.hidden[batch.rows], batch.rows)
    return usage
