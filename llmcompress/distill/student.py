"""A compressed model whose numbers can move, and back: every compressed linear relaxed, everything else as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from llmcompress.distill.adapt import dense_weight
from llmcompress.distill.recipe import Kind
from llmcompress.errors import InputError, RecipeError
from llmcompress.modules import CompressedLinear, compressed_linears, put
from llmcompress.relax import KINDS, Relaxation, RelaxedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORMS: Kind = "norms"  # vectors of the decoder: norms, and biases of what is not compressed


@dataclass(frozen=True, eq=False)
class Student:
    """A model under distillation. `relaxed`: its linears that train, by name; `trained`: what moves, by kind, name."""

    model: PreTrainedModel
    relaxed: dict[str, RelaxedLinear]
    trained: dict[Kind, dict[str, nn.Parameter]]

    def groups(self) -> list[dict[str, Any]]:
        """For an optimizer: every parameter by itself, with its kind and the size of its numbers (root mean square)."""
        named = [(kind, value) for kind, values in self.trained.items() for value in values.values()]
        return [{"params": [value], "kind": kind, "size": _size(value)} for kind, value in named]

    def named(self) -> dict[str, nn.Parameter]:
        """Every parameter that moves, by name."""
        return {name: value for values in self.trained.values() for name, value in values.items()}

    def follow(self) -> None:
        """Takes up what stands in the model now, where other parameters were put in the places of those that train."""
        for values in self.trained.values():
            values.update({name: self.model.get_parameter(name) for name in values})

    def frozen(self) -> dict[str, CompressedLinear]:
        """The compressed linears with what was learned, by name; the model goes on as it is."""
        return {name: module.freeze() for name, module in self.relaxed.items()}

    def settle(self) -> dict[str, CompressedLinear]:
        """Puts the compressed linears with what was learned back into the model; returns them by name."""
        layers = self.frozen()
        for name, layer in layers.items():
            put(self.model, name, layer)
        return layers

    def norms(self) -> dict[str, Tensor]:
        """The vectors that trained, float32, by name."""
        return {name: value.detach() for name, value in self.trained.get(NORMS, {}).items()}


def relaxed_student(
    model: PreTrainedModel,
    rates: Mapping[Kind, float],
    estimator: str,
    latents_from: PreTrainedModel | None = None,
    inside: str = "",
) -> Student:
    """`model`, its compressed linears replaced by relaxed ones. The tied head stays packed, as the token table is.

    `rates` names the kinds that train, those the student has. Latent codes start at the codes, or where the weights of
    the dense model `latents_from` are within their cells. Raises InputError for a model without compressed linears,
    RecipeError where there is nothing to train; neither of one block, with a module path as `inside`: then what lies
    elsewhere stays as it is.
    """
    kinds = frozenset(rates) & frozenset(KINDS)
    relaxation = Relaxation(kinds, estimator)  # type: ignore[arg-type]  # checked by the recipe
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    relaxed: dict[str, RelaxedLinear] = {}
    for name, layer in compressed_linears(model).items():
        if layer is not head and name.startswith(inside):
            relaxed[name] = RelaxedLinear.of(layer, relaxation, _target(latents_from, name))
            put(model, name, relaxed[name])
    if not relaxed and not inside:
        raise InputError("the student has no compressed linears, so there is nothing to recover; compress it first")
    trained: dict[Kind, dict[str, nn.Parameter]] = {kind: {} for kind in rates}
    for name, module in relaxed.items():
        parameters = dict(module.relaxed.named_parameters())
        for key, kind in module.relaxed.kinds().items():
            trained[cast(Kind, kind)][f"{name}.relaxed.{key}"] = parameters[key]
    if NORMS in rates:
        trained[NORMS] = _norms(model, relaxed, inside)
    if not any(trained.values()) and not inside:
        raise RecipeError(f"rates: the student has no {' and no '.join(rates)} to train; give a rate for what it has")
    return Student(model, relaxed, trained)


def _size(value: nn.Parameter) -> float:
    return float(value.detach().square().mean().sqrt()) or 1.0


def _norms(model: PreTrainedModel, relaxed: Mapping[str, RelaxedLinear], inside: str) -> dict[str, nn.Parameter]:
    theirs = tuple(f"{name}." for name in relaxed)
    found = {}
    for name, value in model.named_parameters():
        plain = value.ndim == 1 and value.numel() and value.is_floating_point()
        if plain and name.startswith(inside) and not name.startswith(theirs):
            value.requires_grad_()
            found[name] = value
    return found


def _target(teacher: PreTrainedModel | None, name: str) -> Tensor | None:
    """The teacher's matrix `[out, in]` of the linear `name`."""
    return None if teacher is None else dense_weight(teacher, name)
