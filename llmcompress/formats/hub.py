"""Publishing: a verified checkpoint and its card, in one commit, or nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import GateError, HubError, InputError, RecipeError, list_names
from llmcompress.evaluation.verify import verify
from llmcompress.formats.model_card import DistillationRecord, Evidence, card, gather_evidence
from llmcompress.models.dense.companions import MORE_TEMPLATES, OURS, companions, is_named
from llmcompress.models.dense.locate import client_errors
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import CARD, PLOT, README, manifest, manifest_text
from llmcompress.models.files.compressed import check_kind
from llmcompress.models.files.file_names import MANIFEST
from llmcompress.models.files.reading import read_json
from llmcompress.reporting import report as reports
from llmcompress.reporting.plots import layers_png
from llmcompress.runtime.json_values import JsonRecord

if TYPE_CHECKING:
    pass

LOG = logging.getLogger(__name__)
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LOGIN = "log in with `hf auth login` or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class PushReport(JsonRecord):
    """Files that went, or with `dry_run` would go, to the Hub. `commit`: its address, None where nothing was sent;
    `unmeasured`: names of missing evidence for the quality."""

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
) -> PushReport:
    """Upload a compressed checkpoint that passes `verify` to the Hub, with a model card.

    Everything goes in one commit, so that readers see the old state or the new one. A second attempt does not upload
    finished files again.

    Args:
        folder: a compressed checkpoint.
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
        HubError: where the Hub refuses or fails.
    """
    folder = Path(folder).expanduser()
    if not REPOSITORY.fullmatch(repository):
        raise RecipeError(f"{repository!r} is not a Hub repository; give owner/name")
    if not dry_run:
        _check_token()
    check_kind(folder)
    verify(folder, trust_remote_code=trust_remote_code)
    if manifest(folder) is None:
        raise InputError(f"{folder} has no {MANIFEST}, report and recipe for a card; push a folder that compress wrote")
    belonging = _model_files(folder, trust_remote_code)
    _check_gates(folder)
    proof = _proof(folder)
    made = _card(folder, repository, proof)
    made |= _shorter_manifest(folder, belonging)
    names = sorted({*belonging, MANIFEST} - CARD - made.keys())
    sizes = {name: len(content) for name, content in made.items()}
    files = sizes | {name: (folder / name).stat().st_size for name in names}
    if dry_run:
        return PushReport(repository, files, None, proof.missing)
    if announce is not None:
        announce(files)
    commit = _upload(folder, repository, names, made, private, revision)
    return PushReport(repository, files, commit, proof.missing)


def _check_gates(folder: Path) -> None:
    """Raise GateError for a trial, and for a checkpoint that missed its gates, or whose run ended before they were
    measured."""
    report = reports.read(folder)
    gates = report.gates
    if report.trial:
        raise GateError(f"{folder} is not pushed: {reports.TRIAL}; run the same command without --quick")
    if gates is not None and gates.held is False:
        raise GateError(
            f"{folder} is outside of its gates ({', '.join(gates.clauses())}) and is not pushed; compress to more "
            f"bits, or run the same compress command with other gates, which judges it anew"
        )
    if gates is not None and gates.pending:
        raise GateError(f"{folder} is not pushed, since {gates.unmeasured}; run the same compress command again")


def _read_saved(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the results that a measurement saved under a file's name; None without that file."""
    return read_json(folder / name) if (folder / name).is_file() else None


def _proof(folder: Path) -> Evidence:
    """Return the evidence for the quality of a checkpoint."""
    scores = _read_saved(folder, file_names.SCORES)
    return gather_evidence(scores, reports.read_allocation(folder), reports.read_distillation(folder))


def _card(folder: Path, repository: str, proof: Evidence) -> dict[str, bytes]:
    """Return the files of the card: its text, and its plot if matplotlib is installed."""
    recipe = (folder / file_names.RECIPE).read_text(encoding="utf-8")
    report, distillation = reports.read(folder), reports.read_distillation(folder)
    plots = {PLOT: layers_png(report)} if find_spec("matplotlib") else {}
    taught = None
    if distillation is not None:
        taught = DistillationRecord(distillation, (folder / file_names.DISTILLATION_RECIPE).read_text(encoding="utf-8"))
    scores, passport = (_read_saved(folder, name) for name in (file_names.SCORES, file_names.PASSPORT))
    text = card(report, repository, recipe, scores, PLOT if plots else None, taught, proof, passport)
    return {README: text.encode(), **plots}


def _model_files(folder: Path, trust_remote_code: bool) -> dict[str, str]:
    """Return the part of the manifest that a model consists of; older releases copied other files beside it."""
    known = OURS.union(companions(folder, trust_remote_code).names)
    written = (manifest(folder) or {}).items()
    return {name: value for name, value in written if name in known or name.endswith(".safetensors")}


def _shorter_manifest(folder: Path, files: dict[str, str]) -> dict[str, bytes]:
    """Return the manifest of `files` by its name, if the folder has others, which are not pushed."""
    others = (manifest(folder) or {}).keys() - files.keys()
    if not others:
        return {}
    LOG.warning("%s is no part of the model and is not pushed", list_names(sorted(others), 10))
    return {MANIFEST: manifest_text(files).encode()}


def _check_token() -> None:
    """Raise HubError without a token."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(f"there is no token for the Hub; {LOGIN}")


def _upload(
    folder: Path, repository: str, names: list[str], made: dict[str, bytes], private: bool, revision: str | None
) -> str:
    """Commit the files `names` of the folder and those `made` for it; return the commit's address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _hub_errors(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)  # None: as the account has it
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        tree = api.list_repo_tree(repository, recursive=True, revision=revision)
        paths = (entry.path for entry in tree if not hasattr(entry, "tree_id"))
        before = {path for path in paths if path.rpartition("/")[0] in ("", MORE_TEMPLATES)}
        _check_ours(repository, before)
        gone = sorted(filter(_is_of_model, before - {*names, *made}))
        added = [CommitOperationAdd(name, content) for name, content in made.items()]
        added += [CommitOperationAdd(name, folder / name) for name in names]
        commit = api.create_commit(
            repository,
            [*added, *(CommitOperationDelete(name) for name in gone)],
            commit_message=f"Compressed by llmcompress: recipe {reports.read(folder).recipe}",
            revision=revision,
        )
    return str(commit.commit_url)


def _is_of_model(name: str) -> bool:
    """True for the name of a file that a push may have put into a repository; other ones stay there."""
    return name in OURS or is_named(name) or name.endswith((".safetensors", ".index.json", ".jinja"))


def _check_ours(repository: str, files: set[str]) -> None:
    """Raise HubError for a repository that holds another kind of model."""
    weights = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in files)
    if weights and not {MANIFEST, file_names.REPORT} <= files:
        raise HubError(f"{repository} holds a model that llmcompress did not write; choose another name")


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Raise HubError for errors of the Hub or the network."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    network: tuple[type[Exception], ...] = (*client_errors(), OSError, RuntimeError)  # the last for a large file
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repository!r} is not a possible Hub repository; give owner/name") from error
    except HfHubHTTPError as error:
        raise HubError(_sentence(repository, error.response.status_code)) from error
    except network as error:
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
