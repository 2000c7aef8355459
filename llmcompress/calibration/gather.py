"""The moments of what a block's linears read, over all calibration batches of all processes.

Linears of an expert read the tokens that are routed to it. An expert with few tokens, or none, would be fitted to
noise: its moments are filled up with those of all tokens, to a quarter of the average expert's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from llmcompress.calibration.blocks import BlockForward, RowBatch, for_products
from llmcompress.calibration.gradients import Importance
from llmcompress.calibration.input_scales import input_formats
from llmcompress.calibration.ranks import sum_over_ranks
from llmcompress.calibration.token_weights import AttentionUnknownError, weigh_tokens
from llmcompress.methods.moments import Moments, RunningMoments, capped_weights
from llmcompress.models.dense.experts import DOWN, GATE, UP, Expert, Experts, experts_of, holder
from llmcompress.models.dense.families import BlockLayout
from llmcompress.recipe.calibration import TokenWeights
from llmcompress.recipe.rules import InputRounding
from llmcompress.runtime.phases import phase
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.weight.inputs import InputFormat

HELD_OUT = frozenset({"outer"})  # the statistic that layer errors are computed from
LEAST = 0.25  # of an expert's average tokens

Wanted = dict[tuple[str, ...], frozenset[str]]  # the statistics of each input group, by the names of its linears
Needs = frozenset[str] | Mapping[str, frozenset[str]]
Inputs = tuple[Tensor, Tensor | None]  # what a linear reads, and of which tokens: see `blocks.Visit`


@dataclass(frozen=True, eq=False)
class Statistics:
    """The moments that a walk gathers.

    `needs`: statistics that the methods of every linear read, or those of each linear by module path; then groups
    without any of these names are left out. `cap`: see `moments.capped_weights`; None for none. `weights`: of tokens;
    by gradient, `importance` is that of the sequences. `prefix`: whether inputs come from blocks as the caller left
    them or from the dense ones. `cross`: True to carry the dense model's hidden states beside the others. `inputs`:
    what inputs are rounded to, by linear; `cross` moments are then of what the outputs should come from: a share `aim`
    of the dense model's inputs, else the own ones before they are rounded. `kv_cache`: True for scales of keys and
    values.
    """

    needs: Needs = frozenset()
    cap: float | None = 4.0
    weights: TokenWeights | None = None
    importance: Importance | None = None
    prefix: Literal["compressed", "dense"] = "compressed"
    cross: bool = False
    inputs: Mapping[str, InputRounding] = field(default_factory=dict)
    aim: float = 0.0
    kv_cache: bool = False


@dataclass(frozen=True, eq=False)
class InputGroup:
    """Linears that read the same tensor, by module path, and the moments of it.

    `inputs`: over the calibration sequences; `held_out`: over the others, None if there are none. `starved`: number of
    tokens routed to an expert whose `inputs` were filled up; else None. `rows`: weights of the rows of each linear,
    `[out]` by name, unless all count alike. `unweighed`: True if tokens count alike against the recipe, because the
    block does not reveal its attention. `format`: what the inputs are rounded to, if at all.
    `sample`: inputs `[tokens, in]`, before moments are gathered.
    """

    names: tuple[str, ...]
    inputs: Moments
    held_out: Moments | None
    starved: int | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    unweighed: bool = False
    format: InputFormat | None = None
    sample: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HiddenStreams:
    """The hidden states that blocks read, `[sequences, length, width]`, and the statistics to gather of them.

    `dense`: those in the dense model, of the calibration sequences or of all; None if they are not carried. `behind`:
    those that the block before read; None if it does not stay. `keep_outputs`: True if `hidden` moves on to a block's
    outputs while its moments are gathered. `ranks`: processes that carry the other sequences.
    """

    batches: list[RowBatch]
    hidden: Tensor
    statistics: Statistics
    dense: Tensor | None = None
    behind: Tensor | None = None
    keep_outputs: bool = False
    ranks: Ranks = ALONE


@dataclass(eq=False)
class _Sums:
    """Running moments by linear, one for each group, and by whether they are of held-out tokens.

    `needs`: statistics by linear; `counts`: calibration tokens that were routed to it, whatever they weigh.
    """

    needs: Mapping[str, frozenset[str]]
    cap: float | None
    formats: Mapping[str, InputFormat] = field(default_factory=dict)
    aim: float = 0.0
    running: dict[tuple[str, bool], RunningMoments] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def read(self, name: str, inputs: Inputs, held_out: bool, dense: Inputs | None, weights: Tensor | None) -> None:
        """Add what a linear reads in a batch, here and in the dense model; `weights [sequences, length]` of tokens."""
        x, tokens = inputs
        dense_x = None if dense is None else _align_dense(inputs, dense)
        if dense is None and tokens is not None and "cross" in self.needs[name]:
            dense_x = x  # the dense model routes none of the batch's tokens to this expert
        if tokens is not None:
            x = x[None]  # the norms of an expert's tokens are compared with each other
            dense_x = None if dense_x is None else dense_x[None]
            weights = None if weights is None else weights.flatten()[tokens][None]
            self.counts[name] = self.counts.get(name, 0) + (0 if held_out else len(tokens))
        self.add(name, x, held_out, weights, dense_x)

    def add(
        self,
        name: str,
        x: Tensor,
        held_out: bool = False,
        weights: Tensor | None = None,
        dense_inputs: Tensor | None = None,
    ) -> None:
        """Add a batch of inputs, rounded if they will be; see `add_batch`."""
        if name in self.formats:
            dense_inputs = x if dense_inputs is None else torch.lerp(x, dense_inputs, self.aim)
            x = self.formats[name].round(x)
        needs = HELD_OUT if held_out else self.needs[name]
        sums = self.running.setdefault((name, held_out), RunningMoments(needs))
        add_batch(sums, x, self.cap, weights, dense_inputs)

    def moments(self, ranks: Ranks, device: torch.device) -> dict[tuple[str, bool], Moments]:
        """Return the moments of all processes; `counts` become those of all, too."""
        counts = ranks.gather(self.counts)
        self.counts = {name: sum(each[name] for each in counts) for name in self.counts}
        return sum_over_ranks({key: sums.moments() for key, sums in self.running.items()}, ranks, device)


@torch.no_grad()
def gather(run: BlockForward, wanted: Wanted, streams: HiddenStreams) -> tuple[InputGroup, ...]:
    """Return the moments of each input group over all batches.

    The dense hidden states move on to the block's outputs, and so do the others if `keep_outputs`.
    """
    hidden, dense_hidden = streams.hidden, streams.dense
    readers = {names[0]: names for names in wanted}  # one linear stands for its group
    experts = {f"{run.path}.{path}": module for path, module in experts_of(run.module).items()}
    routed = [name for name in readers if holder(name, experts)]
    sums = _empty_sums(run, wanted, streams)
    sums.counts.update(dict.fromkeys(routed, 0))
    unweighed: list[AttentionUnknownError] = []
    weigh = _token_weigher(run, readers, streams, unweighed)
    outputs = torch.empty_like(hidden) if streams.keep_outputs and routed else hidden
    last: str | None = None  # the linear that the block calls last, known after the first batch
    with streams.ranks.agree_on_errors(), for_products(run):
        for batch in streams.batches:
            in_dense: dict[str, Inputs] = {}

            def keep(name: str, x: Tensor, tokens: Tensor | None, into: dict[str, Inputs] = in_dense) -> None:
                into[name] = x, tokens

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
                dense: dict[str, Inputs] = in_dense,
                weights: Mapping[str, Tensor] = weights,
            ) -> None:
                sums.read(name, (x, tokens), held_out, dense.pop(name, None), weights.get(name))

            output = run(hidden[batch.rows], batch.rows, read, tuple(readers), None if streams.keep_outputs else last)
            if last is None and sums.running and not routed:  # an expert may be called in one batch, not in another
                last = list(sums.running)[-1][0]
            if streams.keep_outputs:
                outputs[batch.rows] = output
    moments = sums.moments(streams.ranks, hidden.device)
    starved = _missing_tokens(run, sums.counts)
    moments = _fill_up(moments, sums, starved, run, streams)
    if outputs is not hidden:
        hidden.copy_(outputs)
    return tuple(
        InputGroup(
            names,
            moments[first, False],
            moments.get((first, True)),
            sums.counts[first] if first in starved else None,
            _row_weights(names, streams),
            bool(unweighed),
            sums.formats.get(first),
        )
        for first, names in readers.items()
    )


def _empty_sums(run: BlockForward, wanted: Wanted, streams: HiddenStreams) -> _Sums:
    """Return the sums of the groups, by their first linears, before any batch was read."""
    config = streams.statistics
    asked = {names[0]: config.inputs[name] for names in wanted for name in names if name in config.inputs}
    formats = input_formats(run, asked, streams.batches, streams.hidden, streams.ranks)
    return _Sums({names[0]: needs for names, needs in wanted.items()}, config.cap, formats, config.aim)


def _token_weigher(
    run: BlockForward,
    readers: Mapping[str, tuple[str, ...]],
    streams: HiddenStreams,
    unweighed: list[AttentionUnknownError],
) -> Callable[[slice], Mapping[str, Tensor]]:
    """Return a function from rows of the sequences to their tokens' weights `[rows, length]`, by linear.

    It returns nothing if all tokens count alike. `unweighed` receives the reason if the block reveals no weights.
    """
    config, known = streams.statistics.weights, streams.statistics.importance
    if config is None:
        return lambda rows: {}
    if known is None or config.by != "gradient":

        def weigh(rows: slice) -> Mapping[str, Tensor]:
            if unweighed:
                return {}
            try:
                return dict.fromkeys(readers, weigh_tokens(run, streams.hidden[rows], rows, config))
            except AttentionUnknownError as error:
                unweighed.append(error)
                return {}

        return weigh
    device = streams.hidden.device
    shares = {first: known.token_weights(names, config.minimum).to(device) for first, names in readers.items()}
    return lambda rows: {first: weights[rows] for first, weights in shares.items()}


def _row_weights(names: tuple[str, ...], streams: HiddenStreams) -> dict[str, Tensor]:
    weights, importance = streams.statistics.weights, streams.statistics.importance
    if importance is None or weights is None or not weights.rows:
        return {}
    return {name: importance.row_weights(name).to(streams.hidden.device) for name in names}


def _align_dense(inputs: Inputs, dense: Inputs) -> Tensor:
    """Return the dense model's input for each token that a linear reads; of a token routed elsewhere, the one here."""
    (x, tokens), (dense_x, dense_tokens) = inputs, dense
    if tokens is None or dense_tokens is None:
        return dense_x
    place = torch.full((int(max(tokens.max(), dense_tokens.max())) + 1,), -1, dtype=torch.long, device=x.device)
    place[dense_tokens] = torch.arange(len(dense_tokens), device=x.device)
    places = place[tokens]
    both = places >= 0
    result = x.clone()
    result[both] = dense_x[places[both]].to(x.dtype)
    return result


