"""Names of the files that llmcompress writes beside a model's weights."""

from __future__ import annotations

REPORT = "report.json"
RECIPE = "recipe.yaml"
SCORES = "eval.json"  # what `eval --save` leaves for the card
ALLOCATION = "allocation.json"  # what a target's plan was chosen from, and what it was to do and did
DISTILLATION = "distillation.json"  # what `distill` did, its recipe, and its curve
DISTILLATION_RECIPE = "distillation.yaml"
DISTILLATION_PLOT = "distillation.png"
