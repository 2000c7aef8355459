"""Domains: shares against a plain oracle, drawing as a function of the step, resumed runs that end as whole ones."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

import llmcompress as lc
from llmcompress.cli.distill import distilled_view
from llmcompress.data.schedule import draw, normalize, quotas, reweight
from llmcompress.distillation.run import distill
from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.calibration import Mixture
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import dump, read_as
from tests.distillation.launched import free_port
from tests.rules.source_tree import ROOT
from tests.tiny import save_tiny

CORN = "Forty farms bring their corn to the mill by the river, and the miller counts every sack of it. "
SEA = "At night THE SHIPS (17 of them) wait, far out, for a pilot; nobody sleeps on deck! "


def oracle(shares: list[float], student: list[float], teacher: list[float]) -> list[float]:
    """arXiv 2407.16154, as written: psi = r exp(ratio), r <- psi / sum / 2 + 1 / (2 N)."""
    psi = []
    for index in range(len(shares)):
        ratio = student[index] / teacher[index]
        psi.append(shares[index] * math.exp(20 if ratio > 20 else ratio))
    found = []
    for value in psi:
        found.append(0.5 * value / sum(psi) + 0.5 / len(psi))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_shares_follow_the_gap(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randint(1, 6)
    shares = normalize([chance.uniform(0.1, 3) for _ in range(count)])
    teacher = [chance.uniform(3, 50) for _ in range(count)]
    student = [value * chance.choice([1.0, 1.1, 2.5, 30.0]) for value in teacher]
    found = reweight(shares, student, teacher)
    assert found == pytest.approx(oracle(shares, student, teacher), rel=1e-12)
    assert math.isclose(sum(found), 1) and min(found) >= 0.5 / count


def test_a_student_in_ruins_does_not_overflow() -> None:
    assert reweight([0.5, 0.5], [math.inf, 10.0], [10.0, 10.0]) == pytest.approx([0.75, 0.25], abs=1e-6)


def test_a_domain_has_its_share_of_the_steps() -> None:
    shares = [0.5, 0.07, 0.43]
    counts = [quotas(shares, 8, step, seed=1) for step in range(2000)]
    assert all(sum(row) == 8 for row in counts)
    for share, column in zip(shares, zip(*counts)):
        assert {math.floor(8 * share), math.ceil(8 * share)} >= set(column)
        assert sum(column) / 2000 == pytest.approx(8 * share, abs=0.05)
    assert counts[7] == quotas(shares, 8, 7, seed=1) and counts != [quotas(shares, 8, n, 2) for n in range(2000)]
    assert quotas([1.0], 8, 3, seed=1) == [8] and quotas([1.0, 0.0], 8, 3, seed=1) == [8, 0]


def test_every_domain_is_read_whole_before_it_is_read_again() -> None:
    sizes, cursors, read = (5, 3), [0, 0], list[list[int]]()
    for count in ((2, 1), (2, 2), (3, 1), (3, 2)):
        read.append(draw(cursors, count, sizes, seed=1))
        cursors = [cursor + more for cursor, more in zip(cursors, count)]
    first, second = [[n for n in chain(*read) if n < 5], [n for n in chain(*read) if n >= 5]]
    assert sorted(first[:5]) == sorted(first[5:]) == list(range(5)) and first[:5] != first[5:]
    assert sorted(second[:3]) == sorted(second[3:]) == [5, 6, 7]


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model, a `small` one made from it, two texts, and chats."""
    place = tmp_path_factory.mktemp("mixture")
    save_tiny("llama", place / "dense")
    (place / "corn.txt").write_text("".join(f"{i}. {CORN}" for i in range(40)))
    (place / "sea.jsonl").write_text("".join(json.dumps({"text": f"{i * i}: {SEA}"}) + "\n" for i in range(40)))
    chats = [
        [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Forty." * (1 + i % 3)}]
        for i in range(24)
    ]
    (place / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = {"dataset": str(place / "corn.txt"), "samples": 4, "length": 32, "held_out": 1}
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]
    lc.compress(place / "dense", {"version": 1, "rules": rules, "calibration": data}, place / "small")
    return place


def domains(folders: Path) -> list[dict[str, Any]]:
    sea = {"name": "sea", "weight": 3, "dataset": str(folders / "sea.jsonl"), "samples": 20, "boundaries": True}
    corn = {"name": "corn", "dataset": str(folders / "corn.txt"), "samples": 12, "length": 24, "held_out": 3}
    return [corn, sea | {"length": 32, "held_out": 2}]


def recipe(folders: Path, **more: Any) -> dict[str, Any]:
    exact = {"batch": 4, "micro_batch": 2, "evaluate_every": 3, "compute": "float32", "rates": {"scales": 5e-3}}
    return {"version": 1, "data": domains(folders), **exact} | more


class Cut(Exception):
    """An interruption of a run."""


def cut_after(step: int) -> Callable[..., None]:
    def cut(done: int, *_: Any) -> None:
        if done == step:
            raise Cut

    return cut


@pytest.mark.slow
def test_a_mixture_that_was_cut_ends_as_a_whole_one(folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, steps=7, save_every=3, mixture={"reweight": "ddk", "every": 2, "sequences": 2})
    whole = distill(folders / "small", folders / "dense", asked, tmp_path / "whole")
    with pytest.raises(Cut):
        distill(folders / "small", folders / "dense", asked, tmp_path / "cut", progress=cut_after(5))
    again = distill(folders / "small", folders / "dense", asked, tmp_path / "cut")
    assert [{**row, "seconds": 0} for row in again.history] == [{**row, "seconds": 0} for row in whole.history]
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    shares = [row["shares"] for row in whole.history]
    assert shares[0] == {"corn": 0.25, "sea": 0.75} and shares[1] != shares[2]
    last = whole.history[-1]
    assert last["domains"].keys() == {"corn", "sea"} and last["kl"] < whole.history[0]["kl"]
    assert min(each["kl"] for each in last["domains"].values()) < last["kl"]
    lines = [line for line in distilled_view(whole.to_json(), False) if isinstance(line, str)]
    assert any(line.startswith("domain  sea · KL ") for line in lines)
    assert again.tokens == whole.tokens and whole.data["domains"]["sea"]["boundaries"] is True


def test_the_shares_of_a_run_are_those_of_the_formula(folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, steps=1, mixture={"reweight": "ddk", "sequences": 3})
    first, last = distill(folders / "small", folders / "dense", asked, tmp_path / "out").history
    rows = [first["domains"][name] for name in ("corn", "sea")]
    expected = oracle([0.25, 0.75], [row["perplexity"] for row in rows], [row["teacher_perplexity"] for row in rows])
    assert list(last["shares"].values()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_answers_and_padding_do_not_depend_on_micro_batches(folders: Path, tmp_path: Path) -> None:
    data = {"dataset": str(folders / "chats.jsonl"), "samples": 22, "length": 56, "held_out": 2, "packing": False}
    results = [
        distill(
            folders / "small",
            folders / "dense",
            recipe(folders, data=data, steps=3, micro_batch=size),
            tmp_path / str(size),
        )
        for size in (1, 4)
    ]
    one, four = [result.history[-1] for result in results]
    assert math.isclose(one["kl"], four["kl"], rel_tol=1e-4) and math.isclose(one["loss"], four["loss"], rel_tol=1e-4)
    assert results[0].tokens == results[1].tokens < 3 * 4 * 19 and "shares" not in one


@pytest.mark.slow
def test_blocks_are_recovered_on_domains_of_unequal_lengths(folders: Path, tmp_path: Path) -> None:
    chats = {"name": "chats", "dataset": str(folders / "chats.jsonl"), "samples": 16, "length": 56, "held_out": 2}
    data, phases = [domains(folders)[0], chats | {"packing": False}], [{"kind": "blockwise", "steps": 4}]
    asked = recipe(folders, data=data, phases=phases, rates={"scales": 2e-3})
    done = distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    assert done.history[-1]["kl"] < done.history[0]["kl"] and set(done.history[-1]["domains"]) == {"corn", "chats"}
    assert len(list(distilled_view(done.to_json(), False))) > 3


@pytest.mark.nightly
def test_two_processes_learn_from_a_mixture_what_one_learns(folders: Path, tmp_path: Path) -> None:
    """Answers in one domain, so that processes count unequally, and shares that both have to agree on."""
    chats = {"name": "chats", "dataset": str(folders / "chats.jsonl"), "samples": 16, "length": 56, "held_out": 2}
    data = [*domains(folders), chats | {"packing": False}]
    asked = recipe(folders, data=data, steps=4, save_every=2, mixture={"reweight": "ddk", "every": 2})
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked))
    alone = distill(folders / "small", folders / "dense", asked, tmp_path / "alone")
    words = ["distill", folders / "small", tmp_path / "recipe.yaml", "--teacher", folders / "dense", "--json"]
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            *launcher,
            "-m",
            "llmcompress",
            *map(str, words),
            "-o",
            str(tmp_path / "both"),
            "--json",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    both = json.loads(done.stdout)
    assert both["tokens"] == alone.tokens
    for one, other in zip(alone.history, both["history"], strict=True):
        assert other["kl"] == pytest.approx(one["kl"], rel=1e-4)
        assert other["shares"] == pytest.approx(one["shares"], rel=1e-4)


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"mixture": {"reweight": "ddk"}, "data": {}}, "mixture: there is one text, so no shares to move"),
        ({"mixture": {"reweight": "dkd"}}, 'reweight is "dkd"; it must be "none" or "ddk"'),
        ({"data": []}, "data is a map, or a list of domains"),
        ({"data": [{"name": "a"}, {"name": "a"}]}, "data has the domain 'a' twice"),
        ({"data": [{"name": "a", "weigth": 2}]}, r'unknown key "weigth" in data; did you mean "weight"\?'),
        ({"data": {"name": "a"}}, "data is one text, which needs no name"),
        ({"data": [{"dataset": "stdlib"}]}, 'data: the key "name" is missing'),
        ({"data": {"lenght": 2}}, r'unknown key "lenght" in data; did you mean "length"\?'),
        ({"data": [{"name": "a", "held_out": 0}]}, "held_out is 0, so nothing can tell"),
        ({"data": {"held_out": 0}}, "held_out is 0, so nothing can tell"),
    ],
)
def test_impossible_mixtures_are_refused(more: dict[str, Any], sentence: str, folders: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        read_as(Distillation, recipe(folders) | more)


def test_more_domains_than_a_text_can_fill_are_refused(folders: Path, tmp_path: Path) -> None:
    many = domains(folders)
    many[0]["samples"] = 5000
    with pytest.raises(InputError, match=r"text from .*corn\.txt gives \d+ of 5000 sequences of 24 tokens"):
        distill(folders / "small", folders / "dense", recipe(folders, data=many), tmp_path / "out")


def test_a_mixture_is_written_as_it_is_read(folders: Path, tmp_path: Path) -> None:
    asked = read_as(Distillation, recipe(folders, mixture={"reweight": "ddk"}))
    (tmp_path / "again.yaml").write_text(dump(asked))
    again = read_as(Distillation, tmp_path / "again.yaml")
    assert again == asked and again.mixture == Mixture(reweight="ddk")
    assert [domain.name for domain in again.data] == ["corn", "sea"]  # type: ignore[union-attr]
    (tmp_path / "one.yaml").write_text(dump(Distillation()))
    assert read_as(Distillation, tmp_path / "one.yaml").data == Distillation().data
    assert torch.tensor(normalize([1, 3])).tolist() == [0.25, 0.75]
