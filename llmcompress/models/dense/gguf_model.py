"""Models in GGUF files, unpacked once into bfloat16 folders in a cache, so that all else sees one kind of model.

transformers reads the weights, and the vocabularies of SentencePiece. Byte-level vocabularies are read here, by the
name that the file has for the way in which text is cut before tokens merge. A wrong cut goes unnoticed, so an unknown
name is refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from llmcompress.errors import DiskError, InputError, MemoryLimitError, first_line, format_bytes, is_out_of_memory
from llmcompress.models.dense.config import check_numbers, config_errors
from llmcompress.models.dense.packed import describe_few_bits
from llmcompress.models.files.file_names import GGUF_SOURCE
from llmcompress.models.files.gguf_header import ENDS, FLOATS, ORIGINAL, GGUFHeader, read_gguf_header
from llmcompress.models.files.output import sync
from llmcompress.models.files.reading import TokenizerReading
from llmcompress.runtime.memory import total_memory
from llmcompress.runtime.precision import ONE_BUILDER
from llmcompress.runtime.progress import digest_file

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

UNPACKING = 8  # counts the ways in which files were unpacked: part of a folder's name in the cache
TOKENIZER, CHAT_TEMPLATE = "tokenizer.ggml", "tokenizer.chat_template"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens
PADDING = re.compile(r"\[+PAD\d+\]+")  # names of the rows of a token table that no token has
NAMED_TEMPLATE = re.compile(r"tokenizer\.chat_template\.([A-Za-z0-9_]+)")  # the name becomes that of a file
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
COUNTS = {  # names of config.json by those of entries
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
}
SENTENCES = (  # that a tokenizer must read and write unchanged
    "Water boils at 100 degrees.",
    "  two  spaces,\n\n\ta tab and 1234567 digits",
    "naïve café — “quotes” ½, Ελληνικά, 日本語 🙂",
)
Steps = tuple[str, ...]  # a pre-tokenizer: "digits", "words" (GPT-2's expression), or an expression
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r"\p{Lm}\p{Lo}\p{M}]"
_LOWER = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARKS}*[\p{{Ll}}{_MARKS}+"  # words that end in small letters
_UPPER = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARKS}+[\p{{Ll}}{_MARKS}*"
_LATER_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PRE_TOKENIZERS: dict[tuple[Steps, bool], str] = {  # with: whole words that are tokens are not merged
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_ENDINGS + r"\p{N}{1,3}" + _SPACES,), True): "llama-bpe",
    ((_ENDINGS + r"\p{N}{1,3}" + _SPACES,), False): "smaug-bpe",
    ((_ENDINGS + r"\p{N}" + _SPACES,), False): "qwen2",
    ((f"{_LOWER}{_SUFFIX}|{_UPPER}{_SUFFIX}|" + r"\p{N}{1,3}" + _LATER_SPACES,), False): "gpt-4o",
    ((f"{_LOWER}|{_UPPER}|" + r"\p{N}" + _LATER_SPACES,), True): "tekken",
}
BEGIN_WITH_BOS = ("llama-bpe", "tekken")  # unless a file says otherwise
BY_NAME: dict[str, tuple[Steps, bool]] = {name: steps for steps, name in PRE_TOKENIZERS.items()}


@dataclass(frozen=True)
class UnpackedModel:
    """An unpacked model. types: weights by the type of GGUF that stored them, most first."""

    folder: Path
    types: dict[str, int]

    @property
    def note(self) -> str:
        """A sentence for the user; empty where the weights were 16-bit floats or more."""
        few = [name for name in self.types if name not in FLOATS]
        if not few:
            return ""
        return describe_few_bits(f"{', '.join(few)} of a GGUF file")


def cache_folder() -> Path:
    """Return the folder of unpacked models: $LLMCOMPRESS_CACHE, else `llmcompress` in Hugging Face's own cache."""
    from huggingface_hub import constants

    chosen = os.environ.get("LLMCOMPRESS_CACHE")
    return Path(os.path.expanduser(chosen)) if chosen else Path(constants.HF_HOME) / "llmcompress"


def unpack_gguf(file: Path) -> UnpackedModel:
    """Return the folder with the model of a GGUF file: bfloat16 weights, tokenizer, chat template. Made once.

    Raises what `unpack_to` raises.
    """
    read_gguf_header(file)  # before the digest, which takes longer
    about = file.stat()
    digest = _digest(file.resolve(), about.st_size, about.st_mtime_ns)
    return unpack_to(cache_folder() / f"{file.stem.lower()}-{digest[:16]}-{UNPACKING}", file, file.stem)