@phase("moments")
def add_batch(
    sums: RunningMoments,
    x: Tensor,
    cap: float | None,
    counts: Tensor | None = None,
    dense_inputs: Tensor | None = None,
) -> None:
    """Add a batch of a linear's inputs `[sequences, length, in]`.

    `counts [sequences, length]`: weights of its tokens, which the cap lowers.
    """
    weights = None if cap is None else capped_weights(x, cap)
    if counts is not None:
        weights = counts if weights is None else weights * counts
    weights = None if weights is None else weights.flatten()
    sums.add(x.flatten(0, 1), weights, None if dense_inputs is None else dense_inputs.flatten(0, 1))


def wanted_of(layout: BlockLayout, needs: Needs) -> Wanted:
    """Return the input groups of a block to gather, each with what the methods of its linears need together."""
    wanted = {}
    for group in layout.groups:
        names = tuple(linear.name for linear in group)
        if isinstance(needs, Mapping):
            if any(name in needs for name in names):
                wanted[names] = frozenset().union(*(needs.get(name, frozenset()) for name in names))
        else:
            wanted[names] = needs
    return wanted


def _missing_tokens(run: BlockForward, counts: Mapping[str, int]) -> dict[str, float]:
    """Return how many tokens starved experts lack; `counts`: tokens of each linear of an expert, by name."""
    experts = experts_of(run.module)
    totals: dict[tuple[str, str], int] = {}  # of all experts of a module, by its path and the linear's leaf
    for name, count in counts.items():
        totals[_kind(name)] = totals.get(_kind(name), 0) + count
    missing = {}
    for name, count in counts.items():
        path, _ = kind = _kind(name)
        least = LEAST * totals[kind] / experts[path.removeprefix(f"{run.path}.")].num_experts
        if count < least:
            missing[name] = least - count
    return missing


