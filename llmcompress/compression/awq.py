"""AWQ (arXiv 2306.00978): the loudest input channels are scaled up before they are rounded.

W x = (W diag(s)) (x / s), and 1/s goes into the producer of x: the weight of a norm, or the rows and the bias of
another linear. Nothing more is stored, and of inputs that are rounded, outliers are smoothed. With a the root mean
square of a channel over the calibration tokens, s = a^alpha. Of `EXPONENTS`, alpha leaves the least relative output
error after plain rounding to the layer's grid, summed over the linears that read x; alpha = 0 is among them, so scaling
never adds to that sum. Where inputs are rounded too, the error is that of products on a sample of tokens with both
sides rounded, and a is the largest magnitude (SmoothQuant, arXiv 2211.10438, divides it by that of the weights, with
alpha fixed at 1/2).

The paper takes the mean magnitude; here it is the root mean square, which second moments give. In models with fewer key
heads than query heads, the paper does not scale values; here query heads that share values share scales. A norm's new
weight is rounded to its stored dtype first and s follows from it, so it is exact there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from llmcompress.calibration.walk import Block, InputGroup
from llmcompress.compression.producers import Feed, feeds
from llmcompress.errors import RecipeError
from llmcompress.methods.grids.gptq import GPTQ
from llmcompress.methods.grids.mxfp import MXFP
from llmcompress.methods.layer import StepConfig
from llmcompress.methods.moments import Moments
from llmcompress.methods.solvers.floats import LAYOUTS, FloatLayout, nearest_floats
from llmcompress.methods.solvers.grid import GridConfig, GridFormat, fit_grid
from llmcompress.methods.solvers.grid import round_to as round_columns
from llmcompress.models.dense.families import Architecture
from llmcompress.models.dense.model import DenseModel
from llmcompress.recipe.rules import InputRounding
from llmcompress.weight.expression import dense
from llmcompress.weight.inputs import InputFormat

EXPONENTS = tuple(step / 20 for step in range(20))
QUIETEST = 1e-4  # of the loudest channel's root mean square: a quieter channel counts as this

Steps = Mapping[str, tuple[StepConfig, ...]]
Form = GridFormat | FloatLayout


@dataclass(frozen=True)
class ScaledChannels:
    """The changes that `scale_channels` made to a block.

    `changed`: by name, the dtypes of changed tensors that no method will compress. `notes`: a sentence for each group
    of linears.
    """

    changed: dict[str, torch.dtype] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tensors(self, block: Block) -> dict[str, Tensor]:
        """Return the tensors that the checkpoint stores in place of the dense model's."""
        return {name: _parameter(block, name).to(dtype) for name, dtype in self.changed.items()}


def check_awq(arch: Architecture, steps: Steps) -> None:
    """Raise RecipeError for a family that nothing can be fused into, and for steps that do not start by rounding."""
    feeds(arch, arch.blocks[0])
    for name, own in steps.items():
        if _form(own[0]) is None:
            raise RecipeError(
                f"fuse: awq chooses scales for rounding, and the first step of {name} is {own[0].method}; use rtn, "
                f"gptq or mxfp there, or leave awq out"
            )


@torch.no_grad()
def scale_channels(
    block: Block,
    source: DenseModel,
    arch: Architecture,
    steps: Steps,
    inputs: Mapping[str, InputRounding] = MappingProxyType({}),
) -> ScaledChannels:
    """Scale the input channels of a block's linears that have `steps`, in its module and in its moments.

    `inputs`: what inputs are rounded to, by linear, for a block whose groups have samples of them.

    A block that is not a decoder block (a table) stays as it is.
    """
    if block.index >= len(arch.blocks):
        return ScaledChannels()
    feed_of = {feed.names: feed for feed in feeds(arch, arch.blocks[block.index])}
    edits = _Edits(block, source, steps)
    config = source.config
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    notes, groups = [], []
    for group in block.groups:
        feed = feed_of[group.names]
        out = len(edits.value(f"{feed.producer}.weight"))
        rows = producer_rows(out, block.weight(feed.names[0]).shape[1], head_dim)
        on = block.weight(feed.names[0]).device
        asked = next((inputs[name] for name in group.names if name in inputs), None)
        best = _search(edits, feed, rows.to(on), _errors(edits, feed, group, asked))
        edits.divide(feed.producer, best.divisor)
        edits.multiply(feed.names, best.scale)
        held_out = None if group.held_out is None else _divide_inputs(group.held_out, best.scale)
        groups.append(InputGroup(group.names, _divide_inputs(group.inputs, best.scale), held_out))
        notes.append(best.note(feed))
    block.groups = tuple(groups)
    return ScaledChannels(edits.changed, tuple(notes))


