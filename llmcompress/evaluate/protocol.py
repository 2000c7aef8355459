"""The protocol of scoring: one list of arguments for everything that measures, stored with what it measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STANDARD_TEXT = "Python's documentation"


@dataclass(frozen=True)
class Protocol:
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

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields; of the text, where it came from."""
        match self.text:
            case None:
                source = STANDARD_TEXT
            case Path():
                source = self.text.name
            case _:
                source = f"a text of {len(self.text):,} characters"
        tasks = [Path(task).name if Path(task).expanduser().exists() else task for task in self.tasks]
        return asdict(self) | {"text": source, "tasks": tasks}


STANDARD = Protocol()
