"""A layer under compression, the registry of methods, and how far a layer is from its dense weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from llmcompress.errors import NumericsError, RecipeError
from llmcompress.methods.moments import STATISTICS, TILE, Moments
from llmcompress.runtime.precision import bfloat16_factors, is_finite
from llmcompress.runtime.seeding import generator
from llmcompress.weight.expression import dense, describe
from llmcompress.weight.hadamard import rotate
from llmcompress.weight.nodes import Dense, LowRank, RotatedInputs, Sum, Weight, Where, Zero

ROWS = 8192  # rows per chunk when measuring the error, which limits the extra copy
TURNED = 1024  # rows that are rotated at a time
MANY, SAMPLED = 2048, 512  # a matrix of so many rows reports the error of so many of them


@dataclass(frozen=True)
class Rotation:
    """The input basis a layer is compressed in: `signs` bool `[in]` and Hadamard size of `hadamard.rotate`."""

    signs: Tensor
    block: int


@dataclass(frozen=True)
class Layer:
    """One linear under compression; `weight`, `approx` and `inputs` are in the basis of `rotation`, if there is one."""

    name: str
    weight: Tensor  # [out, in] float32: the dense weight
    approx: Weight  # its approximation so far, Dense at first
    inputs: Moments
    seed: str = ""  # the same for layers that read the same input
    rotation: Rotation | None = None
    rows: Tensor | None = None  # [out]: importance of rows where a column is chosen as a whole; None: alike
    notes: tuple[str, ...] = ()  # fallbacks taken, for the report

    def expression(self) -> Weight:
        """Return the approximation in the model's own basis."""
        if self.rotation is None:
            return self.approx
        return RotatedInputs(self.approx, self.rotation.signs, self.rotation.block)


class StepConfig(BaseModel, extra="forbid", frozen=True):
    """A method's arguments, as a recipe spells them. `examples` feed the conformance suite."""

    method: str
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    is_slow: ClassVar[bool] = False  # seconds for a million weights

    @property
    def rowwise(self) -> bool:
        """True if rows are compressed independently, so that tall matrices can be processed in row chunks."""
        return _METHODS[self.method].rowwise

    @property
    def presumes(self) -> bool:
        """True if this step supplies input statistics, so that later steps need no calibration data."""
        return False

    def sketch(self, approx: Weight) -> Weight:
        """Return the expression that this step will leave, on meta tensors, for `plan` to count its bits."""
        raise NotImplementedError(f"{type(self).__name__} needs a sketch")

    def without_inputs(self) -> StepConfig | None:
        """Return the step that stores the same and needs no statistics of inputs; None if there is none."""
        return self if _METHODS[self.method].data_free else None

    def substitute(self, width: int) -> str | None:
        """Return what matrices of so many columns become in place of what was asked for, and why; None for no other."""
        return None

    def rough(self) -> StepConfig | None:
        """Return a faster step whose error is a nearly constant multiple of this one's on every layer.

        Returns the step itself if there is no such step, and None if leaving the step out serves as well.
        """
        return self


@dataclass(frozen=True)
class Method:
    """A registered method: `run(layer, config) -> layer`, and the statistics it reads.

    `data_free`: true if it also works on moments of no tokens; then it minimises |W - W_approx|^2. `rowwise`: true if
    it compresses rows independently, unless the config says otherwise.
    """

    name: str
    config: type[StepConfig]
    needs: frozenset[str]
    run: Callable[[Layer, Any], Layer]
    data_free: bool
    rowwise: bool


_METHODS: dict[str, Method] = {}
Run = TypeVar("Run", bound=Callable[..., Layer])


def method(
    name: str,
    config: type[StepConfig],
    needs: set[str] | frozenset[str] = frozenset(),
    data_free: bool = False,
    rowwise: bool = False,
) -> Callable[[Run], Run]:
    """Register a function `(layer, config) -> layer` under `name`; see `Method`.

    Raises ValueError for an unknown statistic.
    """
    if not needs <= STATISTICS:
        raise ValueError(f"method {name!r} needs {sorted(set(needs) - STATISTICS)}; known: {sorted(STATISTICS)}")

    def register(run: Run) -> Run:
        _METHODS[name] = Method(name, config, frozenset(needs), run, data_free or not needs, rowwise)
        return run

    return register