@lru_cache(maxsize=16)
def _digest(file: Path, size: int, changed: int) -> str:
    """Return the digest of a file, read once by a process for as long as `size` and time of change are the same."""
    return digest_file(file)


def unpack_to(target: Path, file: Path, name: str) -> UnpackedModel:
    """Return `target` with the model of a GGUF file, called `name` in its config; `file` is read if it is not there.

    Raises InputError for a file that is damaged, in parts, of an architecture that transformers does not read, or whose
    vocabulary does not fit; MemoryLimitError for weights that do not fit into memory; DiskError for those that do not
    fit on the cache's disk, and when the cache cannot be written.
    """
    if not target.is_dir():
        header = read_gguf_header(file)
        with stage(target) as folder:
            if not target.is_dir():  # or another process has unpacked it meanwhile
                _write_model(file, header, name, folder)
            (folder / GGUF_SOURCE).write_text(json.dumps({"file": file.name, "types": header.types}) + "\n")
    return unpacked_model(target)


def unpacked_model(folder: Path) -> UnpackedModel:
    """Return the model that was unpacked into a folder."""
    return UnpackedModel(folder, json.loads((folder / GGUF_SOURCE).read_text())["types"])


def stored_bytes(file: Path, names: Sequence[str]) -> int:
    """Return the bytes that tensors of a GGUF file take there, by the names that transformers has for them.

    Raises KeyError for one that the file does not have by itself.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    header = read_gguf_header(file)
    kind = header.entries["general.architecture"]
    architecture = {name: number for number, name in MODEL_ARCH_NAMES.items()}[kind]
    known = get_tensor_name_map(architecture, header.entries[f"{kind}.block_count"])
    return sum(header.sizes[known.get_name(name, try_suffixes=(".weight",)) or ""] for name in names)


def _check_counts(file: Path, header: GGUFHeader) -> None:
    """Raise InputError for entries of a model that is larger than the file, before transformers builds it."""
    kind = header.entries.get("general.architecture")
    counts = {name: header.entries.get(f"{kind}.{key}") for name, key in COUNTS.items()}
    check_numbers(counts.get, str(file))
    blocks, width, inner = ((counts[name] or 1) for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    if blocks > len(header.sizes) or width * max(inner, header.vocabulary) > sum(header.types.values()):
        raise InputError(
            f"{file} describes a model of {blocks} blocks and a width of {width}, which it lacks; {ORIGINAL}"
        )


def _check_room(file: Path, needed: int, folder: Path) -> None:
    """Raise MemoryLimitError or DiskError unless `needed` bytes of weights fit into memory and the disk of `folder`."""
    memory, free = total_memory(), shutil.disk_usage(folder).free
    if needed > memory:
        raise MemoryLimitError(
            f"unpacking {file} holds {format_bytes(needed)} and this machine has {format_bytes(memory)}; give the "
            f"model that it was made of, or take a larger machine"
        )
    if needed > free:
        raise DiskError(
            f"unpacking {file} writes {format_bytes(needed)} into {folder.parent}, whose disk has {format_bytes(free)} "
            f"free; set LLMCOMPRESS_CACHE to another folder"
        )


def _write_model(file: Path, header: GGUFHeader, name: str, folder: Path) -> None:
    """Write the model in a GGUF file as an ordinary bfloat16 Hugging Face folder."""
    _check_counts(file, header)
    _check_room(file, 2 * sum(header.types.values()), folder)
    if find_spec("gguf") is None:
        raise InputError(f"reading {file.name} needs the package gguf; run `pip install gguf`")
    import torch
    import transformers

    from llmcompress.models.dense.gguf_positions import read_what_is_passed_over

    dequantize: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # later releases keep the weights packed unless told otherwise
        dequantize = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    loaded: Any
    with ONE_BUILDER, _parse_once():
        tokenizer = _read_tokenizer(file, header)  # first: weights take longer
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.bfloat16, output_loading_info=True, **dequantize
            )
        except config_errors() as error:
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"transformers {transformers.__version__} does not read {file} ({first_line(error)}); {ORIGINAL}"
            ) from error
        model, loading = loaded
        if loading["missing_keys"]:
            raise InputError(f"{file} lacks weights, {sorted(loading['missing_keys'])[0]} for one; give another file")
        read_what_is_passed_over(model, file, header)
    for owner, key in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, key):  # the weights are plain numbers now
            delattr(owner, key)
    model.config._name_or_path = name
    ends = [header.entries.get(f"{TOKENIZER}.{key}_token_id") for key in ENDS]
    known = [end for end in ends if isinstance(end, int) and end < header.vocabulary]
    model.generation_config.eos_token_id = list(dict.fromkeys(known)) or None
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


@contextmanager
def _parse_once() -> Iterator[None]:
    """Let the entries of a GGUF file be parsed once within the block, and held in plain arrays.

    transformers parses them for the tokenizer, the config and the weights. In a memory map as it comes, each of a
    million strings is an object of several hundred bytes.
    """
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    package: Any = gguf
    before, package.GGUFReader = gguf.GGUFReader, cache(PlainReader)
    try:
        yield
    finally:
        package.GGUFReader = before


def _read_tokenizer(file: Path, header: GGUFHeader) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a GGUF file. Raises InputError for one that is not known, or changes text."""
    from transformers import AutoTokenizer

    if header.entries.get(f"{TOKENIZER}.model") == "gpt2":
        name = header.entries.get(f"{TOKENIZER}.pre")
        if name not in BY_NAME:
            raise InputError(f"{file} cuts text by {name!r}, which is not known here; {ORIGINAL}")
        with TokenizerReading(file, ORIGINAL):
            tokenizer: PreTrainedTokenizerBase = _byte_level(file, header, *BY_NAME[name])
    else:
        with TokenizerReading(file, ORIGINAL):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = {NAMED_TEMPLATE.fullmatch(key): text for key, text in header.entries.items() if isinstance(text, str)}
    if named := {match[1]: text for match, text in texts.items() if match}:
        tokenizer.chat_template = named | ({"default": tokenizer.chat_template} if tokenizer.chat_template else {})
    if len(tokenizer) > header.vocabulary:
        raise InputError(
            f"{file} has {len(tokenizer)} tokens and a token table of {header.vocabulary} rows; give another file"
        )
    adds = _adds_bos(header)
    first = tokenizer("a").input_ids[:1]
    if adds != (first == [tokenizer.bos_token_id]):
        raise InputError(f"{file} puts BOS {'first' if adds else 'nowhere'}, and transformers reads it otherwise")
    for text in SENTENCES:
        again = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        if again != text:
            raise InputError(f"transformers misreads the tokenizer of {file}: {text!r} becomes {again!r}")
    return tokenizer


