"""The requirements of a distillation: packages and devices before it starts, memory while it runs, and a student whose
weights compare with its teacher's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch

from llmcompress.data.calibration import held_out_count
from llmcompress.errors import MemoryLimitError, RecipeError, is_out_of_memory
from llmcompress.losses.loss import reads_states
from llmcompress.models.dense.config import FUSED, MODEL, read_entries
from llmcompress.models.files.file_names import DISTILLATION_RECIPE, RECIPE
from llmcompress.recipe.calibration import TextSource
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import read_as, read_recipe
from llmcompress.recipe.sections import Fuse
from llmcompress.recipe.validation import hint
from llmcompress.reporting.report import KNOWN_TEXT


def check_requirements(recipe: Distillation, device: str) -> None:
    """Raise RecipeError if the recipe requires something that is not installed or that `device` cannot do."""
    _check_trackers(recipe)
    if recipe.optimizer != "adamw":
        check_bitsandbytes(f"optimizer: {recipe.optimizer}")
    kind = torch.device(device).type
    if recipe.optimizer == "paged_adamw_8bit" and kind != "cuda":
        raise RecipeError(
            f"optimizer: paged_adamw_8bit requires a GPU to page memory from, and the device is {kind}; use adamw_8bit"
        )
    if recipe.teacher.bits is not None:
        check_bitsandbytes(f"teacher: {{bits: {recipe.teacher.bits}}}")


def check_bitsandbytes(option: str) -> None:
    """Raise RecipeError if bitsandbytes is missing. `option`: the part of the recipe that requires it."""
    if find_spec("bitsandbytes") is None:
        raise RecipeError(f'{option} requires bitsandbytes; run pip install "llmcompress[distill]"')


def _check_trackers(recipe: Distillation) -> None:
    """Raise RecipeError for a tracker that accelerate does not know, or whose package is missing."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    for name in recipe.trackers:
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            near = hint(name, sorted(tracking.LOGGER_TYPE_TO_CLASS))
            raise RecipeError(f'trackers: accelerate knows no "{name}"; {near}')
        builtin = name in {str(kind) for kind in LoggerType}
        if builtin and LoggerType(name) not in tracking.get_available_trackers():
            package = name.replace("_", "-")
            raise RecipeError(f"trackers: {name} requires a package that is not installed; run pip install {package}")


@contextmanager
def advise_on_memory(recipe: Distillation) -> Iterator[None]:
    """Turn an out-of-memory error within the context into a MemoryLimitError that names the settings that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        ways = [
            f"a micro_batch below {recipe.micro_batch}" if recipe.micro_batch > 1 else "",
            "" if recipe.checkpointing else "checkpointing: true",
            "a lower data.length",
        ]
        raise MemoryLimitError(
            f"there is not enough memory for this training; set {' or '.join(filter(None, ways))}, and rerun"
        ) from error


def check_student(folder: Path, teacher: Path, recipe: Distillation) -> None:
    """Raise RecipeError as `check_fused` does, by the recipe in a student's folder, or if that cannot be read.

    `teacher`: the folder of its teacher.
    """
    if (folder / RECIPE).is_file():
        fuse = read_recipe(folder / RECIPE).fuse
    else:  # `save_pretrained` and exports keep the config alone
        fused, same = (read_entries(place / MODEL, place).get(FUSED) for place in (folder, teacher))
        fuse = Fuse.model_construct(**fused) if isinstance(fused, dict) and fused != same else None
    check_fused(fuse, recipe)


def find_known_text(folder: Path, recipe: Distillation) -> list[str]:
    """Return a warning of each text of `recipe` whose held-out part was trained on by the distillation that wrote the
    student's `folder`. `recipe`: as `hide_folders` returns it."""
    path, warnings = folder / DISTILLATION_RECIPE, []
    earlier = read_as(Distillation, path).texts() if path.is_file() else ()
    for text in recipe.texts():
        learned = [_training_samples(other, other.samples) for other in earlier if _tokens(other) == _tokens(text)]
        if (most := max(learned, default=0)) > _training_samples(text, text.samples):
            enough = next(samples for samples in count(most) if _training_samples(text, samples) >= most)
            warnings.append(f"{KNOWN_TEXT} of {text.dataset}; raise samples to {enough} or more")
    return warnings


def _training_samples(text: TextSource, samples: int) -> int:
    """Return how many of the first `samples` sequences of a text are trained on; those after them are held out."""
    return samples - held_out_count(text.held_out, samples)


def _tokens(text: TextSource) -> dict[str, Any]:
    """Return what the sequences of a text depend on, however many there are."""
    others = text.model_dump(exclude={"samples", "held_out", "name", "weight", "dataset", "sha256"})
    return others | {"dataset": text.sha256 or text.dataset}


def check_fused(fuse: Fuse | None, recipe: Distillation) -> None:
    """Raise RecipeError if the recipe compares weights or hidden states that `fuse:` changed before compression.

    The teacher is the model as it was, in other bases.
    """
    if fuse is None:
        return
    stages = recipe.stages()
    for _, stage in stages:
        _check_starts(stage)
    if fuse.rotation and any(reads_states(term.of) for term in recipe.losses):
        raise RecipeError(
            "losses: fuse: rotated the hidden states of this student into another basis than its teacher's; leave "
            "losses on hidden states out"
        )
    if fuse.rotation and any(kind == "blockwise" for kind, _ in stages):
        raise RecipeError(
            "a blockwise phase compares hidden states, and fuse: rotated this student's into another basis than its "
            "teacher's; leave the phase out"
        )


def _check_starts(stage: Distillation) -> None:
    """Raise RecipeError if something in a phase starts at the teacher's weights."""
    starts = {
        "latents: teacher": (stage.latents == "teacher", "set latents: codes"),
        "adapt: {start: residual}": (stage.adapt is not None and stage.adapt.start == "residual", "set start: zero"),
        "regrow: {start: teacher}": (
            stage.regrow is not None and stage.regrow.start == "teacher",
            "set start: zero, without by: learned",
        ),
    }
    for option, (is_given, advice) in starts.items():
        if is_given:
            raise RecipeError(
                f"{option} requires the teacher's weights, and this student's were changed by fuse: before "
                f"compression; {advice}"
            )
