"""A model that can train, and back: every compressed linear relaxed, everything else unchanged.

A dense model with fewer or narrower blocks than its teacher is a student too: its matrices train as float32 master
weights, whatever its folder stores, so that small steps are not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llmcompress.distillation.student.median_scales import MedianScale, follows, grids, median_scales
from llmcompress.errors import RecipeError
from llmcompress.models.dense.families import block_stack
from llmcompress.recipe.distillation import Distillation, Kind, Scales
from llmcompress.weight.modules import Multiplying, compressed_linears, multiplying, put, tie, ties_of
from llmcompress.weight.trainable.latents import Form, ValuesForm
from llmcompress.weight.trainable.masters import Outside
from llmcompress.weight.trainable.relax import KINDS, Relaxation, RelaxedModule, relaxed_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORMS: Kind = "norms"  # vectors of the decoder: norms, and biases of what is not compressed
WEIGHTS: Kind = "weights"  # matrices of the decoder blocks' linears that are not compressed
PROJECTIONS: Kind = "projections"  # linears on hidden states for losses alone, which are no part of the model


@dataclass(frozen=True, eq=False)
class Student:
    """A model under distillation. `relaxed`: its matrices that train, by name; `trained`: all parameters that change,
    by kind and name; `medians`: scales that follow their latents; `projections`: linears that train along with the
    model but are not part of it."""

    model: PreTrainedModel
    relaxed: dict[str, RelaxedModule]
    trained: dict[Kind, dict[str, nn.Parameter]]
    medians: tuple[MedianScale, ...] = ()
    projections: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    def join(self, projections: nn.ModuleDict) -> None:
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
        numbers (root mean square)."""
        trained = [(kind, value) for kind, values in self.trained.items() for value in values.values()]
        named = [(kind, value) for kind, value in trained if value.requires_grad]
        return [{"params": [value], "kind": kind, "size": _size(value)} for kind, value in named]

    def named(self) -> dict[str, nn.Parameter]:
        """Return every parameter that changes, by name."""
        return {name: value for values in self.trained.values() for name, value in values.items()}

    def settle(self) -> None:
        """Set the scales that follow their latents, then do what each matrix asks for, such as clamping latents to the
        range of their codes; for use after a step of the optimizer."""
        for scale in self.medians:
            scale.rebind_parameters()
        for module in self.relaxed.values():
            module.relaxed.settle()

    def rebind_parameters(self) -> None:
        """Look the parameters up in the model again, after others have taken their places there."""
        for kind, values in self.trained.items():
            holder = self.projections if kind == PROJECTIONS else self.model
            values.update({name: holder.get_parameter(name) for name in values})

    def frozen(self) -> dict[str, Multiplying]:
        """Return the compressed matrices with their learned weights, by name; the model stays as it is."""
        return {name: module.freeze() for name, module in self.relaxed.items()}

    def freeze_into_model(self) -> dict[str, Multiplying]:
        """Put the compressed matrices with their learned weights back into the model, and return them by name."""
        layers, ties = self.frozen(), ties_of(self.model)
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
    found = [grid for layer in layers for grid in grids(layer.layout.header)]
    if recipe.freezing is not None and not found:
        raise RecipeError("freezing: the student has no codes that could oscillate; leave it out")
    if recipe.scales == "median" and not any(map(follows, found)):
        raise RecipeError(
            "scales: median is of symmetric grids with two or three levels, and the student has none; use learned"
        )


