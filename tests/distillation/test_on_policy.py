"""Sequences that the student goes on with: what it writes, what of it counts, and that runs with it resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.data.batch import Batch
from llmcompress.data.generate import NOTHING, continue_sequences, end_tokens
from llmcompress.distillation import on_policy
from llmcompress.distillation.on_policy import prompt_lengths, replace_text, writing_window
from llmcompress.distillation.run import control_recipe, distill
from llmcompress.errors import RecipeError
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import read_as
from llmcompress.recipe.sections import OnPolicy
from llmcompress.runtime.seeding import generator
from tests.distillation.miniature import cut_short, make, recipe
from tests.tiers import tiered_nightly
from tests.tiny import tiny
from tests.zoo import zoo

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 16}]}]
OWN: dict[str, Any] = {"on_policy": {"share": 0.5, "prompt": 5, "every": 2}, "steps": 5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("own"), RULES)


def text(sequences: int = 4, length: int = 24) -> Batch:
    ids = torch.randint(3, 250, (sequences, length), generator=torch.Generator().manual_seed(0))
    return Batch.of(ids)


def seeds(count: int) -> list[str]:
    return [f"row {row}" for row in range(count)]


@torch.no_grad()
def slowly(model: PreTrainedModel, row: Tensor, kept: int, ends: set[int], temperature: float, seed: str) -> list[int]:
    """One sequence, read again from its start for every token, up to one that ends it."""
    ids, drawing = row[:kept].tolist(), generator(seed)
    while len(ids) < len(row):
        logits = model(torch.tensor([ids])).logits[0, -1].float()
        ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=drawing)))
        if ids[-1] in ends:
            break
    return ids


@pytest.mark.parametrize("family", ["mamba", "recurrent_gemma", "xlstm"])
def test_sequences_are_continued_whatever_a_model_remembers(family: str) -> None:
    """Its state has another name, or does not come out of it at all."""
    model, batch, kept = zoo(family), text(2, 16), torch.tensor([5, 9])
    found = continue_sequences(model, batch.ids, kept, set(), 1.0, seeds(2))
    assert found.tolist() == [slowly(model, batch.ids[n], int(kept[n]), set(), 1.0, f"row {n}") for n in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("ends", [set(), set(range(100))])
def test_continued_sequences_equal_a_token_by_token_loop(temperature: float, ends: set[int]) -> None:
    model, batch, kept = tiny("llama").eval(), text(), torch.tensor([5, 9, 5, 23])
    found = continue_sequences(model, batch.ids, kept, ends, temperature, seeds(4))
    for row in range(4):
        wanted = slowly(model, batch.ids[row], int(kept[row]), ends, temperature, f"row {row}")
        assert found[row].tolist() == wanted + [NOTHING] * (24 - len(wanted))


@pytest.mark.slow
def test_many_sequences_are_written_in_parts(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part at a time, with the same words."""
    settings = recipe(folders, on_policy={"share": 1.0, "prompt": 5, "every": 2}, steps=2)
    whole = distill(folders / "small", folders / "dense", settings, tmp_path / "whole")
    monkeypatch.setattr(on_policy, "SIDE_BY_SIDE", 3)
    parts = distill(folders / "small", folders / "dense", settings, tmp_path / "parts")
    assert whole.tokens == parts.tokens
    assert whole.history[-1]["kl"] == pytest.approx(parts.history[-1]["kl"], rel=1e-5)


def test_neighbours_change_nothing() -> None:
    model, batch, kept = tiny("llama").eval(), text(), torch.full((4,), 6)
    whole = continue_sequences(model, batch.ids, kept, set(), 1.0, seeds(4))
    order = torch.tensor([2, 0])
    some = continue_sequences(model, batch.ids[order], kept[order], set(), 1.0, ["row 2", "row 0"])
    assert torch.equal(some, whole[order])


def test_its_own_tokens_count_and_nothing_behind_the_end() -> None:
    batch = text(3, 8)
    texts = [[1, 2, 3, 9, 9, 9, 9, 9], [1, 2, 3, 7, 2, NOTHING, NOTHING, NOTHING]]
    found = replace_text(batch, [0, 2], texts, torch.tensor([3, 3, 3]))
    assert found.ids[0].tolist() == texts[0] and found.ids[2].tolist() == [1, 2, 3, 7, 2, 0, 0, 0]
    assert found.counted[0].tolist() == [False] * 3 + [True] * 5
    assert found.counted[2].tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert torch.equal(found.ids[1], batch.ids[1]) and torch.equal(found.counted[1], batch.counted[1])


