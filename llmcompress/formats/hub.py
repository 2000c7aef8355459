"""Publishing: a verified checkpoint and its card, in one commit, or nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmcompress.errors import GateError, HubError, InputError, RecipeError, list_names
from llmcompress.evaluation.verify import verify
from llmcompress.formats.evidence import Evidence, evidence
from llmcompress.formats.model_card import Taught, card
from llmcompress.models.dense.companions import OURS, companions
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import CARD, MANIFEST, PLOT, README, manifest, manifest_text
from llmcompress.models.files.reading import read_json
from llmcompress.reporting import report as reports
from llmcompress.reporting.plots import layers_png
from llmcompress.runtime.json_values import JsonRecord

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOG = logging.getLogger(__name__)
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LOGIN = "log in with `hf auth login` or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Pushed(JsonRecord):
    """Files that went, or with `dry_run` would go, to the Hub. `commit`: its address, None where nothing was sent;
    `unmeasured`: what the evidence for its quality lacks, see `evidence`."""

    repository: str
    files: dict[str, int]  # name -> bytes
    commit: str | None
    unmeasured: tuple[str, ...] = ()


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    announce: Callable[[Mapping[str, int]], None] | None = None,
    trust_remote_code: bool = False,
) -> Pushed:
    """Upload a compressed checkpoint that passes `verify` to the Hub, with a model card.

    Everything goes in one commit, so that readers see the old state or the new one; what was uploaded before a failure
    is not uploaded again.

    Args:
        folder: what compress wrote.
        repository: `owner/name`; made if need be.
        private: True to make it private, if it is made.
        revision: the branch to commit to, made if need be; None for the main one.
        dry_run: True to send nothing.
        announce: receives the files with their bytes before anything is sent.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.

    Returns:
        The files with their bytes, and the commit's address.

    Raises:
        RecipeError: for an impossible name.
        InputError: for a damaged checkpoint.
        GateError: for a checkpoint outside of its recipe's gates, or whose run ended before they were measured.
        HubError: for whatever the Hub refuses.
    """
    folder = Path(folder)
    if not REPOSITORY.fullmatch(repository):
        raise RecipeError(f"{repository!r} is not a Hub repository; give owner/name")
    if not dry_run:
        _check_token()
    verify(folder, trust_remote_code=trust_remote_code)
    if manifest(folder) is None:
        raise InputError(f"{folder} has no {MANIFEST}, report and recipe for a card; push a folder that compress wrote")
    belonging = _belonging(folder, trust_remote_code)
    _check_gates(folder)
    proof = _proof(folder)
    made = _card(folder, repository, proof)
    made |= _manifest_without_strangers(folder, belonging)
    names = sorted({*belonging, MANIFEST} - CARD - made.keys())
    sizes = {name: len(content) for name, content in made.items()}
    files = sizes | {name: (folder / name).stat().st_size for name in names}
    if dry_run:
        return Pushed(repository, files, None, proof.missing)
    if announce is not None:
        announce(files)
    commit = _upload(folder, repository, names, made, private, revision)
    return Pushed(repository, files, commit, proof.missing)


def _check_gates(folder: Path) -> None:
    """Raise GateError for a checkpoint that missed its gates, or whose run ended before they were measured."""
    gates = reports.read(folder).gates
    if gates is not None and gates.held is False:
        raise GateError(
            f"{folder} is outside of its gates ({', '.join(gates.clauses())}) and is not pushed; compress to more "
            f"bits, or run the same compress command with other gates, which judges it anew"
        )
    if gates is not None and gates.pending:
        raise GateError(f"{folder} is not pushed, since {gates.unmeasured}; run the same compress command again")


def _saved(folder: Path, name: str) -> dict[str, Any] | None:
    """The findings that a measurement saved under a file's name; None where nobody asked."""
    return read_json(folder / name) if (folder / name).is_file() else None


def _proof(folder: Path) -> Evidence:
    """The evidence for the quality of a checkpoint."""
    return evidence(
        _saved(folder, file_names.SCORES), reports.read_allocation(folder), reports.read_distillation(folder)
    )