def relaxed_student(
    model: PreTrainedModel,
    rates: Mapping[Kind, float],
    estimator: str,
    target: Callable[[str], Tensor] | None = None,
    inside: str | tuple[str, ...] = "",
    scales: Scales = "learned",
    form: Form | None = None,
    values: Mapping[str, ValuesForm] = MappingProxyType({}),
    shrunk: Callable[[nn.Module], None] | None = None,
    outside: Outside = "code",
) -> Student:
    """Replace the compressed linears of `model` (float32) by relaxed ones; head and token table stay as they are.

    `rates` names the kinds that train, as far as the student has them. Latent codes start at the codes, or if `target`
    gives the dense weights, `[out, in]` by name, at these where they are in the codes' cells. `inside`: starts of names
    of the blocks that train; everything else stays as it is. `scales`: "median" for scales that follow their latents,
    if they can; other scales train as `rates` says. `form`: of latents, `values`: of values, by the names of the
    linears, and `outside`, as in `Relaxation`; latents that medians are taken of are weights, as near as they can be.
    `shrunk`: takes the numbers out of a relaxed layer, in a process that another one gives them to.

    Raises RecipeError, unless only some blocks train, if there is nothing to train, or if only norms of a dense model
    would train although other kinds were asked for.
    """
    kinds = frozenset(rates) & frozenset(KINDS)
    masters = kinds | ({"scales"} if scales == "median" else set())
    start: Outside = "edge" if scales == "median" else outside
    relaxation = Relaxation(masters, estimator, form=form, outside=start)  # type: ignore[arg-type]  # of the recipe
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    relaxed: dict[str, RelaxedModule] = {}
    medians: list[MedianScale] = []
    ties = ties_of(model)
    tied = {*ties, *ties.values()}  # whose sums are the teacher's, so that neither part has a target
    for name, layer in multiplying(model).items():
        if layer is not head and name.startswith(inside):
            wanted = None if target is None or name in tied else target(name)
            how = relaxation
            if name in values:  # the values have masters, which need not train
                how = replace(relaxation, trains=relaxation.trains | {"values"}, values=values[name])
            relaxed[name] = relaxed_module(layer, how, wanted)
            put(model, name, relaxed[name])
            if shrunk is not None:
                shrunk(relaxed[name])
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
    return Student(model, relaxed, trained, tuple(medians))


def _masters(
    relaxed: Mapping[str, RelaxedModule], rates: Mapping[Kind, float], medians: Sequence[MedianScale]
) -> dict[Kind, dict[str, nn.Parameter]]:
    """Return the parameters of relaxed linears that change, by kind and name: those with a rate, which get a gradient,
    and medians, which get none."""
    trained: dict[Kind, dict[str, nn.Parameter]] = {kind: {} for kind in rates}
    following = {(scale.relaxed, scale.scales) for scale in medians}
    for name, module in relaxed.items():
        for key, kind in module.relaxed.kinds().items():
            parameter, follows = module.relaxed.get_parameter(key), (module.relaxed, key) in following
            parameter.requires_grad_(kind in rates and not follows)
            if kind in rates or follows:
                trained.setdefault(cast(Kind, kind), {})[f"{name}.relaxed.{key}"] = parameter
    return trained


def _size(value: nn.Parameter) -> float:
    return float(value.detach().square().mean().sqrt()) or 1.0


def _norms(
    model: PreTrainedModel, relaxed: Mapping[str, RelaxedModule], inside: str | tuple[str, ...]
) -> dict[str, nn.Parameter]:
    theirs = tuple(f"{name}." for name in relaxed)
    found = {}
    for name, value in model.named_parameters():
        plain = value.ndim == 1 and value.numel() and value.is_floating_point()
        if plain and name.startswith(inside) and not name.startswith(theirs):
            value.requires_grad_()
            found[name] = value
    return found


def _weights(model: PreTrainedModel, inside: str | tuple[str, ...]) -> dict[str, nn.Parameter]:
    from transformers.pytorch_utils import Conv1D

    stack = block_stack(model.config, model)
    found = {}
    for name, module in model.get_submodule(stack).named_modules(prefix=stack):
        if name.startswith(inside) and isinstance(module, (nn.Linear, Conv1D)):
            found[f"{name}.weight"] = module.get_parameter("weight")
            found[f"{name}.weight"].requires_grad_()
    return found
