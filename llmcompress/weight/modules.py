"""Linears and embeddings that hold a compressed weight, and putting them into a model.

They subclass `nn.Linear` and `nn.Embedding`, so that PEFT and others find them; their `weight` is the encoded payload.
Linears may share a matrix, their base. It is a child of the model, stored and moved once; a linear refers to it by an
attribute that is no child (`base_of`), which `tie` sets again after either of the two was replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from llmcompress.errors import InputError
from llmcompress.weight import expression
from llmcompress.weight.algebra import add_to_base
from llmcompress.weight.encoding import decode
from llmcompress.weight.inputs import InputFormat
from llmcompress.weight.layout import Layout, PackedWeight, PayloadPiece, pack_weight, pieces
from llmcompress.weight.nodes import Weight, Zero
from llmcompress.weight.rows import rows

LIKE = "like"  # an empty parameter of an embedding, stored too: its dtype is that of the rows
AT_ONCE = 1024  # rows of a table that are decoded together, in some 90 bytes a number
BASE = "base"  # the attribute by which a linear knows the matrix that it shares with others


class CompressedModule(nn.Module):
    """A module whose weight `[out, in]` is a payload: all tensors of `encoding.encode` in one frozen uint8 parameter.

    A checkpoint then has no more tensors than the dense one, no cast of the model rounds scales, and a loader that does
    not know this format stops at the shape of `weight`.
    """

    layout: Layout
    levels: Sequence[Layout] = ()  # of the sizes in a file that has several, until their pieces are joined

    def pieces(self) -> list[PayloadPiece]:
        """Return the tensors that hold the payload: one, but for a file of several sizes that is being loaded."""
        return pieces(self.levels or [self.layout])

    def expect_pieces(self, levels: Sequence[Layout]) -> None:
        """Hold empty pieces, on meta, of a payload whose smaller sizes have the layouts `levels`, itself the last."""
        self.levels = levels
        for piece in self.pieces():
            empty = torch.empty(piece.stop - piece.start, dtype=torch.uint8, device="meta")
            self.register_parameter(piece.name, nn.Parameter(empty, requires_grad=False))

    def join_pieces(self) -> None:
        """Hold one payload again. Raises InputError for pieces that are not in memory."""
        parts = [self._parameters.pop(piece.name) for piece in self.pieces()]
        stored = [part.detach() for part in parts if part is not None and not part.is_meta]
        if len(stored) < len(parts):
            raise InputError("a checkpoint of several sizes cannot be offloaded; shrink it to one, or load it whole")
        self.levels = ()
        self.hold(self.layout, torch.cat(stored))

    def hold(self, layout: Layout, payload: Tensor) -> None:
        """Register the payload of `layout`, uint8 `[bytes]`."""
        self.layout = layout
        self._is_hf_initialized = True  # or transformers draws random numbers for what it leaves on disk
        self.register_parameter("weight", nn.Parameter(payload, requires_grad=False))

    def payload(self) -> dict[str, Tensor]:
        """Return the stored tensors by their paths in the expression: views of the weight.

        Raises InputError if a matrix has taken the payload's place, as by a merge of PEFT's layers.
        """
        stored = self.get_parameter("weight").detach()
        if stored.ndim != 1:
            raise InputError(
                "the payload of a compressed layer was overwritten, as by merging an adapter into it; load the model "
                "again, and make adapters part of it by llmcompress.fold"
            )
        return self.layout.views(stored)

    def packed_weight(self) -> PackedWeight:
        """Return the layout and the payload."""
        return PackedWeight(self.layout, self.get_parameter("weight").detach())

    def expression(self) -> Weight:
        """Return the compressed weight."""
        return decode(self.layout.header, self.payload())


class FastProduct(Protocol):
    """A faster product with a module's weight: `x @ W.T`, or None where it has none for `x`."""

    def __call__(self, layer: Multiplying, x: Tensor) -> Tensor | None: ...


class FastRows(Protocol):
    """A faster lookup in a token table: rows float32 `[..., width]`, or None where it has none for these tokens."""

    def __call__(self, table: CompressedEmbedding, ids: Tensor) -> Tensor | None: ...


class _Product(torch.autograd.Function):
    """A product that keeps the payload for its backward pass, and decodes it there again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Multiplying) -> Tensor:
        """`input [..., in]` to `[..., out]`."""
        ctx.weight = layer.packed_weight()
        output = layer.product(input)
        return output.clone() if output._is_view() else output  # some adapters add to it in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient `[..., out]` of the outputs to that of the inputs."""
        return multiply_back(gradient, decode(ctx.weight.layout.header, ctx.weight.views())), None


def multiply_back(gradient: Tensor, w: Weight) -> Tensor:
    """Return `gradient [..., out] @ dense(w)`, `[..., in]`."""
    return gradient @ expression.dense(w, gradient.device).to(gradient.dtype)


