"""Hidden states beside those of the dense model: closed forms of the measures, and whole models."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluation.drift import cka
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.models.dense.tokenizer import load_tokenizer
from tests.distillation.miniature import make
from tests.tiers import tiered
from tests.tiny import FAMILY_CONFIGS, save_tiny

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("drift"), RULES)


def states(seed: int, width: int = 12, length: int = 40) -> Tensor:
    """Of three windows."""
    return torch.randn(3, length, width, generator=torch.Generator().manual_seed(seed))


def test_turned_and_scaled_states_are_the_same() -> None:
    given = states(0)
    basis, _ = torch.linalg.qr(states(1)[0, :12])
    lengths = torch.rand(3, 40, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    assert cka(given, 3 * lengths * (given @ basis)) == pytest.approx(1.0, abs=1e-5)


def test_unrelated_states_have_no_alignment_however_wide_they_are() -> None:
    """The usual estimate would be near 1 for states that are wider than there are tokens."""
    found = [cka(states(seed, 64, 16), states(seed + 100, 200, 16)) for seed in range(40)]
    assert all(value is not None for value in found)
    assert abs(sum(value or 0.0 for value in found) / 40) < 0.1


def test_the_alignment_is_that_of_the_definition() -> None:
    """Of the unbiased estimator, as sums over all different tokens (Song et al., 2012), in float64."""
    given, wanted = states(3, 5, 6), states(4, 7, 6) + torch.nn.functional.pad(states(3, 5, 6), (0, 2))

    def independence(one: list[list[float]], other: list[list[float]]) -> float:
        n, total = len(one), [0.0, 0.0, 0.0]
        for i in range(n):
            for j in set(range(n)) - {i}:
                total[0] += one[i][j] * other[i][j]
                for q in set(range(n)) - {i, j}:
                    total[1] += one[i][j] * other[i][q]
                    total[2] += sum(one[i][j] * other[q][r] for r in set(range(n)) - {i, j, q})
        falling = [math.perm(n, k) for k in (2, 3, 4)]
        return total[0] / falling[0] + total[2] / falling[2] - 2 * total[1] / falling[1]

    kernels = [[(unit @ unit.T).tolist() for unit in map(directions, one.double())] for one in (given, wanted)]
    across = sum(independence(a, b) for a, b in zip(*kernels))
    own = [sum(independence(a, a) for a in one) for one in kernels]
    assert cka(given, wanted) == pytest.approx(across / math.sqrt(own[0] * own[1]), rel=1e-4)


def directions(one: Tensor) -> Tensor:
    """Tokens of length 1."""
    return one / one.norm(dim=-1, keepdim=True)


def test_states_that_are_all_alike_have_none() -> None:
    assert cka(torch.ones(1, 8, 4), states(5, 4, 8)[:1]) is None


@pytest.mark.parametrize("family", tiered(FAMILY_CONFIGS, {"llama", "phi3", "gpt2"}.__contains__))
def test_a_model_has_none_from_itself(family: str, folders: Path, tmp_path: Path) -> None:
    dense = save_tiny(family, tmp_path / "dense")
    text = folders / "text.txt"
    found = lc.drift(dense, dense, lc.Protocol(text=text, windows=2, length=16))
    assert [row.block for row in found.blocks] == [row.original for row in found.blocks] == [0, 1, 2]
    assert all(row.cka == pytest.approx(1.0, abs=1e-6) and row.error == 0.0 for row in found.blocks)


def test_the_states_are_the_models_own(folders: Path) -> None:
    text, seen = folders / "text.txt", []
    found = lc.drift(
        folders / "small",
        folders / "dense",
        lc.Protocol(text=text, windows=2, length=24),
        progress=lambda done, of: seen.append((done, of)),
    )
    small, dense = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("small", "dense"))
    ids = evaluation_windows(load_tokenizer(folders / "dense"), lc.Protocol(text=text, windows=2, length=24))
    with torch.no_grad():
        states = (model(ids, output_hidden_states=True).hidden_states for model in (small, dense))
        given, wanted = ([layer[:, 1:] for layer in layers] for layers in states)  # BOS is not compared
    for row in found.blocks[:2]:
        error = (given[row.block] - wanted[row.block]).square().sum(-1) / wanted[row.block].square().sum(-1)
        assert row.error == pytest.approx(float(error.mean()), rel=1e-3, abs=1e-7)
        assert row.cka == pytest.approx(cka(given[row.block], wanted[row.block]), abs=1e-4)
    assert found.blocks[-1].error is not None and found.blocks[-1].error > found.blocks[0].error
    assert 0 < (found.blocks[-1].cka or 0) < 1 and found.tokens == 46
    assert seen[-1] == (2, 2)


def test_shortened_and_narrowed_models_are_compared_where_they_can_be(folders: Path, tmp_path: Path) -> None:
    deep = save_tiny("llama", tmp_path / "deep", num_hidden_layers=3)
    protocol = lc.Protocol(text=folders / "text.txt", windows=2, length=24)
    lc.drop_blocks(deep, [1], tmp_path / "short")
    short = lc.drift(tmp_path / "short", deep, protocol)
    assert [(row.block, row.original) for row in short.blocks] == [(0, 0), (1, 2), (2, 3)]
    assert short.blocks[0].error == 0.0 and (short.blocks[1].error or 0) > 0
    wide, slim = save_tiny("llama", tmp_path / "wide", hidden_size=64), save_tiny("llama", tmp_path / "slim")
    other = lc.drift(wide, slim, protocol)
    assert all(row.error is None and row.cka is not None for row in other.blocks)


def test_what_cannot_be_compared_is_refused(folders: Path, tmp_path: Path) -> None:
    deep = save_tiny("llama", tmp_path / "deep", num_hidden_layers=3)
    protocol = lc.Protocol(text=folders / "text.txt", windows=2, length=24)
    with pytest.raises(RecipeError, match="does not say which blocks were kept"):
        lc.drift(folders / "dense", deep, protocol)
    with pytest.raises(InputError, match="windows of 4 tokens tell nothing; set length to 5"):  # of which one is BOS
        lc.drift(folders / "dense", folders / "dense", lc.Protocol(text=folders / "text.txt", windows=2, length=4))
    shortest = lc.Protocol(text=folders / "text.txt", windows=2, length=5)
    assert all(row.cka is not None for row in lc.drift(folders / "dense", folders / "dense", shortest).blocks)
