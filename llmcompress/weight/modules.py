"""Linears and embeddings that hold a compressed weight, and putting them into a model.

They subclass `nn.Linear` and `nn.Embedding`, so that whatever looks for those (PEFT, for one) finds them; their
`weight` is the encoded payload.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.weight import expression
from llmcompress.weight.encoding import decode, encode
from llmcompress.weight.nodes import Weight, shape
from llmcompress.weight.rows import rows
from llmcompress.weight.schema import check
from llmcompress.weight.sums import add_to_base
from llmcompress.weight.tied import BASE, base_of

DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
LIKE = "like"  # an empty parameter of an embedding, stored too: the dtype that its rows are to have
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # bytes: every tensor in a payload starts at a multiple, whatever its dtype


@dataclass(frozen=True)
class Layout:
    """Description of a compressed module in a checkpoint; the module is built from it before its payload is read."""

    size: tuple[int, int]  # (out, in)
    header: dict[str, Any]  # of `encoding.encode`
    tensors: dict[str, tuple[str, int]]  # path in the expression -> (dtype, elements), as they lie in the payload

    def to_json(self) -> dict[str, Any]:
        """The entry for a checkpoint's config."""
        tensors = [[path, dtype, count] for path, (dtype, count) in self.tensors.items()]  # in order, unlike an object
        return {"size": list(self.size), "header": self.header, "tensors": tensors}

    @staticmethod
    def from_json(entry: Any) -> Layout:
        """The inverse of `to_json`. Raises ValueError for an entry that describes no weight."""
        check(entry)
        out, width = entry["size"]
        return Layout((out, width), entry["header"], {path: (dtype, count) for path, dtype, count in entry["tensors"]})

    def check(self, payload: Tensor) -> None:
        """Raise ValueError unless a payload can be decoded by this layout."""
        if payload.dtype != torch.uint8 or list(payload.shape) != [self.bytes()]:
            raise ValueError(f"{payload.dtype} {list(payload.shape)} is no payload of {self.bytes()} bytes")
        check(self.to_json(), self.views(payload))

    @cached_property
    def text(self) -> str:
        """The layout in one line, for the digest of its payload."""
        return json.dumps(self.to_json(), sort_keys=True)

    @property
    def is_zero(self) -> bool:
        """True if the weight is zero, so that nothing is stored."""
        return bool(self.header["node"] == "zero")

    def places(self) -> dict[str, tuple[torch.dtype, int, int]]:
        """Return the place of each tensor in the payload: (dtype, first byte, the byte after its last)."""
        places = {}
        stop = 0
        for path, (name, count) in self.tensors.items():
            dtype = DTYPES[name]
            start = _align(stop)
            stop = start + count * dtype.itemsize
            places[path] = (dtype, start, stop)
        return places

    def views(self, payload: Tensor) -> dict[str, Tensor]:
        """The tensors in a payload, uint8 `[bytes]`, without copying."""
        return {path: payload[start:stop].view(dtype) for path, (dtype, start, stop) in self.places().items()}

    def bytes(self) -> int:
        """Return the size of the payload in bytes."""
        return _align(max((stop for _, _, stop in self.places().values()), default=0))