def methods() -> dict[str, Method]:
    """Return every registered method by name."""
    return dict(_METHODS)


def step(arguments: dict[str, Any]) -> StepConfig:
    """Return a step from its spelling in a recipe: `method` and that method's arguments.

    Raises ValueError for an unknown method.
    """
    name = arguments.get("method")
    if not isinstance(name, str) or name not in _METHODS:
        near = get_close_matches(str(name), _METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_METHODS))}"
        raise ValueError(f"unknown method {name!r}; {hint}")
    return _METHODS[name].config(**arguments)


def apply(layer: Layer, steps: Sequence[StepConfig]) -> Layer:
    """Return the layer after every step, in order. Errors of the steps are raised again with the layer's name.

    Raises NumericsError for a weight or statistics with NaN or Inf.
    """
    given = {"weights": layer.weight, "input statistics": layer.inputs.outer, "channel energies": layer.inputs.square}
    for what, values in given.items():
        if values is not None and not is_finite(values):
            raise NumericsError(f"{layer.name}: its {what} hold NaN or Inf; check the model and the calibration text")
    for config in steps:
        try:
            layer = _METHODS[config.method].run(layer, config)
        except (RecipeError, NumericsError) as error:
            raise type(error)(f"{layer.name}: {config.method}: {error}") from error
    return layer


def sketch(name: str, size: tuple[int, int], steps: Sequence[StepConfig]) -> Weight:
    """Return the expression that the steps will leave of a matrix `[out, in]`, without values, for `plan`.

    Raises RecipeError where a step cannot work on this shape.
    """
    approx: Weight = Dense(torch.empty(size, dtype=torch.bfloat16, device="meta"))
    outer: RotatedInputs | None = None
    for config in steps:
        try:
            after = config.sketch(approx)
            if isinstance(after, RotatedInputs):
                _check_untouched(approx, outer)
                outer, after = after, after.inner
            _check_order(approx, after)
        except RecipeError as error:
            raise RecipeError(f"{name}: {config.method}: {error}") from error
        approx = after
    return approx if outer is None else replace(outer, inner=approx)


def _check_untouched(approx: Weight, rotation: object | None) -> None:
    """Raise RecipeError for a rotation of a matrix that is compressed or rotated already."""
    if not isinstance(approx, Dense) or rotation is not None:
        raise RecipeError("a rotation must come before every other step, and once; move it to the front")


def _check_order(before: Weight, after: Weight) -> None:
    """Raise RecipeError for a step that would throw away the base of an earlier step."""
    (old, old_term), (new, new_term) = base_and_term(before), base_and_term(after)
    if old_term is not None and new_term is not old_term:
        raise RecipeError(f"it would replace the low-rank term of an earlier step ({describe(old_term)}); drop one")
    kept_pruned = isinstance(old, Where) and isinstance(new, Where) and old.index is new.index
    if not (isinstance(old, Dense) or old is new or kept_pruned):
        raise RecipeError(f"it would undo what the steps before it made ({describe(old)}); drop one of them")


def relative_error(weight: Tensor, approx: Weight | Tensor, moments: Moments | None = None) -> float:
    """Return the output error `|(W - W_approx) X|^2 / |W X|^2`, summed in float64; of weights alone without an `outer`.

    The denominator may be off by one in ten thousand.
    """
    value = approx if isinstance(approx, Tensor) else dense(approx)
    outer = None if moments is None else moments.outer
    lost = total = 0.0
    for rows, stored in zip(weight.split(ROWS), value.split(ROWS), strict=True):
        with bfloat16_factors():  # nothing cancels in it, unlike in what error feedback left
            total += _energy(rows, outer)
        lost += _energy(rows - stored.to(weight.device), outer)
    return lost / total if total > 0 else 0.0


def sampled_error(weight: Tensor, approx: Tensor, moments: Moments | None) -> float:
    """Return `relative_error`, of a matrix with many rows on SAMPLED of them, evenly spaced; NaN for NaN or Inf.

    The error of a large layer takes longer than its error feedback; a share of its rows gives it to a few percent.
    """
    if not is_finite(approx):
        return float("nan")
    if len(weight) < MANY:
        return relative_error(weight, approx, moments)
    chosen = sampled_rows(len(weight))
    return relative_error(weight[chosen.to(weight.device)], approx[chosen.to(approx.device)], moments)


