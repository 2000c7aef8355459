"""Drift of hidden states of a model from those of its dense original, block by block, by two measures.

The relative error of a token is `|s - t|^2 / |t|^2`. Centred kernel alignment (CKA, arXiv 1905.00414) asks whether the
same tokens are near each other in both models, whatever the basis and the width: it is 1 if so, and about 0 for
unrelated states. Its estimate is unbiased in each window (arXiv 2010.15327), so that few tokens and wide models do not
raise it. Tokens count as directions, since the first ones of a window are a hundred times as long as others in many
models and would dominate.

One block of each model is in memory at a time.
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
from llmcompress.data.calibration import bos_token
from llmcompress.errors import InputError, NumericsError
from llmcompress.evaluation.logits import Counting, by_blocks, open_model
from llmcompress.evaluation.perplexity import describe_protocol, evaluation_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.models.dense.blocks import matched_blocks
from llmcompress.models.dense.load import check_fits
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import check_vocabularies, load_tokenizer
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.precision import fast_float32

BRIEF = Protocol(windows=8, length=512)
FEWEST = 4  # tokens in a window, for an estimate
ALIKE = 1e-10  # variance of cosines that is rounding alone


@dataclass(frozen=True)
class BlockDrift:
    """The states that enter a block. `block`: its number, or the number of blocks for the output of the last one;
    `original`: its counterpart in the other model; `cka`: None if all states of one model are alike; `error`: the mean
    relative error over tokens, None if widths differ."""

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
    places = [locate(model, revision, trust_remote_code), locate(against, trust_remote_code=trust_remote_code)]
    check_vocabularies(places, predictions=False)
    tokenizer = load_tokenizer(places[0].folder, trust_remote_code)
    behind = int(bos_token(tokenizer) is not None)  # states of BOS are those of no text
    if protocol.length < FEWEST + behind:
        raise InputError(f"windows of {protocol.length} tokens tell nothing; set length to {FEWEST + behind} or more")
    evaluation_windows(tokenizer, protocol)  # a text is missed before models are loaded
    check_fits(device, "reading it", [], places)
    small, dense = (open_model(place, device) for place in places)
    ids = evaluation_windows(tokenizer, protocol, small.config, dense.config)
    blocks = tuple(_block_drifts(by_blocks(small), by_blocks(dense), ids, behind, progress))
    names = [place.public_name for place in places]
    return Drift(names[0], names[1], describe_protocol(tokenizer, protocol), len(ids) * (ids.shape[1] - behind), blocks)


def _block_drifts(
    small: StreamedModel, dense: StreamedModel, ids: Tensor, behind: int, progress: Counting | None
) -> Iterator[BlockDrift]:
    """Run both models, and yield the drift at the input of each block of `small`, then behind its last.

    behind: the number of tokens at the beginning of a window that do not count.
    """
    originals = matched_blocks(small.model, dense.model) | {small.depth: dense.depth}
    given, wanted = (model.embed(ids, 1) for model in (small, dense))
    reached = 0
    for block, original in originals.items():
        for index in range(reached, original):
            dense.advance(wanted, index)
        reached = original
        states = given.hidden[:, behind:], wanted.hidden[:, behind:]
        alignment, error = cka(*states), _relative_error(*states)
        if not all(value is None or value == value for value in (alignment, error)):
            raise NumericsError(f"hidden states at block {block} are NaN or infinite; use an undamaged checkpoint")
        yield BlockDrift(block, original, alignment, error)
        if block < small.depth:
            small.advance(given, block)
        if progress is not None:
            progress(min(block + 1, small.depth), small.depth)


def cka(given: Tensor, wanted: Tensor) -> float | None:
    """Return the alignment of states `[windows, length, width]`; widths may differ. None if all states of one model
    are alike."""
    sums = torch.zeros(3, dtype=torch.float64)
    for windows in zip(given, wanted, strict=True):
        kernel, other = map(_similarities, windows)
        pairs = ((kernel, other), (kernel, kernel), (other, other))
        sums += torch.stack([_independence(*pair) for pair in pairs]).cpu()
    across, *own = (float(value) / len(given) for value in sums)
    return across / sqrt(own[0] * own[1]) if min(own) > ALIKE else None


def _similarities(states: Tensor) -> Tensor:
    """Return the cosines of all pairs of tokens of `[length, width]`, float64 `[length, length]`, diagonal zero."""
    directions = torch.nn.functional.normalize(states.double(), dim=-1)
    return (directions @ directions.T).fill_diagonal_(0.0)


def _independence(kernel: Tensor, other: Tensor) -> Tensor:
    """Return the unbiased estimate of the Hilbert-Schmidt independence criterion, of kernels with an empty diagonal."""
    n = len(kernel)
    joint = (kernel * other).sum() + kernel.sum() * other.sum() / ((n - 1) * (n - 2))
    return (joint - 2 / (n - 2) * (kernel.sum(0) @ other.sum(0))) / (n * (n - 3))


def _relative_error(given: Tensor, wanted: Tensor) -> float | None:
    """Return the mean relative error over tokens; None for states of different widths."""
    if given.shape != wanted.shape:
        return None
    energy = wanted.float().square().sum(-1)
    error = (given.float() - wanted.float()).square().sum(-1)
    return float((error / energy.clamp_min(torch.finfo(torch.float32).tiny)).double().mean())