def _adds_bos(header: GGUFHeader) -> bool:
    """True if text begins with BOS: as the file says, else as llama.cpp takes it for its kind of tokenizer."""
    entries = header.entries
    usual = entries.get(f"{TOKENIZER}.model") == "llama" or entries.get(f"{TOKENIZER}.pre") in BEGIN_WITH_BOS
    return bool(entries.get(f"{TOKENIZER}.add_bos_token", usual))


def _byte_level(file: Path, header: GGUFHeader, steps: tuple[str, ...], whole_words: bool) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer by the file's own entries.

    transformers' reader passes over the way in which text is cut, and adds tokens that the model has no rows for.
    """
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(str(file)).fields  # a string, as transformers has it: `_parse_once` knows it by that
    tokens, kinds, merges = (fields[f"{TOKENIZER}.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    padding = {token for token, kind in zip(tokens, kinds) if kind == UNUSED and PADDING.fullmatch(token)}
    vocabulary = {token: number for number, token in enumerate(tokens) if token not in padding}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_words))
    inner.pre_tokenizer = build_pre_tokenizer(steps)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken(tokens[i], normalized=False) for i, kind in enumerate(kinds) if kind == USER_DEFINED])
    inner.add_special_tokens([tokens[number] for number, kind in enumerate(kinds) if kind == CONTROL])
    ids = {name: header.entries.get(f"{TOKENIZER}.{key}_token_id") for name, key in SPECIAL.items()}
    special = {name: tokens[number] for name, number in ids.items() if number is not None}
    before = special["bos_token"] if _adds_bos(header) else ""
    behind = special["eos_token"] if header.entries.get(f"{TOKENIZER}.add_eos_token") else ""
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=" ".join(filter(None, (before, "$A", behind))),
                special_tokens=[(token, vocabulary[token]) for token in {before, behind} - {""}],
            ),
        ]
    )
    template = header.entries.get(CHAT_TEMPLATE)
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **special)


@contextmanager
def stage(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target` that becomes `target` when the block ends well, and vanishes otherwise.

    Of several processes one is inside at a time. When another was faster, its result stays and ours vanishes.
    """
    lock = FileLock(target.with_name(f".{target.name}.lock"), is_singleton=True)  # a stage may be inside another
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
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
        lock.release()
        if not lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)


def build_pre_tokenizer(steps: Steps) -> PreTokenizer:
    """Return the pre-tokenizer that is called `steps` in short."""
    from tokenizers import Regex, pre_tokenizers

    parts: list[PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if "digits" in steps else []
    parts += [pre_tokenizers.Split(Regex(step), "isolated") for step in steps if step not in ("digits", "words")]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="words" in steps))
    return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
