"""The metrics of a running training: a line of JSON for every optimizer step and every look at the held-out sequences.
The trackers of Accelerate that the recipe names receive the same numbers.

    {"step": 3, "loss": 0.41, "terms": {"forward_kl": 0.41}, "rate": 0.9, "gradient_norm": 0.2, "tokens": 6120, ...}
    {"step": 25, "kl": 0.31, "perplexity": 25.1, "teacher_perplexity": 17.9, "tokens": 51000, "seconds": 64.0}

If oscillating codes are frozen, a step also has {"codes": {"changed": 40, "turned": 9, "frozen": 3}}: how many codes it
changed, how many of these turned back, and how many are frozen by then. If losses are balanced, the step after a look
has {"gradient_shares": {"forward_kl": 0.8, "hidden": 0.2}}, as they would be without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from llmcompress.errors import DiskError
from llmcompress.models.files.output import replace_text
from llmcompress.recipe.distillation import Distillation, Term
from llmcompress.recipe.read import hide_folders
from llmcompress.runtime.json_values import replace_nonfinite

AFTERWARDS = {"rounded", "pruned"}  # marks of looks after the last step of a phase, which a resumed run repeats
LOGS = ".logs"  # follows the name of the output folder: the folder for files of trackers


@dataclass(frozen=True)
class Metrics:
    """The file of one run and, if it is `tracked`, its trackers. Of several processes, the first one writes.

    `phase`: its number, if there are several, which lines then hold; `before`: the steps in earlier ones.
    """

    path: Path
    accelerator: Accelerator
    tracked: bool = True
    phase: int | None = None
    before: int = 0

    def start(self, step: int, begun: bool) -> None:
        """Drop the lines of this phase after `step`, from where it resumes; all its lines unless it has `begun`."""
        if self.accelerator.is_main_process and self.path.is_file():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            stays = [line for line in lines if self._stays(json.loads(line), step, begun)]
            replace_text(self.path, "".join(f"{line}\n" for line in stays))

    def _stays(self, row: Mapping[str, Any], step: int, begun: bool) -> bool:
        """True if a line is of another phase, or not after `step`."""
        if row.get("phase") != self.phase:
            return True
        return begun and row["step"] <= step and not row.keys() & AFTERWARDS

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write one line, which is in the file when this returns. Raises DiskError if it cannot be written."""
        entry = entry if self.phase is None else {"phase": self.phase, **entry}
        if self.tracked:
            self.accelerator.log(dict(_scalars(entry)), step=self.before + entry["step"])
        if not self.accelerator.is_main_process:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(replace_nonfinite(entry)) + "\n")
        except OSError as error:
            raise DiskError(f"{self.path} cannot be written ({error}); free some space and rerun") from error


def term_names(terms: Sequence[Term]) -> list[str]:
    """Return a name for each loss of an objective: its own, with a number from the second loss of that name on."""
    names = [term.of.loss for term in terms]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, before, strict=True)]


def tracker_arguments(recipe: Distillation, output: Path) -> dict[str, Any]:
    """Return the arguments of an `Accelerator` that logs to the recipe's trackers."""
    if not recipe.trackers:
        return {}
    folder = ProjectConfiguration(logging_dir=str(output.with_name(output.name + LOGS)))
    return {"log_with": list(recipe.trackers), "project_config": folder}


def start_trackers(recipe: Distillation, accelerator: Accelerator) -> None:
    """Open a run in every tracker, with the recipe's name and values."""
    values = hide_folders(recipe).model_dump(mode="json").items()
    plain = {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in values}
    accelerator.init_trackers(recipe.name, plain)


def _scalars(entry: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the numbers of an entry, those of a map inside it by "map/key"."""
    numbers: list[tuple[str, float]] = []
    for key, value in entry.items():
        if isinstance(value, Mapping):
            numbers += [(f"{key}/{inner}", number) for inner, number in _scalars(value)]
        elif key != "step":
            numbers.append((key, value))
    return numbers
