"""The blocks to drop: named by the user, most alike before and after, or least missed.

Alike: the score of n blocks in a row is the mean over tokens of cos(input of block l, input of block l + n); the
largest score goes. ShortGPT (arXiv 2403.03853) does this for n = 1, "The Unreasonable Ineffectiveness of the Deeper
Layers" (arXiv 2403.17887) for runs, on the last token only. The state after the last block is taken before the final
norm. The score is blind to a block that works on a single position, such as the one that makes the first token's state
huge. So check the perplexity of the shortened model.

Least missed: the damage of a set of blocks is the mean KL of the dense model's predictions to those without the set.
All runs of blocks are tried, and a greedy search among the blocks that are missed least alone. The better of the two is
improved by swaps until none lowers the damage. Sums of single blocks' damages, as in LAPTOP-Diff (arXiv 2404.11098),
overlook blocks that do each other's work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llmcompress.calibration.streaming import States, StreamedModel, in_memory
from llmcompress.errors import NumericsError, RecipeError
from llmcompress.models.dense.blocks import body, states_between
from llmcompress.models.dense.config import context_length
from llmcompress.models.dense.load import check_fits, load_model
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.model import open_source
from llmcompress.recipe.calibration import Calibration
from llmcompress.runtime.precision import fast_float32, product_dtype, products
from llmcompress.runtime.progress import count_each
from llmcompress.surgery.drop import blocks_of
from llmcompress.surgery.judged_walk import read_tokens

LENGTH = 512  # of a sequence
ALIKE_SAMPLES = 16  # sequences for cosines
DAMAGE_SAMPLES = 8  # for damages: 4096 tokens order sets as other text does
POOL = 6  # blocks beyond the number to drop that a greedy search looks at
POSITIONS = 128  # whose predictions are compared at a time

Blocks = frozenset[int]
Counting = Callable[[int], None]  # models tried so far


class Choice(NamedTuple):
    """Blocks to drop. `damage`: the KL in nats without them, None where it was not measured."""

    blocks: tuple[int, ...]
    damage: float | None


def choose_blocks(
    model: str | Path,
    blocks: str | None,
    count: int | None,
    by: str = "similarity",
    progress: Counting | None = None,
    **reading: Any,
) -> Choice:
    """Return the blocks of a text such as "4,7-9", or without one `count` blocks `by` similarity or damage.

    `reading`: further arguments of `alike_blocks` or `least_damage`. Raises RecipeError for any other text or measure,
    and unless exactly one of `blocks` and `count` is given.
    """
    if by not in ("damage", "similarity"):
        raise RecipeError(f"blocks cannot be chosen by {by!r}; use damage or similarity")
    if (blocks is None) == (count is None):
        raise RecipeError("pass either --blocks or --count, exactly one of them")
    if count is None:
        return Choice(block_numbers(blocks or ""), None)
    if by == "similarity":
        return Choice(alike_blocks(model, count, **reading).blocks, None)
    least = least_damage(model, count, progress=progress, **reading)
    return Choice(least.blocks, least.damage)


def block_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers in a text such as "4,7-9". Raises RecipeError for any other text."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise RecipeError(f"{part!r} names no blocks; write numbers and ranges of them, such as 4,7-9")
        numbers += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return tuple(numbers)


def _read_text(place: Place, count: int, text: str, samples: int, device: str) -> tuple[Tensor, str]:
    """Return tokens `[samples, at most 512]` and their source.

    Raises RecipeError unless `count` blocks can go, MemoryLimitError unless the model fits into memory.
    """
    source = open_source(place)
    if not 0 < count < len(blocks_of(source)):
        raise RecipeError(
            f"{count} of the {len(blocks_of(source))} blocks of {source.name} cannot go; choose at least one, not all"
        )
    check_fits(device, "choosing blocks", [place])
    length = min(LENGTH, context_length(source.config) or LENGTH)
    calibration = Calibration(dataset=text, samples=samples, length=length, held_out=0)
    tokens = read_tokens(source, calibration)
    return tokens.sequences, tokens.source


# --- alike ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alike:
    """A run of blocks. `cosine`: between its input and output; `cosines`: of all runs as long, by their first block;
    `text`: the source of the tokens."""

    blocks: tuple[int, ...]
    cosine: float
    cosines: tuple[float, ...]
    text: str


@fast_float32()
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
        count: number of blocks.
        text: the text to read, as `dataset` of a recipe's calibration.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.

    Returns:
        The blocks, with the cosine of every run of `count` blocks.

    Raises:
        RecipeError: for a model that has no more blocks than `count`.
        MemoryLimitError: for a model that does not fit into memory.
        InputError: for a model or a text that cannot be read.
    """
    place = locate(model, revision, trust_remote_code)
    ids, source = _read_text(place, count, text, ALIKE_SAMPLES, device)
    cosines = run_cosines(load_model(place, device), ids.to(device), count)
    best = int(cosines.argmax())
    if not bool(cosines.isfinite().all()):
        raise NumericsError(f"{place.name}: hidden states hold NaN or Inf; use an undamaged checkpoint")
    return Alike(tuple(range(best, best + count)), float(cosines[best]), tuple(cosines.tolist()), source)


