"""The protocol of scoring, which is stored with the scores."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError, RecipeError, check_several
from llmcompress.recipe.text_files import holds_documents, split_names
from llmcompress.runtime.json_values import JsonRecord

STANDARD_TEXT = "Python's documentation"


@dataclass(frozen=True)
class Protocol(JsonRecord):
    """The texts and tasks of scores, which can be compared if their protocols are equal."""

    text: str | Path | None = None  # a text, files as in a recipe's `dataset`, or None: Python's documentation
    windows: int = 32  # at most
    length: int = 1024  # tokens in a window
    tasks: tuple[str, ...] = ()  # lm-eval's names, "llmcompress_pairs", .yaml and .jsonl files, folders of them
    limit: int | float | None = None  # items per task, or a share below 1; do not quote such scores
    num_fewshot: int | None = None  # examples in a prompt; None: the task's own number
    batch_size: int = 8  # of tasks; changes their scores slightly
    chat_template: bool = False  # True: prompts of tasks are written as chats
    seed: int = 0  # of few-shot examples and samples
    domains: str | Path | None = None  # a folder of .txt files, one kind of text each, which are scored as well
    generate: bool = False  # True: tasks of .jsonl files let the model write answers and programs, and run these

    def __post_init__(self) -> None:
        """Take the path of a file in place of a text. Raise RecipeError for one name in place of several, and for a
        limit that is neither a number of items nor a share of them."""
        if isinstance(self.text, str) and os.path.isfile(os.path.expanduser(self.text)):
            object.__setattr__(self, "text", Path(self.text))
        check_several(self.tasks, "tasks")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and float(self.limit).is_integer())):
            raise RecipeError(
                f"limit {self.limit} is neither a number of items nor a share of them; give a whole number, 1 or more, "
                f"or a share below 1"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields; the text as its source, domains as their names.

        Without `domains` and `generate` where they are not asked for: scores from before there were any compare.
        """
        match self.text:
            case None:
                source = STANDARD_TEXT
            case Path():
                names = ", ".join(Path(name).name for name in split_names(str(self.text)))
                source = f"documents of {names}" if self.has_documents else names
            case _:
                source = f"a text of {len(self.text):,} characters"
        tasks = [Path(task).name if Path(task).expanduser().exists() else task for task in self.tasks]
        values = super().to_json() | {"text": source, "tasks": tasks, "domains": list(self.by_domain())}
        return {name: value for name, value in values.items() if name not in ("domains", "generate") or value}

    @property
    def has_documents(self) -> bool:
        """True if the text is files of documents, not one plain text."""
        return isinstance(self.text, Path) and holds_documents(str(self.text))

    def by_domain(self) -> dict[str, Protocol]:
        """Return the protocol of each kind of text by its name; none without a folder of them.

        Raises InputError for a folder without .txt files.
        """
        if self.domains is None:
            return {}
        files = sorted(Path(self.domains).expanduser().glob("[!.]*.txt"))
        if not files:
            raise InputError(f"{self.domains} is no folder with .txt files; put one kind of text into each")
        return {file.stem: replace(self, text=file, domains=None, tasks=()) for file in files}


STANDARD = Protocol()
