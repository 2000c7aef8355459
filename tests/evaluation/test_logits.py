"""Logits by blocks: scores are those of the whole model, whichever way it is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmcompress as lc
from llmcompress.calibration import streaming
from llmcompress.evaluation.distance import distance
from llmcompress.evaluation.logits import OnDisk, open_model, window_logits
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.weight.modules import compressed_linears, decoded
from tests.calibration.test_walk import save_wide
from tests.tiny import save_tiny
from tests.zoo import save_any

RTN = {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 16}]}]}


def windows() -> torch.Tensor:
    return torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(1))


def test_scores_are_those_of_whole_models(tmp_path: Path) -> None:
    dense = locate(str(save_tiny("qwen3", tmp_path / "dense")))
    small = locate(str(lc.compress(dense.folder, RTN, tmp_path / "small").folder))
    teacher, student = load_model(dense), load_model(small)
    with decoded(student):
        wanted = distance(teacher, student, windows())
    seen: list[tuple[int, int]] = []
    found = distance(
        open_model(dense, "cpu"), open_model(small, "cpu"), windows(), blocks=lambda *one: seen.append(one)
    )
    assert found == wanted
    assert seen == [(1, 2), (2, 2)] * 2
    assert perplexity(open_model(dense, "cpu"), windows()) == wanted.teacher


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_large_vocabulary_is_scored_in_parts(batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = locate(str(save_tiny("qwen3", tmp_path / "dense")))
    small = locate(str(lc.compress(dense.folder, RTN, tmp_path / "small").folder))
    wanted = distance(open_model(dense, "cpu"), open_model(small, "cpu"), windows())
    monkeypatch.setattr(streaming, "LOGITS", 1)
    monkeypatch.setattr(streaming, "STEP", 16)  # of 40 positions
    sizes = [[part.shape[1] for part in parts] for _, parts in window_logits(open_model(dense, "cpu"), windows())]
    assert sizes == [[16, 16, 8]] * 3
    for student in (open_model(small, "cpu"), load_model(small)):  # in parts, and whole
        found = distance(open_model(dense, "cpu"), student, windows(), batch)
        assert found.kl_windows == pytest.approx(wanted.kl_windows, rel=1e-5)
        assert found.teacher.windows == pytest.approx(wanted.teacher.windows, rel=1e-6)
        assert found.top1_agreement == wanted.top1_agreement


def test_what_was_compressed_stays_compressed(tmp_path: Path) -> None:
    dense = save_tiny("qwen3", tmp_path / "dense")
    model = load_model(locate(str(lc.compress(dense, RTN, tmp_path / "small").folder)))
    most = 0
    for _ in window_logits(model, windows(), blocks=lambda *_: None):
        most = max(most, sum(layer.ready is not None for layer in compressed_linears(model).values()))
    assert most == 0  # blocks have passed, and the head of this model is dense


def test_a_model_whose_blocks_do_not_pass_is_read_whole(tmp_path: Path) -> None:
    place = locate(str(save_any("rwkv", tmp_path / "model")))
    found = open_model(place, "cpu")
    assert isinstance(found, OnDisk)
    assert perplexity(found, windows()).nll == pytest.approx(perplexity(load_model(place), windows()).nll, rel=1e-6)


def test_no_window_has_no_logits(tmp_path: Path) -> None:
    place = locate(str(save_tiny("llama", tmp_path)))
    assert list(window_logits(open_model(place, "cpu"), windows()[:0])) == []


PEAK = """
import sys
import torch
torch.set_num_threads(1)
from llmcompress.evaluation.logits import open_model
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.allocation.sensitivity import Probe
from llmcompress.calibration.gather import Statistics
from llmcompress.calibration.walk import walk
from llmcompress.models.dense.model import resolve
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.locate import locate
from llmcompress.runtime.memory import peak_memory

ids = torch.arange(256).reshape(4, 64)
for folder in sys.argv[1:]:
    perplexity(open_model(locate(folder), "cpu"), ids)
    source = resolve(folder)
    arch = architecture(source.config, source.skeleton())
    probe = Probe(source, arch, ids[:, :16], "cpu")
    for block in walk(source, arch, ids, Statistics({}, prefix="dense")):
        name = arch.blocks[block.index].groups[0][0].name
        probe.exchange(block, name, 0.9 * block.weight(name))
        probe.leave(block)
    assert len(probe.divergences()) == len(arch.blocks)
    print(peak_memory() >> 10)
"""


@pytest.mark.nightly
def test_scoring_and_pricing_hold_one_block(tmp_path: Path) -> None:
    """8 and 32 blocks of 14 MB in float32: held all at once they would differ by 330 MB."""
    folders = [str(save_wide(tmp_path / str(layers), layers)) for layers in (8, 32)]
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.splitlines()]
    assert peaks[1] < 1.15 * peaks[0], f"peak memory {peaks[0]} kB with 8 blocks, {peaks[1]} kB with 32"