def _card(folder: Path, repository: str, proof: Evidence) -> dict[str, bytes]:
    """The files of the card: its text, and its plot if matplotlib is there; the text says so if not."""
    recipe = (folder / file_names.RECIPE).read_text(encoding="utf-8")
    report = reports.read(folder)
    plots = {PLOT: layers_png(report)} if find_spec("matplotlib") else {}
    plot, taught = PLOT if plots else None, _taught(folder)
    scores, passport = (_saved(folder, name) for name in (file_names.SCORES, file_names.PASSPORT))
    text = card(report, repository, recipe, scores, plot, taught, proof, passport)
    return {README: text.encode(), **plots}


def _belonging(folder: Path, trust_remote_code: bool) -> dict[str, str]:
    """Return the part of the manifest that a model consists of; older releases copied other files beside it."""
    known = OURS.union(companions(folder, trust_remote_code).names)
    written = (manifest(folder) or {}).items()
    return {name: value for name, value in written if name in known or name.endswith(".safetensors")}


def _manifest_without_strangers(folder: Path, mine: dict[str, str]) -> dict[str, bytes]:
    """Return a manifest for the Hub, by its name, where the folder's has files that do not go there."""
    strangers = (manifest(folder) or {}).keys() - mine.keys()
    if not strangers:
        return {}
    LOG.warning("%s is no part of the model and is not pushed", list_names(sorted(strangers), 10))
    return {MANIFEST: manifest_text(mine).encode()}


def _taught(folder: Path) -> Taught | None:
    """The distillation of a checkpoint; None for one that was only compressed."""
    found = reports.read_distillation(folder)
    if found is None:
        return None
    recipe = (folder / file_names.DISTILLATION_RECIPE).read_text(encoding="utf-8")
    return Taught(found, recipe)


def _check_token() -> None:
    """Raise HubError without a token."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(f"there is no token for the Hub; {LOGIN}")


def _upload(
    folder: Path, repository: str, names: list[str], made: dict[str, bytes], private: bool, revision: str | None
) -> str:
    """Commit and return the address of the commit of files `names` of the folder, and of those `made` for it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _in_a_sentence(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = _files_of(api, repository, revision)
        _check_ours(repository, there)
        gone = sorted(name for name in there - set(names) if name.endswith((".safetensors", ".index.json")))
        written = [CommitOperationAdd(name, folder / name) for name in names]
        added = [*(CommitOperationAdd(name, content) for name, content in made.items()), *written]
        commit = api.create_commit(
            repository,
            [*added, *(CommitOperationDelete(name) for name in gone)],
            commit_message=f"Compressed by llmcompress: recipe {reports.read(folder).recipe}",
            revision=revision,
        )
    return str(commit.commit_url)


def _files_of(api: HfApi, repository: str, revision: str | None) -> set[str]:
    return {entry.path for entry in api.list_repo_tree(repository, revision=revision) if not hasattr(entry, "tree_id")}


def _check_ours(repository: str, there: set[str]) -> None:
    """Raise HubError for a repository that holds another kind of model."""
    weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in there)
    if weights and not {MANIFEST, file_names.REPORT} <= there:
        raise HubError(f"{repository} holds a model that llmcompress did not write; choose another name")


@contextmanager
def _in_a_sentence(repository: str) -> Iterator[None]:
    """Turn errors of the Hub or the network into a HubError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # of the HTTP library that this release of the client uses
    transport = cast("type[Exception]", HfHubHTTPError.__mro__[1])

    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repository!r} is not a possible Hub repository; give owner/name") from error
    except HfHubHTTPError as error:
        raise HubError(_sentence(repository, error.response.status_code)) from error
    except (transport, OSError, RuntimeError) as error:  # the last for a large file that did not get through
        reason = " ".join(str(error).split())[:200]
        raise HubError(f"{repository}: the Hub could not be reached or hung up ({reason}); push again") from error


def _sentence(repository: str, status: int) -> str:
    match status:
        case 401:
            return f"{repository}: the Hub does not accept the token; {LOGIN}"
        case 403:
            return f"{repository}: this token may not write there; {LOGIN}"
        case 409 | 412:
            return f"{repository}: somebody else is writing to it; push again"
        case _:
            return f"{repository}: the Hub answered {status}, nothing was published; push again"
