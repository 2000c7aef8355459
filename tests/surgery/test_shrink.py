"""Smaller sizes of one checkpoint: the first components of its low-rank terms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.errors import InputError, RecipeError
from llmcompress.formats.hub import push
from llmcompress.models.files.compressed import CompressedCheckpoint
from llmcompress.reporting.report import PENDING, UNGATED, GateReport
from llmcompress.surgery.shrink import shrink
from llmcompress.weight.algebra import truncate_low_rank
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Dense, Grid, LowRank, RotatedInputs, Sum, Weight
from tests.tiny import save_tiny

IDS = torch.arange(24)[None]


def factors(bits_: int) -> tuple[LowRank, torch.Tensor, torch.Tensor]:
    """A term of rank 6, stored in 16 bits or in a grid, and its two matrices."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(8, 6, generator=generator), torch.randn(6, 10, generator=generator)
    if bits_ == 16:
        return LowRank(Dense(left), Dense(right)), left, right
    codes = torch.randint(0, 16, (8, 6), generator=generator, dtype=torch.uint8)
    other = torch.randint(0, 16, (6, 10), generator=generator, dtype=torch.uint8)
    scale, zero = torch.rand(8, 3, generator=generator).half(), torch.full((8, 3), 7, dtype=torch.uint8)
    one, rows = torch.rand(1, 1, generator=generator).half(), torch.rand(6, 1, generator=generator).half()
    grid = Grid(codes, scale, zero, 16, 2) if bits_ == 4 else Grid(codes, one, None, 16, 6)
    term = LowRank(grid, Grid(other, rows, None, 16, 10))
    return term, dense(term.left), dense(term.right)


@pytest.mark.parametrize("kind", [16, 4, 1], ids=["values", "groups", "one scale"])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncate_low_rank_keeps_the_first_components(kind: int, rank: int) -> None:
    term, left, right = factors(kind)
    base = Dense(torch.arange(80.0).reshape(8, 10))
    found = truncate_low_rank(RotatedInputs(Sum((base, term)), torch.ones(10, dtype=torch.bool), 2), rank)
    assert isinstance(found, RotatedInputs) and isinstance(found.inner, Sum)
    assert found.inner.parts[0] is base
    torch.testing.assert_close(dense(found.inner.parts[1]), left[:, :rank] @ right[:rank])
    assert bits(found.inner.parts[1]) < bits(term)


