"""Training: what a step reads and how much it learns are functions of the step; resumed runs end as whole ones do."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmcompress as lc
from llmcompress.data import calibration
from llmcompress.data.generate import TeacherText, teacher_sequences
from llmcompress.data.schedule import rate, rows
from llmcompress.distillation import step as steps
from llmcompress.distillation import train
from llmcompress.distillation.context import TrainContext
from llmcompress.distillation.resume import Saving
from llmcompress.distillation.run import distill
from llmcompress.errors import InputError, NumericsError, RecipeError, Termination
from llmcompress.evaluation.verify import verify
from llmcompress.recipe.distillation import Distillation
from llmcompress.reporting.report import read
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import describe
from llmcompress.weight.modules import compressed_linears
from tests.distillation import miniature
from tests.distillation.miniature import cut_short, make, weight_files
from tests.tiers import tiered_nightly
from tests.tiny import save_tiny

RULES = [
    {"match": "*.q_proj", "steps": [{"method": "magnitude", "pattern": "2:4"}]},
    {
        "match": "*.down_proj",
        "steps": [{"method": "rtn", "bits": 2, "group_size": 16}, {"method": "svd", "rank": 2, "factor_bits": 16}],
    },
    {"match": "*", "steps": [{"method": "rotate"}, {"method": "rtn", "bits": 2, "group_size": 16}]},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model, a `small` one made from it, and a text."""
    return make(tmp_path_factory.mktemp("distill"), RULES)


def kept_step(folder: Path) -> int | None:
    """The step of the state that a training left in a folder, None where there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        return int(json.loads(file.metadata()["record"])["step"])


def recipe(folders: Path, **more: Any) -> dict[str, Any]:
    kinds = {"scales": 5e-3, "factors": 5e-3, "values": 2e-3, "norms": 2e-3}
    return miniature.recipe(folders, **{"rates": kinds, "evaluate_every": 3} | more)


def test_every_epoch_reads_every_sequence_once() -> None:
    read = [rows(step, 4, 12, seed=1) for step in range(6)]
    first, second = [sorted(chain.from_iterable(part)) for part in (read[:3], read[3:])]
    assert first == second == list(range(12)) and read[:3] != read[3:]
    assert read[2] == rows(2, 4, 12, seed=1) and read != [rows(step, 4, 12, seed=2) for step in range(6)]


def test_the_rate_rises_and_falls() -> None:
    found = [rate(step, 100, 0.1, 0.2) for step in range(100)]
    assert found[0] == 0.1 and found[9] == 1 == max(found) and math.isclose(found[-1], 0.2)
    assert all(one >= other for one, other in pairwise(found[9:]))


def test_a_notebook_may_train_elsewhere_and_record_no_gradients(folders: Path, tmp_path: Path) -> None:
    """Accelerate's state of before is neither minded nor changed."""
    asked = recipe(folders, steps=1)
    distill(folders / "small", folders / "dense", asked, tmp_path / "wanted")
    assert not AcceleratorState._shared_state
    before = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    try:
        with torch.no_grad():
            distill(folders / "small", folders / "dense", asked, tmp_path / "found")
        assert before.mixed_precision == AcceleratorState().mixed_precision == "bf16"
        assert before.gradient_accumulation_steps == 3
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert weight_files(tmp_path / "found") == weight_files(tmp_path / "wanted")


def test_training_recovers_quality_at_the_same_bytes(folders: Path, tmp_path: Path) -> None:
    done = distill(folders / "small", folders / "dense", recipe(folders, steps=12), tmp_path / "out")
    before, after = done.history[0], done.history[-1]
    assert after["kl"] < 0.9 * before["kl"] and done.steps == 12 and done.tokens == 12 * 4 * 31
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (folders / "small", tmp_path / "out"))
    for name, layer in compressed_linears(new).items():
        was = compressed_linears(old)[name].expression()
        assert describe(layer.expression()) == describe(was)
        codes = [value for key, value in encode(layer.expression())[1].items() if "codes" in key or "index" in key]
        assert all(map(torch.equal, codes, [v for k, v in encode(was)[1].items() if "codes" in k or "index" in k]))
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for folder in (folders / "small", tmp_path / "out")
    ]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]
    assert json.loads((tmp_path / "out" / "distillation.json").read_text())["history"][-1]["kl"] == after["kl"]
    protocol = lc.Protocol(folders / "text.txt", windows=4, length=32)
    distances = [
        lc.score(folder, protocol, against=str(folders / "dense"))["kl"]
        for folder in (folders / "small", tmp_path / "out")
    ]
    assert distances[1] < 0.9 * distances[0]
    assert not (tmp_path / "out.training").exists()
    assert verify(tmp_path / "out", text=folders / "text.txt", length=16).layers == 16
    assert read(tmp_path / "out").bytes == sizes[1]


