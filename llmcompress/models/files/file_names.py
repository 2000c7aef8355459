"""Names of the files that llmcompress writes beside a model's weights, and names that no file can have."""

from __future__ import annotations

import os
from pathlib import Path

from llmcompress.errors import DiskError, InputError

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux's file systems
BESIDE = 24  # bytes that names beside an output have more than its own, such as ".training.partial.lock"

REPORT = "report.json"
RECIPE = "recipe.yaml"
SCORES = "eval.json"  # scores of `eval --save`, for the model card
ALLOCATION = "allocation.json"  # prices behind a target's plan, predicted and measured results
EXPERTS = "experts.json"  # fate of every expert of a mixture that was pruned, condensed or replaced
NARROWED = "narrowed.json"  # neurons and heads that stay in every block of a narrower model
DISTILLATION = "distillation.json"  # result of `distill`, its recipe, and its curve
DISTILLATION_RECIPE = "distillation.yaml"
DISTILLATION_PLOT = "distillation.png"
GENERATIONS = "generations.json"  # {prompt: {model: continuation}}, which a report shows side by side
PASSPORT = "passport.json"  # what adapters of the dense model are worth on the compressed one
METRICS = "metrics.jsonl"  # of a distillation, step by step


def check_name(output: Path) -> None:
    """Raise DiskError for an output whose name, or the name of what is written beside it, no file can have."""
    names = [len(os.fsencode(part)) for part in output.parts]
    if max(names, default=0) > LONGEST_NAME or (names and names[-1] > LONGEST_NAME - BESIDE):
        raise DiskError(
            f"{output} is too long a name: an output's has at most {LONGEST_NAME - BESIDE} bytes, that of a folder "
            f"{LONGEST_NAME}; choose a shorter one"
        )
    if len(os.fsencode(output)) > LONGEST_PATH or "\0" in str(output):
        raise DiskError(f"{str(output)[:LONGEST_NAME]!r} is no path that a file can have; choose another output")


def check_output_name(output: Path) -> None:
    """Raise DiskError as `check_name`, and for the folder of a checkpoint that safetensors could not write to."""
    check_name(output)
    if not is_text(output):
        raise DiskError(f"{str(output)!r} is not UTF-8, which safetensors requires of paths; choose another output")


def check_folder(folder: Path) -> None:
    """Raise InputError for a folder whose name safetensors cannot read."""
    if not is_text(folder):
        raise InputError(f"{str(folder)!r} is not UTF-8, which safetensors requires of paths; rename the folder")


def is_text(path: Path) -> bool:
    """True if a path is UTF-8; bytes that are not stand in it as lone surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
