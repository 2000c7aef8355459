"""Checkpoints as earlier versions wrote them: files that do not say what they belong to."""

from __future__ import annotations

import json
from pathlib import Path

from llmcompress.models.files import tensor_files
from llmcompress.models.files.integrity import BINDING


def unbound(folder: Path) -> Path:
    """Remove from every weight file of a folder what it belongs to; return the folder."""
    for path in tensor_files.shard_files(folder):
        head, content = tensor_files._head(path), path.read_bytes()
        kept = {key: value for key, value in head.metadata.items() if key != BINDING}
        text = json.dumps({"__metadata__": kept, **head.tensors}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[head.start :])
    return folder
