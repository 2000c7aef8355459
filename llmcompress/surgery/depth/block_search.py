"""The blocks whose absence changes the predictions least, found by trying.

The damage of a set of blocks is the mean KL of the dense model's predictions to those without the set. Tried are all
runs of as many blocks in a row, and a greedy search among the blocks that are missed least alone, one after the other.
The better of the two goes on: blocks that stay take the place of blocks that go as long as that lowers the damage.

Sums of the damages of single blocks, as LAPTOP-Diff (arXiv 2404.11098) has them, miss that blocks do each other's work.
Cosines of hidden states (see `similarity`) are blind to a block that works on one position; its damage is large.

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

from llmcompress.calibration.streaming import States, Streamed, in_memory
from llmcompress.errors import NumericsError
from llmcompress.models.dense.model import load_model
from llmcompress.runtime.precision import fast_float32, product_dtype, products
from llmcompress.surgery.depth.text import opened_text

SAMPLES, LENGTH = 8, 512  # of text: 4096 tokens order sets as other text does
POOL = 6  # blocks more than go that a greedy search looks at
POSITIONS = 128  # whose predictions are compared at a time

Blocks = frozenset[int]
Counting = Callable[[int], None]  # models tried so far


@dataclass(frozen=True)
class LeastDamage:
    """Blocks that can go. `damage`: the KL in nats without them; `alone`: that without each block of the model alone;
    `runs`: that without each run of as many blocks in a row, by its first; `text`: the source of the tokens."""

    blocks: tuple[int, ...]
    damage: float
    alone: tuple[float, ...]
    runs: tuple[float, ...]
    text: str


@fast_float32()
def least_damage(
    model: str | Path,
    count: int,
    *,
    text: str = "builtin",
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

    def measured(sets: list[Blocks]) -> list[float]:
        """Return the damage of each set of blocks that go."""
        new = [gone for gone in dict.fromkeys(sets) if gone not in tried]
        kept = [tuple(sorted(everything - gone)) for gone in new]
        tried.update(zip(new, damages(streamed, ids, kept).tolist(), strict=True))
        if progress is not None:
            progress(len(tried))
        if not all(math.isfinite(tried[gone]) for gone in sets):
            raise NumericsError(f"{place.name}: predictions hold NaN or Inf; use an undamaged checkpoint")
        return [tried[gone] for gone in sets]

    blocks = searched(count, streamed.depth, measured)
    alone = tuple(tried[frozenset({index})] for index in range(streamed.depth))
    runs = tuple(tried[gone] for gone in runs_of(count, streamed.depth))
    return LeastDamage(tuple(sorted(blocks)), tried[blocks], alone, runs, source)


def runs_of(count: int, depth: int) -> list[Blocks]:
    """Return all runs of `count` blocks in a row, first to last."""
    return [frozenset(range(first, first + count)) for first in range(depth - count + 1)]


def searched(count: int, depth: int, measured: Callable[[list[Blocks]], list[float]]) -> Blocks:
    """Return `count` of `depth` blocks that can go; `measured` returns the damage of each of some sets."""

    def best(sets: list[Blocks]) -> tuple[float, Blocks]:
        """Return the least damage of some sets, and the set."""
        damage, _, gone = min(zip(measured(sets), map(sorted, sets), sets, strict=True))
        return damage, gone

    alone = measured([frozenset({index}) for index in range(depth)])
    pool = frozenset(sorted(range(depth), key=alone.__getitem__)[: count + POOL])
    in_a_row = best(runs_of(count, depth))
    greedy = math.inf, Blocks()
    while len(greedy[1]) < count:
        greedy = best([greedy[1] | {index} for index in pool - greedy[1]])
    damage, gone = min(in_a_row, greedy, key=lambda found: found[0])
    while True:
        near = pool | {index + step for index in gone for step in (-1, 1) if 0 <= index + step < depth}
        swaps = [gone - {back} | {index} for back in gone for index in near - gone]
        if not swaps or (found := best(swaps))[0] >= damage:
            return gone
        damage, gone = found


@torch.no_grad()
def damages(streamed: Streamed, ids: Tensor, sets: Sequence[Sequence[int]]) -> Tensor:
    """Return the damage of a model that has only the blocks of each set, in order, float64 `[sets]`; `ids`:
    `[sequences, length]`."""
    total = torch.zeros(len(sets), dtype=torch.float64)
    order = sorted(range(len(sets)), key=lambda number: tuple(sets[number]))
    with products(streamed.device, product_dtype("auto", streamed.device)):
        for sequence in ids.to(streamed.device).split(1):
            start = streamed.embedded(sequence, 1)
            wanted = _wanted(_logits(streamed, start, _after(streamed, start, range(streamed.depth))))
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


def _wanted(logits: Tensor) -> tuple[Tensor, float]:
    """Return the probabilities `[length, vocabulary]` of some logits, and the sum of their entropies over tokens."""
    chances = logits.float().softmax(-1)
    return chances, float(torch.special.entr(chances).sum(dtype=torch.float64))


def _divergence(wanted: tuple[Tensor, float], given: Tensor) -> float:
    """Return the sum over tokens of the KL of what is `_wanted` to the predictions of logits `[length, vocabulary]`.

    Log-probabilities are not written out: this is most of the time of a set.
    """
    chances, entropy = wanted
    crossed = 0.0
    for expected, logits in zip(chances.split(POSITIONS), given.split(POSITIONS), strict=True):
        logits = logits.float()
        normalizers = torch.logsumexp(logits, -1)
        crossed += float((normalizers - (expected * logits).sum(-1)).double().sum())
    return crossed - entropy