def test_truncate_low_rank_leaves_terms_of_lower_rank() -> None:
    term, _, _ = factors(16)
    base: Weight = Dense(torch.zeros(8, 10))
    for whole in (term, Sum((base, term)), base):
        assert truncate_low_rank(whole, 6) is whole
    assert truncate_low_rank(Sum((base, term)), 0) is base
    assert isinstance(truncate_low_rank(Sum((base, base, term)), 0), Sum)
    for nothing_else in (term, Sum((term, term))):
        with pytest.raises(RecipeError, match="rank 0 leaves nothing of a matrix that is two factors"):
            truncate_low_rank(nothing_else, 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shrink")
    steps = [{"method": "rotate"}, {"method": "rtn", "bits": 2}, {"method": "eora", "rank": 6, "factor_bits": 4}]
    recipe = {"version": 1, "calibration": {"samples": 4, "length": 32}, "rules": [{"match": "*", "steps": steps}]}
    return lc.compress(save_tiny("llama", folder / "dense"), recipe, folder / "large").folder


@torch.no_grad()
def logits(folder: Path, config: Any = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    found: torch.Tensor = model(IDS).logits
    return found


def test_the_report_says_what_is_true_of_the_smaller_size(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = GateReport({"kl": 0.1}, kl=0.5, perplexity_ratio=2.0, held=False)
    said = ("rates: the student has no factors to train; the rest learns alone", f"{UNGATED}, since it is random")
    earlier = replace(lc.read(large), gates=missed, warnings=said)
    with monkeypatch.context() as patch:
        patch.setattr("llmcompress.surgery.shrink.reports.read", lambda folder: earlier)
        shrink(large, 3, tmp_path / "middle")
    shrink(tmp_path / "middle", 2, tmp_path / "small")
    report = lc.read(tmp_path / "small")
    cut = "low-rank terms have 2 components at most; errors of layers are those before that"
    assert report.warnings == (cut,) and report.gates == missed


@pytest.mark.slow
def test_shrunken_checkpoint_loads_and_is_counted(large: Path, tmp_path: Path) -> None:
    done = shrink(large, 2, tmp_path / "small")
    opened, before = CompressedCheckpoint(tmp_path / "small"), CompressedCheckpoint(large)
    assert done.terms == len(opened.layouts) and done.bytes_after == opened.bytes < done.bytes_before
    for name in opened.layouts:
        torch.testing.assert_close(dense(opened.expression(name)), dense(truncate_low_rank(before.expression(name), 2)))
    report = lc.read(tmp_path / "small")
    stored = sum(bits(opened.expression(name)) for name in opened.layouts)
    weights = sum(row.shape[0] * row.shape[1] for row in report.layers)
    assert report.bpw == done.bpw_after == pytest.approx(stored / weights)
    assert report.gates is None or report.gates.unmeasured not in (None, PENDING)
    assert push(tmp_path / "small", "me/small", dry_run=True).commit is None
    again = shrink(tmp_path / "small", 0, tmp_path / "bare")
    assert again.bytes_after < done.bytes_after
    whole, small, bare = (logits(folder) for folder in (large, tmp_path / "small", tmp_path / "bare"))
    assert 0 < (whole - small).norm() < (whole - bare).norm()


def test_a_model_is_loaded_at_a_smaller_size(large: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(large)
    config.quantization_config["rank"] = 2
    shrink(large, 2, tmp_path / "small")
    assert torch.equal(logits(large, config), logits(tmp_path / "small"))
    AutoModelForCausalLM.from_pretrained(large, config=config).save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(tmp_path / "small"))
    assert CompressedCheckpoint(tmp_path / "saved").bytes == pytest.approx(
        CompressedCheckpoint(tmp_path / "small").bytes, rel=0.02
    )
    headed = AutoModelForSequenceClassification.from_pretrained(large, config=config)
    up = headed.model.layers[0].mlp.up_proj.expression()
    torch.testing.assert_close(
        dense(up), dense(CompressedCheckpoint(tmp_path / "small").expression("model.layers.0.mlp.up_proj"))
    )
    for rank, said in ((-1, "no number of components"), (True, "no number of components")):
        config.quantization_config["rank"] = rank
        with pytest.raises(InputError, match=said):
            AutoModelForCausalLM.from_pretrained(large, config=config)


def test_a_token_table_is_cut_with_the_head_that_is_tied_to_it(tmp_path: Path) -> None:
    """Also where transformers ties them again."""
    steps = [{"method": "rtn", "bits": 4}, {"method": "svd", "rank": 6}]
    recipe = {"version": 1, "rules": [{"match": "*", "steps": steps}], "embeddings": steps}
    source = save_tiny("gemma3_text", tmp_path / "dense", tie_word_embeddings=True)  # whose rows are scaled
    whole = lc.compress(source, recipe, tmp_path / "large").folder
    shrink(whole, 2, tmp_path / "small")
    config = AutoConfig.from_pretrained(whole)
    config.quantization_config["rank"] = 2
    model = AutoModelForCausalLM.from_pretrained(whole, config=config, dtype=torch.float32)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, logits(tmp_path / "small"))
        model.tie_weights()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(tmp_path / "small"))
    assert CompressedCheckpoint(tmp_path / "saved").layouts == CompressedCheckpoint(tmp_path / "small").layouts


@pytest.mark.slow
def test_first_components_are_nearly_the_best_term_of_their_rank(large: Path, tmp_path: Path) -> None:
    steps = [{"method": "rotate"}, {"method": "rtn", "bits": 2}, {"method": "eora", "rank": 2, "factor_bits": 4}]
    recipe = {"version": 1, "calibration": {"samples": 4, "length": 32}, "rules": [{"match": "*", "steps": steps}]}
    own = CompressedCheckpoint(lc.compress(large.parent / "dense", recipe, tmp_path / "own").folder)
    first = CompressedCheckpoint(large)
    exact = dict(AutoModelForCausalLM.from_pretrained(large.parent / "dense").named_parameters())
    for name in first.layouts:
        weight = exact[f"{name}.weight"].detach().float()
        cut, best, without = (
            float((dense(one) - weight).norm())
            for one in (
                truncate_low_rank(first.expression(name), 2),
                own.expression(name),
                truncate_low_rank(first.expression(name), 0),
            )
        )
        assert cut < without and cut < 1.1 * best


def test_shrink_refuses_impossible_ranks_and_tied_blocks(large: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no low-rank term of more than rank 6, so there is nothing to take away"):
        shrink(large, 6, tmp_path / "out")
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]
    tied = {"version": 1, "calibration": {"samples": 4, "length": 32}, "tie": {"blocks": 2}, "rules": rules}
    dense_folder = save_tiny("llama", tmp_path / "dense", num_hidden_layers=4)
    with pytest.raises(RecipeError, match="has matrices in common, whose terms are not taken apart"):
        shrink(lc.compress(dense_folder, tied, tmp_path / "tied").folder, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shrink_command_reports_sizes(large: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["shrink", str(large), "--rank", "1", "-o", str(tmp_path / "out")])
    assert found.exit_code == 0 and "of more than rank 1 were cut to it" in found.stdout
