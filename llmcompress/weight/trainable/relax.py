"""The trainable form of a compressed weight: chosen numbers of an expression become parameters, the rest stays packed.

`relax(w, relaxation)` holds the tensors of `encode(w)` by their paths: those that train as float32 masters of their
stored elements only (so pruned entries stay pruned), the others as the bytes of a file. At every use the masters are
rounded to storable numbers, with straight-through gradients, and put into the expression, whose frozen parts are
decoded once: the model trains with the numbers that `freeze` stores.

The kinds of numbers that may train (`KINDS`), in training as in `freeze`:
- codes of grids, by latents in code units (`straight_through`). Latents are masters themselves or, outside low-rank
  terms, computed from them by a form (`latents`). Zero points, streams of trellises, codes of codebooks and floats of
  few bits with their scales are frozen.
- scales of grids, trellises, codebooks and columns, rounded to float16 within [2^-24, 65504], its smallest and largest
  positive numbers. Gradients pass the ends, so that a scale there can come back. A scale that is not positive at first,
  as of a group of zeros, stays.
- values (every `Dense` and centroid outside low-rank terms) and factors (those inside), rounded to their own dtype,
  within +-its largest number. The values of a matrix that is a single `Dense` may have a form with scores of its own
  that train, of the kind `masks`.

See `matmul` for the product in training, and for the memory that autograd keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from llmcompress.errors import NumericsError, RecipeError
from llmcompress.weight import expression
from llmcompress.weight.algebra import mute_components
from llmcompress.weight.encoding import decode, encode
from llmcompress.weight.inputs import InputFormat
from llmcompress.weight.modules import CompressedLinear, Multiplying, TiedMatrix, base_of
from llmcompress.weight.nodes import Dense, Weight, Zero, shape
from llmcompress.weight.packing import pack
from llmcompress.weight.trainable.latents import Form, TensorForm, ValuesForm, cells
from llmcompress.weight.trainable.masters import Outside, masters
from llmcompress.weight.trainable.matmul import by_rows, decode_frozen, insert_numbers, product
from llmcompress.weight.trainable.straight_through import ESTIMATORS, Estimator, straight_cast, straight_codes

KINDS = ("codes", "scales", "values", "factors", "masks")
SMALLEST_SCALE = 2.0**-24
START = "_start"  # of the name of stored scales that train


@dataclass(frozen=True)
class Relaxation:
    """The kinds of numbers that train, and how. Raises RecipeError for an unknown kind or estimator."""

    trains: frozenset[str]  # of KINDS
    estimator: Estimator = "plain"  # of codes with two levels; more levels have the plain one
    power: float = 3.0  # of ReSTE, at least 1; its authors raise it from 1 to 3 in training
    form: Form | None = None  # of latents; None: they train themselves
    values: ValuesForm | None = None  # of the values of a matrix that is a single `Dense`
    outside: Outside = "code"  # start of latents whose target is in another code's cell

    def __post_init__(self) -> None:
        unknown = sorted(set(self.trains) - set(KINDS))
        if unknown:
            raise RecipeError(f"nothing of the kind {unknown[0]!r} can train; known: {', '.join(KINDS)}")
        if self.estimator not in ESTIMATORS:
            raise RecipeError(f"no estimator is called {self.estimator!r}; known: {', '.join(ESTIMATORS)}")
        if self.power < 1:
            raise RecipeError(f"the power {self.power:g} of ReSTE must be at least 1")


def relax(w: Weight, relaxation: Relaxation, target: Tensor | None = None) -> RelaxedWeight:
    """Return the module that trains `w`; before the first step, its `freeze` encodes to the same bits as `w`.

    `target [out, in]`: the dense weight in the model's own basis, where latents start if it lies in the cells of the
    stored codes (otherwise see `Relaxation`). Without it, and in low-rank terms, they start at the codes. Raises
    ValueError for a target of another shape.
    """
    if target is not None and tuple(target.shape) != shape(w):
        raise ValueError(f"the target is {tuple(target.shape)}, the weight {shape(w)}")
    return RelaxedWeight(w, relaxation, target if "codes" in relaxation.trains else None)


class RelaxedWeight(nn.Module):
    """An expression `[out, in]` with float32 masters; build it by `relax`.

    Parameters are flat and have the names of stored tensors, except those of forms, which are in a module of that name
    in `formed`. Casts of the model leave them float32. `relaxation` may be replaced between steps by one with the same
    kinds and forms, to change ReSTE's power.
    """

    def __init__(self, w: Weight, relaxation: Relaxation, target: Tensor | None) -> None:
        super().__init__()
        self.relaxation = relaxation
        self.size = shape(w)
        self.is_zero = isinstance(w, Zero)
        self.header, tensors = encode(w)
        self.stored_as = {name: tensor.dtype for name, tensor in tensors.items()}
        self.levels: dict[str, int] = {}  # of codes that train, by the names of stored tensors
        self.kind_of: dict[str, str] = {}
        self.formed = nn.Module()  # forms by the names of stored tensors; a ModuleDict could not hold the name `values`
        forms = {} if relaxation.form is None else cells(w)
        for name, kind, master, levels in masters(w, relaxation.trains, target, relaxation.outside):
            if master.numel():
                self.kind_of[name] = kind
                if kind == "codes":
                    self.levels[name] = levels
                if kind == "codes" and relaxation.form is not None and name in forms:
                    self.formed.add_module(name, relaxation.form(master, forms[name]))
                elif kind == "values" and relaxation.values is not None and isinstance(w, Dense):
                    self.formed.add_module(name, relaxation.values(master))
                else:
                    self.register_parameter(name, nn.Parameter(master))
        for name, tensor in tensors.items():
            if name not in self.kind_of:
                self.register_buffer(name, _octets(tensor))
            elif self.kind_of[name] == "scales":
                self.register_buffer(name + START, _octets(tensor))
        self.rank: int | None = None  # components of low-rank terms that products count; None: all
        # the expression with its frozen parts decoded for products in this dtype
        self.ready: tuple[torch.dtype, Weight] | None = None

    def kinds(self) -> dict[str, str]:
        """Return the name of each trainable parameter, and its kind (of `KINDS`)."""
        forms = self.forms()
        own = {name: kind for name, kind in self.kind_of.items() if name not in forms}
        for name, form in forms.items():
            own |= {f"formed.{name}.{key}": kind for key, kind in form.kinds().items()}
        return own

    def forms(self) -> dict[str, TensorForm]:
        """Return the forms by the names of the tensors that they compute."""
        return {name: cast(TensorForm, form) for name, form in self.formed.named_children()}

    def weight(self) -> Tensor:
        """Return the matrix, float32 `[out, in]`, differentiable in the parameters."""
        device = next(iter([*self.parameters(), *self.buffers()]), torch.empty(0)).device
        with torch.autocast(device.type, enabled=False):
            numbers = self._live()
            return expression.dense(insert_numbers(self._decoded(numbers), "", None, numbers))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x [..., in]`, to `[..., out]` in x's dtype (under autocast in its dtype, as `nn.Linear`)."""
        kind, numbers = x.device.type, self._live()
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if self.ready is None or self.ready[0] != dtype:
            self.ready = dtype, by_rows(self._decoded(numbers), "", dtype)
        whole = insert_numbers(self.ready[1], "", None, numbers)
        return product(x, whole if self.rank is None else mute_components(whole, self.rank))

    @torch.no_grad()
    def settle(self) -> None:
        """Put latents that left the range of their codes back to its edge, and settle forms; for use after a step.

        Outside they have no gradient, so they would stay where momentum carried them (BinaryConnect, arXiv 1511.00363).
        Stored numbers do not change. BiPer's latents have a gradient everywhere and stay where they are.
        """
        free = {name for name, levels in self.levels.items() if self.relaxation.estimator == "biper" and levels == 2}
        forms = self.forms()
        for name in self.kind_of.keys() - free:
            if name in forms:
                forms[name].settle()
            elif name in self.levels:
                self.get_parameter(name).clamp_(-0.5, self.levels[name] - 0.5)

    @torch.no_grad()
    def freeze(self) -> Weight:
        """Return the trained expression, in the layout and dtypes of the original.

        Raises NumericsError for a master that is NaN.
        """
        tensors = {}
        for name, dtype in self.stored_as.items():
            if name not in self.kind_of:
                tensors[name] = self.get_buffer(name).view(dtype).clone()
                continue
            if bool(self._master(name).isnan().any()):
                raise NumericsError(f"{name} became NaN in training; lower the learning rate, or skip steps with NaN")
            learned = self._numbers(name)
            if name in self.levels:
                tensors[name] = pack(learned.to(torch.uint8), self.levels[name])
            else:
                tensors[name] = learned.to(dtype)
        return decode(self.header, tensors)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"size={self.size}, trains={sorted(set(self.kind_of.values()))}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but do not cast: bfloat16 masters would lose small steps."""

        self.ready = None

        def move(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        self.ready = None
        super()._load_from_state_dict(*arguments, **named)

    def _live(self) -> dict[str, Tensor]:
        """Return all trained tensors as they would be stored, by name, flat float32, differentiable."""
        return {name: self._numbers(name) for name in self.kind_of}

    @torch.no_grad()
    def _decoded(self, numbers: dict[str, Tensor]) -> Weight:
        """Return the expression with its frozen parts decoded."""
        frozen = {
            name: self.get_buffer(name).view(dtype)
            for name, dtype in self.stored_as.items()
            if name not in self.kind_of
        }
        whole = decode(self.header, frozen | {name: values.detach() for name, values in numbers.items()})
        return decode_frozen(whole, "", frozenset(self.levels))

    def _master(self, name: str) -> Tensor:
        """Return the master of one stored tensor, flat float32, differentiable."""
        form = self.forms().get(name)
        master: Tensor = self.get_parameter(name) if form is None else form()
        return master

    def _numbers(self, name: str) -> Tensor:
        """Return one tensor as it would be stored, flat float32, differentiable."""
        master, dtype = self._master(name), self.stored_as[name]
        match self.kind_of[name]:
            case "codes":
                return straight_codes(master, self.levels[name], self.relaxation.estimator, self.relaxation.power)
            case "scales":
                start = self.get_buffer(name + START).view(dtype).float()
                return torch.where(start > 0, straight_cast(master, dtype, SMALLEST_SCALE), start)
        return straight_cast(master, dtype)


class RelaxedLinear(nn.Module):
    """The trainable form of a `CompressedLinear` in a model; its bias is frozen at first.

    Its base, if it has one, trains once for all linears that share it, as a `RelaxedTiedMatrix`.
    """

    bias: nn.Parameter | None

    def __init__(
        self, relaxed: RelaxedWeight, bias: nn.Parameter | None = None, inputs: InputFormat | None = None
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.out_features, self.in_features = relaxed.size
        self.relaxed = relaxed
        self.register_parameter("bias", bias)

    @staticmethod
    def of(linear: CompressedLinear, relaxation: Relaxation, target: Tensor | None = None) -> RelaxedLinear:
        """Return the trainable form of a layer; `target` as for `relax`."""
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return RelaxedLinear(relax(linear.expression(), relaxation, target), bias, linear.layout.inputs)

    def freeze(self) -> CompressedLinear:
        """Return the trained layer."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return CompressedLinear.of(self.relaxed.freeze(), bias, self.inputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`, in x's dtype."""
        if self.inputs is not None:
            x = self.inputs.round(x)
        base = base_of(self)
        output: Tensor = self.relaxed(x) if base is None or not self.relaxed.is_zero else base(x)
        if base is not None and not self.relaxed.is_zero:
            output = output + base(x)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class RelaxedTiedMatrix(nn.Module):
    """The trainable form of a `TiedMatrix` in a model, for all linears that share it."""

    def __init__(self, relaxed: RelaxedWeight) -> None:
        super().__init__()
        self.relaxed = relaxed

    def freeze(self) -> TiedMatrix:
        """Return the trained matrix."""
        return TiedMatrix.of(self.relaxed.freeze())

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`, in x's dtype."""
        output: Tensor = self.relaxed(x)
        return output


RelaxedModule = RelaxedLinear | RelaxedTiedMatrix


def relaxed_module(layer: Multiplying, relaxation: Relaxation, target: Tensor | None = None) -> RelaxedModule:
    """Return the trainable form of a compressed matrix of a model; `target` as for `relax`."""
    if isinstance(layer, CompressedLinear):
        return RelaxedLinear.of(layer, relaxation, target)
    return RelaxedTiedMatrix(relax(layer.expression(), relaxation, target))


def _octets(tensor: Tensor) -> Tensor:
    """Return a copy of its bytes, which a cast of the module does not round."""
    return tensor.clone().view(torch.uint8)
