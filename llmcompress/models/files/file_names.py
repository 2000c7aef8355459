"""Names of the files that llmcompress writes beside a model's weights, and names that no file can have."""

from __future__ import annotations

CONFIG = "config.json"
MANIFEST = "manifest.json"  # the digests of all other files
REPORT = "report.json"
TERMS = "lora.gguf"  # low-rank terms beside a GGUF file
RECIPE = "recipe.yaml"
SCORES = "eval.json"  # scores of `eval --save`, for the model card
ALLOCATION = "allocation.json"  # prices behind a target's plan, predicted and measured results
EXPERTS = "experts.json"  # fate of every expert of a mixture that was pruned, condensed or replaced
GGUF_SOURCE = "gguf_source.json"  # in an unpacked folder: the types in which its weights were stored
NARROWED = "narrowed.json"  # neurons and heads that stay in every block of a narrower model
ORIGIN = "origin.json"  # of a changed dense model: Hub id, commit, licence and notes of what it was made from
DISTILLATION = "distillation.json"  # result of `distill`, its recipe, and its curve
DISTILLATION_RECIPE = "distillation.yaml"
DISTILLATION_PLOT = "distillation.png"
GENERATIONS = "generations.json"  # {prompt: {model: continuation}}, which a report shows side by side
PASSPORT = "passport.json"  # what adapters of the dense model are worth on the compressed one
METRICS = "metrics.jsonl"  # of a distillation, step by step
