"""Arms of `research/lessons.py` are recipes, and its table follows from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import candidate_losses
import lessons
import pytest
import torch

from llmcompress.losses import loss
from llmcompress.recipe.distillation import Distillation
from tests.tiny import tiny

BENCH = Path(__file__).parents[2] / "research"
COMPRESSED = '{"quantization_config": {"quant_method": "llmcompress"}}'
ARMS = lessons.declared(BENCH / "lessons.yaml")
ARENAS = {name: lessons.declared(BENCH / name) for name in ("lessons.yaml", "codes.yaml", "terms.yaml")}
RUNS = [
    (file, arm, kind)
    for file, asked in ARENAS.items()
    for arm in (*asked["controls"], *asked["arms"])
    for kind in asked["rates"]
]


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses that only the arena knows, until the test ends."""
    monkeypatch.setattr(loss, "_LOSSES", loss.losses())
    monkeypatch.setattr(loss, "_FEATURE_LOSSES", loss.feature_losses())
    candidate_losses.register()


@pytest.mark.usefixtures("candidates")
@pytest.mark.parametrize(("file", "arm", "kind"), RUNS)
def test_every_arm_is_a_recipe(tmp_path: Path, file: str, arm: str, kind: str) -> None:
    (tmp_path / "config.json").write_text(COMPRESSED if kind == "compressed" else "{}")
    asked = ARENAS[file]
    texts = {name: tmp_path / f"{name}.txt" for name in ("wiki", "random", "odd", "typical", "chats", "near")}
    known = (asked["controls"] | asked["arms"])[arm]
    changes = {name: value for name, value in known.items() if name not in ("assistant", "second")}
    made = lessons.recipe(lessons.Arena(asked, texts, (), tmp_path), tmp_path, changes, 7, 3)
    found = Distillation.model_validate(made)
    assert (found.steps, found.seed) == (7, 3)
    assert found.rates == changes.get("rates", asked["rates"][kind])


def row(arm: str, seed: int, kl: float) -> dict[str, Any]:
    return {
        "student": "small",
        "arm": arm,
        "steps": 4,
        "seed": seed,
        "tokens": 1020,
        "seconds": 60.0,
        "kl": [[kl, kl + 0.2]] * 3,
        "ece": [0.05] * 3,
        "pairs": 0.7,
    }


def test_differences_are_those_of_the_same_seed_and_window() -> None:
    rows = [row("js", 0, 0.9), row("js", 1, 1.1), row("forward_kl", 0, 1.0), row("forward_kl", 1, 1.2)]
    rows += [row("js", 2, 0.1), row("before", 0, 2.0) | {"steps": 0}]  # the control of seed 2 is missing
    *_, before, control, js = lessons.table(rows, "small")
    assert before.startswith("| before | 1,020 | 1.0 | 2.1000 ")
    assert control == "| forward_kl | 1,020 | 1.0 | 1.2000 | 1.2000 | 1.2000 |  | 0.0500 | 0.700 | 2 |"
    assert js.split(" | ")[6] == "0.1000 ± 0.0000"  # window by window, so that what windows share is no noise
    made = list(lessons.records(rows, "small"))
    assert [record["arm"] for record in made] == ["before", "forward_kl", "js"]
    numbers = made[-1]["numbers"]
    assert (numbers["less"], numbers["kl_docs"], numbers["seeds"]) == (pytest.approx(0.1), pytest.approx(1.1), 2)
    assert {"less", "less_stderr"}.isdisjoint(made[1]["numbers"])


def test_the_nearest_to_the_teacher_comes_first() -> None:
    rows = [row("worse", 0, 1.5), row("js", 0, 0.9), row("forward_kl", 0, 1.0), row("before", 0, 0.8) | {"steps": 0}]
    assert [arm for arm, _ in lessons.summary(rows, "small")] == ["before", "forward_kl", "js", "worse"]


def test_as_many_minutes_are_an_arm_of_their_own() -> None:
    rows = [row("js", 0, 0.9), row("js", 0, 0.8) | {"steps": 6}, row("forward_kl", 0, 1.0), row("forward_kl", 1, 1.0)]
    rows.append(row("js", 1, 0.8) | {"steps": 5})  # what fits into a control's time differs from seed to seed
    found = dict(lessons.summary(rows, "small"))
    assert list(found) == ["forward_kl", "js, in as many minutes", "js"]
    assert [numbers["seeds"] for numbers in found.values()] == [2, 2, 1]


