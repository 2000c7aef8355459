"""As `vllm_engine`, for experts of few bits on any CPU: vLLM's loader reads them, and a plain loop multiplies.

vLLM's own kernels for such experts need a GPU, or a CPU with AMX. Run as a script.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from llmcompress.weight.inputs import InputFormat, InputName
from tests.formats.vllm_engine import main

PLACE = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
METHODS: dict[str, tuple[str, str, InputName | None]] = {  # by module: class, choice of a kernel, and format of inputs
    "wna16": ("WNA16", "select_wna16_moe_backend", None),
    "w8a8_int8": ("W8A8Int8", "select_int8_moe_backend", "int8"),
    "w8a8_fp8": ("W8A8Fp8", "select_fp8_moe_backend", "fp8"),
}


def replace_kernels() -> None:
    """Give vLLM's methods for experts a loop in place of their kernels."""
    for name, (kind, choice, inputs) in METHODS.items():
        module: Any = import_module(f"{PLACE}.compressed_tensors_moe_{name}")
        setattr(module, choice, lambda *given, **named: (None, None))
        method = getattr(module, f"CompressedTensors{kind}MoEMethod")
        method.is_monolithic, method.inputs = False, inputs
        method.apply, method.process_weights_after_loading = multiply, decode
        method.get_fused_moe_quant_config = lambda self, layer: None


def decode(self: Any, layer: Any) -> None:
    """Put matrices `[experts, out, in]` beside the codes that vLLM has loaded."""
    for name in ("w13", "w2"):
        packed, scale = getattr(layer, f"{name}_weight_packed", None), getattr(layer, f"{name}_weight_scale").float()
        if packed is None:
            codes = getattr(layer, f"{name}_weight").float()
        else:
            codes = ((packed[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(-2).float() - 8
        setattr(layer, f"{name}_decoded", (codes.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2))


def multiply(self: Any, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **shared: Any) -> Tensor:
    """Return the weighted sum of each token's experts."""
    output = torch.zeros_like(x, dtype=torch.float32)
    for number, (first, second) in enumerate(zip(layer.w13_decoded, layer.w2_decoded, strict=True)):
        tokens, places = (topk_ids == number).nonzero(as_tuple=True)
        gate, up = (rounded(self, x[tokens]) @ first.T).chunk(2, -1)
        inner = rounded(self, silu(gate) * up)
        output.index_add_(0, tokens, inner @ second.T * topk_weights[tokens, places, None])
    return output.to(x.dtype)


def rounded(self: Any, x: Tensor) -> Tensor:
    return x.float() if self.inputs is None else InputFormat(self.inputs).round(x.float())


if __name__ == "__main__":
    replace_kernels()
    main(sys.argv[1], Path(sys.argv[2]))
