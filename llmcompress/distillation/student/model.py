"""A model that can train, and back: every compressed linear relaxed, everything else unchanged.

A dense model with fewer or narrower blocks than its teacher is a student too: its matrices train as float32 master
weights, whatever its folder stores, so that no small step is lost.

Scales, gains of norms and biases move in proportion to the size of each number. The gains of one norm of Gemma 3 lie
between 0.001 and 585, the biases of one layer of Qwen2 between 0.01 and 145. Steps in proportion to their root mean
square would multiply the smallest, which hold down channels of large values.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmcompress.distillation.student.median_scales import MedianScale, can_follow, grid_headers, median_scales
from llmcompress.errors import RecipeError
from llmcompress.models.dense.families import block_stack
from llmcompress.recipe.distillation import Distillation, Kind, Scales
from llmcompress.weight.modules import Multiplying, compressed_linears, multiplying, put, tie, ties_of
from llmcompress.weight.trainable.latents import ValuesForm
from llmcompress.weight.trainable.relax import KINDS, Relaxation, RelaxedModule, relaxed_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORMS: Kind = "norms"  # vectors of the decoder: norms, and biases of what is not compressed
WEIGHTS: Kind = "weights"  # matrices of the decoder blocks' linears that are not compressed
PROJECTIONS: Kind = "projections"  # linears on hidden states for losses alone, which are no part of the model
MULTIPLIERS: frozenset[Kind] = frozenset({"scales", NORMS})  # each number moves in proportion to its own size
MAY_ADD = re.compile("RMSNorm|LayerNorm1P")  # classes of norms of which some add 1 to their gains
FLOOR = 1e-3  # of a vector's root mean square: a smaller number moves as one of this size
PLAIN = Relaxation(frozenset())


@dataclass(frozen=True, eq=False)
class Student:
    """A model under distillation.

    `relaxed`: its matrices that train, by name; `trained`: all parameters that change, by kind and name; `medians`:
    scales that follow their latents; `projections`: linears that train with the model but are no part of it; `offsets`:
    what is added to a vector where it multiplies, by name; `held`: `MULTIPLIERS` as they were before the current step.
    """

    model: PreTrainedModel
    relaxed: dict[str, RelaxedModule]
    trained: dict[Kind, dict[str, nn.Parameter]]
    medians: tuple[MedianScale, ...] = ()
    projections: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    offsets: dict[str, float] = field(default_factory=dict)
    held: dict[str, Tensor] = field(default_factory=dict)

    def add_projections(self, projections: nn.ModuleDict) -> None:
        """Let linears on hidden states train along. Raises RecipeError if they have no rate."""
        if len(projections) and PROJECTIONS not in self.trained:
            raise RecipeError(
                "losses: the student's hidden states are not as wide as the teacher's, so they are compared through "
                "linears that train; give these a rate, as in rates: {projections: 1.0e-3}, or use the loss minilm"
            )
        self.projections.update(dict(projections.items()))
        self.trained.get(PROJECTIONS, {}).update(projections.named_parameters())

    def groups(self) -> list[dict[str, Any]]:
        """Return groups for an optimizer: every parameter with a gradient by itself, with its kind and the size of its
        numbers: the root mean square, 1 for zeros. It is 1 for `MULTIPLIERS`, which `settle` scales one by one."""
        trained = [(kind, value) for kind, values in self.trained.items() for value in values.values()]
        return [
            {"params": [value], "kind": kind, "size": 1.0 if kind in MULTIPLIERS else _root_mean_square(value)}
            for kind, value in trained
            if value.requires_grad
        ]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return every parameter that changes, by name."""
        return {name: value for values in self.trained.values() for name, value in values.items()}

    def hold(self) -> None:
        """Before a step of the optimizer, note the numbers of `MULTIPLIERS`."""
        for kind in (kind for kind in self.trained if kind in MULTIPLIERS):  # in the same order in all processes
            self.held.update({name: value.detach().clone() for name, value in self.trained[kind].items()})

    @torch.no_grad()
    def settle(self) -> None:
        """After a step of the optimizer, let each number of `MULTIPLIERS` move by a share of its own size.

        Set the scales that follow their latents. Let each matrix settle, such as clamp latents to the range of codes.
        """
        parameters = self.named_parameters()
        for name, before in self.held.items():
            sizes = number_sizes(before, self.offsets.get(name, 0.0))
            parameters[name].copy_(before + (parameters[name] - before) * sizes)
        self.held.clear()
        for scale in self.medians:
            scale.update()
        for module in self.relaxed.values():
            module.relaxed.settle()

    def rebind_parameters(self) -> None:
        """Look the parameters up in the model again, after others have replaced them there."""
        for kind, values in self.trained.items():
            holder = self.projections if kind == PROJECTIONS else self.model
            values.update({name: holder.get_parameter(name) for name in values})

    def freeze_into_model(self) -> dict[str, Multiplying]:
        """Put the compressed matrices with their learned weights back into the model, and return them by name."""
        layers: dict[str, Multiplying] = {name: module.freeze() for name, module in self.relaxed.items()}
        ties = ties_of(self.model)
        for name, layer in layers.items():
            put(self.model, name, layer)
        tie(self.model, ties)
        return layers

    def dense(self) -> dict[str, Tensor]:
        """Return the vectors and matrices that trained outside compressed linears, float32, by name."""
        kinds = (self.trained.get(kind, {}) for kind in (NORMS, WEIGHTS))
        return {name: value.detach() for values in kinds for name, value in values.items()}


