"""The place of a model: a folder, a Hub id (`org/name` or `org/name@revision`), or `smollm2`, the embedded model.

`locate` is the only door: a name goes in, a folder of config.json and safetensors comes out, downloaded or unpacked if
necessary. All later code sees one kind of model.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from llmcompress.errors import InputError, first_line
from llmcompress.models.dense.smollm2 import EMBEDDED, EMBEDDED_LICENSE, EMBEDDED_NAME, embedded_folder
from llmcompress.models.files.reading import check_folder

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
HUB_CODE = "*.py"
NOT_HUB_FILES = ["*/*", "consolidated*.safetensors"]  # other formats of the same weights
COMMIT = re.compile(r"[0-9a-f]{40}")
CLOSE = 0.8  # of two names, 1 if they are the same
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Place:
    """A model folder on this machine.

    revision: the Hub commit. notes: remarks for the user. license: if it is known without the model's card.
    trust_remote_code: True to run the Python code that the model needs, see `config.py`.
    """

    name: str
    folder: Path
    revision: str | None = None
    notes: tuple[str, ...] = ()
    hub_id: str | None = None
    license: str | None = None
    trust_remote_code: bool = False

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


def locate(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Place:
    """Return the place of `model`; a local folder wins over the Hub and `smollm2`.

    Raises InputError for an unknown model, DiskError for a cache that cannot be written.
    """
    if not isinstance(model, str | Path):
        raise InputError(
            f"the model is an object of type {type(model).__name__}, and models are read from disk; give a folder, a "
            f"Hub id or {EMBEDDED!r} (write one that is in memory by save_pretrained, and its tokenizer beside it)"
        )
    path, model = Path(os.path.expanduser(model)), str(model)  # its own errors are False here, unlike pathlib's
    if os.path.isdir(path):
        check_folder(path)
        if revision is not None:
            raise InputError(f"{model} is a folder, which has no revisions; leave out revision {revision!r}")
        same = HUB_ID.fullmatch(model) and not model.startswith(".")
        note = f"{path.name} is read as a folder of this machine, not as the Hub model of that name"
        return Place(model, path, notes=(note,) if same else (), trust_remote_code=trust_remote_code)
    if os.path.isfile(path):
        raise InputError(f"{model} is a file; give the folder that holds config.json and the safetensors files")
    if model == EMBEDDED:
        return Place(model, embedded_folder(), hub_id=EMBEDDED_NAME, license=EMBEDDED_LICENSE)
    name, _, pinned = model.partition("@")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(
            f"the model folder {model} does not exist; {_near(model)}give a folder, a Hub id or {EMBEDDED!r}"
        )
    if pinned and revision and pinned != revision:
        raise InputError(f"{model} names revision {pinned!r} and revision {revision!r} was given too; give one of them")
    return download(name, pinned or revision, trust_remote_code)


def download(name: str, revision: str | None, trust_remote_code: bool = False) -> Place:
    """Return the snapshot of a Hub model: safetensors, config and tokenizer files, and code if it is trusted.

    The revision is resolved once, to the commit in `Place.revision`. The cache and HF_HUB_OFFLINE are respected.
    """
    from huggingface_hub import errors, snapshot_download

    what = f"{name} at revision {revision}" if revision else name
    wanted = [*HUB_FILES, HUB_CODE] if trust_remote_code else HUB_FILES
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=NOT_HUB_FILES))
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
    except errors.HFValidationError as error:
        raise InputError(
            f"{name!r} is neither a folder nor a possible Hub id; {_near(name)}give a folder, org/name or {EMBEDDED!r}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"the Hub model {what} is not in the cache and the Hub cannot be reached (or HF_HUB_OFFLINE is set); "
            f"{_near(name)}download it once while online (`hf download {name}`), or give a folder"
        ) from error
    except (errors.HfHubHTTPError, ConnectionError) as error:
        raise InputError(f"the Hub answered {first_line(error)} for {what}; try again, or give a folder") from error
    commit = folder.name if COMMIT.fullmatch(folder.name) else revision
    return Place(name, folder, revision=commit, hub_id=name, trust_remote_code=trust_remote_code)


def _near(model: str) -> str:
    """Return a clause on a model with almost this name: the embedded one, one beside, or one cached."""
    from huggingface_hub import constants

    parent = Path(os.path.expanduser(model)).parent
    beside = [str(parent / name) for name in _names(parent) if (parent / name / "config.json").is_file()]
    cached = [name.removeprefix("models--").replace("--", "/") for name in _names(Path(constants.HF_HUB_CACHE))]
    known = {name.lower(): name for name in (*cached, *beside, EMBEDDED)}
    near = get_close_matches(str(Path(model)).lower(), known, n=1, cutoff=CLOSE)
    return f"did you mean {known[near[0]]!r}? If not, " if near else ""


def _names(folder: Path) -> list[str]:
    """Return the names in a folder; none if it cannot be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []
