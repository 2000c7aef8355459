"""The blocks whose absence changes the predictions least, found by trying.

The damage of a set of blocks is the mean KL of the dense model's predictions to those without the set. The search is a
floating one (Pudil, Novovicova and Kittler, 1994): the block that is missed least goes; then blocks that are gone come
back as long as fewer blocks were never gone at less damage; and so on, until one block more than asked for is gone.
Sums of the damages of single blocks, as LAPTOP-Diff (arXiv 2404.11098) has them, miss that blocks do each other's work,
and so does a search that never looks back; cosines of hidden states (see `similarity`) miss what the states are for.

Sets that begin alike share their forwards, so that leaving out each of n blocks once takes half of n forwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.calibrate.streaming import States, Streamed, in_memory
from llmcompress.compression.depth.text import opened_text
from llmcompress.errors import NumericsError
from llmcompress.evaluate.distance import kl_divergence
from llmcompress.models.dense import load_model
from llmcompress.runtime.precision import fast_float32, product_dtype, products

SAMPLES, LENGTH = 8, 512  # of text: 4096 tokens order sets as other text does
POSITIONS = 128  # whose predictions are compared at a time

Blocks = frozenset[int]
Counting = Callable[[int], None]  # models tried so far


@dataclass(frozen=True)
class LeastDamage:
    """Blocks that can go. `damage`: the KL in nats without them; `alone`: that without each block of the model alone;
    `text`: the source of the tokens."""

    blocks: tuple[int, ...]
    damage: float
    alone: tuple[float, ...]
    text: str


@fast_float32()
def least_damage(
    model: str | Path,
    count: int,
    *,
    text: str = "stdlib",
    revision: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Counting | None = None,
) -> LeastDamage:
    """Find `count` decoder blocks whose absence damages predictions least. Loads the whole model.

    Args:
        model: a folder, a Hub id (`org/name` or `org/name@revision`) or `smollm2`; a dense causal language model.
        count: how many blocks.
        text: what is read, as `dataset` of a recipe's calibration.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.
        progress: receives the number of sets of blocks that were tried.

    Returns:
        The blocks, with the damage of their absence.

    Raises:
        RecipeError: for a model that has no more blocks than `count`.
        InputError: for a model or a text that cannot be read, or whose blocks cannot be run one by one.
    """
    place, ids, source = opened_text(model, count, text, SAMPLES, LENGTH, revision, trust_remote_code)
    streamed, tried = in_memory(load_model(place, device)), dict[Blocks, float]()
    everything = frozenset(range(streamed.depth))

    def best(sets: list[Blocks]) -> tuple[float, Blocks]:
        """The least damage of some sets of blocks that go, and the set."""
        new = [gone for gone in sets if gone not in tried]
        kept = [tuple(sorted(everything - gone)) for gone in new]
        tried.update(zip(new, damages(streamed, ids, kept).tolist(), strict=True))
        if progress is not None:
            progress(len(tried))
        if not all(math.isfinite(tried[gone]) for gone in sets):
            raise NumericsError(f"{place.name}: predictions hold NaN or Inf; use an undamaged checkpoint")
        return min(((tried[gone], gone) for gone in sets), key=lambda found: (found[0], sorted(found[1])))

    blocks, damage = floating_search(count, everything, best)
    alone = tuple(tried[frozenset({index})] for index in sorted(everything))
    return LeastDamage(tuple(sorted(blocks)), damage, alone, source)


def floating_search(
    count: int, everything: Blocks, best: Callable[[list[Blocks]], tuple[float, Blocks]]
) -> tuple[Blocks, float]:
    """Return `count` members of `everything` that can go and their damage; `best` finds the least of some sets."""
    found: dict[int, tuple[float, Blocks]] = {}
    gone, most = Blocks(), min(count + 1, len(everything) - 1)
    while len(gone) < most:
        damage, gone = best([gone | {index} for index in everything - gone])
        if len(gone) not in found or damage < found[len(gone)][0]:
            found[len(gone)] = damage, gone
        while len(gone) > 2:
            damage, fewer = best([gone - {index} for index in gone])
            if damage >= found[len(fewer)][0]:
                break
            gone = fewer
            found[len(gone)] = damage, gone
    damage, gone = found[count]
    return gone, damage


@torch.no_grad()
def damages(streamed: Streamed, ids: Tensor, sets: Sequence[Sequence[int]]) -> Tensor:
    """Return the damage of a model that has only the blocks of each set, in order, float64 `[sets]`; `ids`:
    `[sequences, length]`."""
    total = torch.zeros(len(sets), dtype=torch.float64)
    order = sorted(range(len(sets)), key=lambda number: tuple(sets[number]))
    with products(streamed.device, product_dtype("auto", streamed.device)):
        for sequence in ids.to(streamed.device).split(1):
            start = streamed.embedded(sequence, 1)
            wanted = _logits(streamed, start, _after(streamed, start, range(streamed.depth))).float().log_softmax(-1)
            path: Sequence[int] = ()
            passed = [start.hidden]  # before each block of the path, and after the last
            for number in order:
                shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(path, sets[number])))
                path = sets[number]
                del passed[shared + 1 :]
                for index in path[shared:]:
                    passed.append(_after(streamed, replace(start, hidden=passed[-1]), (index,)))
                total[number] += _divergence(wanted, _logits(streamed, start, passed[-1]))
    return total / ids.numel()


def _after(streamed: Streamed, states: States, blocks: Iterable[int]) -> Tensor:
    """Return the hidden states after these blocks; those given stay."""
    passing = replace(states, hidden=states.hidden.clone())
    for index in blocks:
        streamed.advance(passing, index)
    return passing.hidden


def _logits(streamed: Streamed, states: States, hidden: Tensor) -> Tensor:
    """Return the logits `[length, vocabulary]` of one sequence, from what is `hidden` after its last block."""
    [logits] = streamed.logits(replace(states, hidden=hidden))
    return logits[0]


def _divergence(wanted: Tensor, given: Tensor) -> float:
    """Return the sum over tokens of the KL of log-probabilities to those of logits, `[length, vocabulary]`."""
    parts = zip(wanted.split(POSITIONS), given.split(POSITIONS), strict=True)
    return sum(float(kl_divergence(one, other.float().log_softmax(-1)).double().sum()) for one, other in parts)
