"""What compression cost: perplexity, lm-eval tasks, and the distance to the dense model."""

from llmcompress.evaluate.distance import Distance, distance
from llmcompress.evaluate.harness import PAIRS, TaskScores, minimal_pairs_task, run_tasks
from llmcompress.evaluate.noise import Difference, paired
from llmcompress.evaluate.perplexity import Perplexity, evaluation_windows, perplexity, text_windows
from llmcompress.evaluate.processes import ALONE, Processes, launched
from llmcompress.evaluate.scores import Evaluation, compare, evaluate

__all__ = [
    "ALONE",
    "Difference",
    "Distance",
    "Evaluation",
    "PAIRS",
    "Perplexity",
    "Processes",
    "TaskScores",
    "compare",
    "distance",
    "evaluate",
    "evaluation_windows",
    "launched",
    "minimal_pairs_task",
    "paired",
    "perplexity",
    "run_tasks",
    "text_windows",
]
