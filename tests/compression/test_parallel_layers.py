"""Layers shared out over processes: where each goes, and that their weights are bit for bit those of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import llmcompress as lc
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import Block, InputGroup, walk
from llmcompress.compression import layers
from llmcompress.compression.job import Job, prepare
from llmcompress.compression.layers import WorkItem, assign_to_ranks, compress_layers
from llmcompress.errors import NumericsError
from llmcompress.methods import layer, row_chunks
from llmcompress.methods.moments import Moments
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.read import read_recipe
from llmcompress.reporting.report import LayerReport
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.weight.encoding import decode
from llmcompress.weight.expression import dense
from llmcompress.weight.layout import PackedWeight
from llmcompress.weight.nodes import Weight, shape
from tests import builders
from tests.builders import correlated, gaussian
from tests.lockstep import in_lockstep
from tests.tiers import tiered
from tests.tiny import save_tiny
from tests.zoo import save_zoo

GPTQ = {"method": "gptq", "bits": 3, "group_size": 8}
TRELLIS = {"method": "trellis", "bits": 2, "memory": 8}
PIPELINES: dict[str, list[dict[str, Any]]] = {
    "gptq": [GPTQ],
    "sparse": [{"method": "sparsegpt", "sparsity": 0.5}],
    "rotated trellis": [{"method": "rotate"}, TRELLIS],
    "low rank": [GPTQ, {"method": "eora", "rank": 2}],  # of all rows at once
    "partial": [{"method": "pb_llm", "salient": "1:8"}],
}
Packed = dict[str, PackedWeight]
ONEDNN: Any = torch.backends.mkldnn


# --- where shares go --------------------------------------------------------------------------------------------------


def items(costs: list[tuple[int, float]]) -> list[WorkItem]:
    return [WorkItem(str(number), group, slice(0, 1), seconds) for number, (group, seconds) in enumerate(costs)]


def load(costs: list[tuple[int, float]], factors: list[float], owners: tuple[int, ...] | list[int]) -> float:
    """The time of the busiest process."""
    totals = dict.fromkeys(owners, 0.0)
    for (_, seconds), owner in zip(costs, owners, strict=True):
        totals[owner] += seconds
    for owner, group in {(owner, group) for (group, _), owner in zip(costs, owners, strict=True)}:
        totals[owner] += factors[group]
    return max(totals.values())


def test_one_process_has_everything() -> None:
    assert assign_to_ranks(items([(0, 3.0), (1, 1.0), (1, 2.0)]), [1.0, 5.0], 1) == [0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_at_most_a_third_slower_than_the_best(seed: int) -> None:
    """The bound of Graham for the longest first, on independent shares: 4/3 - 1/(3m)."""
    drawn = torch.rand(7, generator=torch.Generator().manual_seed(seed)).tolist()
    costs = [(number, seconds) for number, seconds in enumerate(drawn)]
    for count in (2, 3):
        best = min(load(costs, [0.0] * 7, owners) for owners in product(range(count), repeat=7))
        owners = assign_to_ranks(items(costs), [0.0] * 7, count)
        assert load(costs, [0.0] * 7, owners) <= best * (4 / 3 - 1 / (3 * count)) + 1e-9


def test_layers_that_share_a_costly_factor_stay_together() -> None:
    owners = assign_to_ranks(items([(0, 1.0), (0, 1.0), (0, 1.0), (1, 6.0)]), [10.0, 10.0], 2)
    assert owners == [1, 1, 1, 0]
    assert len(set(assign_to_ranks(items([(0, 30.0), (0, 30.0)]), [10.0], 2))) == 2, "but not where apart is faster"


# --- what becomes of them -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            made[family] = save_tiny(family, place) if family == "llama" else save_zoo(family, place)
        return made[family]

    return get


@contextmanager
def standing(model: Path, **asked: Any) -> Iterator[tuple[Job, Block]]:
    """A walk at a model's first block, with both streams, and the job that is laid over the model."""
    entries = {"version": 1, "name": "test", "asymmetric": 0.5, "calibration": {"samples": 4, "length": 16}, **asked}
    job = prepare(resolve(str(model)), read_recipe(entries))
    tokens = torch.randint(0, 250, (6, 16), generator=torch.Generator().manual_seed(1))
    blocks: Any = walk(job.source, job.arch, tokens, Statistics(needs=job.needs(), cross=True), held_out=2)
    yield job, next(blocks)
    blocks.close()