def test_prompt_lengths_reach_the_first_target() -> None:
    batch = text(3, 10)
    batch.counted[1, :7] = False  # a chat whose answer begins there
    batch.counted[2, :9] = False
    assert prompt_lengths(batch, 4).tolist() == [4, 7, 9]
    assert prompt_lengths(batch, 50).tolist() == [9, 9, 9]  # one token is left to write
    batch.counted[0, 6:] = False  # a short document, and padding
    assert prompt_lengths(batch, 4).tolist() == [4, 7, 9]
    assert prompt_lengths(batch, 8).tolist() == [5, 8, 9]


@pytest.mark.parametrize(("share", "rows"), [(0.5, [1, 3]), (0.25, [3]), (1.0, [0, 1, 2, 3]), (0.75, [1, 2, 3])])
def test_the_share_is_spread_evenly(share: float, rows: list[int]) -> None:
    assert OnPolicy(share=share).rows(4) == rows


def test_windows_meet_and_end_with_the_run() -> None:
    asked = OnPolicy(every=4)
    assert [list(writing_window(asked, step, 10)) for step in (0, 3, 4, 8)] == [[0, 1, 2, 3], [3], [4, 5, 6, 7], [8, 9]]


def test_ends_are_those_of_the_generation_config() -> None:
    model = tiny("llama")
    for given, wanted in ((None, set()), (7, {7}), ([7, 8], {7, 8})):
        model.generation_config.eos_token_id = given
        assert end_tokens(model) == wanted


# in the middle of a window, and at the end of one
@pytest.mark.parametrize("calls", tiered_nightly([1, 2, 4], lambda calls: calls == 2))
def test_an_interrupted_run_ends_as_a_whole_one(folders: Path, tmp_path: Path, calls: int) -> None:
    settings = recipe(folders, **OWN, save_every=1)
    cut_short(folders, settings, tmp_path / "cut", calls)
    distill(folders / "small", folders / "dense", settings, tmp_path / "cut")
    distill(folders / "small", folders / "dense", settings, tmp_path / "whole")
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_student_learns_from_its_own_continuations(folders: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"steps": 6, "rates": {"scales": 2e-2}, "on_policy": {"share": 1.0, "prompt": 5}}
    done = distill(folders / "small", folders / "dense", recipe(folders, **own), tmp_path / "own")
    assert done.history[-1]["kl"] < done.history[0]["kl"]
    rows = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    tokens = [row["tokens"] for row in rows if "gradient_norm" in row]
    assert tokens[0] <= 4 * (32 - 5)  # a batch of sequences of 32, of which the prompts do not count


def test_controls_read_the_data(folders: Path) -> None:
    asked = read_as(Distillation, recipe(folders, **OWN, controls=["no_teacher", "vanilla"]))
    for name in asked.controls:
        assert control_recipe(asked, name).on_policy is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"losses": [{"of": {"loss": "cross_entropy"}}]}, "cross_entropy learns the next token as the truth"),
        ({"losses": [{"of": {"loss": "forward_kl"}}, {"of": {"loss": "ofa"}, "exits": [1]}]}, "ofa learns the next"),
        ({"on_policy": {"share": 0.2}}, "a share of 0.2 is less than one sequence of a batch of 4"),
        ({"teacher": {"kind": "cached"}}, "cannot be cached"),
        ({"checkpointing": True}, "set checkpointing: false"),
        ({"phases": [{"kind": "blockwise", "steps": 2}]}, "blockwise phases read no predictions"),
    ],
)
def test_impossible_on_policy_recipes_are_refused(folders: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_as(Distillation, recipe(folders, **OWN) | more)


def test_a_prompt_of_all_tokens_is_refused(folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, on_policy={"prompt": 32})
    with pytest.raises(RecipeError, match="a prompt of 32 leaves nothing of 32 tokens"):
        distill(folders / "small", folders / "dense", asked, tmp_path / "out")


def test_documents_apart_are_refused(folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, **OWN)
    asked["data"] |= {"boundaries": True}
    with pytest.raises(RecipeError, match="on_policy: sequences of several documents"):
        distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
