"""What compression cost: perplexity, lm-eval tasks, and the distance to the dense model."""

from llmcompress.evaluate.compare import Comparison, compare
from llmcompress.evaluate.harness import PAIRS, minimal_pairs_task, run_tasks
from llmcompress.evaluate.perplexity import Perplexity, perplexity, text_windows
from llmcompress.evaluate.scores import compare_models, evaluate

__all__ = [
    "PAIRS",
    "Comparison",
    "Perplexity",
    "compare",
    "compare_models",
    "evaluate",
    "minimal_pairs_task",
    "perplexity",
    "run_tasks",
    "text_windows",
]
