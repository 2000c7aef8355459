"""Sequences shared out over processes give the moments of all of them, to the rounding of float32 sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.gradients import measure_importance
from llmcompress.calibration.ranks import own_share, sum_over_ranks
from llmcompress.calibration.walk import Execution, walk
from llmcompress.errors import RecipeError
from llmcompress.methods.moments import Moments
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.recipe.calibration import TokenWeights
from llmcompress.runtime.ranks import ALONE, Ranks
from tests.lockstep import in_lockstep
from tests.tiers import tiered
from tests.tiny import save_tiny
from tests.zoo import save_zoo

ALL = frozenset({"square", "outer", "cross"})
Found = dict[tuple[str, bool], Moments]


def sequences(count: int = 7, length: int = 24) -> Tensor:
    return torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("held_out", [0, 1, 4])
def test_shares_are_all_of_the_sequences(count: int, held_out: int) -> None:
    given = sequences()
    shares = [own_share(given, held_out, Ranks("cpu", rank, count)) for rank in range(count)]
    fitted = torch.cat([part[: len(part) - held] for part, held in shares])
    beside = torch.cat([part[len(part) - held :] for part, held in shares])
    assert torch.equal(torch.cat([fitted, beside]), given) and len(beside) == held_out


def test_a_process_without_a_sequence_is_refused() -> None:
    with pytest.raises(RecipeError, match="4 processes are more than the 3 calibration sequences; start fewer"):
        own_share(sequences(), 4, Ranks("cpu", 0, 4))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("width", [5, 300, 600])  # within a tile, and over its edges
def test_moments_of_shards_are_those_of_the_whole(count: int, width: int) -> None:
    """Against float64; a process may lack a linear altogether, as one whose tokens did not reach an expert."""
    torch.manual_seed(0)
    x, dense = torch.randn(40, width), torch.randn(40, width)
    parts = torch.arange(40).tensor_split(count)

    def work(ranks: Ranks) -> dict[str, Moments]:
        rows = parts[ranks.rank]
        own = {"all": Moments.of(x[rows], ALL, torch.linspace(0.1, 1, len(rows)), dense[rows])}
        if ranks.rank == 1:
            own["rare"] = Moments.of(x[rows], frozenset({"outer"}))
        return sum_over_ranks(own, ranks, torch.device("cpu"))

    found = in_lockstep(count, work)
    weight = torch.cat([torch.linspace(0.1, 1, len(rows)) for rows in parts]).double()[:, None]
    y, z = x.double(), dense.double()
    for each in found:
        whole, rare = each["all"], each["rare"]
        assert whole.tokens == pytest.approx(float(weight.sum())) and rare.tokens == len(parts[1])
        for value, expected in (
            (whole.square, (y * y * weight).sum(0)),
            (whole.outer, (y * weight).T @ y),
            (whole.cross, (z * weight).T @ y),
            (rare.outer, y[parts[1]].T @ y[parts[1]]),
        ):
            assert value is not None
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
        assert whole.outer is not None and torch.equal(whole.outer, whole.outer.T)
        assert rare.square is None and rare.cross is None
        first = found[0]["all"]
        assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(whole), strict=True))


def tensors(moments: Moments) -> list[Tensor]:
    return [value for value in (moments.square, moments.outer, moments.cross) if value is not None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DenseModel]:
    def get(family: str) -> DenseModel:
        place: Path = tmp_path_factory.mktemp(family)
        return resolve(str(save_tiny(family, place) if family == "llama" else save_zoo(family, place)))

    return get


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("by", tiered([None, "attention", "gradient"], lambda by: by is None))
def test_a_walk_together_is_a_walk_alone(
    family: str, by: Literal["attention", "gradient"] | None, models: Callable[[str], DenseModel]
) -> None:
    """Dense and compressed streams, held-out sequences that not every process has, experts that are starved."""
    source, given = models(family), sequences()
    weights = None if by is None else TokenWeights(by=by)

    def work(ranks: Ranks) -> Found:
        own, held_out = own_share(given, 2, ranks)
        arch = architecture(source.config, source.skeleton())
        found: Found = {}
        counts = measure_importance(source, arch, own, ranks=ranks) if by == "gradient" else None
        statistics = Statistics(ALL, weights=weights, importance=counts, cross=True)
        for block in walk(source, arch, own, statistics, Execution(batch_size=1, ranks=ranks), held_out=held_out):
            for group in block.groups:
                found[group.names[0], False] = group.inputs
                assert group.held_out is not None
                found[group.names[0], True] = group.held_out
                with torch.no_grad():  # so that the streams part
                    block.module.get_submodule(group.names[0].removeprefix(f"{block.path}.")).weight.mul_(0.9)
        return found

    whole, together = work(ALONE), in_lockstep(3, work)
    for found in together:
        assert found.keys() == whole.keys()
        for key, moments in found.items():
            assert moments.tokens == pytest.approx(whole[key].tokens, rel=1e-6)
            for one, other in zip(tensors(moments), tensors(whole[key]), strict=True):
                assert torch.linalg.vector_norm(one - other) <= 1e-5 * torch.linalg.vector_norm(other), key
