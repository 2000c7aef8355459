"""The trainable form of a compressed weight: chosen numbers of an expression become parameters, the rest stays packed.

`relax(w, relaxation)` holds the tensors of `encode(w)` by their paths: those that train as float32 masters of their
stored elements only (so a pruned entry has nothing that could move), the others as the bytes that a file has. At every
use the masters are rounded to what can be stored, with straight-through gradients, and put into the expression, whose
frozen parts are decoded once: what trains is what `freeze` stores.

The kinds of numbers that may train (`KINDS`), and how they are kept storable, in training as in `freeze`:
- codes of grids, by latents in code units (`straight_through`). Latents are masters themselves or, outside low-rank
  terms, made of them in another form (`latents`). Zero points, streams of trellises, codes of codebooks and floats of
  few bits with their scales are frozen.
- scales of grids, trellises, codebooks and columns, rounded to float16 within [2^-24, 65504], its smallest and largest
  positive numbers. Gradients pass the ends, so that a scale there can come back. A scale that is not positive at first,
  as of a group of zeros, stays.
- values of `Dense` and centroids outside low-rank terms, and factors, every `Dense` and centroid inside them: rounded
  to their own dtype, within +-its largest number. The values of a matrix that is nothing else may have a form
  (`latents`) with scores of its own that train, of the kind `masks`.

See `matmul` for the product with the expression in training, and for the memory that autograd keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from llmcompress.errors import NumericsError, RecipeError
from llmcompress.weight import expression
from llmcompress.weight.encoding import decode, encode
from llmcompress.weight.modules import CompressedLinear, Multiplying, TiedMatrix
from llmcompress.weight.nodes import Dense, Weight, Zero, shape
from llmcompress.weight.packing import pack
from llmcompress.weight.tied import base_of
from llmcompress.weight.trainable.latents.form import Form, TensorForm, ValuesForm, cells
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
    power: float = 3.0  # of ReSTE, at least 1; its authors raise it from 1 to 3 while they train
    form: Form | None = None  # of latents; None: each is a number that trains
    values: ValuesForm | None = None  # of the values of a matrix that is nothing else
    outside: Outside = "code"  # where latents start whose target is in another code's cell

    def __post_init__(self) -> None:
        unknown = sorted(set(self.trains) - set(KINDS))
        if unknown:
            raise RecipeError(f"nothing of the kind {unknown[0]!r} can train; known: {', '.join(KINDS)}")
        if self.estimator not in ESTIMATORS:
            raise RecipeError(f"no estimator is called {self.estimator!r}; known: {', '.join(ESTIMATORS)}")
        if self.power < 1:
            raise RecipeError(f"the power {self.power:g} of ReSTE must be at least 1")


def relax(w: Weight, relaxation: Relaxation, target: Tensor | None = None) -> RelaxedWeight:
    """The module that trains `w`; until a step, its `freeze` encodes to the same bits as `w`.

    `target` `[out, in]`: the dense teacher's weight in the model's own basis. Latents then start where it is, if that
    is inside the cells of the stored codes (otherwise see `Relaxation`); without it, and in low-rank terms, they start
    at the codes. Raises ValueError for a target of another shape.
    """
    if target is not None and tuple(target.shape) != shape(w):
        raise ValueError(f"the target is {tuple(target.shape)}, the weight {shape(w)}")
    return RelaxedWeight(w, relaxation, target if "codes" in relaxation.trains else None)


class RelaxedWeight(nn.Module):
    """An expression `[out, in]` with float32 masters; build it by `relax`.

    Parameters are flat and have the names of the tensors that `encode` would write, but for latents in another form,
    which are those of a module of that name in `formed`; casts of the model leave them float32. `relaxation` may be
    replaced between steps by one that trains the same kinds in the same form, to change ReSTE's power.
    """

    def __init__(self, w: Weight, relaxation: Relaxation, target: Tensor | None) -> None:
        super().__init__()
        self.relaxation = relaxation
        self.size = shape(w)
        self.is_zero = isinstance(w, Zero)
        self.header, tensors = encode(w)
        self.stored_as = {name: tensor.dtype for name, tensor in tensors.items()}
        self.levels: dict[str, int] = {}  # of codes that train, by the names of what is stored
        self.kind_of: dict[str, str] = {}
        self.formed = nn.Module()  # holds forms by the names of what is stored; a ModuleDict has no name `values` left
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
        # the expression with its frozen parts decoded, once it was multiplied, and the dtype of these products
        self.ready: tuple[torch.dtype, Weight] | None = None

    def kinds(self) -> dict[str, str]:
        """The name of each trainable parameter, and its kind (of `KINDS`)."""
        forms = self.forms()
        own = {name: kind for name, kind in self.kind_of.items() if name not in forms}
        for name, form in forms.items():
            own |= {f"formed.{name}.{key}": kind for key, kind in form.kinds().items()}
        return own

    def forms(self) -> dict[str, TensorForm]:
        """Return the forms of what is no parameter itself, by the names of what is stored."""
        return {name: cast(TensorForm, form) for name, form in self.formed.named_children()}

    def weight(self) -> Tensor:
        """The matrix, float32 `[out, in]`, differentiable in what trains."""
        device = next(iter([*self.parameters(), *self.buffers()]), torch.empty(0)).device
        with torch.autocast(device.type, enabled=False):
            numbers = self._live()
            return expression.dense(insert_numbers(self._decoded(numbers), "", None, numbers))

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`, in x's dtype (under autocast in its dtype, as `nn.Linear`)."""
        kind, numbers = x.device.type, self._live()
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if self.ready is None or self.ready[0] != dtype:
            self.ready = dtype, by_rows(self._decoded(numbers), "", dtype)
        return product(x, insert_numbers(self.ready[1], "", None, numbers))

    @torch.no_grad()
    def settle(self) -> None:
        """Put latents that left the range of their codes back to its edge, and do what forms ask for.

        Call it after a step of the optimizer.

        Outside they have no gradient, so what momentum carried there would stay (BinaryConnect, arXiv 1511.00363). What
        is stored does not change. BiPer's latents have a gradient everywhere and stay where they are.
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
        """The expression with what was learned, in the layout and bytes of the one that was relaxed.

        Raises NumericsError for a master that is not a number.
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
        """Moves, but does not cast: bfloat16 masters would lose small steps."""

        self.ready = None

        def move(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        self.ready = None
        super()._load_from_state_dict(*arguments, **named)

    def _live(self) -> dict[str, Tensor]:
        """All trained numbers as they would be stored, by name, flat float32, differentiable."""
        return {name: self._numbers(name) for name in self.kind_of}

    @torch.no_grad()
    def _decoded(self, numbers: dict[str, Tensor]) -> Weight:
        """The expression with its frozen parts decoded."""
        stored = {name: self.get_buffer(name).view(dtype) for name, dtype in self._frozen_tensors()}
        whole = decode(self.header, stored | {name: found.detach() for name, found in numbers.items()})
        return decode_frozen(whole, "", frozenset(self.levels))

    def _frozen_tensors(self) -> list[tuple[str, torch.dtype]]:
        """The stored tensors that do not train."""
        return [(name, dtype) for name, dtype in self.stored_as.items() if name not in self.kind_of]

    def _master(self, name: str) -> Tensor:
        """Return the master of one stored tensor, flat float32, differentiable."""
        form = self.forms().get(name)
        found: Tensor = self.get_parameter(name) if form is None else form()
        return found

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
    """Stands in a model for a `CompressedLinear` while it trains. Its bias trains only if it is told to.

    What a linear has in common with others trains by itself, once, as a `RelaxedTiedMatrix`.
    """

    bias: nn.Parameter | None

    def __init__(self, relaxed: RelaxedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = relaxed.size
        self.relaxed = relaxed
        self.register_parameter("bias", bias)

    @staticmethod
    def of(linear: CompressedLinear, relaxation: Relaxation, target: Tensor | None = None) -> RelaxedLinear:
        """The trainable form of a layer; `target` as for `relax`."""
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return RelaxedLinear(relax(linear.expression(), relaxation, target), bias)

    def freeze(self) -> CompressedLinear:
        """The layer with what was learned, and the bias as it is now."""
        return CompressedLinear.of(self.relaxed.freeze(), None if self.bias is None else self.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`, in x's dtype."""
        base = base_of(self)
        output: Tensor = self.relaxed(x) if base is None or not self.relaxed.is_zero else base(x)
        if base is not None and not self.relaxed.is_zero:
            output = output + base(x)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class RelaxedTiedMatrix(nn.Module):
    """Stands in a model for a `TiedMatrix` while it trains, for all linears that have it."""

    def __init__(self, relaxed: RelaxedWeight) -> None:
        super().__init__()
        self.relaxed = relaxed

    def freeze(self) -> TiedMatrix:
        """The matrix with what was learned."""
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
    """Its bytes, in memory of their own: a cast of the module does not round them."""
    return tensor.clone().view(torch.uint8)
