"""Digests that identify a model by its content, and bind the files of a checkpoint to each other.

The entry BINDING of a safetensors header is JSON: `id`, a digest of all tensors, equal in all files of a checkpoint;
`config`, of the entries of config.json that change numbers; `tokenizer`, of the tokenizer's files. So neither a file of
a sibling run nor an edited config loads. Checkpoints of earlier versions have no such entry, and load as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError
from llmcompress.models.dense.adapter import adapter_files
from llmcompress.models.dense.config import code_files
from llmcompress.models.dense.headers import model_files
from llmcompress.models.files.integrity import BINDING, MENDING, read_binding
from llmcompress.models.files.reading import read_json
from llmcompress.models.files.tensor_files import shard_files
from llmcompress.runtime.progress import digest_file

SILENT = {  # entries of a config that change no number that the model computes
    *("architectures", "auto_map", "bos_token_id", "decoder_start_token_id", "dtype", "eos_token_id", "id2label"),
    *("label2id", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict"),
    *("task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache"),
    "quantization_config",  # digests of the tensors bind it
}
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt"),
    *("*.model", "*.tiktoken"),
)


def binding(folder: Path) -> dict[str, str]:
    """Return the digests of config and tokenizer in a folder that is being written, for the headers of its weights."""
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {"config": config_digest(entries), "tokenizer": tokenizer_digest(folder)}


def saved_binding(config: Any, digests: Mapping[str, str]) -> dict[str, str]:
    """Return the header's entry for a model that transformers saves, with the `digests` of its tensors.

    It leaves out the tokenizer, which is saved apart.
    """
    entries = json.loads(config.to_json_string(use_diff=True))
    root = sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()
    return {BINDING: json.dumps({"id": root, "config": config_digest(entries)}, sort_keys=True)}


def config_digest(entries: Mapping[str, Any]) -> str:
    """Return a digest of the entries of a config.json that change the numbers of a model."""
    return sha256(json.dumps(_loud(entries), sort_keys=True).encode()).hexdigest()


def _loud(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _loud(value) if isinstance(value, dict) else value
        for key, value in entries.items()
        if key not in SILENT and not key.startswith("_") and value is not None
    }


def check_binding(files: Sequence[Path]) -> None:
    """Raise InputError unless weight files of one folder belong together, and to the config.json beside them."""
    first, *others = ((path, read_binding(path)) for path in files)
    for path, entry in others:
        if entry != first[1]:
            raise InputError(f"{path} belongs to another checkpoint than {first[0].name}; {MENDING}")
    config = files[0].parent / "config.json"
    if "config" not in first[1] or not config.is_file():
        return
    if config_digest(read_json(config, MENDING)) != first[1]["config"]:
        raise InputError(f"{config} is not the one that its weights were written with; {MENDING}")


def check_tokenizer(folder: Path) -> None:
    """Raise InputError if a checkpoint's tokenizer files are not those that its weights were written with."""
    for path in shard_files(folder)[:1]:
        entry = read_binding(path)
        if "tokenizer" in entry and entry["tokenizer"] != tokenizer_digest(folder):
            raise InputError(f"the tokenizer in {folder} is not the one that its weights were written with; {MENDING}")


def content_digest(files: Iterable[Path]) -> str:
    """Return one digest of the contents of `files`, in this order.

    A file is read once in a process, and again when its inode, its size or one of its times is another.
    """
    digest = sha256()
    for path in files:
        state = path.stat()
        digest.update(_digest(path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _digest(path: Path, *_state: int) -> bytes:
    return bytes.fromhex(digest_file(path))


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files in a model's folder that decide how it reads text, sorted."""
    paths = {path for pattern in TOKENIZER for path in folder.glob(pattern)}
    return sorted(path for path in paths if path.is_file())


def tokenizer_digest(folder: Path) -> str:
    """Return one digest of the names and contents of a model's tokenizer files."""
    files = tokenizer_files(folder)
    names = "\n".join(path.name for path in files)
    return sha256(f"{names}\n{content_digest(files)}".encode()).hexdigest()


def teacher_digest(folder: Path, adapter: Path | None = None) -> str:
    """Return one digest of the files that decide a model's predictions: config, weights, its own code, an `adapter`."""
    code = (folder / name for name in code_files(folder))
    parts = [] if adapter is None else adapter_files(adapter)
    return content_digest([folder / "config.json", *model_files(folder), *code, *parts])