def test_time_is_made_equal_where_that_can_tell_anything() -> None:
    control = row("forward_kl", 0, 1.0)
    quicker, slower = ({"seconds": seconds} for seconds in (40.0, 80.0))
    assert lessons.fitting(control, row("js", 0, 1.1) | quicker) == 6
    assert lessons.fitting(control, row("js", 0, 0.9) | slower) == 3
    assert lessons.fitting(control, row("js", 0, 1.1) | slower) == 0  # as long it is behind, in less time all the more
    assert lessons.fitting(control, row("js", 0, 0.9) | {"seconds": 61.0}) == 0


def test_a_row_that_is_there_is_not_run_again(tmp_path: Path) -> None:
    arena = lessons.Arena(ARMS, {}, (), tmp_path)
    arena.rows.write_text('{"student": "small", "arm": "js", "steps": 4, "seed": 0, "seconds": 1.5}\n')
    lessons.once(arena, Path("small"), "js", {}, 4, 0)  # would fail, having no such student
    found = lessons.found(arena, Path("small"), "js", 4, 0)
    assert found is not None and found["seconds"] == 1.5


def test_what_another_process_runs_is_left_to_it(tmp_path: Path) -> None:
    arena = lessons.Arena(ARMS, {}, (), tmp_path)
    running: list[str] = []

    def run(_: Any, student: Path, *rest: Any) -> dict[str, Any]:
        running.append(student.name)
        lessons.once(arena, student, "js", {}, 4, 0)  # as another process would meanwhile
        return {"seconds": 1.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lessons, "_run", run)
        lessons.once(arena, Path("small"), "js", {}, 4, 0)
    assert running == ["small"] and len(arena.known()) == 1


def test_samples_are_those_that_the_epochs_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    arena = lessons.Arena(ARMS, dict.fromkeys(("wiki",), tmp_path / "wiki.txt"), (), tmp_path)
    steps, batch = 40, ARMS["common"]["batch"]
    for changes, samples in (({}, steps * batch), ({"epochs": 4}, steps * batch // 8)):
        data = lessons.recipe(arena, tmp_path, changes, steps, 0)["data"]
        assert [part["samples"] - lessons.HELD for part in data] == [samples] * 2


def test_an_arm_that_fails_is_told_and_tried_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def run(*_: Any) -> dict[str, Any]:
        tried.append("js")
        raise RuntimeError("it does not fit")

    monkeypatch.setattr(lessons, "_run", run)
    arena = lessons.Arena(ARMS, {}, (), tmp_path)
    for _ in range(2):
        lessons.once(arena, Path("small"), "js", {}, 4, 0)
    assert tried == ["js"] and not arena.known()
    assert "small, js, seed 0: failed" in capsys.readouterr().err
    assert "it does not fit" in next((tmp_path / "unfinished").glob("*.failed")).read_text()


def test_a_second_teacher_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = lessons.Arena(ARMS, {}, (), tmp_path)
    monkeypatch.setattr(lessons.lc, "compress", lambda _, recipe, folder, device: folder.mkdir())
    monkeypatch.setattr(lessons, "drop_blocks", lambda _, blocks, folder: folder.mkdir())  # fails where there is one
    asked = ({"recipe": "gptq-3-g64"}, {"blocks": [1]}, {"recipe": "gptq-3-g64"}, {"blocks": [1]})
    made = [lessons.made(arena, each) for each in asked]
    assert made[:2] == made[2:] and made[0] != made[1]


def test_a_text_is_read_once_by_the_teacher_that_scores() -> None:
    model = tiny("llama")
    texts = torch.arange(8).reshape(2, 1, 4)
    wanted = [model(input_ids=ids, use_cache=False).logits for ids in texts]
    lessons.remembering(model)
    given = [model(input_ids=ids, use_cache=False).logits for ids in texts]
    model.lm_head.weight.data.zero_()  # whatever reads again finds nothing
    given += [model(input_ids=ids, use_cache=False).logits for ids in texts]
    assert all(torch.equal(one, other) for one, other in zip(given, wanted * 2, strict=True))