def sampled_rows(rows: int) -> Tensor:
    """Return the numbers of SAMPLED rows, evenly spaced, that the error of a large matrix is measured on."""
    return torch.linspace(0, rows - 1, SAMPLED).round().long()


def _energy(matrix: Tensor, outer: Tensor | None) -> float:
    """Return tr(M H M^T) from the upper half of `outer` (H); |M|^2 without one."""
    if outer is None:
        return float(matrix.double().square().sum())
    total = 0.0
    for start in range(0, len(outer), TILE):
        stop = start + TILE
        seen = matrix[:, start:stop] @ outer[start:stop, start:]
        seen[:, TILE:] *= 2  # for the mirrored tiles
        total += float(torch.linalg.vecdot(seen, matrix[:, start:]).sum(dtype=torch.float64))
    return total


def own_generator(layer: Layer, purpose: str) -> torch.Generator:
    """Return the generator of a layer and no other, by the recipe's seed."""
    seed = layer.seed.partition("/")[0]
    return generator(purpose, layer.name, *(() if seed in ("", "0") else (seed,)))


def base_and_term(approx: Weight) -> tuple[Weight, LowRank | None]:
    """Return the base of an approximation and its low-rank term."""
    match approx:
        case Sum((base, LowRank() as term)):
            return base, term
        case _:
            return approx, None


def join(base: Weight, term: LowRank | None) -> Weight:
    """Invert `base_and_term`."""
    return base if term is None else Sum((base, term))


def term_beside_dense(approx: Weight, base: str) -> LowRank | None:
    """Return the low-rank term, for a step that makes a new base, `base` in words.

    Raises RecipeError if an earlier step has made a base.
    """
    old, term = base_and_term(approx)
    if not isinstance(old, Dense):
        raise RecipeError(f"{base} stores every weight, so it does not go after {describe(old)}; drop one")
    return term


def base_target(layer: Layer) -> Tensor:
    """Return the target of the base, `[out, in]`: the weight less the low-rank term."""
    term = base_and_term(layer.approx)[1]
    return layer.weight if term is None else layer.weight - dense(term)


def stored_target(layer: Layer) -> Tensor:
    """Return the target of a base that is rounded without feedback: `base_target`, or what is kept of it; after pruning
    with feedback, the values that this has moved."""
    target, kept = base_target(layer), support(layer.approx)
    if kept is None:
        return target
    values = dense(base_and_term(layer.approx)[0])
    unmoved = any(torch.equal(values, (each * kept).to(torch.bfloat16).float()) for each in (target, layer.weight))
    return target * kept if unmoved else values


def with_base(layer: Layer, base: Weight, notes: tuple[str, ...] = ()) -> Layer:
    """Return the layer with another base beside its low-rank term, if it has one."""
    return replace(layer, approx=join(base, base_and_term(layer.approx)[1]), notes=layer.notes + notes)


def support(approx: Weight) -> Tensor | None:
    """Return the mask of a pruned base, bool `[out, in]`, true where a weight is kept; None if it is not pruned."""
    match base_and_term(approx)[0]:
        case Where(index, _, Zero()):
            return index.inside
        case _:
            return None


def rotate_layer(layer: Layer, rotation: Rotation) -> Layer:
    """Return the layer in another input basis; only before anything was compressed."""
    _check_untouched(layer.approx, layer.rotation)

    def rotate_rows(matrix: Tensor) -> Tensor:
        """Return `matrix @ R`, some rows at a time: a transform takes a few times the memory of its input."""
        product = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
        for rows, place in zip(matrix.split(TURNED), product.split(TURNED), strict=True):
            place.copy_(rotate(rows, rotation.signs, rotation.block))
        return product

    def turn(moments: Moments) -> Moments:
        if moments.outer is None:
            return Moments(moments.tokens)
        outer = rotate_rows(rotate_rows(moments.outer).T)
        return Moments(moments.tokens, square=outer.diagonal().clone(), outer=outer)

    key = ("rotated", rotation.block, rotation.signs.numpy(force=True).tobytes())
    inputs = layer.inputs.memo(key, lambda: turn(layer.inputs))
    weight = rotate_rows(layer.weight)
    return replace(layer, weight=weight, approx=Dense(weight.to(torch.bfloat16)), inputs=inputs, rotation=rotation)
