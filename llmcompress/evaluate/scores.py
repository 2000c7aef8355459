"""Everything one wants to know of a model in one call: perplexity, tasks, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmcompress.evaluate.compare import compare
from llmcompress.evaluate.harness import run_tasks
from llmcompress.evaluate.perplexity import perplexity, text_windows
from llmcompress.modules import decoded
from llmcompress.text import read_text, stdlib_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | None = None,
    *,
    windows: int = 32,
    length: int = 1024,
    tasks: Sequence[str] = (),
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    against: PreTrainedModel | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """-> perplexity, tokens, tasks {name: {metric: value}}, kl and top1_agreement (None unless `against` is given).

    `text` is a text, the Path of a UTF-8 file, or None: documentation that Python ships and that calibration on
    "stdlib" never sees. `against` is the teacher. `tasks`, `limit`, `num_fewshot`, `batch_size` (of tasks) and `seed`
    are those of `run_tasks`. Compressed layers stay decoded meanwhile, so they take the memory of dense ones.
    """
    ids = evaluation_windows(tokenizer, text, windows, length, model)
    with decoded(model):
        if against is None:
            score, distance = perplexity(model, ids), None
        else:
            with decoded(against):
                distance = compare(against, model, ids)
            score = distance.student
        scored = run_tasks(
            model, tokenizer, tasks, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, seed=seed
        )
    return {
        "perplexity": score.value,
        "tokens": score.tokens,
        "tasks": scored,
        "kl": None if distance is None else distance.kl,
        "top1_agreement": None if distance is None else distance.top1_agreement,
    }


def compare_models(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | None = None,
    *,
    windows: int = 32,
    length: int = 1024,
    tasks: Sequence[str] = (),
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """{"dense": ..., "compressed": ...}, each what `evaluate` gives, the distances both measured from `dense`."""
    ids = evaluation_windows(tokenizer, text, windows, length, dense)
    both = {"dense": dense, "compressed": compressed}
    with decoded(dense), decoded(compressed):
        distance = compare(dense, compressed, ids)
        scored = {
            name: run_tasks(
                model, tokenizer, tasks, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, seed=seed
            )
            for name, model in both.items()
        }
    return {
        "dense": {
            "perplexity": distance.teacher.value,
            "tokens": distance.tokens,
            "tasks": scored["dense"],
            "kl": 0.0,
            "top1_agreement": 1.0,
        },
        "compressed": {
            "perplexity": distance.student.value,
            "tokens": distance.tokens,
            "tasks": scored["compressed"],
            "kl": distance.kl,
            "top1_agreement": distance.top1_agreement,
        },
    }


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, text: str | Path | None, windows: int, length: int, model: PreTrainedModel
) -> Tensor:
    """The windows [n, length] of `text` (see `evaluate`) that `model` is to read."""
    if text is None:
        text = stdlib_text("test")
    elif isinstance(text, Path):
        text = read_text(text)
    return text_windows(tokenizer, text, windows, length, model.config)
