"""Logits of a compressed Llama in vLLM's own model on the CPU, with attention in plain PyTorch: FOLDER, output file.

Run as a script, in a process of its own: vLLM sets up distributed groups and global state.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import vllm.model_executor.models.llama as llama
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.quantization import get_quantization_config

from llmcompress.formats.vllm.plugin import register
from llmcompress.models.files.reading import read_json


class Attention(nn.Module):
    """Causal attention over one sequence, instead of vLLM's, which needs its compiled kernels and a cache."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, **more: Any) -> None:
        super().__init__()
        self.heads, self.size, self.scale, self.stored = num_heads, head_size, scale, num_kv_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(1, len(x), -1, self.size).transpose(1, 2) for x in (q, k, v))
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return found[0].transpose(0, 1).flatten(1)


class Described(SimpleNamespace):
    """The model's description, of which few entries matter here: all others are false."""

    def __getattr__(self, name: str) -> bool:
        return False


def main(folder: Path, output: Path) -> None:
    """Build the model, load the checkpoint through vLLM's loader, and save the logits of 30 tokens."""
    register()
    entries = read_json(folder / "config.json")["quantization_config"]
    described = AutoConfig.from_pretrained(folder)
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))
    object.__setattr__(config, "model_config", Described(hf_config=described, dtype=torch.float32, head_dtype=None))
    object.__setattr__(config, "quant_config", get_quantization_config("llmcompress").from_config(entries))
    config.compilation_config.mode = 0
    llama.Attention = Attention
    with set_current_vllm_config(config), torch.no_grad():
        init_distributed_environment(1, 0, f"file://{output.with_suffix('.store')}", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = llama.LlamaForCausalLM(vllm_config=config)
        tensors: dict[str, Tensor] = {}
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
        model.load_weights(iter(tensors.items()))
        for module in model.modules():
            finish = getattr(getattr(module, "quant_method", None), "process_weights_after_loading", None)
            if finish is not None:
                finish(module)
        hidden = model(torch.arange(30) * 7 % 256, torch.arange(30))
        torch.save(model.compute_logits(hidden), output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
