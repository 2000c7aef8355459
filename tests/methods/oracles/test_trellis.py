"""Trellises against a reader of single bits, and the search for codes against all codes and a slow one in float64."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from torch import Tensor

from llmcompress.methods.layer import relative_error
from llmcompress.methods.solvers.block_search import TrellisStreams
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import TrellisCodes, shape
from llmcompress.weight.trellis import SEEDS, Trellis, cuts, index, linear_code, states, table
from tests.builders import RINGS, TRELLISES, compressed, correlated, gaussian, moments, seeded, streams
from tests.methods.conformance.cases import ROTATE
from tests.methods.oracles.columns import searched
from tests.tiers import tiered

SMALL = (Trellis(1, 1, 4), Trellis(2, 1, 4), Trellis(2, 2, 5))
every_trellis = pytest.mark.parametrize("trellis", TRELLISES, ids=str)


def read(w: TrellisCodes) -> Tensor:
    """`dense` once more, from the bits of the file, one number at a time."""
    trellis, tensors = w.trellis, encode(w)[1]
    stored = "".join(f"{octet:08b}"[::-1] for octet in tensors["codes"].tolist())  # lowest bits first
    found = torch.zeros(shape(w))
    at = 0
    for first, last in itertools.pairwise(cuts(len(found), w.run, trellis)):
        history = "0" * trellis.memory  # highest bit first
        for column, step in itertools.product(range(found.shape[1]), range(first, last)):
            if trellis.ring and step == first:  # goes on from its own end
                ring = [stored[at + code * trellis.bits :][: trellis.bits][::-1] for code in range(last - first)]
                history = ("".join(ring) * trellis.memory)[-trellis.memory :]
            history = (history + stored[at : at + trellis.bits][::-1])[-trellis.memory :]
            at += trellis.bits
            for value in range(trellis.values):
                row = step * trellis.values + value
                found[row, column] = table(trellis)[int(history, 2), value] * w.scale[row, 0].float()
    return found


@pytest.mark.parametrize("trellis", [*TRELLISES, *RINGS], ids=str)
@pytest.mark.parametrize("steps, run", [(1, 768), (7, 14), (21, 12), (20, 6)])
def test_a_matrix_is_what_its_bits_say(trellis: Trellis, steps: int, run: int) -> None:
    w = streams(trellis, steps, 5, run)
    assert torch.equal(dense(w), read(w))


@every_trellis
def test_a_table_is_a_gaussian_whose_branches_lie_apart(trellis: Trellis) -> None:
    found = table(trellis)
    assert torch.equal(found, found.bfloat16().float())
    assert found.mean(0).abs().max() < 0.02
    spread = 1.0 if trellis.code == "table" else 0.82 + 0.1 * trellis.rate
    torch.testing.assert_close(found.square().mean(0), torch.full((trellis.values,), spread**2), rtol=0, atol=0.06)
    if trellis.values == 2 or trellis.code == "linear":  # whose numbers are too coarse to tell the parts by
        return
    parts = 1 << trellis.bits
    edges = torch.special.ndtri(torch.arange(1, parts) / parts)
    part = torch.bucketize(found[:, 0], edges)
    for branches in (part.reshape(-1, parts), part.reshape(parts, -1).T):  # states after one, and before one
        assert torch.equal(branches.sort(1).values, torch.arange(parts).expand(len(branches), parts))


@pytest.mark.parametrize("memory", [8, 12, 14, 16])
@pytest.mark.parametrize("bits, values", [(1, 1), (3, 2), (2, 1), (5, 2), (3, 1), (7, 2), (4, 1)])
def test_a_linear_code_is_a_few_numbers_and_a_sum_of_bits(bits: int, values: int, memory: int) -> None:
    if memory < 2 * bits:
        return
    code, found = linear_code(bits, values, memory), table(Trellis(bits, values, memory, "linear"))
    for value in range(values):
        assert len(code.numbers[value]) == 1 << min(8, max(6, 4 - (-bits // values)))
        assert found[:, value].unique().numel() <= len(code.numbers[value])
        at = index(torch.arange(1 << memory), code.masks[value])
        assert torch.equal(
            at.bincount(), torch.full((len(code.numbers[value]),), (1 << memory) // len(code.numbers[value]))
        )
        if values == 1:
            part = at & ((1 << bits) - 1)
            for branches in (part.reshape(-1, 1 << bits), part.reshape(1 << bits, -1).T):  # after a state, and before
                assert torch.equal(branches.sort(1).values, torch.arange(1 << bits).expand_as(branches))
        one, other = torch.randint(1 << memory, (2, 100), generator=seeded(3))
        assert torch.equal(at[one] ^ at[other], at[one ^ other]), "linear over two elements"


def test_linear_codes_never_change() -> None:
    """Files hold only the sizes of a trellis, so another number here would change models that exist."""
    digest = hashlib.sha256()
    for bits, values in SEEDS:
        for memory in range(2 * bits if bits > 4 else 8, 17):
            digest.update((table(Trellis(bits, values, memory, "linear")) * 32).to(torch.int8).numpy().tobytes())
    assert digest.hexdigest()[:16] == "0b9ec3fb61146f19"


@pytest.mark.slow
@pytest.mark.parametrize("bits, values", [(1, 1), (3, 2), (2, 1), (5, 2), (3, 1), (4, 1)])
def test_a_linear_code_comes_closer_to_a_gaussian_than_a_table(bits: int, values: int) -> None:
    wanted = torch.randn(6000 // values, values, generator=seeded(7))
    errors = []
    for code in ("linear", "table"):
        trellis = Trellis(bits, values, 12, code)
        found = table(trellis)[searched(trellis, wanted, torch.ones_like(wanted))]
        scale = (wanted * found).sum() / found.square().sum()
        errors.append((wanted - scale * found).square().mean())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("sizes", [(8, 1, 16), (0, 1, 8), (2, 3, 8), (2, 1, 3), (2, 1, 17)])
def test_sizes_that_make_no_trellis_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is none: bits 1 to 7"):
        Trellis(*sizes)


# --- the search -----------------------------------------------------------------------------------------------------


def wishes(trellis: Trellis, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    random = seeded(seed)
    size = (steps, trellis.values)
    return torch.randn(size, generator=random), torch.rand(size, generator=random) + 0.1


def cost(trellis: Trellis, found: Tensor, wanted: Tensor, importance: Tensor) -> float:
    numbers = table(trellis)[found.long()].double()
    return float((importance * (wanted - numbers).square()).sum())


@pytest.mark.parametrize("trellis", SMALL, ids=str)
@pytest.mark.parametrize("steps", tiered([1, 2, 5], lambda steps: steps > 1))
@pytest.mark.parametrize("end", tiered([-1, 3], lambda end: end == 3))
def test_no_codes_are_nearer_than_those_found(trellis: Trellis, steps: int, end: int) -> None:
    if end >= 0 and steps * trellis.bits < trellis.memory:
        steps = -(-trellis.memory // trellis.bits)  # or the end cannot be reached
    start, rest = 5, 1 << (trellis.memory - trellis.bits)  # what later states see of one
    wanted, importance = wishes(trellis, steps, seed=steps)
    found = searched(trellis, wanted, importance, start, end)
    costs = []
    for codes in itertools.product(range(1 << trellis.bits), repeat=steps):
        way = [start]
        for code in codes:
            way.append((way[-1] << trellis.bits | code) % (1 << trellis.memory))
        if end < 0 or way[-1] % rest == end % rest:
            costs.append(cost(trellis, torch.tensor(way[1:]), wanted, importance))
    assert cost(trellis, found, wanted, importance) == pytest.approx(min(costs), rel=1e-3)
    before = torch.cat([torch.tensor([start]), found[:-1]])
    assert torch.equal(before % rest, found >> trellis.bits), "no way"


@pytest.mark.parametrize("trellis", tiered(TRELLISES, lambda trellis: trellis in TRELLISES[:1]))
def test_a_long_search_agrees_with_a_slow_one_in_float64(trellis: Trellis) -> None:
    """1,500 steps, whose whole costs would add up to more than a key holds."""
    steps = 1500
    wanted, importance = wishes(trellis, steps, seed=1)
    found = searched(trellis, wanted, importance)
    numbers, parts = table(trellis).double(), 1 << trellis.bits
    costs = torch.full((1 << trellis.memory,), float("inf"), dtype=torch.float64)
    costs[0] = 0
    for want, weight in zip(wanted, importance, strict=True):
        cheapest = costs.reshape(parts, -1).amin(0)  # of all that share their newer codes
        costs = cheapest.repeat_interleave(parts) + (weight * (want - numbers).square()).sum(1)
    assert cost(trellis, found, wanted, importance) == pytest.approx(float(costs.min()), rel=1e-3)


NEAREST = {1: 0.277, 2: 0.0707, 3: 0.0185, 1.5: 0.1415, 2.5: 0.038}  # bits a value -> the most that may be lost


@pytest.mark.parametrize("bits", tiered(NEAREST, lambda bits: bits == 2))
def test_how_near_a_gaussian_comes(bits: float) -> None:
    """At a memory of 12; 1/4, 1/16, 1/64, 1/8 and 1/32 are the limits of any code (Shannon)."""
    values = 1 if bits == int(bits) else 2
    trellis = Trellis(int(bits * values), values, 12)
    wanted = torch.randn(12000 // values, values, generator=seeded(3))
    ones = torch.ones_like(wanted)
    error = cost(trellis, searched(trellis, wanted, ones), wanted, ones) / wanted.numel()
    assert 4**-bits < error < NEAREST[bits]


# --- columns --------------------------------------------------------------------------------------------------------


def test_columns_chosen_again_stay_linked() -> None:
    trellis, width = Trellis(2, 1, 8), 6
    columns = TrellisStreams(torch.rand(40, 1).half() + 0.5, width, trellis, run=16)
    wanted = torch.randn(width, 40, generator=seeded(0))
    columns.choose(0, wanted.clone())
    before = columns.weight(wanted.T)
    again = TrellisStreams.of(before)
    for stream, (first, last) in enumerate(itertools.pairwise(cuts(40, 16, trellis))):
        way = states(before.codes[first * width : last * width], width, trellis)
        assert torch.equal(again.ends[1:, stream], way[:, -1])
    stored = torch.randn(1, 40, generator=seeded(1))
    again.choose(2, stored)
    after = dense(again.weight(wanted.T))
    assert torch.equal(after[:, 2], stored[0]) and not torch.equal(after[:, 2], dense(before)[:, 2])
    others = [column for column in range(width) if column != 2]
    assert torch.equal(after[:, others], dense(before)[:, others])


def test_rows_of_zeros_stay_zero() -> None:
    weight = gaussian(48, 64)
    weight[5] = 0
    found = dense(compressed(weight, correlated(512, 64), {"method": "trellis", "memory": 8}).expression())
    assert int(found[5].count_nonzero()) == 0 and bool(found.isfinite().all())


@pytest.mark.parametrize("bits, values", [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_short_ring_is_nearer_than_a_long_chain(bits: int, values: int) -> None:
    wanted, errors = torch.randn(768, 16, generator=seeded(5)), []
    for ring, run in ((False, 768), (True, 256)):
        columns = TrellisStreams(torch.ones(768, 1).half(), 16, Trellis(bits, values, 12, "linear", ring), run)
        stored = wanted.T.contiguous()
        columns.choose(0, stored)
        assert torch.equal(dense(columns.weight(wanted)), stored.T)
        errors.append((wanted - stored.T).square().mean())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("trellis", RINGS, ids=str)
def test_rings_are_free_of_each_other(trellis: Trellis) -> None:
    """Columns chosen in any order, and again, are those chosen at once."""
    wanted = torch.randn(6, 40, generator=seeded(0))
    scale = torch.rand(40, 1).half() + 0.5
    columns = TrellisStreams(scale, 6, trellis, run=16)
    at_once = wanted.clone()
    columns.choose(0, at_once)
    again = TrellisStreams.of(columns.weight(wanted.T))
    assert torch.equal(again.states, columns.states)
    for column in (4, 1, 0, 5, 3, 2):
        stored = wanted[column : column + 1].clone()
        again.choose(column, stored)
        assert torch.equal(stored[0], at_once[column])


@pytest.mark.parametrize(("rows", "ring"), [(4, False), (127, False), (128, True)])
def test_short_columns_stay_linked(rows: int, ring: bool) -> None:
    done = compressed(gaussian(rows, 64), correlated(512, 64), {"method": "trellis", "ring": True}).expression()
    assert isinstance(done, TrellisCodes) and done.trellis.ring == ring
    assert torch.equal(dense(done), read(done))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_it_is_far_better_than_a_grid_of_as_many_bits(bits: int) -> None:
    """On tokens not seen; in a rotated basis, where 2 bits of a trellis at its best lose 0.060, of a grid 0.118."""
    errors = []
    for kind in ("trellis", "gptq"):
        weight, inputs, unseen = gaussian(96, 128), correlated(2048, 128, seed=1), correlated(2048, 128, seed=2)
        done = compressed(weight, inputs, ROTATE, {"method": kind, "bits": bits})
        errors.append(relative_error(weight, done.expression(), moments(unseen)))
    assert errors[0] < 0.85 * errors[1]
