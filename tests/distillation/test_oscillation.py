"""Codes that oscillate are frozen at their rounded mean when the paper says so, stay so, and nothing else changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcompress.cli.distill import distilled_view
from llmcompress.distillation.run import distill
from llmcompress.distillation.student.oscillation import Freezer, History, after_step
from llmcompress.errors import RecipeError
from llmcompress.recipe.sections import Freezing
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import CompressedLinear
from llmcompress.weight.nodes import Grid, Sum
from llmcompress.weight.trainable.relax import Relaxation, RelaxedLinear
from tests.builders import grid, seeded
from tests.distillation.miniature import cut_short, make, recipe, weight_files
from tests.tiers import tiered_nightly
from tests.tiny import save_tiny

RULES = [{"match": "*", "steps": [{"method": "rotate"}, {"method": "rtn", "bits": 2, "group_size": 16}]}]
CODES = {"rates": {"codes": 8e-2, "scales": 2e-2}, "latents": "teacher", "steps": 6}
SOON = {"momentum": 0.4, "threshold": 0.5, "final_threshold": 0.3}
NEVER = {"momentum": 0.4, "threshold": 1, "final_threshold": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("oscillation"), RULES)


# --- the rule, code by code -----------------------------------------------------------------------------------------


def slowly(walk: list[int], momentum: float, thresholds: list[float]) -> list[tuple[int, bool, float]]:
    """(code, is it frozen, its frequency) of one code after each step, if it would walk so; every average as the sum
    that it stands for, every question asked of the whole past."""
    codes, turned, found = [walk[0]], [0.0], []
    frozen = False
    for wished, threshold in zip(walk[1:], thresholds, strict=True):
        now = codes[-1] if frozen else wished
        changes = [(one < other) - (one > other) for one, other in zip(codes, [*codes[1:], now], strict=True)]
        before = [change for change in changes[:-1] if change]
        turned.append(float(bool(changes[-1] and before and before[-1] != changes[-1])))
        codes.append(now)
        weights = [momentum * (1 - momentum) ** (len(codes) - 1 - t) for t in range(1, len(codes))]
        frequency = math.fsum(w * t for w, t in zip(weights, turned[1:], strict=True))
        mean = math.fsum(w * c for w, c in zip(weights, codes[1:], strict=True)) + (1 - math.fsum(weights)) * codes[0]
        if not frozen and frequency > threshold:
            frozen, codes[-1] = True, math.floor(mean + 0.5)
        found.append((codes[-1], frozen, frequency))
    return found


@pytest.mark.parametrize("momentum", [0.1, 0.35])
def test_histories_equal_a_loop_over_single_codes(momentum: float) -> None:
    count, steps, levels = 60, 25, 4
    nudges = torch.randint(-1, 2, (steps, count), generator=seeded(0))
    walks = torch.cat([torch.full((1, count), 1), nudges]).cumsum(0).clamp(0, levels - 1)
    asked = Freezing(momentum=momentum, threshold=0.4, final_threshold=0.15)
    thresholds = [asked.threshold_at((step + 1) / steps) for step in range(steps)]
    history = History.of(torch.zeros(count), walks[0])
    seen = []
    for walk, threshold in zip(walks[1:], thresholds, strict=True):
        history, _ = after_step(history, walk.float(), momentum, threshold)
        seen.append(history)
    wanted = [slowly(walks[:, i].tolist(), momentum, thresholds) for i in range(count)]
    assert 0 < int(seen[-1].frozen.sum()) < count
    for step, found in enumerate(seen):
        codes, frozen, frequency = zip(*(each[step] for each in wanted), strict=True)
        loose = torch.tensor([not each[max(step - 1, 0)][1] for each in wanted])  # frozen ones are watched no more
        assert found.codes.tolist() == list(codes) and found.frozen.tolist() == list(frozen)
        torch.testing.assert_close(found.frequency[loose], torch.tensor(frequency)[loose], rtol=1e-5, atol=1e-6)


def test_the_threshold_is_half_a_cosine() -> None:
    asked = Freezing(momentum=0.1, threshold=0.5, final_threshold=0.1)
    assert [asked.threshold_at(done) for done in (0, 0.5, 1)] == pytest.approx([0.5, 0.3, 0.1])


def layer(levels: int = 4, seed: int = 0) -> RelaxedLinear:
    """Two grids that are added, of which codes and scales train."""
    parts = tuple(grid((6, 10), levels, 4, seed + part, symmetric=bool(part)) for part in range(2))
    linear = CompressedLinear.of(Sum(parts), nn.Parameter(torch.zeros(6)))
    return RelaxedLinear.of(linear, Relaxation(frozenset({"codes", "scales"})))


def latents(of: RelaxedLinear, part: int = 0) -> Tensor:
    return of.relaxed.get_parameter(f"{part}_codes").data


def stored(of: RelaxedLinear) -> list[Tensor]:
    """The codes that a file would have."""
    match of.freeze().expression():
        case Sum(parts):
            return [part.codes.flatten() for part in parts if isinstance(part, Grid)]
    raise AssertionError


def test_a_code_that_turns_is_frozen_at_its_mean() -> None:
    """1, 2, 1, 2: it turns at the second step and at the third, where the mean is 1 + 5/8."""
    student = layer()
    latents(student)[7] = 1.0
    freezer = Freezer.of(Freezing(momentum=0.5, threshold=0.6, final_threshold=0.6), {"q": student})
    places: list[int] = []
    for step, place in enumerate([1.6, 1.4, 1.6, 1.2, 0.0, 3.0]):
        latents(student)[7] = place
        counts = freezer.watch(step / 6).tolist()
        assert counts[1:] == [[0, 0], [1, 0], [1, 1], [0, 1], [0, 1], [0, 1]][step]
        places.append(int(stored(student)[0][7]))
    assert places == [2, 1, 2, 2, 2, 2] and float(latents(student)[7]) == 2 and freezer.count_frozen() == 1


def test_a_mean_may_be_another_code_than_the_last() -> None:
    """0, 1, 0, 0, 1, 0 with a long memory: frozen by its second turn of three, at 0, where it mostly was."""
    student = layer(levels=2)
    latents(student)[0] = 0.0
    freezer = Freezer.of(Freezing(momentum=0.25, threshold=0.3, final_threshold=0.3), {"q": student})
    for done, code in enumerate([1.0, 0.0, 0.0, 1.0]):  # turned at the 2nd and 4th: 0.25 * 0.75^2 + 0.25 = 0.39
        latents(student)[0] = code
        assert freezer.count_frozen() == 0
        freezer.watch(done / 4)
    assert freezer.count_frozen() == 1 and float(latents(student)[0]) == 0


def test_frozen_codes_never_change_and_their_gradients_do_not_count() -> None:
    student, random = layer(), seeded(5)
    before = encode(student.freeze().expression())
    freezer = Freezer.of(Freezing(**SOON), {"q": student})
    optimizer = torch.optim.AdamW(student.relaxed.parameters(), lr=0.3)
    held: list[tuple[Tensor, Tensor]] = []
    for step in range(30):
        optimizer.zero_grad()
        target = torch.randn(6, 10, generator=random)
        (student.relaxed.weight() - target).square().sum().backward()
        freezer.hold()
        for watched in freezer.watched:
            gradient = watched.relaxed.get_parameter(watched.key).grad
            assert gradient is not None and not gradient[watched.history.frozen].any()
            assert gradient.any() or bool(watched.history.frozen.all())
        optimizer.step()
        student.relaxed.settle()
        freezer.watch((step + 1) / 30)
        codes, frozen = torch.cat(stored(student)), torch.cat([each.history.frozen for each in freezer.watched])
        for was, there in held:
            assert torch.equal(codes[there], was[there]) and bool(frozen[there].all())
        held.append((codes, frozen))
        assert torch.equal(codes, torch.cat([each.history.codes for each in freezer.watched]))
    assert 5 < freezer.count_frozen() < 120
    after = encode(student.freeze().expression())
    assert before[0] == after[0] and {k: v.shape for k, v in before[1].items()} == {
        k: v.shape for k, v in after[1].items()
    }


def late(asked: Freezing | None, shares: Tensor) -> tuple[float, int]:
    """The mean loss of codes that are drawn to these shares of the way to the next one, and how many of them change,
    both over the last 30 of 90 steps."""
    w = grid((6, 10), 4, 5, 0, symmetric=True)
    student = RelaxedLinear.of(CompressedLinear.of(w, None), Relaxation(frozenset({"codes"})))
    steps = (w.scale.float()[:, :, None] * torch.ones(5)).reshape(6, 10)
    target = dense(w) + shares.reshape(6, 10) * steps * torch.where(w.codes < 2, 1, -1)
    freezer = Freezer.of(asked, {"q": student})
    optimizer = torch.optim.SGD(student.relaxed.parameters(), lr=0.2)
    losses, changed = [], 0
    for step in range(90):
        optimizer.zero_grad()
        (0.5 * ((student.relaxed.weight() - target) / steps).square().sum()).backward()
        before = student.relaxed.weight().detach()
        freezer.hold()
        optimizer.step()
        student.relaxed.settle()
        freezer.watch((step + 1) / 90)
        after = student.relaxed.weight().detach()
        if step >= 60:
            losses.append(float(((after - target) / steps).square().mean()))
            changed += int((before != after).sum())
    return sum(losses) / len(losses), changed


def test_freezing_ends_the_noise_of_codes_between_two_values() -> None:
    """Without it they change for ever, and lose more; with it they stay at the nearer one of both."""
    shares = torch.linspace(0.15, 0.4, 60)
    best = float(shares.square().mean())
    noise, changes = late(None, shares)
    rest, none = late(Freezing(momentum=0.1, threshold=0.25, final_threshold=0.15), shares)
    assert changes > 300 and noise > 1.5 * best
    assert none == 0 and rest == pytest.approx(best, rel=1e-2)


# --- in a run -------------------------------------------------------------------------------------------------------


def rows(output: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run, except times."""
    found = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in {"seconds", "tokens_per_second"}} for row in found]