def is_traced(x: Tensor) -> bool:
    """True while a compiler or a transform of torch follows `x`, or a derivative goes forward with it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return is_functorch_wrapped_tensor(x) or forward_ad._current_level >= 0


class Multiplying(CompressedModule):
    """A compressed matrix that inputs are multiplied by, by a kernel where one fits (`kernels.accelerate`), else
    decoded at every call unless inside `decoded(model)`. A backward pass decodes it again, and holds it for no longer.
    """

    ready: Weight | None
    fast: FastProduct | None

    def hold(self, layout: Layout, payload: Tensor) -> None:
        """See `CompressedModule.hold`."""
        super().hold(layout, payload)
        self.ready = self.fast = None

    def product(self, input: Tensor) -> Tensor:
        """Return `input [..., in] @ W.T`, `[..., out]`, for the stored matrix alone; in the input's dtype."""
        if self.ready is not None:
            return expression.matmul(input, self.ready)
        if input.requires_grad and torch.is_grad_enabled() and not is_traced(input):
            return cast("Tensor", _Product.apply(input, self))
        output = None if self.fast is None else self.fast(self, input)
        return expression.matmul(input, self.expression()) if output is None else output

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is decoded inside `decoded(model)`, which undoes it in this module alone."""
        return self.__dict__ | {"ready": None}


class TiedMatrix(Multiplying):
    """A matrix that several linears share, stored once; it is no linear of the model itself."""

    def __init__(self, layout: Layout, payload: Tensor) -> None:
        super().__init__()
        self.hold(layout, payload)

    @staticmethod
    def of(w: Weight) -> TiedMatrix:
        """Return the module for an expression."""
        return TiedMatrix(*pack_weight(w))

    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in]` to `[..., out]`, in the input's dtype."""
        return self.product(input)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.layout.size[1]}, {self.layout.size[0]}"


