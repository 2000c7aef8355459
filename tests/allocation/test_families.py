"""Options of many families over one budget: none is worse for the others' being there, and low-rank terms pay or go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.allocation.allocate import PriceList, choose, damage, measure_prices, priced_tokens, reachable_choices
from llmcompress.allocation.choices import Choices, Matrix
from llmcompress.allocation.distortion import error, families
from llmcompress.allocation.file_sizes import payload_bytes
from llmcompress.allocation.prices import MatrixPrices, OptionPrice
from llmcompress.compression import run
from llmcompress.compression.job import prepare
from llmcompress.evaluation.verify import verify
from llmcompress.methods.layer import StepConfig, sketch, step
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.read import read_recipe
from llmcompress.recipe.target import Target
from llmcompress.weight.expression import bits
from tests.builders import gaussian, layer, moments
from tests.tiny import save_tiny

ROTATE = {"method": "rotate"}
LOW_RANK = {"method": "eora", "rank": 8, "factor_bits": 4}
SIZE = (64, 64)
Steps = tuple[StepConfig, ...]


def trellis(rate: float, *more: dict[str, Any]) -> list[dict[str, Any]]:
    return [ROTATE, {"method": "trellis", "bits": rate, "memory": 8}, *more]


OPTIONS = [
    *(trellis(rate) for rate in (1, 2, 3)),
    *(trellis(rate, LOW_RANK) for rate in (1, 2)),
    *([ROTATE, {"method": "gptq", "bits": rate}] for rate in (2, 3)),
    [ROTATE, {"method": "pb_llm", "salient": 0.1, "structure": "columns", "salient_bits": 4}],
    *([ROTATE, {"method": "planes", "bits": planes}] for planes in (1, 2)),
    [{"method": "sparsegpt", "pattern": "2:4", "bits": 4}],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of two blocks and a text."""
    folder = tmp_path_factory.mktemp("families")
    save_tiny("llama", folder / "dense", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    (folder / "text.txt").write_text(
        "".join(f"{i}. The quick brown fox jumps over {i * i} grey geese. " for i in range(80))
    )
    return folder


@pytest.fixture(scope="module")
def priced(place: Path) -> PriceList:
    """All families, on every layer."""
    calibration = {"dataset": str(place / "text.txt"), "samples": 12, "length": 48, "held_out": 4}
    values = {"version": 1, "calibration": calibration, "target": {"bpw": 2}, "options": OPTIONS}
    job = prepare(resolve(str(place / "dense")), read_recipe(values))
    return measure_prices(job, reachable_choices(job, ()), priced_tokens(job))


def only(found: PriceList, numbers: Sequence[int]) -> PriceList:
    """The list as if these options were all there are."""

    def of(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[number] for number in numbers)

    matrices = [
        replace(one, options=of(one.options), bits=of(one.bits), bytes=of(one.bytes)) for one in found.choices.matrices
    ]
    prices = tuple(replace(one, offers=of(one.offers)) for one in found.prices)
    return replace(found, choices=replace(found.choices, matrices=tuple(matrices)), prices=prices)


@pytest.mark.parametrize("bpw", [2.2, 2.7, 3.4])
@pytest.mark.slow
def test_all_families_together_are_never_worse_than_the_best_one(bpw: float, priced: PriceList) -> None:
    target = Target(bpw=bpw)
    everything = priced.reaching(target)
    assert (everything.choices.bpw(everything.chosen) or 99) <= bpw
    alone = []
    for family in families([offer.steps for offer in priced.prices[0].offers]):
        one = only(priced, family)
        cheapest = [min(range(len(matrix.bits)), key=matrix.bits.__getitem__) for matrix in one.choices.matrices]
        if (one.choices.bpw(cheapest) or 0) <= bpw:
            alone.append(damage(one.prices, one.reaching(target).chosen))
    assert len(alone) > 2 and damage(everything.prices, everything.chosen) <= min(alone) * (1 + 1e-9)


def test_more_families_never_hurt_whatever_their_prices() -> None:
    """A family that is worse at more bits must not make a better one at fewer look bad."""
    good = [([{"method": "rtn", "bits": 2}], 1.0), ([{"method": "rtn", "bits": 3}], 0.2)]
    bad = [([{"method": "gptq", "bits": 5}], 3.0)]
    found, prices = listed([[*good, *bad]] * 3)
    assert choose(found, prices, Target(bpw=6)) == (1, 1, 1)
    assert sorted(choose(found, prices, Target(bpw=2.7))) == [0, 0, 1]


def listed(damages: Sequence[Sequence[tuple[list[dict[str, Any]], float]]]) -> tuple[Choices, tuple[MatrixPrices, ...]]:
    """Matrices of one size whose options have these damages."""
    matrices, prices = [], []
    for number, row in enumerate(damages):
        options = tuple(tuple(map(step, steps)) for steps, _ in row)
        stored = [sketch("a", SIZE, steps) for steps in options]
        count, size = tuple(map(bits, stored)), tuple(map(payload_bytes, stored))
        matrices.append(Matrix(str(number), SIZE, options, count, size, (prod(SIZE),) * len(stored)))
        offers = [
            OptionPrice(steps, count[place], size[place], value, True, value)
            for place, (steps, (_, value)) in enumerate(zip(options, row, strict=True))
        ]
        prices.append(MatrixPrices(str(number), SIZE, False, 1.0, tuple(offers)))
    return Choices(tuple(matrices), 0, 0, 0, 0), tuple(prices)


def inputs(seed: int, loud: float) -> Tensor:
    """`[tokens, 64]` of which six directions are `loud` times as large as the others."""
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(9))).Q
    sizes = torch.ones(64)
    sizes[:6] = loud
    return (torch.randn(1024, 64, generator=torch.Generator().manual_seed(seed)) * sizes) @ basis.T


