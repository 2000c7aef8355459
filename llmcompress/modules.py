"""Linears and embeddings that hold a compressed weight, and putting them into a model.

They subclass `nn.Linear` and `nn.Embedding`, so that whatever looks for those (PEFT, for one) finds them; their
parameters are the encoded payload under the names of `weight.encode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmcompress import weight as expression
from llmcompress.lookup import rows

DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
LIKE = "like"  # an empty parameter of an embedding, stored too: the dtype that its rows are to have
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Layout:
    """What a checkpoint must say of a compressed linear so that it can be built before its tensors are read."""

    size: tuple[int, int]  # (out, in)
    header: dict[str, Any]  # of `weight.encode`
    tensors: dict[str, tuple[str, int]]  # payload name -> (dtype, elements); all are flat

    def to_json(self) -> dict[str, Any]:
        """The entry for a checkpoint's config."""
        return {
            "size": list(self.size),
            "header": self.header,
            "tensors": {k: list(v) for k, v in self.tensors.items()},
        }

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Layout:
        """The inverse of `to_json`. Raises KeyError or ValueError for an entry of another form."""
        out, width = entry["size"]
        tensors = {name: (str(dtype), int(count)) for name, (dtype, count) in entry["tensors"].items()}
        if "weight" not in tensors or not {dtype for dtype, _ in tensors.values()} <= DTYPES.keys():
            raise ValueError(f"the payload {tensors} is not of a known form")
        return Layout((int(out), int(width)), entry["header"], tensors)


class Compressed(nn.Module):
    """A module whose weight `[out, in]` is a payload: frozen parameters under the names of `weight.encode`."""

    layout: Layout

    def hold(self, layout: Layout, device: str | torch.device | None) -> None:
        """Registers the parameters of `layout`, not filled yet."""
        self.layout = layout
        self._is_hf_initialized = True  # or transformers draws random numbers for what it leaves on disk
        for name, (dtype, count) in layout.tensors.items():
            payload = torch.zeros(count, dtype=DTYPES[dtype], device=device)
            self.register_parameter(name, nn.Parameter(payload, requires_grad=False))

    def payload(self) -> dict[str, Tensor]:
        """The stored tensors, by name."""
        return {name: getattr(self, name).detach() for name in self.layout.tensors}

    def expression(self) -> expression.Weight:
        """The compressed weight."""
        return expression.decode(self.layout.header, self.payload())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the payload between devices, but never casts it: `model.to(dtype)` must not round scales."""
        payload = {id(getattr(self, name)) for name in self.layout.tensors}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype or id(tensor) not in payload else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class CompressedLinear(Compressed, nn.Linear):
    """`x @ W.T + bias` for a compressed `W [out, in]`, decoded at every call unless inside `decoded(model)`."""

    def __init__(self, layout: Layout, bias: Tensor | None = None, device: str | torch.device | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.out_features, self.in_features = layout.size
        self.hold(layout, device)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.ready: expression.Weight | None = None

    @staticmethod
    def of(w: expression.Weight, bias: Tensor | None = None) -> CompressedLinear:
        """The layer for an expression."""
        layout, tensors = packed(w)
        layer = CompressedLinear(layout, bias, device="meta")
        for name, tensor in tensors.items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in]` to `[..., out]`, in the input's dtype."""
        output = expression.matmul(input, self.expression() if self.ready is None else self.ready)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class CompressedEmbedding(Compressed, nn.Embedding):
    """Rows of a compressed table `[vocabulary, width]`; those looked up are decoded, never the whole table."""

    def __init__(self, layout: Layout, dtype: torch.dtype, device: str | torch.device | None = None) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the dense table
        self.num_embeddings, self.embedding_dim = layout.size
        self.padding_idx = None  # matters to gradients of the table only, which has none
        # before the payload, so that `model.dtype` is the model's own and not that of scales
        self.register_parameter(LIKE, nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False))
        self.hold(layout, device)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[...]` to rows `[..., width]`, in the dtype the model has."""
        chosen, places = input.unique(return_inverse=True)
        found = expression.dense(rows(self.layout.header, self.payload(), chosen))
        return found.to(self.get_parameter(LIKE).dtype)[places]

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def packed(w: expression.Weight) -> tuple[Layout, dict[str, Tensor]]:
    """The layout and the stored tensors of an expression."""
    header, tensors = expression.encode(w)
    listed = {name: (NAMES[tensor.dtype], tensor.numel()) for name, tensor in tensors.items()}
    return Layout(expression.shape(w), header, listed), tensors


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces the submodule called `name`. Raises AttributeError if there is none."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(name)
    setattr(model.get_submodule(parent), leaf, module)


def compressed_modules(model: nn.Module) -> dict[str, Compressed]:
    """Every compressed linear and embedding of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Compressed)}


def compressed_linears(model: nn.Module) -> dict[str, CompressedLinear]:
    """Every compressed linear of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


@contextmanager
def decoded(model: nn.Module) -> Iterator[None]:
    """Keeps every compressed linear decoded while the context lasts: dense memory, faster, equal up to rounding.

    Embeddings decode the rows that they look up, here as elsewhere.
    """
    layers = list(compressed_linears(model).values())
    for layer in layers:
        layer.ready = expression.decoded(layer.expression())
    try:
        yield
    finally:
        for layer in layers:
            layer.ready = None
