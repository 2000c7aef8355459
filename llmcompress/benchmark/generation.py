"""The loop that every model of transformers generates by, with the time of its parts."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TurnTimes:
    """Seconds of one turn. `first_token`: from the prompt to the first token chosen; `decode`: of `tokens` more."""

    threads: int  # as the engine says it computed with
    prompt: int  # tokens
    tokens: int
    prefill: float
    first_token: float
    decode: float


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompt: Sequence[int], tokens: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[int], TurnTimes]:
    """Return the likeliest `tokens` + 1 tokens after a prompt, one after the other, and the seconds that it took.

    One sequence, keys and values in transformers' DynamicCache, and logits of the last position only where the model
    can leave out the others. An end token does not end it.
    """
    from transformers import DynamicCache

    few: dict[str, Any] = {"logits_to_keep": 1} if _can_leave_out(model) else {}
    ids = torch.tensor([list(prompt)], device=model.device)
    cache = DynamicCache(config=model.config)
    start = clock()
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **few).logits
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)  # it is at work still; later the numbers of tokens wait for it
    read = clock()
    token = logits[:, -1:].argmax(-1)
    found = [int(token)]
    first = clock()
    for _ in range(tokens):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        found.append(int(token))
    end = clock()
    return found, TurnTimes(torch.get_num_threads(), len(prompt), tokens, read - start, first - start, end - first)


def _can_leave_out(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
