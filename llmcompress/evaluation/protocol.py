"""The protocol of scoring: one list of arguments for everything that measures, stored with what it measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError, RecipeError
from llmcompress.runtime.json_values import JsonRecord

STANDARD_TEXT = "Python's documentation"


@dataclass(frozen=True)
class Protocol(JsonRecord):
    """Two scores can be compared where their protocols are equal."""

    text: str | Path | None = None  # a text, a UTF-8 file, or None: documentation of Python that calibration never sees
    windows: int = 32  # of text, at most
    length: int = 1024  # tokens in a window
    tasks: tuple[str, ...] = ()  # lm-eval's names, "llmcompress_pairs", .yaml files, folders of them, .jsonl files
    limit: int | float | None = None  # items per task, or a share below 1: not a result to quote
    num_fewshot: int | None = None  # examples in a prompt; None: the task's own number
    batch_size: int = 8  # of tasks; moves their scores a little
    chat_template: bool = False  # true: prompts of tasks are written as chats
    seed: int = 0  # of few-shot examples and samples
    domains: Path | None = None  # a folder of .txt files, one kind of text each, that are read beside the text

    def __post_init__(self) -> None:
        """Raise RecipeError for a limit that is neither a number of items nor a share of them."""
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and float(self.limit).is_integer())):
            raise RecipeError(
                f"limit {self.limit} is neither a number of items nor a share of them; give a whole number, 1 or more, "
                f"or a share below 1"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields; of the text, where it came from, of kinds of text their names."""
        match self.text:
            case None:
                source = STANDARD_TEXT
            case Path():
                source = self.text.name
            case _:
                source = f"a text of {len(self.text):,} characters"
        tasks = [Path(task).name if Path(task).expanduser().exists() else task for task in self.tasks]
        values = super().to_json() | {"text": source, "tasks": tasks, "domains": list(self.by_domain())}
        return {name: value for name, value in values.items() if name != "domains" or value}

    def by_domain(self) -> dict[str, Protocol]:
        """Return, by name, the protocol of each kind of text alone; none where there is no folder of them.

        Raises InputError for a folder without .txt files.
        """
        if self.domains is None:
            return {}
        files = sorted(self.domains.glob("*.txt"))
        if not files:
            raise InputError(f"{self.domains} is no folder with .txt files; put one kind of text into each")
        return {file.stem: replace(self, text=file, domains=None, tasks=()) for file in files}


STANDARD = Protocol()
