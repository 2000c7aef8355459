"""The size of a checkpoint's weight files, predicted from headers and sketches alone.

At most a few bytes a tensor too high, and never too low: a file must not exceed its target.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256

import torch

from llmcompress.compression.job import Job
from llmcompress.models.dense.headers import Header
from llmcompress.models.files.integrity import BINDING, DIGESTS, digest
from llmcompress.models.files.tensor_files import SHARD
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
    payloads, table = {f"{name}.weight" for name in compressed}, job.arch.embedding
    tensors = dict(job.source.tensors)
    if table in compressed:
        tensors[f"{table}.{LIKE}"] = tensors[f"{table}.weight"]
    kept = sum(header.bytes for name, header in job.source.tensors.items() if name not in payloads)
    return kept + _header_bytes(tensors, payloads)


def _header_bytes(tensors: Mapping[str, Header], payloads: set[str]) -> int:
    """Return an upper bound of the bytes of all headers in the weight files."""
    most = max(sum(header.bytes for header in tensors.values()), 1)
    entries = {
        name: {
            "data_offsets": [most, most],
            "dtype": "U8" if name in payloads else header.dtype,
            "shape": [header.bytes] if name in payloads else list(header.shape),
        }
        for name, header in tensors.items()
    }
    one = digest(torch.empty(0))
    bound = json.dumps(dict.fromkeys(("id", "config", "tokenizer"), sha256().hexdigest()))
    metadata = {DIGESTS: json.dumps(dict.fromkeys(tensors, one)), "format": "pt"}
    each = len(json.dumps({"__metadata__": {BINDING: bound, DIGESTS: "{}", "format": "pt"}})) + 8 + PADDING
    text = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":"), ensure_ascii=False)
    return len(text.encode()) + each * (1 + most // SHARD)
