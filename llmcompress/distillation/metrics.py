"""The metrics of a running training: a line of JSON for every optimizer step and every look at the held-out sequences.
The Accelerate trackers that the recipe names receive the same numbers.

    {"step": 3, "loss": 0.41, "terms": {"forward_kl": 0.41}, "rate": 0.9, "gradient_norm": 0.2, "tokens": 6120, ...}
    {"step": 25, "kl": 0.31, "perplexity": 25.1, "teacher_perplexity": 17.9, "tokens": 51000, "seconds": 64.0}

If oscillating codes are frozen, a step also has {"codes": {"changed": 40, "turned": 9, "frozen": 3}}: the number of
codes that it changed, of those among them that turned back, and of codes that are frozen by then. If losses are
balanced, the step after a look has {"gradient_shares": {"forward_kl": 0.8, "hidden": 0.2}}, as they would be without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration

from llmcompress.errors import DiskError, RecipeError
from llmcompress.models.files.output import replace_text
from llmcompress.recipe.distillation import Distillation, Term
from llmcompress.recipe.read import hide_folders
from llmcompress.recipe.validation import hint
from llmcompress.runtime.json_values import replace_nonfinite

AFTERWARDS = {"rounded", "pruned"}  # marks of lines about what is done to weights once a phase has trained them
LOGS = ".logs"  # follows the name of the output folder: the folder for files of trackers


class Metrics:
    """The file of one run and, if it is `tracked`, its trackers. If there are several processes, only the first one
    writes."""

    def __init__(
        self, path: Path, accelerator: Accelerator, phase: int | None = None, before: int = 0, *, tracked: bool = True
    ) -> None:
        self.path, self.accelerator, self.phase, self.before, self.tracked = path, accelerator, phase, before, tracked

    def of_phase(self, number: int, before: int) -> Metrics:
        """Return the metrics of one phase of several, after `before` steps in earlier ones; lines hold its number."""
        return Metrics(self.path, self.accelerator, number, before, tracked=self.tracked)

    def start(self, step: int, begun: bool) -> None:
        """Drop the lines of this phase after `step`, where it resumes; all its lines unless it has `begun`."""
        if self.accelerator.is_main_process and self.path.is_file():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if self._stays(json.loads(line), step, begun)]
            replace_text(self.path, "".join(f"{line}\n" for line in kept))

    def _stays(self, row: Mapping[str, Any], step: int, begun: bool) -> bool:
        """True if a line is of another phase or not after `step`; what follows the last step is measured again."""
        if row.get("phase") != self.phase:
            return True
        return begun and row["step"] <= step and not row.keys() & AFTERWARDS

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write one line, which is in the file when this returns; null for numbers that JSON lacks. Raises DiskError
        if the file cannot be written."""
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


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError for a tracker that accelerate does not know, or whose package is missing."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise RecipeError(f'trackers: accelerate knows no "{name}"; {hint(name, sorted(LOGGER_TYPE_TO_CLASS))}')
        builtin = name in {str(kind) for kind in LoggerType}
        if builtin and LoggerType(name) not in get_available_trackers():
            package = name.replace("_", "-")
            raise RecipeError(f"trackers: {name} requires a package that is not installed; run pip install {package}")


def tracking(recipe: Distillation, output: Path) -> dict[str, Any]:
    """Return the arguments of an `Accelerator` that logs to the recipe's trackers. Raises as `check_trackers` does."""
    check_trackers(recipe.trackers)
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
    found: list[tuple[str, float]] = []
    for key, value in entry.items():
        if isinstance(value, Mapping):
            found += [(f"{key}/{inner}", number) for inner, number in _scalars(value)]
        elif key != "step":
            found.append((key, value))
    return found
