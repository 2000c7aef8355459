"""The size of a checkpoint's weight files, predicted from headers and sketches alone.

At most a few bytes a tensor too high, and never too low: a file must not exceed its target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from llmcompress.compression.plan import Job
from llmcompress.models.dense import Header
from llmcompress.models.integrity import DIGESTS, digest
from llmcompress.weight.expression import tensor_bits
from llmcompress.weight.modules import ALIGNMENT, LIKE
from llmcompress.weight.nodes import Weight

PADDING = 8  # of a header, at most


def payload_bytes(w: Weight) -> int:
    """Return the bytes of a module's payload, in which each stored tensor is padded to a multiple of 8 bytes."""
    return sum(map(_filled, tensor_bits(w)))


def _filled(count: int) -> int:
    """Return the padded bytes of `count` bits."""
    return -(-count // (8 * ALIGNMENT)) * ALIGNMENT


def bytes_around(job: Job, compressed: set[str]) -> int:
    """Return the bytes of all weight files without the payloads of the modules `compressed`: dense tensors and the
    files' headers."""
    payloads = {f"{name}.weight" for name in compressed}
    kept = sum(header.bytes for name, header in job.source.tensors.items() if name not in payloads)
    return kept + sum(_header_bytes(file, payloads) for file in _files(job, compressed))


def _files(job: Job, compressed: set[str]) -> list[dict[str, Header]]:
    """Return the tensors in each file, as a run writes them: a block, a table, or the rest."""
    tables = [f"{name}.weight" for name in (job.arch.embedding, job.arch.head) if name in compressed]
    places = [*(f"{layout.path}." for layout in job.arch.blocks), *tables]
    files: list[dict[str, Header]] = [{} for _ in (*places, "the rest")]
    for name, header in job.source.tensors.items():
        place = next((number for number, start in enumerate(places) if name.startswith(start)), len(places))
        files[place][name] = header
        if place < len(places) and name == f"{job.arch.embedding}.weight":
            files[place][f"{job.arch.embedding}.{LIKE}"] = header
    return files


def _header_bytes(file: Mapping[str, Header], payloads: set[str]) -> int:
    """Return an upper bound of the header's bytes in a safetensors file of ours."""
    most = max(sum(header.bytes for header in file.values()), 1)
    entries = {
        name: {
            "data_offsets": [most, most],
            "dtype": "U8" if name in payloads else header.dtype,
            "shape": [header.bytes] if name in payloads else list(header.shape),
        }
        for name, header in file.items()
    }
    metadata = {DIGESTS: json.dumps(dict.fromkeys(file, digest(torch.empty(0)))), "format": "pt"}
    text = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":"), ensure_ascii=False)
    return 8 + len(text.encode()) + PADDING