def check_latents(model: PreTrainedModel, recipe: Distillation) -> None:
    """Raise RecipeError if an option for trained codes does not apply to the compressed linears of a student."""
    head = model.get_output_embeddings()
    layers = [layer for layer in compressed_linears(model).values() if layer is not head]
    headers = [header for layer in layers for header in grid_headers(layer.layout.header)]
    if recipe.freezing is not None and not headers:
        raise RecipeError("freezing: the student has no codes that could oscillate; leave it out")
    if recipe.scales == "median" and not any(map(can_follow, headers)):
        raise RecipeError(
            "scales: median is of symmetric grids with two or three levels, and the student has none; use learned"
        )


def relaxed_student(
    model: PreTrainedModel,
    rates: Mapping[Kind, float],
    target: Callable[[str], Tensor] | None = None,
    inside: str | tuple[str, ...] = "",
    scales: Scales = "learned",
    relaxation: Relaxation = PLAIN,
    values: Mapping[str, ValuesForm] = MappingProxyType({}),
    drop_values: Callable[[nn.Module], None] | None = None,
) -> Student:
    """Replace the compressed linears of `model` (float32) by relaxed ones; head and token table stay as they are.

    Args:
        rates: names the kinds that train, as far as the student has them.
        target: gives dense weights, `[out, in]` by name, where latents start if these are in the codes' cells; None:
            they start at the codes.
        inside: starts of names of the blocks that train; everything else stays as it is.
        scales: "median" for scales that follow their latents, if they can; others train as `rates` says.
        relaxation: how they train; the kinds follow from `rates`.
        values: forms of values, by the names of the linears.
        drop_values: takes the numbers out of a relaxed layer, in a process that receives its shares.

    Raises RecipeError, without `inside`, if nothing trains, or of a dense model only norms although `rates` has more.
    """
    kinds = frozenset(rates) & frozenset(KINDS)
    masters = kinds | ({"scales"} if scales == "median" else set())
    outside = "edge" if scales == "median" else relaxation.outside
    relaxation = replace(relaxation, trains=masters, outside=outside)
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    relaxed: dict[str, RelaxedModule] = {}
    medians: list[MedianScale] = []
    ties = ties_of(model)
    tied = {*ties, *ties.values()}  # whose sums are the teacher's, so that neither part has a target
    for name, layer in multiplying(model).items():
        if layer is not head and name.startswith(inside):
            wanted = None if target is None or name in tied else target(name)
            of_layer = relaxation
            if name in values:  # the values have masters, which need not train
                of_layer = replace(relaxation, trains=relaxation.trains | {"values"}, values=values[name])
            relaxed[name] = relaxed_module(layer, of_layer, wanted)
            put(model, name, relaxed[name])
            if drop_values is not None:
                drop_values(relaxed[name])
            if scales == "median":
                medians += median_scales(layer.expression(), relaxed[name].relaxed)
    tie(model, ties)
    if not relaxed and not inside and kinds and WEIGHTS not in rates:
        raise RecipeError(
            f"rates: the student has no compressed linears, so no {' and no '.join(sorted(kinds))}; give a rate for "
            f"its weights, as in {{weights: 1.0e-3, norms: 1.0e-3}}"
        )
    trained = _masters(relaxed, rates, medians)
    if NORMS in rates:
        trained[NORMS] = _norms(model, relaxed, inside)
    if WEIGHTS in rates:
        trained[WEIGHTS] = _weights(model, inside)
    if not any(trained.values()) and not inside:
        raise RecipeError(f"rates: the student has no {' and no '.join(rates)} to train; give a rate for what it has")
    return Student(model, relaxed, trained, tuple(medians), offsets=find_offsets(model, trained.get(NORMS, {}).keys()))


