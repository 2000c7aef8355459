"""The moments of what a block's linears read, gathered over all batches of the calibration, of all processes.

Linears of an expert read the tokens that are routed to it; see `rare_experts` for one that gets few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcompress.calibration.blocks import BlockForward, RowBatch, for_products
from llmcompress.calibration.gradients import Importance
from llmcompress.calibration.ranks import added
from llmcompress.calibration.rare_experts import lacking, read_all, routed
from llmcompress.calibration.token_weights import AttentionUnknownError, token_weights
from llmcompress.methods.moments import Moments, RunningMoments, capped_weights
from llmcompress.models.dense.families import BlockLayout
from llmcompress.recipe.calibration import TokenWeights
from llmcompress.runtime.ranks import ALONE, Ranks

HELD_OUT = frozenset({"outer"})  # what an honest layer error is computed from

Wanted = dict[tuple[str, ...], frozenset[str]]  # the statistics of each input group, by the names of its linears
Needs = frozenset[str] | Mapping[str, frozenset[str]]
Found = dict[tuple[str, bool], Moments]  # by a linear's name, and whether of held-out tokens
Seen = tuple[Tensor, Tensor | None]  # what a linear reads, and of which tokens: see `blocks.Visit`


@dataclass(frozen=True, eq=False)
class InputGroup:
    """Linears that read the same tensor, by module path, and the moments of it.

    `inputs`: over the calibration sequences; `held_out`: over the others, None if there are none. `starved`: the tokens
    that were routed to an expert where its `inputs` were filled up with others; else None. `rows`: what the rows of
    each linear count, `[out]` by name, where they do not count alike. `unweighed`: True if tokens count alike
    against the recipe, since the block does not tell their weights.
    """

    names: tuple[str, ...]
    inputs: Moments
    held_out: Moments | None
    starved: int | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    unweighed: bool = False


@dataclass(frozen=True, eq=False)
class HiddenStreams:
    """The hidden states that blocks read, `[sequences, length, width]`, and how moments are gathered of them.

    `dense`: those in the dense model, of the calibration sequences or of all, None where they are not carried;
    `behind`: those that the block before read, None where it does not stay; `keep_outputs`: `hidden` moves on to a
    block's outputs while its moments are gathered; `ranks`: which carry the other sequences; `importance`: of all
    linears' tokens and rows, where `weights` go by it.
    """

    batches: list[RowBatch]
    hidden: Tensor
    dense: Tensor | None
    behind: Tensor | None
    cap: float | None
    weights: TokenWeights | None
    keep_outputs: bool
    ranks: Ranks = ALONE
    importance: Importance | None = None


@dataclass(eq=False)
class _Sums:
    """The moments of each linear that stands for its group, and whether of held-out tokens. `needs`: by its name;
    `counts`: the calibration tokens that were routed to it, whatever they weigh."""

    needs: Mapping[str, frozenset[str]]
    cap: float | None
    running: dict[tuple[str, bool], RunningMoments] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def read(self, name: str, seen: Seen, held_out: bool, dense: Seen | None, weights: Tensor | None) -> None:
        """Add what a linear reads in a batch, here and in the dense model; `weights [sequences, length]` of tokens."""
        x, tokens = seen
        beside = None if dense is None else _beside(seen, dense)
        if dense is None and tokens is not None and "cross" in self.needs[name]:
            beside = x  # the dense model routes none of the batch's tokens to this expert
        if tokens is not None:
            x = x[None]  # the norms of an expert's tokens are compared with each other
            beside = None if beside is None else beside[None]
            weights = None if weights is None else weights.flatten()[tokens][None]
            self.counts[name] = self.counts.get(name, 0) + (0 if held_out else len(tokens))
        self.add(name, x, held_out, weights, beside)

    def add(
        self,
        name: str,
        x: Tensor,
        held_out: bool = False,
        weights: Tensor | None = None,
        dense_inputs: Tensor | None = None,
    ) -> None:
        """Add a batch of inputs; see `add_batch`."""
        needs = HELD_OUT if held_out else self.needs[name]
        sums = self.running.setdefault((name, held_out), RunningMoments(needs))
        add_batch(sums, x, self.cap, weights, dense_inputs)

    def over(self, ranks: Ranks, device: torch.device) -> Found:
        """Return the moments of what all processes have seen, and count it."""
        seen = ranks.gather(self.counts)
        self.counts = {name: sum(counts[name] for counts in seen) for name in self.counts}
        return added({key: sums.moments() for key, sums in self.running.items()}, ranks, device)


def _filled_up(
    found: Found, sums: _Sums, missing: Mapping[str, float], run: BlockForward, streams: HiddenStreams
) -> Found:
    """Return the moments with those of starved experts, by the tokens that each of them is `missing`, filled up."""
    if not missing:
        return found
    everything = _Sums(sums.needs, sums.cap)

    def add(name: str, x: Tensor) -> None:
        everything.add(name, x[None], dense_inputs=x[None])

    with streams.ranks.agree_on_errors():
        read_all(run, missing, streams.batches, streams.hidden, add)
    filled = dict(found)
    for key, more in everything.over(streams.ranks, streams.hidden.device).items():
        scaled = more.times(missing[key[0]] / more.tokens)
        filled[key] = filled[key] + scaled if key in filled else scaled
    return filled


@torch.no_grad()
def gather(run: BlockForward, wanted: Wanted, streams: HiddenStreams) -> tuple[InputGroup, ...]:
    """The moments of each input group over all batches.

    The dense hidden states move on to the block's outputs for them; so do the others if `keep_outputs`.
    """
    hidden, dense_hidden = streams.hidden, streams.dense
    readers = {names[0]: names for names in wanted}  # one linear stands for its group
    to_experts = routed(run, tuple(readers))
    sums = _Sums({first: wanted[names] for first, names in readers.items()}, streams.cap)
    sums.counts.update(dict.fromkeys(to_experts, 0))
    unweighed: list[AttentionUnknownError] = []
    weigh = _weighing(run, readers, streams, unweighed)
    outputs = torch.empty_like(hidden) if streams.keep_outputs and to_experts else hidden
    last: str | None = None  # the linear that the block calls last: known, and all calls counted, after the first batch
    with streams.ranks.agree_on_errors(), for_products(run):
        for batch in streams.batches:
            in_dense: dict[str, Seen] = {}

            def keep(name: str, x: Tensor, tokens: Tensor | None, seen: dict[str, Seen] = in_dense) -> None:
                seen[name] = x, tokens

            if dense_hidden is not None and batch.rows.stop <= len(dense_hidden):
                dense_hidden[batch.rows] = run(dense_hidden[batch.rows], batch.rows, keep, tuple(readers))
            if not readers and not streams.keep_outputs:
                continue
            weights = weigh(batch.rows)

            def read(
                name: str,
                x: Tensor,
                tokens: Tensor | None,
                held_out: bool = batch.held_out,
                dense: dict[str, Seen] = in_dense,
                weights: Mapping[str, Tensor] = weights,
            ) -> None:
                sums.read(name, (x, tokens), held_out, dense.pop(name, None), weights.get(name))

            output = run(hidden[batch.rows], batch.rows, read, tuple(readers), None if streams.keep_outputs else last)
            # an expert may be called in one batch and not in another
            if last is None and sums.running and not to_experts:
                last = list(sums.running)[-1][0]
            if streams.keep_outputs:
                outputs[batch.rows] = output
    found = sums.over(streams.ranks, hidden.device)
    starved = lacking(run, sums.counts)
    found = _filled_up(found, sums, starved, run, streams)
    if outputs is not hidden:
        hidden.copy_(outputs)
    return tuple(
        InputGroup(
            names,
            found[first, False],
            found.get((first, True)),
            sums.counts[first] if first in starved else None,
            _row_weights(names, streams),
            bool(unweighed),
        )
        for first, names in readers.items()
    )


def _weighing(
    run: BlockForward,
    readers: Mapping[str, tuple[str, ...]],
    streams: HiddenStreams,
    unweighed: list[AttentionUnknownError],
) -> Callable[[slice], Mapping[str, Tensor]]:
    """Return the function from some rows of all sequences to the weights of their tokens, `[rows, length]` for each
    linear that stands for its group; to nothing where all count alike. `unweighed` receives the reason why weights that
    were asked for cannot be had."""
    config, known = streams.weights, streams.importance
    if config is None:
        return lambda rows: {}
    if known is None:

        def weigh(rows: slice) -> Mapping[str, Tensor]:
            if unweighed:
                return {}
            try:
                return dict.fromkeys(readers, token_weights(run, streams.hidden[rows], rows, config))
            except AttentionUnknownError as error:
                unweighed.append(error)
                return {}

        return weigh
    device = streams.hidden.device
    found = {first: known.token_weights(names, config.minimum).to(device) for first, names in readers.items()}
    return lambda rows: {first: weights[rows] for first, weights in found.items()}


def _row_weights(names: tuple[str, ...], streams: HiddenStreams) -> dict[str, Tensor]:
    if streams.importance is None or streams.weights is None or not streams.weights.rows:
        return {}
    return {name: streams.importance.row_weights(name).to(streams.hidden.device) for name in names}


def _beside(seen: Seen, dense: Seen) -> Tensor:
    """Return what the dense model's linear reads for each of the tokens that a linear reads; where the dense model
    routes a token elsewhere, what is read here."""
    (x, tokens), (there, theirs) = seen, dense
    if tokens is None or theirs is None:
        return there
    place = torch.full((int(max(tokens.max(), theirs.max())) + 1,), -1, dtype=torch.long, device=x.device)
    place[theirs] = torch.arange(len(theirs), device=x.device)
    found = place[tokens]
    both = found >= 0
    result = x.clone()
    result[both] = there[found[both]].to(x.dtype)
    return result


def add_batch(
    sums: RunningMoments,
    x: Tensor,
    cap: float | None,
    counts: Tensor | None = None,
    dense_inputs: Tensor | None = None,
) -> None:
    """Add a batch of a linear's inputs `[sequences, length, in]`; `counts [sequences, length]` are weights of its
    tokens, which the cap lowers."""
    weights = None if cap is None else capped_weights(x, cap)
    if counts is not None:
        weights = counts if weights is None else weights * counts
    weights = None if weights is None else weights.flatten()
    sums.add(x.flatten(0, 1), weights, None if dense_inputs is None else dense_inputs.flatten(0, 1))


def wanted_of(layout: BlockLayout, needs: Needs) -> Wanted:
    """The groups of a block to gather, each with what the methods of its linears need together."""
    wanted = {}
    for group in layout.groups:
        names = tuple(linear.name for linear in group)
        if isinstance(needs, Mapping):
            if any(name in needs for name in names):
                wanted[names] = frozenset().union(*(needs.get(name, frozenset()) for name in names))
        else:
            wanted[names] = needs
    return wanted
