"""The finished work of an interrupted run, kept so that the same command resumes instead of starting over.

    FOLDER/NAME.json          a record without tensors
    FOLDER/NAME.safetensors   a record with tensors; the JSON is in its header

The JSON object of a record has the identity of its run, on which alone its content depends, and the keys of its entry.
A run with another identity is refused with the differences. A record is replaced in one step, even if the power fails.
The object and the tensors carry digests, so damage is noticed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from llmcompress.errors import InputError, LLMCompressError
from llmcompress.models.files.output import MARK, disk_errors, remove_folder, replace_text
from llmcompress.models.files.tensor_files import read_tensors, write_tensors

RECORD = "record"  # the key of the JSON in a header
DIGEST = "sha256"  # the key of the digest in the JSON, over all its other keys


class Record(NamedTuple):
    """A stored record: plain values, and tensors by name."""

    entry: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Store:
    """The records of one run in a folder, which is made for the first one.

    identity: plain values that the records depend on. place: the path to remove to start over, by default the folder.
    advice: another way out if another run left it. error: the type that is raised then.
    """

    folder: Path
    identity: Mapping[str, Any]
    place: Path | None = None
    advice: str = "or choose another output folder"
    error: type[LLMCompressError] = field(default=InputError)

    def put(self, name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Replace the record `name`, on the disk. Raises DiskError if that fails."""
        path = self._file(name, tensors is not None)
        if twice := sorted({*self.identity, DIGEST} & entry.keys()):
            raise ValueError(f"the entry {name} has the keys {twice}, as the identity has; rename them")
        text = _seal({**self.identity, **entry})
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if tensors is None:
                replace_text(path, text)
            else:
                write_tensors(path, tensors, header={RECORD: text})

    def get(self, name: str) -> Record | None:
        """Return the record `name`, None without one. Raises `error` for another run's, or a damaged one."""
        path = self.path(name)
        if path is None:
            return None
        try:
            tensors, header = ({}, {RECORD: path.read_text("utf-8")}) if path.suffix == ".json" else read_tensors(path)
            entry = _unseal(header[RECORD])
            known = {key: entry.pop(key, None) for key in self.identity}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
            raise self.damage(error, path) from error
        here = _plain(self.identity)
        if changed := [key for key, value in known.items() if value != here[key]]:
            raise self.refusal(changed)
        return Record(entry, tensors)

    def path(self, name: str) -> Path | None:
        """Return the file of the record `name`, None without one."""
        return next((path for path in (self._file(name, True), self._file(name, False)) if path.is_file()), None)

    def names(self) -> list[str]:
        """Return the names of all records in the folder, sorted."""
        return sorted(path.stem for path in self.folder.glob("[!.]*") if path.suffix in (".json", ".safetensors"))

    def remove(self, name: str) -> None:
        """Remove the record `name`, if there is one."""
        for tensors in (True, False):
            self._file(name, tensors).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the folder and its content, records first."""
        for name in self.names():
            self.remove(name)
        if (self.folder / MARK).is_file():  # a folder of ours, so its mark goes last
            remove_folder(self.folder)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def within(self, name: str, **more: Any) -> Store:
        """Return the store of a part of the run: the folder `name` inside, with `more` in its identity."""
        return replace(self, folder=self.folder / name, identity={**self.identity, **more})

    def refusal(self, changed: Iterable[str]) -> LLMCompressError:
        """Return the error of a store that another run left; `changed`: the differences to it."""
        what = " and ".join(changed)
        return self.error(f"{self._place} was left by a different run ({what} changed); remove it, {self.advice}")

    def damage(self, error: BaseException, path: Path | None = None) -> LLMCompressError:
        """Return the error of a record that cannot be used, because of `error`."""
        said = f"{path or self._place} cannot be read ({type(error).__name__}: {error})"
        return self.error(f"{error if isinstance(error, InputError) else said}; remove {self._place} to start over")

    @property
    def _place(self) -> Path:
        return self.folder if self.place is None else self.place

    def _file(self, name: str, tensors: bool) -> Path:
        return self.folder / f"{name}{'.safetensors' if tensors else '.json'}"


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(entry)))
    return plain


def _seal(entry: Mapping[str, Any]) -> str:
    plain = _plain(entry)
    return json.dumps({**plain, DIGEST: _digest(plain)})


def _unseal(text: str) -> dict[str, Any]:
    """Return the object that `_seal` wrote. Raises ValueError for one that has changed.

    Records of earlier versions, such as caches, have no digest.
    """
    entry: dict[str, Any] = json.loads(text)
    known = entry.pop(DIGEST, None)
    if known is not None and known != _digest(entry):
        raise ValueError("it is not as it was written")
    return entry


def _digest(entry: Mapping[str, Any]) -> str:
    return sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