def _align(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class CompressedModule(nn.Module):
    """A module whose weight `[out, in]` is a payload: all tensors of `encoding.encode` in one frozen uint8 parameter.

    One, so that a checkpoint has no more tensors than the dense one; uint8, so that no cast of the model rounds scales;
    under the dense weight's name, so that a loader that does not know this format stops at its shape.
    """

    layout: Layout

    def hold(self, layout: Layout, payload: Tensor) -> None:
        """Registers the payload of `layout`, uint8 `[bytes]`."""
        self.layout = layout
        self._is_hf_initialized = True  # or transformers draws random numbers for what it leaves on disk
        self.register_parameter("weight", nn.Parameter(payload, requires_grad=False))

    def payload(self) -> dict[str, Tensor]:
        """The stored tensors by their paths in the expression: views of the weight.

        Raises InputError where something has put a matrix in the payload's place, as a merge of PEFT's layers would.
        """
        stored = self.get_parameter("weight").detach()
        if stored.ndim != 1:
            raise InputError(
                "the payload of a compressed layer was overwritten, as by merging an adapter into it; load the model "
                "again, and make adapters part of it by llmcompress.fold"
            )
        return self.layout.views(stored)

    def expression(self) -> Weight:
        """The compressed weight."""
        return decode(self.layout.header, self.payload())


class PackedWeight(NamedTuple):
    """A compressed weight as modules hold it and checkpoints store it: its layout, and the payload, uint8 `[bytes]`."""

    layout: Layout
    payload: Tensor

    @staticmethod
    def of(module: CompressedModule) -> PackedWeight:
        """Return what a module holds."""
        return PackedWeight(module.layout, module.get_parameter("weight").detach())

    def views(self) -> dict[str, Tensor]:
        """The tensors in the payload, by their paths in the expression."""
        return self.layout.views(self.payload)


class FastProduct(Protocol):
    """A faster way to multiply by what a module stores: `x @ W.T`, or None where it has none for `x`."""

    def __call__(self, layer: Multiplying, x: Tensor) -> Tensor | None: ...


class FastRows(Protocol):
    """A faster way to the rows of a token table: float32 `[..., width]`, or None where it has none for these tokens."""

    def __call__(self, table: CompressedEmbedding, ids: Tensor) -> Tensor | None: ...


class Multiplying(CompressedModule):
    """A compressed matrix that inputs are multiplied by: with a kernel where there is one (`kernels.accelerate`), else
    decoded at every call unless inside `decoded(model)`."""

    ready: Weight | None
    fast: FastProduct | None

    def hold(self, layout: Layout, payload: Tensor) -> None:
        """Registers the payload of `layout`, uint8 `[bytes]`."""
        super().hold(layout, payload)
        self.ready = self.fast = None

    def product(self, input: Tensor) -> Tensor:
        """`x @ W.T`, `input [..., in]` to `[..., out]`, for what this module stores; in the input's dtype."""
        output = None if self.fast is None or self.ready is not None else self.fast(self, input)
        if output is not None:
            return output
        return expression.matmul(input, self.expression() if self.ready is None else self.ready)


class TiedMatrix(Multiplying):
    """A matrix that several linears have in common, stored once; it is no linear of the model itself."""

    def __init__(self, layout: Layout, payload: Tensor) -> None:
        super().__init__()
        self.hold(layout, payload)

    @staticmethod
    def of(w: Weight) -> TiedMatrix:
        """The module for an expression."""
        return TiedMatrix(*pack_weight(w))

    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in]` to `[..., out]`, in the input's dtype."""
        return self.product(input)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.layout.size[1]}, {self.layout.size[0]}"


class CompressedLinear(Multiplying, nn.Linear):
    """`x @ W.T + bias` for a compressed `W [out, in]`, or for the sum of W and a matrix that other linears have too.

    That one, `base`, is a child of the model (`tie`), not of the linear, so that it is stored and moved once.
    """

    def __init__(self, layout: Layout, payload: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.out_features, self.in_features = layout.size
        self.hold(layout, payload)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @staticmethod
    def of(w: Weight, bias: Tensor | None = None) -> CompressedLinear:
        """The layer for an expression."""
        return CompressedLinear(*pack_weight(w), bias)

    def have_in_common(self, base: nn.Module) -> None:
        """Add what `base` gives, which the model holds once for all linears that have it."""
        self.__dict__[BASE] = base

    @property
    def W_q(self) -> Tensor:
        """By this name PEFT knows a weight that `dequantize` decodes, as DoRA needs it."""
        return self.get_parameter("weight")

    def whole(self) -> Weight:
        """The weight of the layer: its own, and that of its base."""
        base: TiedMatrix | None = base_of(self)
        return self.expression() if base is None else add_to_base(base.expression(), self.expression())

    def dequantize(self) -> Tensor:
        """The dense weight `[out, in]`."""
        return expression.dense(self.whole())

    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in]` to `[..., out]`, in the input's dtype."""
        base = self.__dict__.get(BASE)
        output = self.product(input) if base is None or not self.layout.is_zero else base(input)
        if base is not None and not self.layout.is_zero:
            output = output + base(input)
        bias = self._parameters["bias"]  # by its name it takes as long as a small product
        return output if bias is None else output + bias.to(output.dtype)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class CompressedEmbedding(CompressedModule, nn.Embedding):
    """Rows of a compressed table `[vocabulary, width]`; those looked up are decoded, never the whole table."""

    max_norm = None  # these four as adapters read them, which look up rows of their own
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
        """Token ids `[...]` to rows `[..., width]`, in the dtype the model has.

        Raises IndexError for tokens that the table does not have.
        """
        like = self.get_parameter(LIKE)
        found = None if self.fast is None else self.fast(self, input)
        found = (self._rows(input) if found is None else found).to(like.dtype)
        return found if self.scale is None else found * self.embed_scale

    @property
    def embed_scale(self) -> Tensor:
        """By this name PEFT knows what rows are multiplied by. Raises AttributeError where they are not."""
        if self.scale is None:
            raise AttributeError("rows are not scaled")
        return self.get_parameter(LIKE).new_tensor(self.scale)

    def _rows(self, ids: Tensor) -> Tensor:
        """Return rows, float32 `[..., width]`, decoding each token once. A program that is traced decodes every place:
        how many tokens differ, and so its shapes, would be known only when it runs."""
        if torch.compiler.is_compiling():
            is_known = ((ids >= 0) & (ids < self.num_embeddings)).all()
            torch._assert_async(is_known, f"a token is not in a table of {self.num_embeddings}")
            found = expression.dense(rows(self.layout.header, self.payload(), ids.flatten()))
            return found.view(*ids.shape, self.embedding_dim)
        chosen, places = ids.unique(return_inverse=True)
        self._check(chosen)
        return expression.dense(rows(self.layout.header, self.payload(), chosen))[places]

    def _check(self, chosen: Tensor) -> None:
        """Raise IndexError for tokens outside of the table; `chosen` is sorted."""
        for token in chosen[[0, -1]].tolist() if len(chosen) else ():
            if not 0 <= token < self.num_embeddings:
                raise IndexError(f"token {token} is not in a table of {self.num_embeddings}; pass tokens of this model")

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def payload_texts(layouts: Mapping[str, Layout]) -> dict[str, str]:
    """Return the layouts of compressed modules by the names of their payloads, for the digests of a file."""
    return {f"{name}.weight": layout.text for name, layout in layouts.items()}


