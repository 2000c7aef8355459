"""Sizes that train together: their gradients are those of separate models, and a small size is better for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.distillation.run import distill
from llmcompress.distillation.student.model import Student, relaxed_student
from llmcompress.distillation.student.nested import at_size, check_nested, deal
from llmcompress.errors import RecipeError
from llmcompress.formats.peft import split_low_rank
from llmcompress.weight.algebra import mute_components, split_components, term_ends, truncate_low_rank
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import CompressedLinear, compressed_linears, decoded, put
from llmcompress.weight.nodes import Dense, Grid, LowRank, RotatedInputs, Sum, Weight
from tests.distillation.miniature import cut_short, loaded, make, recipe, weight_files

NESTED = (3, 0)
RATES = {"scales": 5e-3, "norms": 2e-3, "factors": 1e-2}
RULES: list[dict[str, Any]] = [
    {"match": "*.down_proj", "steps": [{"method": "rtn", "bits": 2}, {"method": "eora", "rank": 6, "factor_bits": 4}]},
    {"match": "*", "steps": [{"method": "rtn", "bits": 2}, {"method": "svd", "rank": 6, "factor_bits": 16}]},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("nested"), RULES)


def term(size: int, grid: bool) -> LowRank:
    generator = torch.Generator().manual_seed(size)
    if not grid:
        return LowRank(Dense(torch.randn(8, size, generator=generator)), Dense(torch.randn(size, 16)))
    left, right = (torch.randint(0, 16, shape, dtype=torch.uint8) for shape in ((8, size), (size, 16)))
    one, rows = torch.rand(1, 1).half(), torch.rand(size, 1).half()
    return LowRank(Grid(left, one, None, 16, size), Grid(right, rows, None, 16, 16))


@pytest.mark.parametrize("rank", [0, 2, 4, 6, 9])
def test_components_of_several_terms_count_together(rank: int) -> None:
    """Muted terms, and those that were taken apart, give the matrix of the first components in their order."""
    base, terms = Dense(torch.randn(8, 16)), (term(4, True), term(5, False))
    signs = torch.ones(16, dtype=torch.bool)
    whole = RotatedInputs(Sum((base, *terms)), signs, 16)
    left = torch.cat([dense(each.left) for each in terms], 1)[:, :rank]
    right = torch.cat([dense(each.right) for each in terms])[:rank]
    wanted = dense(RotatedInputs(Dense(base.values + left @ right), signs, 16))
    for found in (truncate_low_rank(whole, rank), mute_components(whole, rank)):
        torch.testing.assert_close(dense(found), wanted)
    apart = split_components(whole, (2, 6))
    torch.testing.assert_close(dense(apart), dense(whole))
    torch.testing.assert_close(dense(truncate_low_rank(apart, rank)), wanted)
    assert isinstance(apart, RotatedInputs) and isinstance(apart.inner, Sum) and len(apart.inner.parts) == 5


@pytest.mark.parametrize("rank", [0, 2, 4, 6, 9])
def test_a_term_around_a_rotation_counts_behind_the_one_below_it(rank: int) -> None:
    """A distillation puts its term around what `compress` wrote."""
    base, inner, outer = Dense(torch.randn(8, 16)), term(4, True), term(5, False)
    signs = torch.ones(16, dtype=torch.bool)
    whole = Sum((RotatedInputs(Sum((base, inner)), signs, 16), outer))
    below = base.values + dense(inner.left)[:, :rank] @ dense(inner.right)[:rank]
    around = dense(outer.left)[:, : max(rank - 4, 0)] @ dense(outer.right)[: max(rank - 4, 0)]
    wanted = dense(RotatedInputs(Dense(below), signs, 16)) + around
    for cut in (truncate_low_rank(whole, rank), mute_components(whole, rank)):
        torch.testing.assert_close(dense(cut), wanted)
    assert [end for _, end in term_ends(split_components(whole, (2, 6)))] == [2, 4, 6, 9]
    bare, factors = split_low_rank(whole)
    assert factors is not None and len(factors[0]) == 9 and not list(term_ends(bare))
    torch.testing.assert_close(dense(bare) + factors[1] @ factors[0], dense(whole))


def separate(folders: Path, size: int | None) -> Student:
    """A student of its own at a size, in float64 but for the numbers that train in its matrices."""
    model, _ = loaded(folders)
    for name, layer in compressed_linears(model).items():
        if size is not None and (first := truncate_low_rank(layer.expression(), size)) is not None:
            put(model, name, CompressedLinear.of(first, layer.bias))
    return relaxed_student(model.double(), RATES)


def test_gradients_are_the_sums_of_those_of_separate_models(folders: Path) -> None:
    ids = torch.arange(7 * 20).reshape(7, 20) * 13 % 256
    together = separate(folders, None)
    wanted: dict[str, Tensor] = {}
    for size, rows in deal(torch.arange(7), NESTED, step=4):
        with at_size(together.model, size):
            loss = together.model(ids[rows]).logits.square().sum()
            loss.backward()
        alone = separate(folders, size)
        own = alone.model(ids[rows]).logits.square().sum()
        torch.testing.assert_close(loss, own)
        own.backward()
        for name, value in alone.named_parameters().items():
            place, _, key = name.rpartition(".relaxed.")
            whole = name if key != "scale" else f"{place}.relaxed.0_scale"
            mine = torch.zeros_like(together.named_parameters()[whole]) if value.grad is not None else None
            if mine is None or value.grad is None:
                continue
            if "left" in key and "scale" not in key:
                mine = mine.view(-1, 6)
                mine[:, : size or 6] = value.grad.view(len(mine), -1)
            else:
                mine[: value.numel()] = value.grad
            wanted[whole] = wanted.get(whole, 0) + mine.flatten()
    assert len(wanted) == len(together.named_parameters())
    for name, value in together.named_parameters().items():
        torch.testing.assert_close(
            value.grad, wanted[name].view_as(value), rtol=1e-5, atol=1e-5 * float(wanted[name].abs().max())
        )


def test_sequences_are_dealt_to_sizes_in_turn() -> None:
    read: dict[int | None, set[int]] = {}
    for step in range(3):
        dealt = deal(torch.arange(4, 8), NESTED, step)
        assert sorted(int(row) for _, rows in dealt for row in rows) == [4, 5, 6, 7]
        for size, rows in dealt:
            read.setdefault(size, set()).update(rows.tolist())
    assert all(read[size] == {4, 5, 6, 7} for size in (None, *NESTED)), "each place of a batch goes to each size"


def test_a_decoded_student_is_read_at_a_size(folders: Path) -> None:
    model = loaded(folders)[0].double()
    ids = torch.arange(20)[None]
    with torch.no_grad(), decoded(model):
        whole = model(ids).logits
        with at_size(model, 0):
            bare = model(ids).logits
        assert torch.equal(model(ids).logits, whole)
        wanted = separate(folders, 0).model(ids).logits
    torch.testing.assert_close(bare, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_nested_run_resumes_and_is_better_at_its_small_sizes(folders: Path, tmp_path: Path) -> None:
    settings = recipe(folders, steps=8, rates=RATES, evaluate_every=4, save_every=4, batch=6, micro_batch=2)
    plain = distill(folders / "small", folders / "dense", settings, tmp_path / "plain")
    nested = settings | {"nested": NESTED}
    done = distill(folders / "small", folders / "dense", nested, tmp_path / "whole")
    first, last = done.history[0], done.history[-1]
    assert list(last["sizes"]) == ["3", "0"] and "sizes" not in plain.history[-1]
    assert first["kl"] < first["sizes"]["3"]["kl"] < first["sizes"]["0"]["kl"]
    assert all(last["sizes"][size]["kl"] < 0.9 * first["sizes"][size]["kl"] for size in last["sizes"])
    cut_short(folders, nested, tmp_path / "cut", calls=5)
    distill(folders / "small", folders / "dense", nested, tmp_path / "cut")
    assert weight_files(tmp_path / "whole") == weight_files(tmp_path / "cut")
    parts = distill(folders / "small", folders / "dense", nested | {"micro_batch": 1}, tmp_path / "parts")
    assert parts.history[-1]["kl"] == pytest.approx(last["kl"], rel=1e-3), "no division of the work shows"
    saved = nested | {"micro_batch": 1, "checkpointing": True}
    assert distill(folders / "small", folders / "dense", saved, tmp_path / "less").history[-1]["kl"] == pytest.approx(
        parts.history[-1]["kl"], rel=1e-3
    )


def test_sizes_that_cannot_be_are_refused(folders: Path, tmp_path: Path) -> None:
    for more, said in (
        ({"nested": [3, 3]}, "nested: a number of components is there twice"),
        ({"nested": [4, 3, 2, 1]}, "nested: 5 sizes, with the whole, need as many sequences in the batch"),
        ({"nested": [2], "phases": [{"kind": "blockwise", "steps": 1}]}, "need as many sequences in the batch"),
        ({"nested": [6]}, "no low-rank term of the student has more than 6 components"),
    ):
        with pytest.raises(RecipeError, match=said):
            distill(folders / "small", folders / "dense", recipe(folders, steps=1, **more), tmp_path / "out")
    bare: Weight = term(4, False)
    model, _ = loaded(folders)
    put(model, "model.layers.0.mlp.up_proj", CompressedLinear.of(bare))
    with pytest.raises(RecipeError, match="rank 0 leaves nothing of a matrix that is two factors"):
        check_nested(model, (0,))
