"""Prompts of tasks that a model cannot read whole: lm-eval cuts their first tokens off and goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def cut_prompts(samples: Mapping[str, Sequence[Mapping[str, Any]]], harness: Any) -> Iterator[str]:
    """Yield a sentence for each task with cut prompts; an item counts once, with whichever of its answers.

    `samples`: lm-eval's, of each task; `harness`: its model.
    """
    for task, rows in samples.items():
        items = {row["doc_id"]: row["arguments"] for row in rows}  # every filter has the same
        cut = [item for item, requests in items.items() if any(_is_cut(one, harness) for one in requests)]
        if cut:
            answer = max(_reserved(one, harness) for one in items[cut[0]])
            room = f"{harness.max_length} tokens" + (f", less {answer} for the answer" if answer else "")
            yield (
                f"{len(cut)} of {len(items)} prompts of {task} are longer than the model's {room}; the first tokens "
                f"were cut"
            )


def _is_cut(request: tuple[Any, ...], harness: Any) -> bool:
    """True for the arguments of a request that lm-eval's HFLM shortens."""
    match request:
        case (str(prompt), dict()):
            return len(harness.tok_encode(prompt)) > harness.max_length - _reserved(request, harness)
        case (str(prompt), str(answer)) if prompt:  # an answer that is longer by itself is an error
            return len(harness.tok_encode(prompt + answer)) > harness.max_length + 1  # the last token is not read
        case _:  # a text whose perplexity is taken is read window by window
            return False


def _reserved(request: tuple[Any, ...], harness: Any) -> int:
    """Return how many tokens of the context are left for what the model writes."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if not isinstance(request[-1], dict):
        return 0
    return int(normalize_gen_kwargs(request[-1], harness.max_gen_toks)["max_gen_toks"])