def producer_rows(out: int, width: int, head_dim: int) -> Tensor:
    """Return for each of `width` channels the row of its producer that it is proportional to, `[width]`.

    A producer with `out` = `width` rows has one for each channel. A projection of values may have fewer: then each head
    of `head_dim` rows serves the consecutive query heads that share it.
    """
    channels = torch.arange(width)
    return channels // head_dim // (width // out) * head_dim + channels % head_dim


@dataclass(frozen=True, eq=False)
class _Scales:
    """Scales `[in]` and the divisors of the producer's rows `[rows]`, with the errors before and after scaling."""

    exponent: float
    divisor: Tensor
    scale: Tensor
    before: float
    after: float

    def note(self, feed: Feed) -> str:
        """Return a sentence for the report."""
        return (
            f"{', '.join(feed.names)}: channels scaled by {feed.producer}, exponent {self.exponent:g}, error after "
            f"plain rounding {self.before:.5f}, then {self.after:.5f}"
        )


class _Edits:
    """Changes to a block's parameters, in place; values are rounded as they will be stored."""

    def __init__(self, block: Block, source: DenseModel, steps: Steps) -> None:
        self.block, self.source, self.steps = block, source, steps
        self.changed: dict[str, torch.dtype] = {}  # not the weights of linears that have steps

    def value(self, name: str) -> Tensor:
        """Return the parameter as it is now, float32."""
        return _parameter(self.block, name)

    def divide(self, producer: str, divisor: Tensor) -> None:
        """Divide the output of a norm or a linear, channel by channel."""
        for leaf, value in list(_module(self.block, producer).named_parameters(recurse=False)):
            self._put(f"{producer}.{leaf}", value.detach() / divisor.reshape(-1, *[1] * (value.dim() - 1)))

    def multiply(self, names: tuple[str, ...], scale: Tensor) -> None:
        """Multiply the columns of linears."""
        for name in names:
            self._put(f"{name}.weight", self.value(f"{name}.weight") * scale)

    def as_stored(self, name: str, value: Tensor) -> Tensor:
        """Return `value` rounded to the dtype that the parameter is stored in."""
        return value.to(self.source.read(name).dtype)

    def _put(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in self.steps:
            stored = self.as_stored(name, value)
            self.changed[name], value = stored.dtype, stored.float()
        setattr(_module(self.block, path), leaf, nn.Parameter(value, requires_grad=False))


def _module(block: Block, path: str) -> nn.Module:
    return block.module.get_submodule(path.removeprefix(f"{block.path}."))


def _parameter(block: Block, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return _module(block, path).get_parameter(leaf).detach()


def _search(edits: _Edits, feed: Feed, rows: Tensor, errors: _Errors) -> _Scales:
    """Return the scales of the exponent with the least error after plain rounding."""
    loudness = _loudness(errors.energy, rows, len(edits.value(f"{feed.producer}.weight")))
    options: list[_Scales] = []
    for exponent in EXPONENTS:
        divisor = torch.exp(exponent * loudness)
        if feed.is_norm:
            divisor = _exact(divisor, f"{feed.producer}.weight", edits)
        scale = divisor[rows]
        error = errors.of(scale)
        options.append(_Scales(exponent, divisor, scale, options[0].before if options else error, error))
    return min(options, key=lambda scales: scales.after)


@dataclass(frozen=True, eq=False)
class _Errors:
    """The errors of linears that read the same input, by the scales of its channels.

    `energy [in]`: of the channels; `of(scale)`: the relative output errors after rounding, summed.
    """

    energy: Tensor
    of: Callable[[Tensor], float]


def _errors(edits: _Edits, feed: Feed, group: InputGroup, inputs: InputRounding | None) -> _Errors:
    """Return the errors of the linears of a feed that will be rounded."""
    forms = [(name, form) for name in feed.names if (form := _form_of(edits, name)) is not None]
    linears = [(edits.value(f"{name}.weight"), form) for name, form in forms]
    outer, x = group.inputs.outer, group.sample
    if x is not None:
        return _Errors(x.abs().amax(0).square(), _errors_on(x, linears, inputs))
    if outer is None:
        raise ValueError("scales are chosen by the moment outer, which was not gathered")
    energies = [_energy(weight, outer) for weight, _ in linears]

    def of(scale: Tensor) -> float:
        lost = (weight - round_to(weight * scale, form) / scale for weight, form in linears)
        return sum(_energy(each, outer) / whole for each, whole in zip(lost, energies, strict=True) if whole > 0)

    return _Errors(outer.diagonal(), of)


def _errors_on(
    x: Tensor, linears: Sequence[tuple[Tensor, Form]], inputs: InputRounding | None
) -> Callable[[Tensor], float]:
    """Return the errors on inputs `x [tokens, in]`, of which the scaled ones are rounded as well."""
    outputs = [x @ weight.T for weight, _ in linears]

    def of(scale: Tensor) -> float:
        seen, total = x / scale, 0.0
        if inputs is not None:
            peak = float(seen.abs().max())
            calibrated = inputs.is_calibrated and peak > 0
            form = InputFormat.of_peak(inputs.format, peak) if calibrated else InputFormat(inputs.format)
            seen = form.round(seen)
        for (weight, form_of_weight), wanted in zip(linears, outputs, strict=True):
            lost = float((seen @ round_to(weight * scale, form_of_weight).T - wanted).square().sum())
            whole = float(wanted.square().sum())
            total += lost / whole if whole > 0 else 0.0
        return total

    return of


def _form_of(edits: _Edits, name: str) -> Form | None:
    return _form(edits.steps[name][0]) if name in edits.steps else None


def _form(config: StepConfig) -> Form | None:
    """Return the form that a step rounds to; None for a step that does something else."""
    match config:
        case GPTQ():
            return config.form()
        case MXFP(format=name):
            return LAYOUTS[name]
        case GridConfig():
            return config.grid_format()
    return None


def _energy(matrix: Tensor, outer: Tensor) -> float:
    """Return the energy of the outputs of `matrix` for inputs whose second moments are `outer`."""
    return float(torch.linalg.vecdot(matrix @ outer, matrix).sum(dtype=torch.float64))


def _loudness(energy: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the logarithm of the root of the mean `energy [in]` of the channels that each of a producer's `count` rows
    feeds.

    It is centred between the quietest and the loudest row.
    """
    energy = energy.double().clamp_min(0)
    shared = energy.new_zeros(count).index_add_(0, rows, energy) / rows.bincount(minlength=count)
    floor = max(float(shared.max()) * QUIETEST**2, torch.finfo(torch.float64).tiny)
    logarithm = shared.clamp_min(floor).log() / 2
    return (logarithm - (logarithm.max() + logarithm.min()) / 2).float()


def _exact(divisor: Tensor, norm: str, edits: _Edits) -> Tensor:
    """Return the nearest divisor that divides a norm's weight without rounding; 1 where there is none."""
    weight = edits.value(norm)
    after = edits.as_stored(norm, weight / divisor).float()
    return torch.where((after != 0) & after.isfinite(), weight / after, 1.0)


def round_to(weight: Tensor, form: Form) -> Tensor:
    """Return the matrix that `rtn` or `mxfp` stores for `weight [out, in]`."""
    if isinstance(form, FloatLayout):
        return dense(nearest_floats(weight, form))
    parts = []
    for columns in weight.split(form.group(weight.shape[1]), 1):
        scale, zero = fit_grid(columns, form)
        parts.append(round_columns(columns, scale, zero, form.levels))
    return torch.cat(parts, 1)


def _divide_inputs(moments: Moments, scale: Tensor) -> Moments:
    """Return the moments of the inputs divided by `scale`."""
    inverse = 1 / scale
    both = torch.outer(inverse, inverse)
    return Moments(
        moments.tokens,
        None if moments.square is None else moments.square * inverse.square(),
        None if moments.outer is None else moments.outer * both,
        None if moments.cross is None else moments.cross * both,
    )