def _kind(name: str) -> tuple[str, str]:
    """Return the module path of the experts that a linear is in, and the linear's leaf."""
    path, _, leaf = name.rsplit(".", 2)
    return path, leaf


def _fill_up(
    moments: dict[tuple[str, bool], Moments],
    sums: _Sums,
    missing: Mapping[str, float],
    run: BlockForward,
    streams: HiddenStreams,
) -> dict[tuple[str, bool], Moments]:
    """Return the moments with those of all tokens added to starved experts, by the tokens that each is `missing`."""
    if not missing:
        return moments
    everything = _Sums(sums.needs, sums.cap, sums.formats)

    def add(name: str, x: Tensor) -> None:
        everything.add(name, x[None], dense_inputs=x[None])

    with streams.ranks.agree_on_errors():
        _feed_all_tokens(run, missing, streams.batches, streams.hidden, add)
    filled = dict(moments)
    for key, more in everything.moments(streams.ranks, streams.hidden.device).items():
        share = more.times(missing[key[0]] / more.tokens)
        filled[key] = filled[key] + share if key in filled else share
    return filled


@torch.no_grad()
def _feed_all_tokens(
    run: BlockForward,
    names: Mapping[str, float],
    batches: list[RowBatch],
    hidden: Tensor,
    add: Callable[[str, Tensor], None],
) -> None:
    """Call `add(name, input [tokens, in])` with what linears of experts would read of all calibration tokens."""
    paths = {_kind(name)[0] for name in names}
    with ExitStack() as hooks, for_products(run):
        for path, experts in experts_of(run.module).items():
            if f"{run.path}.{path}" in paths:
                read = _AllTokens(f"{run.path}.{path}", names, add, run.dtype)
                hooks.enter_context(experts.register_forward_pre_hook(read))
        for batch in batches:
            if not batch.held_out:
                run(hidden[batch.rows], batch.rows)


@dataclass(frozen=True)
class _AllTokens:
    """A hook before the experts at `path`."""

    path: str
    names: Mapping[str, float]
    add: Callable[[str, Tensor], None]
    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens = args[0]
        if isinstance(module, Experts) and module.form.sorted:
            tokens = tokens.view(module.num_experts, -1, tokens.shape[-1]).sum(0)
        for number, expert in module.named_children():
            for leaf in (GATE, UP, DOWN):
                name = f"{self.path}.{number}.{leaf}"
                if name in self.names and isinstance(expert, Expert):
                    x = expert.inner(tokens) if leaf == DOWN else tokens
                    with torch.autocast(x.device.type, enabled=False):
                        self.add(name, x.to(self.dtype))