def pack_weight(w: Weight) -> PackedWeight:
    """Encode an expression."""
    header, tensors = encode(w)
    listed = {path: (NAMES[tensor.dtype], tensor.numel()) for path, tensor in tensors.items()}
    layout = Layout(shape(w), header, listed)
    device = next(iter(tensors.values())).device if tensors else None
    payload = torch.zeros(layout.bytes(), dtype=torch.uint8, device=device)
    for path, (_, start, stop) in layout.places().items():
        payload[start:stop] = tensors[path].view(torch.uint8)
    return PackedWeight(layout, payload)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule called `name`; what it had in common with others, the new one has too. Raises
    AttributeError if there is none."""
    parent, _, leaf = name.rpartition(".")
    if (base := base_of(model.get_submodule(name))) is not None:
        module.__dict__[BASE] = base
    setattr(model.get_submodule(parent), leaf, module)


def compressed_modules(model: nn.Module) -> dict[str, CompressedModule]:
    """Every compressed linear and embedding of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedModule)}


def compressed_linears(model: nn.Module) -> dict[str, CompressedLinear]:
    """Every compressed linear of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def multiplying(model: nn.Module) -> dict[str, Multiplying]:
    """Every compressed matrix of a model that multiplies inputs: its linears, and what several have in common."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Multiplying)}


@contextmanager
def decoded(model: nn.Module, dtype: torch.dtype | None = None, skip: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Keep every compressed matrix of a model decoded while the context lasts.

    Products are equal up to rounding; memory is that of the dense model. Embeddings decode the rows that they look up,
    here as elsewhere.

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
    for layer in layers:
        layer.ready = expression.decoded(layer.expression(), dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.ready = None
