"""Hidden states of a model beside those of the one that it was made from, block by block: where the two part.

Two measures. The relative error of a token is `|s - t|^2 / |t|^2`, and counts turns and changes of length alike.
Centred kernel alignment (CKA, arXiv 1905.00414) asks whether the same tokens are near each other in both models,
whatever the basis and the width; it is 1 if so and about 0 for unrelated states. It is estimated without bias window by
window (arXiv 2010.15327), so few tokens and wide models do not make it look better. Tokens count as directions: the
first ones of a window are a hundred times as long as others in many models, and would be the whole measure.

Both models pass block by block, so that one block of each is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibration.streaming import StreamedModel
from llmcompress.errors import InputError, NumericsError
from llmcompress.evaluation.logits import Counting, by_blocks, opened
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.models.dense.blocks import matched_blocks
from llmcompress.models.dense.load import check_fits
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import check_vocabularies, load_tokenizer
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.precision import fast_float32

BRIEF = Protocol(windows=8, length=512)
FEWEST = 4  # tokens in a window, below which nothing is estimated
ALIKE = 1e-10  # variance of cosines, below which it is that of rounding


@dataclass(frozen=True)
class BlockDrift:
    """The states that enter a block. `block`: its number, or of blocks in all for what leaves the last one; `original`:
    the same in the other model; `cka`: None if the states of either are all alike; `error`: the mean over tokens of the
    relative error, None where widths differ."""

    block: int
    original: int
    cka: float | None
    error: float | None


@dataclass(frozen=True)
class Drift(JsonRecord):
    """The drift of `model` from `against` at every block, on `tokens` tokens of the protocol's text."""

    model: str
    against: str
    protocol: dict[str, Any]
    tokens: int
    blocks: tuple[BlockDrift, ...]


@fast_float32()
@torch.no_grad()
def drift(
    model: str | Path,
    against: str | Path,
    protocol: Protocol = BRIEF,
    *,
    revision: str | None = None,
    device: str = "cpu",
    progress: Counting | None = None,
    trust_remote_code: bool = False,
) -> Drift:
    """Measure how far hidden states of `model` are from those of `against`, at the input of every block.

    Args:
        model: a folder, a Hub id or `smollm2`; compressed, shortened, narrowed or dense.
        against: the dense model that it was made from.
        protocol: the text; tasks are left aside.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        progress: receives (blocks of `model` that are done, blocks).
        trust_remote_code: True to run the Python code that models bring along, if transformers lacks their class.

    Returns:
        The alignment and the relative error at the input of every block, and behind the last one.

    Raises:
        InputError: for a model that cannot be loaded or read block by block, for two that have different vocabularies,
            and for a text that is too short.
        RecipeError: for models whose blocks have no known counterparts.
        NumericsError: for hidden states that are NaN or infinite.
    """
    if protocol.length < FEWEST:
        raise InputError(f"windows of {protocol.length} tokens tell nothing; set length to {FEWEST} or more")
    places = [locate(model, revision, trust_remote_code), locate(against, trust_remote_code=trust_remote_code)]
    check_vocabularies(places, predictions=False)
    tokenizer = load_tokenizer(places[0].folder, trust_remote_code)
    evaluation_windows(tokenizer, protocol)  # a text is missed before models are loaded
    check_fits(device, "reading it", [], places)
    mine, theirs = (opened(place, device) for place in places)
    ids = evaluation_windows(tokenizer, protocol, mine.config, theirs.config)
    found = tuple(_drifts(by_blocks(mine), by_blocks(theirs), ids, progress))
    names = [place.public_name for place in places]
    return Drift(names[0], names[1], protocol.to_json(), ids.numel(), found)


def _drifts(mine: StreamedModel, theirs: StreamedModel, ids: Tensor, progress: Counting | None) -> Iterator[BlockDrift]:
    """Let both models pass, and yield the drift at each block of `mine`, then behind its last."""
    originals = matched_blocks(mine.model, theirs.model) | {mine.depth: theirs.depth}
    given, wanted = (model.embed(ids, 1) for model in (mine, theirs))
    reached = 0
    for block, original in originals.items():
        for index in range(reached, original):
            theirs.advance(wanted, index)
        reached = original
        found = BlockDrift(block, original, cka(given.hidden, wanted.hidden), _error(given.hidden, wanted.hidden))
        if not all(value is None or value == value for value in (found.cka, found.error)):
            raise NumericsError(f"hidden states at block {block} are NaN or infinite; use an undamaged checkpoint")
        yield found
        if block < mine.depth:
            mine.advance(given, block)
        if progress is not None:
            progress(min(block + 1, mine.depth), mine.depth)


def cka(given: Tensor, wanted: Tensor) -> float | None:
    """Return the alignment of states `[windows, length, width]`, whose widths may differ; None if those of one model
    do not differ from each other at all."""
    sums = torch.zeros(3, dtype=torch.float64)
    for mine, theirs in zip(given, wanted, strict=True):
        one, other = _similarities(mine), _similarities(theirs)
        pairs = ((one, other), (one, one), (other, other))
        sums += torch.stack([_independence(*pair) for pair in pairs]).cpu()
    across, *own = (float(value) / len(given) for value in sums)
    return across / sqrt(own[0] * own[1]) if min(own) > ALIKE else None


def _similarities(states: Tensor) -> Tensor:
    """Return the cosines of all pairs of tokens, of `[length, width]`, float64 `[length, length]`, zero on the
    diagonal."""
    directions = torch.nn.functional.normalize(states.double(), dim=-1)
    return (directions @ directions.T).fill_diagonal_(0.0)


def _independence(one: Tensor, other: Tensor) -> Tensor:
    """Return the unbiased estimate of the Hilbert-Schmidt independence criterion, of kernels with an empty diagonal."""
    n = len(one)
    together = (one * other).sum() + one.sum() * other.sum() / ((n - 1) * (n - 2))
    return (together - 2 / (n - 2) * (one.sum(0) @ other.sum(0))) / (n * (n - 3))


def _error(given: Tensor, wanted: Tensor) -> float | None:
    """Return the mean over tokens of the relative error; None for states of different widths."""
    if given.shape != wanted.shape:
        return None
    energy = wanted.float().square().sum(-1)
    error = (given.float() - wanted.float()).square().sum(-1)
    return float((error / energy.clamp_min(torch.finfo(torch.float32).tiny)).double().mean())
