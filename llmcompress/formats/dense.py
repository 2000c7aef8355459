"""To plain bfloat16, which every engine reads: the quality of the compressed model at the size of the dense one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.formats.engine_files import ExportReport
from llmcompress.models.dense.companions import copy_companions
from llmcompress.models.dense.experts import experts_of
from llmcompress.models.dense.families import block_paths
from llmcompress.models.dense.skeleton import folder_skeleton, transposed_linears
from llmcompress.models.dense.stored_names import hub_names
from llmcompress.models.files.checkpoint import write_checkpoint
from llmcompress.models.files.compressed import CompressedCheckpoint, round_to_bfloat16
from llmcompress.runtime.progress import count_each
from llmcompress.weight.expression import dense


def to_dense(opened: CompressedCheckpoint, output: Path) -> ExportReport:
    """Write every compressed matrix decoded and rounded to bfloat16; all else as it is stored.

    Blocks that have widths of their own are filled up with zeros to the widest, which changes no prediction.
    """
    folder, trusted, model = opened.folder, opened.trust_remote_code, opened.skeleton
    plain = folder_skeleton(folder, unfused=False, trust_remote_code=trusted)
    experts, turned = experts_of(model), transposed_linears(model)
    shapes = {name: value.shape for name, value in model.state_dict().items()} if opened.sizes else {}
    rounding = 0.0
    with write_checkpoint(output, opened.dense_bytes) as writer:
        copy_companions(folder, writer.folder, trusted)
        for layers, others in opened.parts(apart=block_paths(model)):  # some families join matrices of a block
            tensors = opened.read_plain(others)
            for layer in count_each(layers, "matrix decoded"):
                stored, moved = round_to_bfloat16(dense(opened.expression(layer)))
                rounding = max(rounding, moved)
                tensors[f"{layer}.weight"] = stored.T.contiguous() if layer in turned else stored
            narrower = [name for name, value in tensors.items() if shapes.get(name, value.shape) != value.shape]
            tensors |= {name: _pad(tensors[name], shapes[name]) for name in narrower}
            if tensors:
                writer.add(hub_names(plain, experts, tensors))
        size = writer.close()
        writer.write("config.json", json.dumps(opened.config | {"dtype": "bfloat16"}, indent=1))
    return ExportReport(
        to="dense",
        output=str(output),
        bytes_before=opened.bytes,
        bytes_after=size,
        kept=("everything that was not compressed, and the files beside the weights",),
        changed=(
            f"{len(opened.layouts)} matrices rounded to bfloat16, by at most {rounding:.1e} of their size",
            *([f"{len(opened.sizes)} matrices of narrower blocks filled up with zeros"] if opened.sizes else []),
        ),
    )


def _pad(value: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor with zeros behind its entries, up to the shape."""
    missing = [wanted - size for size, wanted in zip(value.shape, shape, strict=True)]
    return torch.nn.functional.pad(value, [part for each in reversed(missing) for part in (0, each)])
