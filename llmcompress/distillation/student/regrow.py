"""Pruned matrices that train dense for a phase and are pruned again: grow-and-prune (GaP, arXiv 2106.09857).

`grow` puts zeros, or the teacher's weights, where weights are missing, so that all of a matrix trains; `prune_again`
keeps as many weights as before, in the same pattern. So a mask that was chosen once, one layer at a time, can still
change. The paper starts at zero and keeps the largest weights. Language models have input channels of very unlike
sizes, so the size of a weight counts times the norm of its inputs here, as in Wanda (arXiv 2306.11695), unless the
recipe asks for the paper's way. `learned_masks` has masks that change in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.data.batch import Batch
from llmcompress.distillation.objective.forward import hidden_states
from llmcompress.distillation.student.low_rank import teacher_weights
from llmcompress.errors import RecipeError, list_names
from llmcompress.methods.solvers.projection import largest, largest_of_each
from llmcompress.recipe.rules import matches
from llmcompress.recipe.sections import Regrowth
from llmcompress.weight.modules import CompressedLinear, Multiplying, compressed_linears, decoded, put
from llmcompress.weight.nodes import Bitmap, Dense, Pattern, Where, Zero, shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEQUENCES = 64  # of the training text, that norms of inputs come from

Masks = Mapping[str, Bitmap | Pattern]


@torch.no_grad()
def grow(
    model: PreTrainedModel, options: Regrowth, teacher: Callable[[], PreTrainedModel]
) -> dict[str, Bitmap | Pattern]:
    """Make each pruned linear of `model` that `options` match dense, in place; return the masks by name.

    `teacher`: gives the dense model, at whose weights the new ones may start; if masks learn, all weights do.
    Raises RecipeError for a pattern that matches no matrix of values and zeros.
    """
    layers, pruned = compressed_linears(model), pruned_linears(model)
    for each in options.match:
        if not any(matches(each, name) for name in pruned):
            choice = f"it has {list_names(pruned)}" if pruned else "it has none"
            raise RecipeError(f'regrow matches no matrix of values and zeros of the student ("{each}"); {choice}')
    chosen = [name for name in pruned if any(matches(each, name) for each in options.match)]
    targets = teacher_weights(model, teacher()) if options.start == "teacher" else None
    for name in chosen:
        index, values = pruned[name]
        back = torch.zeros_like(values) if targets is None else targets(name).to(values)
        grown = back if options.by == "learned" else values.where(index.inside, back)
        put(model, name, CompressedLinear.of(Dense(grown), layers[name].bias, layers[name].layout.inputs))
    return {name: pruned[name][0] for name in chosen}


def pruned_linears(model: PreTrainedModel) -> dict[str, tuple[Bitmap | Pattern, Tensor]]:
    """Return the mask and the values `[out, in]` of each linear of a model that is nothing else, by name."""
    return {name: parts for name, layer in compressed_linears(model).items() if (parts := _parts(layer))}


@torch.no_grad()
def prune_again(
    layers: Mapping[str, Multiplying], masks: Masks, norms: Mapping[str, Tensor] | None
) -> dict[str, CompressedLinear]:
    """Return the dense layers named in `masks` with as many weights as the masks have, in their patterns.

    `norms`: squared norms of inputs `[in]` by name; None if the size alone decides.
    """
    linears = {}
    for name, mask in masks.items():
        layer = layers[name]
        match layer, layer.expression():
            case CompressedLinear(), Dense(values) as grown:
                scores = values.float().square()
                scores = scores if norms is None else scores * norms[name].to(scores.device)
                index = mask_like(mask, scores)
                pruned = Where(index, Dense(values), Zero(shape(grown)))
                linears[name] = CompressedLinear.of(pruned, layer.bias, layer.layout.inputs)
            case _, other:
                raise TypeError(f"{name} was grown, and is a {type(other).__name__}")
    return linears


def regrown_share(layers: Mapping[str, Multiplying], masks: Masks) -> float:
    """Return the share of the stored weights of the layers in `masks` that these masks did not have."""
    now = {name: parts[0].inside for name in masks if (parts := _parts(layers[name]))}
    new = sum(int((inside & ~masks[name].inside).sum()) for name, inside in now.items())
    return new / max(1, sum(int(inside.sum()) for inside in now.values()))


@torch.no_grad()
def input_norms(
    model: PreTrainedModel, names: Collection[str], text: Batch, autocast: Callable[[], AbstractContextManager[None]]
) -> dict[str, Tensor]:
    """Return the squared norms `[in]` of the inputs of the linears `names`, float32, over `text`; ones for an expert
    that none of its tokens reaches."""
    norms: dict[str, Tensor] = {}
    with decoded(model), autocast(), _add_squares(model, names, norms):
        for part in text.chunks(1):
            batch = part.trim().to(next(model.parameters()).device)
            hidden_states(model, batch)
    layers = compressed_linears(model)
    return {name: norms[name] if name in norms else torch.ones(layers[name].in_features) for name in names}


@contextmanager
def _add_squares(model: PreTrainedModel, names: Iterable[str], norms: dict[str, Tensor]) -> Iterator[None]:
    """Add within the context the squares of the inputs of the linears `names` to `norms`."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            squares = inputs[0].detach().float().square().flatten(0, -2).sum(0)
            norms[name] = squares if name not in norms else norms[name] + squares

        return add

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook(name)))
        yield


def mask_like(mask: Bitmap | Pattern, scores: Tensor) -> Bitmap | Pattern:
    """Return the mask of the best `scores [out, in]`, as many in all or in every group as `mask` has."""
    if isinstance(mask, Pattern):
        return Pattern(largest_of_each(scores.T, mask.keep, mask.group).T, mask.keep, mask.group)
    return Bitmap(largest(scores, int(mask.inside.sum())))


def _parts(layer: Multiplying) -> tuple[Bitmap | Pattern, Tensor] | None:
    """Return the mask and the values `[out, in]` of a layer that is nothing else; None for others."""
    match layer, layer.expression():
        case CompressedLinear(), Where(Bitmap() | Pattern() as index, Dense(values), Zero()):
            return index, values
    return None
