"""Names of the files that llmcompress writes beside a model's weights."""

from __future__ import annotations

REPORT = "report.json"
RECIPE = "recipe.yaml"
SCORES = "eval.json"  # scores of `eval --save`, for the model card
ALLOCATION = "allocation.json"  # prices behind a target's plan, predicted and measured results
DISTILLATION = "distillation.json"  # result of `distill`, its recipe, and its curve
DISTILLATION_RECIPE = "distillation.yaml"
DISTILLATION_PLOT = "distillation.png"
GENERATIONS = "generations.json"  # {prompt: {model: continuation}}, which a report shows side by side
METRICS = "metrics.jsonl"  # of a distillation, step by step