class CompressedLinear(Multiplying, nn.Linear):
    """`x @ W.T + bias` for a compressed `W [out, in]`, or for the sum of W and its base, if it has one.

    Inputs are rounded first if its layout says so.
    """

    def __init__(self, layout: Layout, payload: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.out_features, self.in_features = layout.size
        self.hold(layout, payload)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @staticmethod
    def of(w: Weight, bias: Tensor | None = None, inputs: InputFormat | None = None) -> CompressedLinear:
        """Return the layer for an expression."""
        return CompressedLinear(*pack_weight(w, inputs), bias)

    def have_in_common(self, base: nn.Module) -> None:
        """Make `base` the base of this linear; the model holds it."""
        self.__dict__[BASE] = base

    @property
    def W_q(self) -> Tensor:
        """The payload, by the name under which PEFT looks for a weight that `dequantize` decodes (for DoRA)."""
        return self.get_parameter("weight")

    def whole(self) -> Weight:
        """Return the weight of the layer, its base included."""
        base: TiedMatrix | None = base_of(self)
        return self.expression() if base is None else add_to_base(base.expression(), self.expression())

    def dequantize(self) -> Tensor:
        """Return the dense weight `[out, in]`, its base included."""
        return expression.dense(self.whole())

    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in]` to `[..., out]`, in the input's dtype."""
        if self.layout.inputs is not None:
            input = self.layout.inputs.round(input)
        base = self.__dict__.get(BASE)
        output = self.product(input) if base is None or not self.layout.is_zero else base(input)
        if base is not None and not self.layout.is_zero:
            output = output + base(input)
        bias = self._parameters["bias"]  # by its name it takes as long as a small product
        return output if bias is None else output + bias.to(output.dtype)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        inputs = "" if self.layout.inputs is None else f", {self.layout.inputs}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{inputs}"


class CompressedEmbedding(CompressedModule, nn.Embedding):
    """Rows of a compressed table `[vocabulary, width]`; only those looked up are decoded."""

    max_norm = None  # adapters read these four
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    def __init__(
        self,
        layout: Layout,
        payload: Tensor,
        dtype: torch.dtype,
        scale: float | None = None,
        padding_idx: int | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the dense table
        self.num_embeddings, self.embedding_dim = layout.size
        self.scale = scale  # rows are multiplied by it, in some models
        self.padding_idx = padding_idx  # matters to gradients of adapters, since the table has none
        like = torch.empty(0, dtype=dtype, device=payload.device)
        self.register_parameter(LIKE, nn.Parameter(like, requires_grad=False))
        self.hold(layout, payload)
        self.fast: FastRows | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return rows `[..., width]` for token ids `[...]`, in the model's dtype.

        Raises IndexError for tokens that the table does not have.
        """
        like = self.get_parameter(LIKE)
        rows = None if self.fast is None else self.fast(self, input)
        rows = (self._rows(input) if rows is None else rows).to(like.dtype)
        return rows if self.scale is None else rows * self.embed_scale

    @property
    def embed_scale(self) -> Tensor:
        """The factor of rows, by the name under which PEFT looks for it. Raises AttributeError where there is none."""
        if self.scale is None:
            raise AttributeError("rows are not scaled")
        return self.get_parameter(LIKE).new_tensor(self.scale)

    def _rows(self, ids: Tensor) -> Tensor:
        """Return rows, float32 `[..., width]`, decoding each token once; every place in a program that is traced, whose
        shapes must not depend on how many tokens differ."""
        if torch.compiler.is_compiling():
            is_known = ((ids >= 0) & (ids < self.num_embeddings)).all()
            torch._assert_async(is_known, f"a token is not in a table of {self.num_embeddings}")
            values = expression.dense(rows(self.layout.header, self.payload(), ids.flatten()))
            return values.view(*ids.shape, self.embedding_dim)
        tokens, places = ids.unique(return_inverse=True)  # sorted
        for token in tokens[[0, -1]].tolist() if len(tokens) else ():
            if not 0 <= token < self.num_embeddings:
                raise IndexError(f"token {token} is not in a table of {self.num_embeddings}; pass tokens of this model")
        payload, parts = self.payload(), tokens.split(AT_ONCE)  # of no tokens, one part
        return torch.cat([expression.dense(rows(self.layout.header, payload, part)) for part in parts])[places]

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def with_weight(layer: CompressedLinear | CompressedEmbedding, w: Weight) -> CompressedLinear | CompressedEmbedding:
    """Return a layer like another, with another weight of its own."""
    layout, payload = pack_weight(w, layer.layout.inputs)
    if isinstance(layer, CompressedLinear):
        return CompressedLinear(layout, payload, layer.bias)
    return CompressedEmbedding(layout, payload, layer.get_parameter(LIKE).dtype, layer.scale, layer.padding_idx)


# --- modules of a model ---------------------------------------------------------------------------------------------


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called `name`; the new one has the same base. Raises AttributeError if there is none."""
    parent, _, leaf = name.rpartition(".")
    if (base := base_of(model.get_submodule(name))) is not None:
        module.__dict__[BASE] = base
    setattr(model.get_submodule(parent), leaf, module)


def add_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a path that may be new, with plain modules on the way."""
    parent, _, leaf = name.rpartition(".")
    node = model
    for part in parent.split(".") if parent else ():
        if not hasattr(node, part):
            node.add_module(part, nn.Module())
        node = node.get_submodule(part)
    node.add_module(leaf, module)


def compressed_modules(model: nn.Module) -> dict[str, CompressedModule]:
    """Return every compressed linear and embedding of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedModule)}


def compressed_linears(model: nn.Module) -> dict[str, CompressedLinear]:
    """Return every compressed linear of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def multiplying(model: nn.Module) -> dict[str, Multiplying]:
    """Return every compressed matrix of a model that multiplies inputs by name: its linears and their bases."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Multiplying)}


def base_of(linear: nn.Module) -> Any:
    """Return the module of the matrix that a linear shares with others; None for a linear without one."""
    return linear.__dict__.get(BASE)


def describe_beside_base(own: Weight) -> str:
    """Return in words what a linear stores besides its base, which is counted with another linear."""
    return "tied" if isinstance(own, Zero) else f"tied + {expression.describe(own)}"


def ties_of(model: nn.Module) -> dict[str, str]:
    """Return the names of linears that have a base, each with the name of the base."""
    names = {module: name for name, module in model.named_modules()}
    return {name: names[base_of(module)] for name, module in model.named_modules() if base_of(module) is not None}


def tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Give linears their bases, by name as `ties_of` returns them. Raises AttributeError for an unknown name."""
    for name, base in ties.items():
        model.get_submodule(name).__dict__[BASE] = model.get_submodule(base)


def untie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Remove bases from a model and from its linears, which have become dense."""
    for name, base in ties.items():
        model.get_submodule(name).__dict__.pop(BASE)
        parent, _, leaf = base.rpartition(".")
        if hasattr(model.get_submodule(parent), leaf):
            delattr(model.get_submodule(parent), leaf)


@contextmanager
def decoded(model: nn.Module, dtype: torch.dtype | None = None, skip: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Keep every compressed matrix of a model decoded while the context lasts.

    Products are equal up to rounding; memory is that of the dense model. Embeddings still decode the rows that they
    look up.

    Args:
        model: any module; those without compressed linears stay as they are.
        dtype: of the decoded weights; None for that of the model's other weights.
        skip: parts of the model that stay as they are.

    Yields:
        Nothing; `model` itself is changed, and changed back in the end.
    """
    skipped = {inner for part in skip for inner in part.modules()}
    linears = [layer for layer in compressed_linears(model).values() if layer not in skipped]
    bases = {base for base in map(base_of, linears) if base is not None}  # of a block, they lie outside
    layers: list[Multiplying] = [*linears, *bases]
    floats = (value.dtype for value in model.parameters() if value.is_floating_point())
    dtype = next(floats, torch.float32) if dtype is None else dtype
    try:
        for layer in layers:
            layer.ready = expression.decoded(layer.expression(), dtype)
        yield
    finally:
        for layer in layers:
            layer.ready = None