@pytest.mark.slow
def test_the_teacher_that_is_loaded_writes_the_text(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = []

    def written(model: PreTrainedModel, *rest: Any, **more: Any) -> TeacherText:
        writers.append((model.dtype, model.config.name_or_path))
        return teacher_sequences(model, *rest, **more)

    monkeypatch.setattr(calibration, "teacher_sequences", written)
    own = {"dataset": "self", "samples": 6, "length": 16, "held_out": 2}
    distill(folders / "small", folders / "dense", recipe(folders, data=own, compute="bfloat16"), tmp_path / "out")
    assert writers == [(torch.bfloat16, str(folders / "dense"))]  # as it teaches, not as a copy in float32


@pytest.mark.slow
def test_codes_that_start_at_the_teacher_are_recovered(folders: Path, tmp_path: Path) -> None:
    """Of a student that was rounded to nearest."""
    asked = recipe(folders, steps=24, rates={"codes": 1e-2}, latents="teacher")
    done = distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    assert done.history[-1]["kl"] < 0.5 * done.history[0]["kl"] and set(done.trained) == {"codes"}


@pytest.mark.slow
def test_latents_that_start_at_the_codes_take_time_to_change_them(folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, steps=24, evaluate_every=1, rates={"codes": 4e-2}, latents="codes")
    done = distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    distances = [row["kl"] for row in done.history]
    assert distances[0] == distances[3] != distances[-1]


def test_an_interrupted_run_resumes_exactly(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(folders, steps=7, save_every=3, losses=[{"of": {"loss": "taid"}}])
    whole = distill(folders / "small", folders / "dense", asked, tmp_path / "whole")
    cut_short(folders, asked, tmp_path / "cut", calls=5)
    assert kept_step(tmp_path / "cut.training") is not None and not (tmp_path / "cut").exists()
    seen: list[int] = []
    again = distill(
        folders / "small", folders / "dense", asked, tmp_path / "cut", progress=lambda done, *_: seen.append(done)
    )
    assert seen == [4, 5, 6, 7]
    assert [{**row, "seconds": 0} for row in again.history] == [{**row, "seconds": 0} for row in whole.history]
    assert weight_files(tmp_path / "whole") == weight_files(tmp_path / "cut")


@pytest.mark.parametrize("step", tiered_nightly([2, 6], lambda step: step == 2))
def test_sigterm_keeps_the_state_of_the_last_step(step: int, folders: Path, tmp_path: Path) -> None:
    """Within the run, and within its last step."""
    asked = recipe(folders, steps=7, save_every=7)
    whole = distill(folders / "small", folders / "dense", asked, tmp_path / "whole")

    def stop(done: int, *_: Any) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        Termination, match=rf"step {step + 1} is kept in .*cut\.training, from where the same command resumes"
    ):
        distill(folders / "small", folders / "dense", asked, tmp_path / "cut", progress=stop)
    assert kept_step(tmp_path / "cut.training") == step + 1
    again = distill(folders / "small", folders / "dense", asked, tmp_path / "cut")
    assert again.history[-1]["kl"] == whole.history[-1]["kl"]


@pytest.mark.parametrize("minutes, kept", [(1e-9, 2), (60, None)])
def test_states_are_kept_every_so_many_minutes(minutes: float, kept: int | None, folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, steps=4, save_every=1000, save_minutes=minutes)
    cut_short(folders, asked, tmp_path / "out", calls=2)
    assert kept_step(tmp_path / "out.training") == kept


@pytest.mark.parametrize(
    "more, saving, wait",
    [({}, 0.1, 10), ({}, 2, 38), ({}, 100, 600), ({"save_minutes": 1}, 100, 60), ({"save_every": 5}, 2, 600)],
)
def test_states_that_take_long_to_write_are_kept_less_often(more: dict[str, Any], saving: float, wait: float) -> None:
    for since, late in ((wait - 1, False), (wait + 1, True)):
        assert Saving(Distillation(**more), at=time.monotonic() - since, took=saving).is_late() == late


def test_the_gradient_does_not_depend_on_micro_batches(folders: Path, tmp_path: Path) -> None:
    results = [
        distill(folders / "small", folders / "dense", recipe(folders, steps=3, micro_batch=size), tmp_path / str(size))
        for size in (1, 4)
    ]
    one, four = [result.history[-1] for result in results]
    assert math.isclose(one["kl"], four["kl"], rel_tol=1e-4) and math.isclose(one["loss"], four["loss"], rel_tol=1e-5)


def test_another_recipe_does_not_continue(folders: Path, tmp_path: Path) -> None:
    cut_short(folders, recipe(folders, steps=4, save_every=1), tmp_path / "out", calls=1)
    with pytest.raises(InputError, match="was left by a different run .recipe changed"):
        distill(folders / "small", folders / "dense", recipe(folders, steps=5, save_every=1), tmp_path / "out")


@pytest.mark.slow
def test_another_student_of_the_same_size_does_not_continue(folders: Path, tmp_path: Path) -> None:
    data = {"dataset": str(folders / "text.txt"), "samples": 8, "length": 32, "held_out": 2, "seed": 1}
    tables = [{"method": "rtn", "bits": 4}]
    other = {"version": 1, "rules": RULES, "calibration": data, "embeddings": tables, "seed": 1}
    lc.compress(folders / "dense", other, tmp_path / "other")
    sizes = [
        sorted(path.stat().st_size for path in folder.glob("*.safetensors"))
        for folder in (folders / "small", tmp_path / "other")
    ]
    assert sizes[0] == sizes[1]
    asked = recipe(folders, steps=4, save_every=1)
    cut_short(folders, asked, tmp_path / "out", calls=1)
    with pytest.raises(InputError, match="was left by a different run .student changed"):
        distill(tmp_path / "other", folders / "dense", asked, tmp_path / "out")


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"rates": {"codez": 1e-3}}, "codez"),
        ({"rates": {}}, "it must not be empty"),
        ({"batch": 3}, "batch 3 is no multiple of micro_batch 2"),
        ({"losses": [{"of": {"loss": "forward_lk"}}]}, "forward_kl"),
        ({"stepz": 3}, 'unknown key "stepz".*did you mean "steps"'),
    ],
)
def test_impossible_recipes_are_refused(more: dict[str, Any], sentence: str, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        distill(folders / "small", folders / "dense", recipe(folders, **more), tmp_path / "out")


def test_impossible_pairs_are_refused(folders: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", vocab_size=300)
    with pytest.raises(InputError, match="the table of tokens has 264 rows in .*small and 300 in .*other;"):
        distill(folders / "small", other, recipe(folders), tmp_path / "out")
    with pytest.raises(RecipeError, match="the student has no compressed linears"):
        distill(folders / "dense", folders / "dense", recipe(folders), tmp_path / "out")
    with pytest.raises(InputError, match="24 sequences are too few for a batch of 32"):
        distill(folders / "small", folders / "dense", recipe(folders, batch=32), tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_at_its_step(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = steps.rate

    def broken(number: int, *given: Any) -> float:
        if number == 2:
            for parameter in student[0].named_parameters().values():
                parameter.data.fill_(float("nan"))
        return step(number, *given)

    student: list[Any] = []
    judge = train.evaluate_held_out

    def seen(run: TrainContext, number: int) -> Any:
        student.append(run.student)
        return judge(run, number)

    monkeypatch.setattr(train, "evaluate_held_out", seen)
    monkeypatch.setattr(steps, "rate", broken)
    ways = "lower the rates, and remove out.training or choose another output folder"
    with pytest.raises(NumericsError, match=f"^step 3: the loss is nan and the gradient's norm nan; {ways}"):
        distill(folders / "small", folders / "dense", recipe(folders, steps=6, save_every=1), tmp_path / "out")
    assert kept_step(tmp_path / "out.training") == 2
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "out.training")


def test_defaults_are_a_recipe() -> None:
    assert Distillation().losses[0].of.loss == "forward_kl"