def run(folders: Path, output: Path, **more: Any) -> Any:
    return distill(folders / "small", folders / "dense", recipe(folders, **CODES | more), output)


@pytest.mark.slow
def test_without_a_code_that_is_frozen_nothing_changes(folders: Path, tmp_path: Path) -> None:
    run(folders, tmp_path / "plain")
    done = run(folders, tmp_path / "watched", freezing=NEVER)
    assert weight_files(tmp_path / "plain") == weight_files(tmp_path / "watched")
    plain, watched = rows(tmp_path / "plain"), rows(tmp_path / "watched")
    seen = [row.pop("codes") for row in watched if "loss" in row]
    assert plain == watched and all(row["frozen"] == 0 for row in seen)
    assert any(row["turned"] for row in seen) and any(row["changed"] > row["turned"] for row in seen)
    assert [phase["frozen"] for phase in done.phases] == [0]


@pytest.fixture(scope="module")
def whole(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of an uninterrupted run that froze codes."""
    return run(folders, tmp_path_factory.mktemp("oscillation") / "whole", freezing=SOON, save_every=2)


def test_frozen_codes_are_counted_in_metrics_and_view(whole: Any) -> None:
    seen = [row["codes"]["frozen"] for row in rows(Path(whole.output)) if "loss" in row]
    assert seen == sorted(seen) and 0 < seen[-1] < whole.trained["codes"] / 2
    assert whole.phases[0]["frozen"] == seen[-1]
    assert f"frozen  {seen[-1]:,} codes that oscillated" in list(distilled_view(whole.to_json(), False))


@pytest.mark.parametrize("after", tiered_nightly([3, 6], lambda after: after == 6))
def test_frozen_codes_survive_an_interruption(after: int, whole: Any, folders: Path, tmp_path: Path) -> None:
    """Between two states, and after the last step."""
    asked = recipe(folders, **CODES, freezing=SOON, save_every=2)
    cut_short(folders, asked, tmp_path / "cut", calls=after)
    again = distill(folders / "small", folders / "dense", asked, tmp_path / "cut")
    assert weight_files(Path(whole.output)) == weight_files(tmp_path / "cut")
    assert rows(Path(whole.output)) == rows(tmp_path / "cut")
    assert again.phases[0]["frozen"] == whole.phases[0]["frozen"] > 0


@pytest.mark.slow
def test_blocks_freeze_codes_too(folders: Path, tmp_path: Path) -> None:
    phase = {"kind": "blockwise", "steps": 8, "evaluate_every": 2, "rates": {"codes": 4e-2}, "latents": "teacher"}
    data = recipe(folders, phases=[phase | {"freezing": SOON}])
    done = distill(folders / "small", folders / "dense", data, tmp_path / "out")
    [told] = done.phases
    frozen = [block["frozen"] for block in told["blocks"].values()]
    assert told["frozen"] == sum(frozen) > 0 and rows(tmp_path / "out")[-1]["codes"] == {"frozen": sum(frozen)}
    assert all(block["after"] < block["before"] for block in told["blocks"].values())


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"rates": {"scales": 1e-3}, "freezing": {}}, "freezing needs codes that train, and rates has none for"),
        ({"freezing": {"threshold": 0.01, "final_threshold": 0.02}}, "final_threshold 0.02 is above threshold 0.01"),
        ({"freezing": {"momentum": 1}}, r"freezing\.momentum"),
        ({"freezing": {"treshold": 0.1}}, 'did you mean "threshold"'),
        (
            {"phases": [{"kind": "end_to_end", "rates": {"norms": 0.1}, "freezing": {}}]},
            "freezing needs codes that train",
        ),
    ],
)
def test_impossible_freezing_is_refused(more: dict[str, Any], sentence: str, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        run(folders, tmp_path / "out", **more)


def test_a_student_without_codes_is_refused(folders: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "other", tie_word_embeddings=True, seed=1)
    asked = recipe(folders, rates={"codes": 1e-2, "weights": 1e-3}, freezing=SOON)
    with pytest.raises(RecipeError, match="freezing: the student has no codes that could oscillate"):
        distill(tmp_path / "other", folders / "dense", asked, tmp_path / "out")