def fresh(moments: Moments) -> Moments:
    """Moments of the same bits, of which nothing has been derived yet."""
    return Moments(moments.tokens, moments.square, moments.outer, moments.cross)


def groups_of(block: Block) -> list[InputGroup]:
    return [replace(group, inputs=fresh(group.inputs)) for group in block.groups]


def check_same(alone: tuple[Packed, list[LayerReport]], found: tuple[Packed, list[LayerReport]]) -> None:
    assert list(found[0]) == list(alone[0]) and found[1] == alone[1]
    for name, weight in alone[0].items():
        assert found[0][name].layout == weight.layout and torch.equal(found[0][name].payload, weight.payload), name


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", tiered(PIPELINES, {"gptq", "rotated trellis", "low rank"}.__contains__))
def test_weights_are_those_of_one_process(
    name: str, count: int, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that have to be cut into runs of rows, which lie in several processes, among them."""
    monkeypatch.setattr(row_chunks, "RUN", 16)
    with standing(models("llama"), rules=[{"match": "*", "steps": PIPELINES[name]}]) as (job, block):
        alone = compress_layers(job, block, groups_of(block), ALONE)
        for found in in_lockstep(count, lambda ranks: compress_layers(job, block, groups_of(block), ranks)):
            check_same(alone, found)


@pytest.mark.parametrize(
    "steps", [[{"method": "rotate"}, GPTQ], [{"method": "mxfp", "format": "nvfp4"}]], ids=["in runs", "in one piece"]
)
def test_a_long_layer_is_decoded_a_run_at_a_time(
    steps: list[dict[str, Any]], models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its error is that of evenly spaced rows, in float64."""
    monkeypatch.setattr(row_chunks, "RUN", 16)
    monkeypatch.setattr(layers, "MANY", 48)
    monkeypatch.setattr(layer, "SAMPLED", 10)
    decoded: list[int] = []

    def watched(weight: Weight) -> torch.Tensor:
        decoded.append(shape(weight)[0])
        return dense(weight)

    monkeypatch.setattr(layers, "dense", watched)
    with standing(models("llama"), rules=[{"match": "*", "steps": steps}], asymmetric=0.0) as (job, block):
        groups = groups_of(block)
        packed, rows = compress_layers(job, block, groups, ALONE)
        assert max(row.shape[0] for row in rows) == 48 and max(decoded) < 48
        for row in (row for row in rows if row.shape[0] >= 48):
            weight, outer = block.weight(row.name).double(), next(g for g in groups if row.name in g.names).inputs.outer
            assert outer is not None
            chosen = torch.tensor([round(number * (len(weight) - 1) / 9) for number in range(10)])
            lost = (weight - dense(decode(packed[row.name].layout.header, packed[row.name].views())).double())[chosen]
            wanted = (lost @ outer.double() * lost).sum() / (weight[chosen] @ outer.double() * weight[chosen]).sum()
            assert row.error == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize("rest", [2, 100, 190, 192, 382, 384])
@pytest.mark.parametrize("run", [256, 384, 768])
def test_runs_of_a_long_matrix_join_to_the_streams_that_were_searched(run: int, rest: int) -> None:
    """A few rows behind the last whole run are no stream of their own, neither alone nor joined."""
    steps = (layer.step({**TRELLIS, "run": run, "ring": True}),)
    long = builders.layer(gaussian(row_chunks.RUN + rest, 4), correlated(64, 4))
    parts = [row_chunks.apply_to_run(long, steps, rows) for rows in row_chunks.runs(len(long.weight), steps)]
    whole = dense(row_chunks.join_runs(parts).weight)
    assert torch.equal(whole, torch.cat([dense(part.weight) for part in parts]))
    assert len(parts) == 1 + (rest >= 384)


@pytest.mark.parametrize("name", tiered(PIPELINES, {"gptq", "rotated trellis", "low rank"}.__contains__))
def test_weights_are_those_of_one_layer_after_the_other(name: str, models: Callable[[str], Path]) -> None:
    """All layers of a block beside each other, in threads, as on a GPU."""
    with standing(models("llama"), rules=[{"match": "*", "steps": PIPELINES[name]}]) as (job, block):
        threads, switch = torch.get_num_threads(), ONEDNN.matmul.fp32_precision
        expected = compress_layers(job, block, groups_of(block), ALONE)
        for workers in (1, 3):
            check_same(expected, compress_layers(job, block, groups_of(block), ALONE, workers))
        assert torch.get_num_threads() == threads and ONEDNN.matmul.fp32_precision == switch


@pytest.mark.slow
def test_experts_are_side_by_side_in_a_run(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run as on a GPU leaves the bytes of one on the CPU."""
    text = tmp_path / "text.txt"
    text.write_text("Forty farms bring their corn to the mill by the river. " * 40)
    data = {"dataset": str(text), "samples": 6, "length": 32, "held_out": 2}
    asked = {"version": 1, "name": "test", "calibration": data, "rules": [{"match": "*", "steps": [GPTQ]}]}
    at_once: list[int] = []

    def counted(job: Job, block: Block, groups: Any, ranks: Ranks, workers: int) -> Any:
        at_once.append(sum(len(group.names) for group in groups))
        return compress_layers(job, block, groups, ranks, workers)

    expected = lc.compress(models("mixtral"), asked, tmp_path / "one")
    monkeypatch.setattr("llmcompress.compression.block.workers_on", lambda device: 4)
    monkeypatch.setattr("llmcompress.compression.block.compress_layers", counted)
    found = lc.compress(models("mixtral"), asked, tmp_path / "four")
    assert max(at_once) == 4 and found.report.layers == expected.report.layers
    for file in expected.folder.glob("*.safetensors"):
        assert (found.folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_experts_are_shared_out_too(models: Callable[[str], Path]) -> None:
    with standing(models("mixtral"), rules=[{"match": "*", "steps": [GPTQ]}]) as (job, block):
        alone = compress_layers(job, block, groups_of(block), ALONE)
        for found in in_lockstep(3, lambda ranks: compress_layers(job, block, groups_of(block), ranks)):
            check_same(alone, found)


def test_no_layer_is_compressed_twice(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []
    original = row_chunks.apply_to_run

    def counted(layer: Any, steps: Any, rows: slice) -> Any:
        done.append((layer.name, rows.start))
        return original(layer, steps, rows)

    monkeypatch.setattr(row_chunks, "RUN", 16)
    monkeypatch.setattr("llmcompress.compression.layers.apply_to_run", counted)
    with standing(models("llama"), rules=[{"match": "*", "steps": [GPTQ]}]) as (job, block):
        in_lockstep(3, lambda ranks: compress_layers(job, block, groups_of(block), ranks))
        rows = {name: linear.shape[0] for name, linear in block.linears.items() if name.startswith(f"{block.path}.")}
    assert sorted(done) == sorted((name, start) for name, count in rows.items() for start in range(0, count, 16))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_error_is_that_of_the_first_layer_in_order(workers: int, models: Callable[[str], Path]) -> None:
    with standing(models("llama"), rules=[{"match": "*", "steps": [GPTQ]}]) as (job, block):
        groups = groups_of(block)
        for group in groups[1:]:
            if group.inputs.outer is not None:
                group.inputs.outer.mul_(float("nan"))
        first = groups[1].names[0]
        with pytest.raises(NumericsError, match=f"^{first}: its input statistics"):
            compress_layers(job, block, groups, ALONE, workers)


def test_an_error_in_one_process_ends_all(models: Callable[[str], Path]) -> None:
    with standing(models("llama"), rules=[{"match": "*", "steps": [GPTQ]}]) as (job, block):

        def work(ranks: Ranks) -> None:
            groups = groups_of(block)
            for group in groups:
                if "o_proj" in group.names[0] and group.inputs.outer is not None:
                    group.inputs.outer.mul_(float("nan"))
            with pytest.raises(NumericsError, match=r"o_proj: its input statistics cannot be factored"):
                compress_layers(job, block, groups, ranks)

        in_lockstep(2, work)
