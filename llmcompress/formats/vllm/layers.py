"""Linears and token tables of vLLM whose weight is the payload that a checkpoint of ours stores.

vLLM asks a `QuantizationConfig` for the method of every layer by its name; the method gives the layer its parameters,
loads them, and multiplies. Layers that vLLM fuses (q, k and v; gate and up) hold their payloads one after the other,
each with a layout of its own; a part that was not compressed is held as the payload of a dense weight. Products are
those of `CompressedLinear`: by kernels where there are some, else weights are decoded at every call.

Payloads are not cut into shards, so tensor parallelism is refused. `torch.compile` does not see through decoding:
start vLLM with `enforce_eager`.
"""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from llmcompress.errors import InputError
from llmcompress.models.files.integrity import MENDING
from llmcompress.models.transformers.hf_quantizer import NAME, LLMCompressConfig
from llmcompress.weight.layout import NAMES, Layout
from llmcompress.weight.modules import LIKE, CompressedEmbedding, CompressedLinear

TABLES = ("embed_tokens", "wte", "embed_in")  # names of token tables, which some of vLLM's models do not pass on
PER_HEAD = re.compile(r"transformer\.h\.\d+\.self_attention\.query_key_value")  # of Falcon and Bloom
SHARDS: dict[str | None, int] = {None: 0, "q": 0, "k": 1, "v": 2}  # vLLM's names of fused parts; it numbers others


class PayloadConfig(QuantizationConfig):
    """`quantization_config` of a compressed checkpoint: the layout of every compressed module by name."""

    def __init__(self, layouts: dict[str, Layout]) -> None:
        super().__init__()
        self.layouts = layouts

    def get_name(self) -> str:
        """Return the name of the method."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPU: any, since all is done in PyTorch."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PayloadConfig:
        """Return the config of a checkpoint. Raises InputError for tied blocks, and for several sizes."""
        quantization = LLMCompressConfig(**config)
        if quantization.ties:
            raise InputError("vLLM does not read blocks that have matrices in common; export to dense instead")
        if quantization.nested:
            raise InputError("vLLM does not read a file of several sizes; make one by `llmcompress shrink --rank`")
        return cls(quantization.table())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename layers as vLLM's model does."""
        self.layouts = hf_to_vllm_mapper.apply_dict(self.layouts)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return the method of a layer; None for vLLM's own. Raises InputError for experts, which are not read."""
        layouts = self._layouts_of(prefix or self._table())
        if isinstance(layer, LinearBase):
            return PayloadMethod(prefix, layouts) if any(layouts) else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            if any(layouts):
                return PayloadMethod(prefix, layouts)
            return HeadMethod() if isinstance(layer, ParallelLMHead) else None
        if prefix and (inside := next((name for name in self.layouts if name.startswith(f"{prefix}.")), None)):
            raise InputError(f"vLLM fuses {inside} into {prefix}, which is not supported; export to dense instead")
        return None

    def _table(self) -> str:
        """Return the name of the compressed token table; empty if there is none."""
        return next((name for name in self.layouts if name.rpartition(".")[2] in TABLES), "")

    def _layouts_of(self, prefix: str) -> list[Layout | None]:
        """Return the layouts of a layer's parts, in vLLM's order; None for a part that was not compressed."""
        for name in (prefix, prefix.replace(".mixer.", ".mamba.")):  # which files of Granite 4 have
            if name in self.layouts:
                return [self.layouts[name]]
        parent, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        return [self.layouts.get(f"{parent}.{part}" if parent else part) for part in parts]


