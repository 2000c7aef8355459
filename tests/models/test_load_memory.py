"""Loading a compressed model takes no more memory than its own bytes: the dense one is never there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.transformers.hf_quantizer import table_entry
from llmcompress.weight.layout import Layout, pack_weight, payload_texts
from llmcompress.weight.nodes import Grid

WIDTH, DEPTH = 1536, 18
LOAD = """
import json, sys
import llmcompress
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
def held(entry):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(entry)) * 1024
before = held("VmRSS")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps({"peak": held("VmHWM") - before, "layers": len(model.model.layers)}))
"""


def write_large(folder: Path) -> int:
    """A checkpoint of more than 1 GB were it dense, in 4-bit grids, its blocks all alike; returns the dense bytes."""
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=24, vocab_size=257
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    sizes = {name: tuple(m.weight.shape) for name, m in model.model.named_modules() if name.endswith("_proj")}
    grids = {size: pack_weight(grid(*size)) for size in sorted(set(sizes.values()))}  # one for all of a size
    layouts: dict[str, Layout] = {}
    with write_checkpoint(folder) as writer:
        for block in range(DEPTH):
            inside = {f"model.{n}": grids[size] for n, size in sizes.items() if n.startswith(f"layers.{block}.")}
            layouts |= {name: layout for name, (layout, _) in inside.items()}
            tensors = {f"{name}.weight": payload.clone() for name, (_, payload) in inside.items()}
            norms = (f"model.layers.{block}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm"))
            writer.add(tensors | {name: torch.ones(WIDTH) for name in norms}, payload_texts(layouts))
        tables = {f"{name}.weight": torch.ones(257, WIDTH) for name in ("model.embed_tokens", "lm_head")}
        writer.add(tables | {"model.norm.weight": torch.ones(WIDTH)})
        writer.write("config.json", json.dumps(config.to_dict() | {"quantization_config": table_entry(layouts)}))
        writer.close()
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def grid(out: int, width: int) -> Grid:
    codes = torch.randint(0, 16, (out, width), dtype=torch.uint8)
    return Grid(codes, torch.full((out, width // 128), 0.01, dtype=torch.float16), None, 16, 128)


@pytest.mark.slow
def test_the_peak_of_a_load_follows_the_bytes_on_disk(tmp_path: Path) -> None:
    assert write_large(tmp_path / "large") > 1e9
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "large")], check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == DEPTH
    assert found["peak"] <= 1.2 * size