@torch.no_grad()
def run_cosines(model: Any, ids: Tensor, count: int) -> Tensor:
    """Return the mean cosine over each run of `count` blocks, float64 `[runs]`; `ids`: `[sequences, length]`."""
    last = model.config.num_hidden_layers
    total = torch.zeros(last - count + 1, dtype=torch.float64)
    for sequence in count_each(ids, "sequence"):
        with states_between(model, range(last + 1)) as states:
            body(model)(input_ids=sequence[None], use_cache=False)
        for first in range(len(total)):
            before, after = states[first].float(), states[first + count].float()
            total[first] += float(cosine_similarity(before, after, dim=-1).double().sum())
    return total / ids.numel()


# --- least missed ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeastDamage:
    """Blocks that can go. `damage`: the KL in nats without them; `alone`: without each block of the model alone;
    `runs`: without each run of as many blocks, by its first; `text`: the source of the tokens."""

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
        count: number of blocks.
        text: the text to read, as `dataset` of a recipe's calibration.
        revision: a branch, tag or commit of a Hub model.
        device: where to compute: `cpu`, `cuda` or `cuda:1`.
        trust_remote_code: True to run the Python code that the model brings along, if transformers lacks its class.
        progress: receives the number of sets of blocks that were tried.

    Returns:
        The blocks, with the damage of their absence.

    Raises:
        RecipeError: for a model that has no more blocks than `count`.
        MemoryLimitError: for a model that does not fit into memory.
        InputError: for a model or a text that cannot be read, or whose blocks cannot be run one by one.
    """
    place = locate(model, revision, trust_remote_code)
    ids, source = _read_text(place, count, text, DAMAGE_SAMPLES, device)
    streamed, tried = in_memory(load_model(place, device)), dict[Blocks, float]()
    everything = frozenset(range(streamed.depth))

    def measure(sets: list[Blocks]) -> list[float]:
        """Return the damage of each set of blocks that go."""
        new = [gone for gone in dict.fromkeys(sets) if gone not in tried]
        paths = [tuple(sorted(everything - gone)) for gone in new]
        tried.update(zip(new, path_damages(streamed, ids, paths).tolist(), strict=True))
        if progress is not None:
            progress(len(tried))
        if not all(math.isfinite(tried[gone]) for gone in sets):
            raise NumericsError(f"{place.name}: predictions hold NaN or Inf; use an undamaged checkpoint")
        return [tried[gone] for gone in sets]

    blocks = search_blocks(count, streamed.depth, measure)
    alone = tuple(tried[frozenset({index})] for index in range(streamed.depth))
    runs = tuple(tried[gone] for gone in runs_of(count, streamed.depth))
    return LeastDamage(tuple(sorted(blocks)), tried[blocks], alone, runs, source)


def runs_of(count: int, depth: int) -> list[Blocks]:
    """Return all runs of `count` blocks in a row, first to last."""
    return [frozenset(range(first, first + count)) for first in range(depth - count + 1)]


def search_blocks(count: int, depth: int, measure: Callable[[list[Blocks]], list[float]]) -> Blocks:
    """Return `count` of `depth` blocks that can go; `measure` returns the damage of each set of blocks."""

    def choose(sets: list[Blocks]) -> tuple[float, Blocks]:
        """Return the least damage, and its set."""
        damage, _, gone = min(zip(measure(sets), map(sorted, sets), sets, strict=True))
        return damage, gone

    alone = measure([frozenset({index}) for index in range(depth)])
    pool = frozenset(sorted(range(depth), key=alone.__getitem__)[: count + POOL])
    in_a_row = choose(runs_of(count, depth))
    greedy = math.inf, Blocks()
    while len(greedy[1]) < count:
        greedy = choose([greedy[1] | {index} for index in pool - greedy[1]])
    damage, gone = min(in_a_row, greedy, key=lambda pair: pair[0])
    while True:
        near = pool | {index + step for index in gone for step in (-1, 1) if 0 <= index + step < depth}
        swaps = [gone - {back} | {index} for back in gone for index in near - gone]
        if not swaps or (better := choose(swaps))[0] >= damage:
            return gone
        damage, gone = better


@torch.no_grad()
def path_damages(streamed: StreamedModel, ids: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
    """Return the damage of a model with only the blocks of each path, float64 `[paths]`; `ids`: `[sequences, length]`.

    Paths that begin alike share their forwards: to leave out each of n blocks once takes half of n forwards.
    """
    total = torch.zeros(len(paths), dtype=torch.float64)
    order = sorted(range(len(paths)), key=lambda number: tuple(paths[number]))
    with products(streamed.device, product_dtype("auto", streamed.device)):
        for sequence in count_each(ids.to(streamed.device).split(1), "sequence"):
            start = streamed.embed(sequence, 1)
            dense = _run_blocks(streamed, start, range(streamed.depth))
            probabilities = torch.cat([part.float().softmax(-1) for part in _logits(streamed, start, dense)])
            entropy = float(torch.special.entr(probabilities).sum(dtype=torch.float64))
            path: Sequence[int] = ()
            states = [start.hidden]  # before each block of the path, and after the last
            for number in order:
                shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(path, paths[number])))
                path = paths[number]
                del states[shared + 1 :]
                for index in path[shared:]:
                    states.append(_run_blocks(streamed, replace(start, hidden=states[-1]), (index,)))
                total[number] += _cross_entropy(probabilities, _logits(streamed, start, states[-1])) - entropy
    return total / ids.numel()


def _run_blocks(streamed: StreamedModel, states: States, blocks: Iterable[int]) -> Tensor:
    """Return the hidden states after these blocks; those in `states` stay."""
    passing = replace(states, hidden=states.hidden.clone())
    for index in blocks:
        streamed.advance(passing, index)
    return passing.hidden


def _logits(streamed: StreamedModel, states: States, hidden: Tensor) -> Iterator[Tensor]:
    """Yield the logits `[positions, vocabulary]` of one sequence in parts, from its states after the last block."""
    with streamed.at_the_end():
        for part in streamed.predict_parts(states, hidden, slice(0, 1)):
            yield from part[0].split(POSITIONS)


def _cross_entropy(probabilities: Tensor, logits: Iterable[Tensor]) -> float:
    """Return the sum over tokens of the cross-entropy: `[length, vocabulary]`, and `[positions, vocabulary]` in parts.

    Log-probabilities are not written out: this is most of the time of a set.
    """
    total, first = 0.0, 0
    for given in logits:
        expected = probabilities[first : first + len(given)]
        first += len(given)
        given = given.float()
        normalizers = torch.logsumexp(given, -1)
        total += float((normalizers - (expected * given).sum(-1)).double().sum())
    return total