class PayloadMethod(LinearMethodBase):
    """The weight of one layer: payloads one after the other, uint8, in one parameter."""

    def __init__(self, prefix: str, layouts: list[Layout | None]) -> None:
        super().__init__()
        self.prefix, self.given = prefix, layouts
        self.layouts: list[Layout] = []

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the payload, with its loader.

        Raises InputError under tensor parallelism, for sizes other than the checkpoint's, and for rows that vLLM moves.
        """
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise InputError(f"{self.prefix} is one payload, which is not cut; set tensor_parallel_size to 1")
        if PER_HEAD.fullmatch(self.prefix) and getattr(layer, "total_num_kv_heads", 1) != 1:  # rows are q k v q k v
            raise InputError(f"vLLM moves rows of {self.prefix}, and a payload has none; export to dense instead")
        sizes = [(rows, input_size) for rows in output_partition_sizes]
        if len(self.given) == 1:
            sizes = [(output_size, input_size)]  # stored fused already
        if len(self.given) != len(sizes):
            raise InputError(
                f"vLLM has {len(sizes)} parts of {self.prefix}, several of which are one payload in the checkpoint; "
                f"export to dense or compressed-tensors instead"
            )
        dense = [_dense(size, params_dtype) for size in sizes]
        self.layouts = [layout or plain for layout, plain in zip(self.given, dense, strict=True)]
        table = isinstance(layer, VocabParallelEmbedding)  # whose rows vLLM fills up to a round number
        for layout, (rows, width) in zip(self.layouts, sizes, strict=True):
            if layout.size[1] != width or not (layout.size[0] == rows or (table and layout.size[0] < rows)):
                raise InputError(f"{self.prefix} is {layout.size} in config.json, {(rows, width)} in vLLM's model")
        total = sum(layout.bytes() for layout in self.layouts)
        _add(layer, "weight", torch.empty(total, dtype=torch.uint8), self.load)
        if table and not isinstance(layer, ParallelLMHead):
            _add(layer, LIKE, torch.empty(0, dtype=params_dtype), lambda parameter, loaded: None)

    def load(self, parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        """Copy a part of the checkpoint to its place. Raises InputError for one of another size."""
        number = shard if isinstance(shard, int) else SHARDS[shard]
        start, stop = self._places()[number]
        values = loaded
        if self.given[number] is None:
            [(dtype, _, length)] = self.layouts[number].places().values()
            stop = start + length  # without the padding before the next payload
            values = loaded.to(dtype).contiguous().reshape(-1).view(torch.uint8)
        if values.dtype != torch.uint8 or values.shape != (stop - start,):
            raise InputError(
                f"part {number} of {self.prefix} is {values.dtype} {list(values.shape)} in the file, not the "
                f"{stop - start} bytes that config.json says; {MENDING}"
            )
        parameter.data[start:stop].copy_(values)

    def _places(self) -> list[tuple[int, int]]:
        return list(pairwise(accumulate((layout.bytes() for layout in self.layouts), initial=0)))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Let layers of ours read the payload where it lies now."""
        from llmcompress.kernels.accelerate import accelerate_loaded  # vLLM starts in no process that has llvmlite

        weight: Tensor = layer.get_parameter("weight").data
        parts = [weight[start:stop] for start, stop in self._places()]
        for layout, part in zip(self.layouts, parts, strict=True):
            try:
                layout.check(part)
            except ValueError as error:
                raise InputError(f"the payload of {self.prefix} is damaged ({error}); {MENDING}") from error
        made = [CompressedLinear(layout, part) for layout, part in zip(self.layouts, parts, strict=True)]
        like = getattr(layer, LIKE, None)
        table = None if like is None else CompressedEmbedding(self.layouts[0], parts[0], like.dtype)
        accelerate_loaded(nn.ModuleList(made))
        object.__setattr__(layer, "decoders", (made, table))  # not as submodules: these have no parameters of their own

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product of `x [..., in]`, `[..., out]`, in its dtype."""
        outputs = [part(x) for part in layer.decoders[0]]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return output if bias is None else output + bias

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Return the rows `[..., width]` of token ids `[...]`."""
        rows: Tensor = layer.decoders[1](input_)
        return rows


class HeadMethod(UnquantizedEmbeddingMethod):
    """A head that was not compressed itself, but may be tied to a table that was."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Share the table's weight, and its method if that is a payload."""
        if isinstance(embed_tokens.quant_method, PayloadMethod):
            layer.quant_method = embed_tokens.quant_method
        layer.weight = embed_tokens.weight
        return layer


def _dense(size: tuple[int, int], dtype: torch.dtype) -> Layout:
    """Return the layout of a weight that is not compressed."""
    header = {"node": "dense", "shape": list(size)}
    return Layout(size, header, {"values": (NAMES[dtype], size[0] * size[1])})


def _add(layer: nn.Module, name: str, value: Tensor, loader: Any) -> None:
    parameter: Any = nn.Parameter(value, requires_grad=False)
    parameter.weight_loader = loader
    layer.register_parameter(name, parameter)
