"""Low-rank terms that are trained in: nothing moves before a step, the file grows by their bits, the distance falls."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.distillation.run import distill
from llmcompress.distillation.student.low_rank import add_terms, dense_weight, round_terms, teacher_weights
from llmcompress.errors import RecipeError
from llmcompress.evaluation.verify import verify
from llmcompress.recipe.sections import Adaptation
from llmcompress.reporting.report import read
from llmcompress.weight.algebra import add_term, truncate_low_rank
from llmcompress.weight.expression import bits, dense, describe
from llmcompress.weight.modules import CompressedLinear, compressed_linears
from llmcompress.weight.nodes import Dense, LowRank, Sum, shape
from tests.builders import grid
from tests.distillation.miniature import cut_short, loaded, make, recipe, weight_files, weights_bytes
from tests.tiers import tiered_nightly
from tests.zoo import expert_slices, save_zoo, zoo

RULES = [
    {"match": "*.down_proj", "steps": [{"method": "rtn", "bits": 3}, {"method": "svd", "rank": 2}]},
    {"match": "*", "steps": [{"method": "rotate"}, {"method": "rtn", "bits": 2, "group_size": 16}]},
]
IDS = torch.arange(30)[None] * 7 % 256


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("adapt"), RULES)


def linears(model: PreTrainedModel) -> dict[str, CompressedLinear]:
    """Those in blocks."""
    return {name: layer for name, layer in compressed_linears(model).items() if "layers" in name}


def term_of(layer: CompressedLinear) -> LowRank:
    w = layer.expression()
    assert isinstance(w, Sum) and isinstance(w.parts[-1], LowRank)
    return w.parts[-1]


@torch.no_grad()
def test_a_term_that_starts_at_zero_changes_nothing(folders: Path) -> None:
    student, teacher = loaded(folders)
    before = student(IDS).logits
    names = add_terms(student, Adaptation(match=("*_proj",), rank=3), lambda: teacher, seed=5)
    assert len(names) == 14
    torch.testing.assert_close(student(IDS).logits, before, rtol=1e-5, atol=1e-5)  # BLAS may sum in another order
    for layer in linears(student).values():
        term = term_of(layer)
        assert describe(term) == "rank 3 (bfloat16 | bfloat16)" and not dense(term.left).any()
        size = dense(layer.expression()).square().mean().sqrt() / math.sqrt(3)
        assert 0.7 < float(dense(term.right).square().mean().sqrt() / size) < 1.3


def test_terms_are_functions_of_the_seed(folders: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        student, _ = loaded(folders)
        add_terms(student, Adaptation(rank=2), partial(pytest.fail, "the teacher was loaded"), seed)
        found.append(torch.cat([layer.get_parameter("weight") for layer in linears(student).values()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_second_term_starts_in_other_directions(folders: Path) -> None:
    student, teacher = loaded(folders)
    rows: dict[str, list[torch.Tensor]] = {}
    for _ in range(2):
        for name in add_terms(student, Adaptation(rank=2), lambda: teacher, seed=0):
            rows.setdefault(name, []).append(dense(term_of(linears(student)[name]).right))
    assert all(int(torch.linalg.matrix_rank(torch.cat(both))) == 4 for both in rows.values())


def test_a_term_starts_at_the_best_rank_of_the_residual(folders: Path) -> None:
    """Eckart and Young: what is left has the tail of the singular values, up to bfloat16."""
    student, teacher = loaded(folders)
    before = {name: layer.dequantize() for name, layer in linears(student).items()}
    add_terms(student, Adaptation(rank=4, start="residual"), lambda: teacher, seed=0)
    for name, layer in linears(student).items():
        wanted = dense_weight(teacher, name)
        tail = torch.linalg.svdvals(wanted - before[name])[4:].square().sum()
        left = (wanted - layer.dequantize()).square().sum()
        assert 0.999 < float(left / tail) < 1.01, name
        assert describe(term_of(layer)) == "rank 4 (bfloat16 | bfloat16)"


def test_a_teacher_may_be_compressed_itself(folders: Path) -> None:
    student, teacher = loaded(folders)
    for name, layer in linears(student).items():
        assert torch.equal(dense_weight(student, name), layer.dequantize())
        assert torch.equal(dense_weight(teacher, name), teacher.get_parameter(f"{name}.weight"))


@pytest.mark.parametrize("factor_bits, close", [(8, 2e-2), (4, 0.3)])
def test_factors_are_rounded_to_their_bits(factor_bits: Any, close: float, folders: Path) -> None:
    student, teacher = loaded(folders)
    asked = Adaptation(match=("*.q_proj",), rank=3, factor_bits=factor_bits, start="residual")
    names = add_terms(student, asked, lambda: teacher, seed=0)
    exact = linears(student)
    found = round_terms(exact, names, asked)
    assert sorted(found) == sorted(names) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    for name, layer in found.items():
        term, was = term_of(layer), dense(term_of(exact[name]))
        assert bits(term) == factor_bits * 3 * (32 + 32) + 16 * (3 + 1)
        assert float((dense(term) - was).norm() / was.norm()) < close
    assert round_terms(exact, names, Adaptation(rank=3)) == {}


def test_a_term_that_learned_nothing_is_rounded_to_nothing(folders: Path) -> None:
    student, teacher = loaded(folders)
    asked = Adaptation(rank=3, factor_bits=4)
    names = add_terms(student, asked, lambda: teacher, seed=0)
    for layer in round_terms(linears(student), names, asked).values():
        assert float(dense(term_of(layer)).abs().max()) < 1e-6


def test_rounding_keeps_the_order_of_components_that_learned_together() -> None:
    """The last two of a term are ten times larger than its first, which the size 3 has beside another term."""
    random = torch.Generator().manual_seed(0)
    left, right = torch.randn(32, 4, generator=random), torch.randn(4, 48, generator=random)
    left[:, 2:] *= 10
    before = LowRank(Dense(torch.ones(32, 1)), Dense(torch.ones(1, 48)))
    base = Sum((grid((32, 48), 4, 16, 0, symmetric=True), before))
    layer = CompressedLinear.of(add_term(base, LowRank(Dense(left), Dense(right))))
    found = round_terms({"q": layer}, ["q"], Adaptation(rank=4, factor_bits=8), (3,))["q"].expression()
    for size, count in ((3, 2), (5, 4)):
        term = left[:, :count] @ right[:count]
        assert (dense(truncate_low_rank(found, size)) - dense(base) - term).norm() < 2e-2 * term.norm()


def test_experts_start_at_those_of_a_dense_teacher(tmp_path: Path) -> None:
    save_zoo("qwen3_moe", tmp_path / "dense")
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]
    asked = {"version": 1, "calibration": None, "rules": rules}
    student = lc.compress(tmp_path / "dense", asked, tmp_path / "small").model
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    wanted, weights = expert_slices("qwen3_moe", teacher), teacher_weights(student, teacher)
    assert len(wanted) == 24 and all(torch.equal(weights(name[:-7]), value) for name, value in wanted.items())
    expert = "model.layers.0.mlp.experts.0.gate_proj"
    others = teacher_weights(student, zoo("qwen3_moe", num_experts=8))
    assert len(others("model.layers.0.self_attn.q_proj")), "attention is the same"
    with pytest.raises(
        RecipeError, match="the teacher has no .*experts.0.gate_proj, or other experts there; start lat"
    ):
        others(expert)
    with pytest.raises(RecipeError, match="the teacher has no .*experts.0.gate_proj, or other experts"):
        teacher_weights(student, zoo("qwen3_moe", mlp_only_layers=[0, 1]))(expert)


@pytest.mark.parametrize("factor_bits", [pytest.param(16, marks=pytest.mark.slow), 8])
def test_the_checkpoint_grows_by_the_bits_of_its_terms(factor_bits: int, folders: Path, tmp_path: Path) -> None:
    terms = {"rank": 4, "factor_bits": factor_bits}
    asked = recipe(folders, steps=6, rates={"factors": 1e-2}, adapt=terms)
    done = distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (folders / "small", tmp_path / "out"))
    layers, added, stored = linears(old), 0, 0
    for name, layer in linears(new).items():
        term = term_of(layer)
        out, width = shape(term)
        scales = 0 if factor_bits == 16 else 16 * (4 + 1)
        assert bits(term) == factor_bits * 4 * (out + width) + scales
        assert bits(layer.expression()) == bits(layers[name].expression()) + bits(term)
        added, stored = added + bits(term), stored + bits(layer.expression())
    padding = 8 * len(layers) * 5  # at most 7 bytes for each tensor of a payload
    assert abs(done.bytes_after - done.bytes_before - added / 8) < padding
    header = 0.02 * weights_bytes(tmp_path / "out")
    assert abs(weights_bytes(tmp_path / "out") - weights_bytes(folders / "small") - added / 8) < padding + header
    report = read(tmp_path / "out")
    counted = sum(shape(layer.expression())[0] * shape(layer.expression())[1] for layer in layers.values())
    assert math.isclose(report.bpw, stored / counted) and report.bytes == weights_bytes(tmp_path / "out")
    assert all("rank 4" in row.stored for row in report.layers if "layers" in row.name)
    assert verify(tmp_path / "out", text=folders / "text.txt", length=16).layers == 16
    protocol = lc.Protocol(folders / "text.txt", windows=4, length=32)
    distances = [
        lc.score(folder, protocol, against=str(folders / "dense"))["kl"]
        for folder in (folders / "small", tmp_path / "out")
    ]
    assert distances[1] < 0.9 * distances[0]
    steps = [row["step"] for row in done.history]
    assert steps == ([0, 6] if factor_bits == 16 else [0, 6, 6])


@pytest.mark.parametrize("start", tiered_nightly(["zero", "residual"], "zero".__eq__))
def test_terms_bring_the_student_nearer_at_equal_steps(start: str, folders: Path, tmp_path: Path) -> None:
    rates = {"scales": 5e-3, "norms": 2e-3, "factors": 1e-2}
    plain = distill(folders / "small", folders / "dense", recipe(folders, steps=12, rates=rates), tmp_path / "plain")
    terms = {"match": "*", "rank": 8, "start": start}
    asked = recipe(folders, steps=12, rates=rates, adapt=terms)
    done = distill(folders / "small", folders / "dense", asked, tmp_path / "more")
    assert done.history[-1]["kl"] < 0.9 * plain.history[-1]["kl"]
    first = [found.history[0]["kl"] for found in (plain, done)]
    assert done.history[-1]["kl"] < 0.95 * first[1], "wherever it starts, it learns"
    assert math.isclose(first[0], first[1], rel_tol=1e-6) if start == "zero" else first[1] < 0.9 * first[0]
    assert plain.bytes_before == plain.bytes_after == done.bytes_before < done.bytes_after


@pytest.mark.slow
def test_an_interrupted_run_resumes_exactly(folders: Path, tmp_path: Path) -> None:
    terms = {"match": ["*.q_proj", "re:.*down_proj"], "rank": 2, "factor_bits": 8}
    asked = recipe(folders, steps=4, save_every=2, rates={"factors": 1e-2}, adapt=terms)
    whole = distill(folders / "small", folders / "dense", asked, tmp_path / "whole")
    cut_short(folders, asked, tmp_path / "cut", calls=3)
    again = distill(folders / "small", folders / "dense", asked, tmp_path / "cut")
    assert [row["kl"] for row in again.history] == [row["kl"] for row in whole.history]
    assert weight_files(tmp_path / "whole") == weight_files(tmp_path / "cut")


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"adapt": {"rank": 2}}, "adapt adds low-rank factors, and rates has none for them"),
        ({"adapt": {"rank": 0}, "rates": {"factors": 1e-3}}, "rank is 0; it must be a whole number at least 1"),
        ({"adapt": {"rank": 2, "factor_bits": 3}, "rates": {"factors": 1e-3}}, "factor_bits is 3; it must be 4 or 8"),
        ({"adapt": {"rank": 2, "match": "re:("}, "rates": {"factors": 1e-3}}, "which is no regular expression"),
        ({"adapt": {"rank": 33}, "rates": {"factors": 1e-3}}, r"rank 33 is larger than the matrix \[32, 32\] of model"),
        (
            {"adapt": {"rank": 2, "match": ["*.q_proj", "*.qkv"]}, "rates": {"factors": 1e-3}},
            r'adapt matches no compressed linear of the student \("\*.qkv"\); it has model.layers.0.self_attn.q_proj',
        ),
    ],
)
def test_impossible_terms_are_refused(more: dict[str, Any], sentence: str, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        distill(folders / "small", folders / "dense", recipe(folders, **more), tmp_path / "out")
