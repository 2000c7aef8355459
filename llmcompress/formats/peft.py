"""To PEFT: a checkpoint of ours without its low-rank terms, and these as an ordinary LoRA adapter beside it.

The adapter can then be trained, swapped or left out with PEFT's own tools. OUT/base and OUT/adapter.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.formats.engine_files import ExportReport
from llmcompress.models.dense.companions import copy_companions
from llmcompress.models.files.checkpoint import Writer, seal, write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.models.transformers.hf_quantizer import table_entry
from llmcompress.runtime.progress import count_each
from llmcompress.weight.expression import dense
from llmcompress.weight.hadamard import unrotate
from llmcompress.weight.layout import Layout, pack_weight, payload_texts
from llmcompress.weight.modules import LIKE
from llmcompress.weight.nodes import LowRank, RotatedInputs, Sum, Weight


def to_peft(opened: CompressedCheckpoint, output: Path) -> ExportReport:
    """Write OUT/base without low-rank terms and OUT/adapter with them. Raises InputError where there are none."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    layouts: dict[str, Layout] = {}
    with write_checkpoint(output, 2 * opened.bytes) as whole:
        writer = Writer(whole.folder / "base")
        writer.folder.mkdir()
        copy_companions(opened.folder, writer.folder, opened.trust_remote_code)
        for layers, others in opened.parts():
            tensors = {name: opened.read(name) for name in others}
            for layer in count_each(layers, "matrix taken apart"):
                base, term = opened.expression(layer), None
                if f"{layer}.{LIKE}" not in opened.files:  # PEFT names and turns factors of token tables otherwise
                    base, term = split_low_rank(base)
                if term is not None:
                    factors[layer] = term
                layouts[layer], tensors[f"{layer}.weight"] = pack_weight(base)
            writer.add(tensors, payload_texts(layouts))
        if not factors:
            raise InputError(
                f"{opened.folder} has no low-rank terms, so there is no adapter to export; choose another format"
            )
        size = writer.close()
        writer.mark.unlink()
        entry = {"quantization_config": table_entry(layouts, opened.sizes)}
        writer.write("config.json", json.dumps(opened.config | entry, indent=1))
        seal(writer.folder)
        size += _write_adapter(whole.folder / "adapter", f"{output.name}/base", factors)
    kept = f"{len(layouts)} compressed matrices, bit for bit, in {output / 'base'}"
    changed = f"{len(factors)} low-rank terms became float32 LoRA factors in {output / 'adapter'}"
    return ExportReport("peft", str(output), opened.bytes, size, (kept,), (changed,))


def split_low_rank(w: Weight) -> tuple[Weight, tuple[Tensor, Tensor] | None]:
    """Return the expression without its low-rank terms, and their A `[rank, in]` and B `[out, rank]` unrotated."""
    match w:
        case Sum((first, *others)) if any(isinstance(part, LowRank) for part in others):
            first, inner = split_low_rank(first)  # below a rotation
            factors = [] if inner is None else [inner]
            factors += [(dense(part.right), dense(part.left)) for part in others if isinstance(part, LowRank)]
            rest = (first, *(part for part in others if not isinstance(part, LowRank)))
            base = first if len(rest) == 1 else Sum(rest)
            return base, (torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], 1))
        case RotatedInputs(inner, signs, block):
            base, term = split_low_rank(inner)
            turned = None if term is None else (unrotate(term[0], signs, block), term[1])
            return RotatedInputs(base, signs, block), turned
        case _:
            return w, None


def _write_adapter(folder: Path, base: str, factors: dict[str, tuple[Tensor, Tensor]]) -> int:
    """Write the adapter for the model `base`; return the bytes of its weights."""
    from peft import LoraConfig, TaskType

    ranks = {name: len(a) for name, (a, _) in factors.items()}
    common = max(ranks.values())
    unlike = {f"^{name}$".replace(".", r"\."): rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        target_modules=sorted(factors),
        r=common,
        lora_alpha=common,  # scaling 1
        rank_pattern=unlike,
        alpha_pattern=unlike,
        inference_mode=True,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(torch.float32).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(torch.float32).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return path.stat().st_size
