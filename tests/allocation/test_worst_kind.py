"""Steps by the kind of text that loses most: kinds, windows of them, prices, plans and files; and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.allocation.allocate import Allocation, allocate, choose
from llmcompress.allocation.cost import probing_tokens
from llmcompress.allocation.price_file import Part, allocate_by, measure_part
from llmcompress.allocation.prices import damage_by_kind
from llmcompress.cli.app import app
from llmcompress.compression.job import Job, prepare
from llmcompress.data.calibration import calibration_tokens
from llmcompress.data.kinds import KIND_WINDOWS
from llmcompress.errors import InputError, RecipeError
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.calibration import Calibration
from llmcompress.recipe.read import Change, read_recipe
from llmcompress.recipe.target import Target
from llmcompress.reporting.formatting import target_text
from tests.tiny import save_tiny, tiny_tokenizer

LENGTH = 32
KINDS = {"letters": "abcdefghij", "sums": "0123456789"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model and two files of rows, of letters and of digits."""
    folder = tmp_path_factory.mktemp("kinds")
    save_tiny("llama", folder / "dense", hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    for name, letters in KINDS.items():
        random = Random(name)
        rows = [{"text": "".join(random.choices(letters, k=40))} for _ in range(120)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(place: Path, target: dict[str, Any], **more: Any) -> dict[str, Any]:
    files = [str(place / f"{name}.jsonl") for name in KINDS]
    calibration = {"dataset": files, "samples": 32, "length": LENGTH, "held_out": 12}
    options = [[{"method": "rtn", "bits": bits, "narrow_range": True}] for bits in (2, 3, 4, 5, 6, 8)]
    return {"version": 1, "name": "kinds", "calibration": calibration, "options": options, "target": target} | more


def job_of(place: Path, target: dict[str, Any], **more: Any) -> Job:
    return prepare(resolve(str(place / "dense")), read_recipe(recipe(place, target, **more)))


# --- kinds of text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_windows_are_of_one_kind_and_of_documents_that_calibration_does_not_have(packing: bool, place: Path) -> None:
    tokenizer = tiny_tokenizer()
    files = ",".join(str(place / f"{name}.jsonl") for name in KINDS)
    config = Calibration(dataset=files, samples=16, length=LENGTH, packing=packing)
    plain = calibration_tokens(config, tokenizer)
    found = calibration_tokens(config, tokenizer, kinds=LENGTH)
    assert torch.equal(plain.sequences, found.sequences) and plain.hash != found.hash and not plain.kinds
    fitted = tokenizer.decode(found.sequences.flatten().tolist())
    for name, windows in found.kinds.items():
        assert windows.shape == (KIND_WINDOWS, LENGTH)
        for window in windows:
            text = tokenizer.decode(window.tolist(), skip_special_tokens=True)
            assert set(text) <= set(KINDS[name]) and text[:12] not in fitted
    assert probing_tokens(config, Target(bpw=2, worst=True)) - probing_tokens(config, None) == 4 * LENGTH


def test_text_that_is_read_whole_has_none_left_and_files_need_names(place: Path, tmp_path: Path) -> None:
    files = ",".join(str(place / f"{name}.jsonl") for name in KINDS)
    with pytest.raises(InputError, match="needs a window of 32 tokens of letters beside the calibration sequences"):
        calibration_tokens(Calibration(dataset=files, samples=340, length=LENGTH), tiny_tokenizer(), kinds=LENGTH)
    for names, words in ((["a/x.txt", "b/x.txt"], "are named 'x'; rename one"), (["a/x.txt"], "is one; use builtin")):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("Seven grey geese fly over the mill. " * 40)
        text = Calibration(dataset=f"{tmp_path}/{'*' if len(names) > 1 else 'a'}/*.txt", samples=4, length=LENGTH)
        with pytest.raises(InputError, match=words):
            calibration_tokens(text, tiny_tokenizer(), kinds=LENGTH)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"calibration": {"dataset": "stdlib"}},
            "worst compares kinds of text, and the calibration text is of one",
        ),
        ({"calibration": {"dataset": "one.txt"}}, "let calibration.dataset be builtin or a list of files"),
        ({"target": {"kl": 0.1, "worst": True}}, "worst makes a loss least, and kl is a limit of one; give a size or"),
        ({"target": {"bpw": 2, "worst": "much"}}, "target.worst"),
    ],
)
def test_what_has_no_worst_kind_is_refused(changes: dict[str, Any], words: str, place: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        read_recipe(recipe(place, {"bpw": 2, "worst": True}) | changes)
    assert read_recipe(recipe(place, {"bpw": 2, "worst": False})).target == Target(bpw=2)


def test_sizes_of_the_command_line_keep_it(place: Path) -> None:
    base, size = recipe(place, {"bpw": 2, "worst": True}), Target(bpw=3)
    change = Change("target", {"bpw": 3.0}, "--bpw", stay=("engine", "worst"))
    wanted = read_recipe(base, changes=[change]).target
    assert wanted == Target(bpw=3, worst=True) == size.in_the_way_of(wanted) != size
    assert target_text(wanted.model_dump(exclude_none=True)) == "3 bpw by the worst kind of text"


# --- prices and plans -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Path:
    """A `place` whose model keeps letters in one half of its channels and digits in the other.

    Blocks 0 and 1 read and write the first half, block 2 the second. BOS is in neither.
    """
    folder = tmp_path_factory.mktemp("parted")
    dense = save_tiny("llama", folder / "dense", hidden_size=64, intermediate_size=64, num_hidden_layers=3)
    tensors = load_file(dense / "model.safetensors")
    tokenizer = tiny_tokenizer()
    halves = {"letters": slice(0, 32), "sums": slice(32, 64)}
    table = torch.zeros_like(tensors["model.embed_tokens.weight"])
    for name, letters in KINDS.items():
        for token in tokenizer(letters, add_special_tokens=False).input_ids:
            table[token, halves[name]] = tensors["model.embed_tokens.weight"][token, halves[name]]
    tensors["model.embed_tokens.weight"] = table
    for name, weight in tensors.items():
        if ".layers." in name and "_proj" in name:
            kept, own = torch.zeros_like(weight), halves["sums" if ".layers.2." in name else "letters"]
            where = (own, slice(None)) if "o_proj" in name or "down_proj" in name else (slice(None), own)
            kept[where] = weight[where]
            tensors[name] = kept
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    for name in KINDS:
        (folder / f"{name}.jsonl").write_text((place / f"{name}.jsonl").read_text())
    return folder


@pytest.fixture(scope="module")
def plan(parted: Path) -> Allocation:
    return allocate(job_of(parted, {"bpw": 3.3, "worst": True}))


def test_weights_that_a_kind_does_not_use_cost_it_nothing(plan: Allocation) -> None:
    assert [*plan.text.kinds] == ["letters", "sums"]
    for matrix in plan.prices:
        used = int(".layers.2." in matrix.name)
        for offer in matrix.offers:
            assert len(offer.kinds) == 2 and offer.kinds[used] > 0
            assert offer.kinds[1 - used] < 1e-4 * offer.kinds[used]


def test_the_worst_kind_loses_less_than_by_the_plain_plan(plan: Allocation) -> None:
    plain = choose(plan.choices, plan.prices, Target(bpw=3.3))
    before, after = (damage_by_kind(plan.prices, each) for each in (plain, plan.chosen))
    assert max(after) < 0.97 * max(before)
    assert all(plan.choices.bpw(each) <= 3.3 for each in (plain, plan.chosen))  # type: ignore[operator]
    assert choose(plan.choices, plan.prices, Target(bpw=3.3, worst=True)) == plan.chosen
    for bpw in (2.3, 2.7, 4.2, 5.5):
        plans = [choose(plan.choices, plan.prices, Target(bpw=bpw, worst=worst)) for worst in (None, True)]
        plain_loss, worst_loss = (max(damage_by_kind(plan.prices, each)) for each in plans)
        assert worst_loss <= plain_loss


def test_one_kind_gives_the_plain_plan(plan: Allocation) -> None:
    prices = [
        dataclasses.replace(
            matrix, offers=tuple(dataclasses.replace(offer, kinds=(offer.damage,)) for offer in matrix.offers)
        )
        for matrix in plan.prices
    ]
    for bpw in (2.3, 3.3, 4.2):
        plans = [choose(plan.choices, prices, Target(bpw=bpw, worst=worst)) for worst in (None, True)]
        assert plans[0] == plans[1]


def test_the_text_as_it_comes_is_priced_as_without_kinds(parted: Path, plan: Allocation) -> None:
    alone = allocate(job_of(parted, {"bpw": 3.3}))
    assert not alone.text.kinds and torch.equal(alone.text.mixed, plan.text.mixed)
    for matrix, other in zip(plan.prices, alone.prices, strict=True):
        bare = tuple(dataclasses.replace(offer, kinds=()) for offer in matrix.offers)
        assert [offer.damage for offer in bare] == pytest.approx([offer.damage for offer in other.offers], rel=1e-4)
        assert [(offer.error, offer.bits) for offer in bare] == [(offer.error, offer.bits) for offer in other.offers]
    assert alone.chosen == choose(plan.choices, plan.prices, Target(bpw=3.3))


def test_price_files_and_their_parts_hold_the_kinds(parted: Path, plan: Allocation, tmp_path: Path) -> None:
    job, prices = job_of(parted, {"bpw": 3.3, "worst": True}), tmp_path / "out.prices.json"
    for number in (2, 1):
        measure_part(prices, Part(number, 2), job)
    joined = allocate_by(prices, job)
    again = allocate_by(prices, job)
    for found in (joined, again):
        assert found.chosen == plan.chosen and found.prices == plan.prices
        assert {name: rows.tolist() for name, rows in found.text.kinds.items()} == {
            name: rows.tolist() for name, rows in plan.text.kinds.items()
        }
    with pytest.raises(lc.LLMCompressError, match=r"left by a different run"):
        allocate_by(prices, job_of(parted, {"bpw": 3.3}))


def test_the_report_has_the_loss_of_each_kind(parted: Path, plan: Allocation, tmp_path: Path) -> None:
    done = lc.compress(parted / "dense", recipe(parted, {"bpw": 3.3, "worst": True}), tmp_path / "out")
    assert done.allocation is not None
    kinds = done.allocation["kinds"]
    assert [*kinds] == ["letters", "sums"] and done.allocation["target"] == {"bpw": 3.3, "worst": True}
    assert [row["predicted_kl"] for row in kinds.values()] == pytest.approx(damage_by_kind(plan.prices, plan.chosen))
    assert max(row["plain_kl"] for row in kinds.values()) > max(row["predicted_kl"] for row in kinds.values())
    assert all(0 < row["measured_kl"] < 10 * row["predicted_kl"] for row in kinds.values())
    assert done.allocation["baselines"]["plain"] <= done.allocation["predicted_kl"]
    shown = " ".join(CliRunner().invoke(app, ["inspect", str(done.folder)]).stdout.split())
    assert all(
        f"kind {name} · KL predicted {row['predicted_kl']:.4f}, measured" in shown for name, row in kinds.items()
    )
