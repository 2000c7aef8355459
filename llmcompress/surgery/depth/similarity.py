"""The consecutive blocks that change the hidden states least: the candidates for dropping.

The score of a run of n blocks is the mean over tokens of cos(input of block l, input of block l + n); the run with the
largest score goes. ShortGPT (arXiv 2403.03853) does this for n = 1, "The Unreasonable Ineffectiveness of the Deeper
Layers" (arXiv 2403.17887) for runs, on the last token only. The state after the last block is taken before the final
norm. The score is blind to a block that works on a single position: the one that makes the first token's state huge
seems to do nothing. So check the perplexity of the shortened model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llmcompress.errors import NumericsError
from llmcompress.models.dense.hidden_states import body, states_between
from llmcompress.models.dense.model import load_model
from llmcompress.surgery.depth.text import opened_text

SAMPLES, LENGTH = 16, 512  # of text: 8192 tokens are enough for the choice


@dataclass(frozen=True)
class Alike:
    """A run of blocks. `cosine`: between its input and its output; `cosines`: of every run of this length, by its first
    block; `text`: the source of the tokens."""

    blocks: tuple[int, ...]
    cosine: float
    cosines: tuple[float, ...]
    text: str


def alike_blocks(
    model: str | Path,
    count: int,
    *,
    text: str = "stdlib",
    revision: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Alike:
    """Find the `count` consecutive decoder blocks whose input and output are most alike. Loads the whole model.

    Args:
        model: a folder, a Hub id (`org/name` or `org/name@revision`) or `smollm2`; a dense causal language model.
        count: how many blocks.
        text: what is read, as `dataset` of a recipe's calibration.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.

    Returns:
        The blocks, with how alike each run of `count` blocks leaves its hidden states.

    Raises:
        RecipeError: for a model that has no more blocks than `count`.
        InputError: for a model or a text that cannot be read.
    """
    place, ids, read = opened_text(model, count, text, SAMPLES, LENGTH, revision, trust_remote_code)
    found = run_cosines(load_model(place, device), ids.to(device), count)
    best = int(found.argmax())
    if not bool(found.isfinite().all()):
        raise NumericsError(f"{place.name}: hidden states hold NaN or Inf; use an undamaged checkpoint")
    return Alike(tuple(range(best, best + count)), float(found[best]), tuple(found.tolist()), read)


@torch.no_grad()
def run_cosines(model: Any, ids: Tensor, count: int) -> Tensor:
    """Return the mean cosine over each run of `count` blocks, float64 `[runs]`; `ids`: `[sequences, length]`."""
    last = model.config.num_hidden_layers
    total = torch.zeros(last - count + 1, dtype=torch.float64)
    for sequence in ids:
        with states_between(model, range(last + 1)) as states:
            body(model)(input_ids=sequence[None], use_cache=False)
        for first in range(len(total)):
            one, other = states[first].float(), states[first + count].float()
            total[first] += float(cosine_similarity(one, other, dim=-1).double().sum())
    return total / ids.numel()