def test_a_low_rank_term_is_taken_where_it_pays_for_its_bits() -> None:
    """Rank 8 in 4 bits takes what a third bit of a 64 x 64 grid does. It pays where a few directions hold the inputs,
    and does not where all are alike."""
    options = [[{"method": "rtn", "bits": 2}], [{"method": "rtn", "bits": 2}, LOW_RANK], [{"method": "rtn", "bits": 3}]]
    damages = []
    for loud in (1.0, 30.0):
        one, held_out = layer(gaussian(*SIZE), inputs(0, loud)), moments(inputs(1, loud))
        damages.append([(steps, error(one, tuple(map(step, steps)), held_out)) for steps in options])
    found, prices = listed(damages)
    assert 0.9 < found.matrices[0].bits[1] / found.matrices[0].bits[2] < 1.1
    assert choose(found, prices, Target(bpw=3.4)) == (2, 1)
    assert choose(found, prices, Target(bpw=2.8)) == (0, 1), "where bits are short, those go first that buy most"


@pytest.mark.slow
def test_a_trellis_gets_no_low_rank_term_where_a_higher_rate_buys_more(priced: PriceList) -> None:
    """On these small matrices rank 8 takes nearly a bit a weight; a term is left to fill up what remains, if at all."""
    together = only(priced, [OPTIONS.index(steps) for steps in (trellis(2), trellis(2, LOW_RANK), trellis(3))])
    for one in together.prices:
        plain, term, higher = one.offers
        assert term.error < plain.error, "it does help, for its bits"
        gains = [(plain.damage - other.damage) / (other.bits - plain.bits) for other in (term, higher)]
        assert gains[0] < gains[1]
    for bpw in (2.5, 2.8, 3.1, 4):
        assert together.reaching(Target(bpw=bpw)).chosen.count(1) <= 2


@pytest.mark.slow
def test_a_model_of_many_families_is_as_large_as_planned(priced: PriceList, place: Path, tmp_path: Path) -> None:
    """Also with low-rank terms, which here are all there is to choose from beside a grid."""
    everything = priced.reaching(Target(bpw=2.7))
    terms = only(priced, [OPTIONS.index(trellis(1, LOW_RANK)), OPTIONS.index(trellis(2, LOW_RANK)), 5])
    for number, plan in enumerate((everything, terms.reaching(Target(bpw=2.8)))):
        result = run.compress(plan.settled, tmp_path / str(number))
        assert result.report.bpw == pytest.approx(plan.choices.bpw(plan.chosen))
        assert result.report.bytes <= plan.choices.size(plan.chosen) <= 1.02 * result.report.bytes
        assert verify(result.folder, text=place / "text.txt", length=16).layers == 14
        assert 0 < plan.measure_kl(result.folder) < 10 * damage(plan.prices, plan.chosen)
    used = {config.method for rule in plan.recipe.rules for config in rule.steps}
    assert "eora" in used