def _root_mean_square(value: Tensor) -> float:
    return float(value.detach().square().mean().sqrt()) or 1.0


def _masters(
    relaxed: Mapping[str, RelaxedModule], rates: Mapping[Kind, float], medians: Sequence[MedianScale]
) -> dict[Kind, dict[str, nn.Parameter]]:
    """Return the parameters of relaxed linears that change, by kind and name: those with a rate, which get a gradient,
    and medians, which get none."""
    trained: dict[Kind, dict[str, nn.Parameter]] = {kind: {} for kind in rates}
    of_medians = {(scale.relaxed, scale.scales) for scale in medians}
    for name, module in relaxed.items():
        for key, kind in module.relaxed.kinds().items():
            parameter, is_median = module.relaxed.get_parameter(key), (module.relaxed, key) in of_medians
            parameter.requires_grad_(kind in rates and not is_median)
            if kind in rates or is_median:
                trained.setdefault(cast(Kind, kind), {})[f"{name}.relaxed.{key}"] = parameter
    return trained


def _norms(
    model: PreTrainedModel, relaxed: Mapping[str, RelaxedModule], inside: str | tuple[str, ...]
) -> dict[str, nn.Parameter]:
    in_linears = tuple(f"{name}." for name in relaxed)
    norms = {}
    for name, value in model.named_parameters():
        is_vector = value.ndim == 1 and value.numel() and value.is_floating_point()
        if is_vector and name.startswith(inside) and not name.startswith(in_linears):
            value.requires_grad_()
            norms[name] = value
    return norms


def _weights(model: PreTrainedModel, inside: str | tuple[str, ...]) -> dict[str, nn.Parameter]:
    from transformers.pytorch_utils import Conv1D

    stack = block_stack(model.config, model)
    weights = {}
    for name, module in model.get_submodule(stack).named_modules(prefix=stack):
        if name.startswith(inside) and isinstance(module, (nn.Linear, Conv1D)):
            weights[f"{name}.weight"] = module.get_parameter("weight")
            weights[f"{name}.weight"].requires_grad_()
    return weights


def number_sizes(vector: Tensor, offset: float) -> Tensor:
    """Return the size of each number of `vector + offset`, at least `FLOOR` of their root mean square; 1 for zeros."""
    sizes = (vector + offset).abs()
    mean = sizes.square().mean().sqrt()
    return torch.where(mean > 0, sizes.maximum(FLOOR * mean), torch.ones_like(sizes))


@torch.no_grad()
def find_offsets(model: nn.Module, gains: Collection[str]) -> dict[str, float]:
    """Return what norms add to their `gains`, by name, where that is not 0: Gemma's are stored less 1."""
    norms = {f"{name}.weight": norm for name, norm in model.named_modules() if MAY_ADD.search(type(norm).__name__)}
    return {name: 1.0 for name in norms.keys() & set(gains) if _adds_one(norms[name])}


def _adds_one(norm: nn.Module) -> bool:
    """True if a norm passes something on although its gains are zero."""
    gains = getattr(norm, "weight", None)
    if not isinstance(gains, Tensor) or gains.ndim != 1 or len(inspect.signature(norm.forward).parameters) != 1:
        return False
    zeros = {name: torch.zeros(value.shape) for name, value in norm.named_parameters()}  # its own may be on meta
    return bool(functional_call(norm, zeros, torch.arange(float(len(gains)))[None]).any())
