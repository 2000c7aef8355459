"""The scores of a sweep: the dense model's, measured once, and those of each checkpoint, stored in it.

A checkpoint stores what `eval --save` writes, with a digest of the text. So scores are measured again if text, tasks or
protocol have changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.evaluation.distance import Distance
from llmcompress.evaluation.evaluate import Evaluation, TextScores, evaluate
from llmcompress.evaluation.logits import OnDisk
from llmcompress.evaluation.perplexity import describe_protocol, evaluation_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.tasks import find_tasks
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import add_file, has_file
from llmcompress.models.files.reading import read_json
from llmcompress.runtime.facts import versions


@dataclass(frozen=True)
class Judge:
    """A scorer of models against `dense`. `settings`: plain values that two comparable scores must share."""

    dense: DenseModel
    protocol: Protocol
    device: str
    settings: dict[str, Any]

    @staticmethod
    def of(dense: DenseModel, protocol: Protocol, device: str) -> Judge:
        """Prepare a judge.

        Raises InputError for a text that is too short or cannot be read, RecipeError for too long windows and unknown
        tasks.
        """
        tokenizer = dense.tokenizer()
        ids = evaluation_windows(tokenizer, protocol, dense.config)
        find_tasks(tokenizer, protocol)
        settings = describe_protocol(tokenizer, protocol) | {
            "digest": _digest(ids, protocol.tasks),
            "versions": versions(),
        }
        return Judge(dense, protocol, device, json.loads(json.dumps(settings)))

    def _stored_entries(self, folder: Path) -> dict[str, Any] | None:
        """Return the entries {"dense", "compressed", ...} that a checkpoint has for the same protocol, if any."""
        if not has_file(folder, file_names.SCORES):
            return None
        entries = read_json(folder / file_names.SCORES)
        same = all(entries.get(key) == value for key, value in self.settings.items())
        return entries if same and "dense" in entries else None

    def of_dense(self, folders: Iterable[Path]) -> dict[str, Any]:
        """Return the dense model's scores: from the first checkpoint that has them, else measured."""
        for folder in folders:
            if (entries := self._stored_entries(folder)) is not None:
                scores: dict[str, Any] = entries["dense"]
                return scores
        measured = _check_complete(evaluate(OnDisk(self.dense, self.device), self.dense.tokenizer(), self.protocol))
        own = {name: TextScores.of(Distance.to_itself(scores.perplexity)) for name, scores in measured.texts.items()}
        return Evaluation(measured.tasks, own).to_json()

    def scores(self, folder: Path, dense: dict[str, Any]) -> dict[str, Any]:
        """Return the scores of the checkpoint in `folder`, and store them there. `dense`: the dense model's scores.

        Raises DiskError if the folder cannot be written to.
        """
        entries = self._stored_entries(folder)
        if entries is None:
            teacher = OnDisk(self.dense, self.device)
            place = locate(str(folder), trust_remote_code=self.dense.trust_remote_code)
            student = load_model(place, self.device)
            measured = _check_complete(evaluate(student, self.dense.tokenizer(), self.protocol, against=teacher))
            entries = self.settings | {"dense": dense, "compressed": measured.to_json()}
            add_file(folder, file_names.SCORES, json.dumps(entries, indent=2))
        scores: dict[str, Any] = entries["compressed"]
        return scores


def _check_complete(scores: Evaluation) -> Evaluation:
    """Return scores that may be stored. Raises InputError if tasks are missing."""
    if scores.tasks.failure is not None:
        raise InputError(scores.tasks.failure)
    return scores


def _digest(windows: Tensor, tasks: Iterable[str]) -> str:
    """Return the digest of the tokens and of the files among the tasks."""
    digest = sha256(windows.numpy().tobytes())
    for path in (Path(os.path.expanduser(task)) for task in tasks):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(file.read_bytes())
    return digest.hexdigest()
