"""Block-wise recovery, and phases: a block is never worse than it was, phases end as they would one by one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.cli.terminal import verdict
from llmcompress.data.batch import Batch
from llmcompress.distillation import blockwise
from llmcompress.distillation.blockwise import (
    Activations,
    Block,
    RecoveredBlocks,
    Stream,
    in_batches,
    mean_error,
    recover_block,
    recover_blocks,
)
from llmcompress.distillation.phases import run_phases
from llmcompress.distillation.run import distill
from llmcompress.distillation.student.low_rank import teacher_weights
from llmcompress.distillation.student.model import relaxed_student
from llmcompress.errors import InputError, NumericsError, RecipeError
from llmcompress.evaluation.verify import verify
from llmcompress.models.files.store import Store
from llmcompress.recipe.distillation import CONTROLS, Distillation
from llmcompress.recipe.read import read_as
from llmcompress.weight.modules import compressed_linears
from tests.distillation.miniature import cut_short, loaded, make, recipe
from tests.tiers import tiered, tiered_nightly
from tests.tiny import FAMILY_CONFIGS, save_tiny, tiny

RULES = [{"match": "*", "steps": [{"method": "rotate"}, {"method": "rtn", "bits": 2, "group_size": 16}]}]
RATES = {"codes": 5e-3, "scales": 5e-3, "norms": 5e-3}
PATH = "model.layers.0"
BLOCKWISE = [{"kind": "blockwise", "steps": 2}]
TWO = [{"of": {"loss": "forward_kl"}}, {"of": {"loss": "cross_entropy"}}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("phases"), RULES)


def asked(folders: Path, **more: Any) -> Distillation:
    more = {"rates": RATES, "latents": "teacher", "steps": 20, "evaluate_every": 5} | more
    return read_as(Distillation, recipe(folders, **more))


def tokens(count: int = 12, length: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(3))


def walk_of(folders: Path, settings: Distillation, kept: Path, **more: Any) -> tuple[PreTrainedModel, RecoveredBlocks]:
    student, teacher = loaded(folders)
    run: Any = SimpleNamespace(
        recipe=settings,
        student=SimpleNamespace(model=student),
        dense_teacher=lambda: teacher,
        store=Store(kept, {"recipe": 1}),
        autocast=torch.enable_grad,
    )
    return student, recover_blocks(run, Batch.of(tokens()), 4, **more)


def payloads(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: layer.get_parameter("weight").clone() for name, layer in compressed_linears(model).items()}


def first_block(folders: Path) -> tuple[PreTrainedModel, Block, Activations, Activations]:
    """The student, its first block, and what that should learn from and be measured on."""
    student, teacher = loaded(folders)
    batches = in_batches(12, 4, 2)
    streams = [Stream.of(model, tokens(), batches, torch.enable_grad) for model in (student, teacher)]
    streams[1].advance(0)
    data = Activations(streams[0].hidden, streams[1].hidden, torch.ones(12, 16, dtype=torch.bool))
    return student, streams[0].block(0), data[:8], data[8:]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_streams_are_the_models_own_hidden_states(family: str) -> None:
    model = tiny(family)
    stream = Stream.of(model, tokens(), in_batches(12, 4, 3), torch.enable_grad)
    wanted = model(tokens(), output_hidden_states=True).hidden_states
    assert stream.blocks == 2 and stream.hidden.dtype == torch.bfloat16
    for index, states in enumerate(wanted[:2]):  # after the last block, transformers gives them normalised
        assert float((stream.hidden.float() - states).norm() / states.norm()) < 5e-3, index
        stream.advance(0)


def test_the_error_is_the_mean_of_relative_errors_of_tokens_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = (torch.randn(3, 5, 4, generator=generator).to(torch.bfloat16) for _ in range(2))
    counted = torch.rand(3, 5, generator=generator) < 0.7
    found = mean_error(lambda hidden: 2 * hidden, Activations(inputs, wanted, counted), size=2)
    errors = [
        float((2 * x.double() - y.double()).square().sum() / y.double().square().sum())
        for x, y, counts in zip(inputs.flatten(0, 1), wanted.flatten(0, 1), counted.flatten())
        if counts
    ]
    assert math.isclose(found, sum(errors) / len(errors), rel_tol=1e-5)


@pytest.mark.parametrize("kind", tiered(["codes", "scales", "norms"], "codes".__eq__))
def test_a_block_improves_on_held_out_text(kind: Any, folders: Path) -> None:
    student, block, train, held_out = first_block(folders)
    settings = asked(folders, rates={kind: RATES[kind]}, latents="codes")
    part = relaxed_student(student, settings.rates, teacher_weights(student, loaded(folders)[1]), f"{PATH}.")
    assert {name.rpartition(".")[0][: len(PATH)] for name in part.named_parameters()} == {PATH}
    found = recover_block(block, part, train, held_out, settings, PATH)
    assert found.after < (0.99 if kind == "norms" else 0.97) * found.before and found.step in (5, 10, 15, 20)
    assert mean_error(block, held_out, 2) == found.after
    part.freeze_into_model()
    assert math.isclose(mean_error(block, held_out, 2), found.after, rel_tol=1e-5)


def test_a_block_that_nothing_helps_stays_as_it_is(folders: Path) -> None:
    """Held-out targets that are what the block gives already."""
    student, block, train, held_out = first_block(folders)
    with torch.no_grad():
        there = torch.cat([block(part.inputs.float()) for part in held_out.batches(2)])
    near = replace(held_out, wanted=there + 1e-3 * torch.randn_like(there))
    before, norms = payloads(student), {name: value.clone() for name, value in student.named_parameters()}
    part = relaxed_student(student, RATES, None, f"{PATH}.")
    found = recover_block(block, part, train, near, asked(folders), PATH)
    part.freeze_into_model()
    assert found.after == found.before > 0 and found.step == 0
    after = payloads(student)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(value, norms[name]) for name, value in student.named_parameters())


def test_the_walk_recovers_every_block(folders: Path, tmp_path: Path) -> None:
    before = payloads(loaded(folders)[0])
    student, walked = walk_of(folders, asked(folders), tmp_path / "kept")
    assert list(walked.errors) == ["model.layers.0", "model.layers.1"]
    assert all(block.after < 0.97 * block.before for block in walked.errors.values())
    assert walked.trained["norms"] == 4 * 32 and walked.trained["codes"] == sum(
        layer.in_features * layer.out_features for layer in walked.linears.values()
    )
    after = payloads(student)
    assert before.keys() == after.keys() and walked.linears.keys() == {name for name in after if "layers" in name}
    assert all(len(after[name]) == len(value) for name, value in before.items())
    again, _ = walk_of(folders, asked(folders), tmp_path / "other")
    assert all(torch.equal(value, after[name]) for name, value in payloads(again).items())


def test_a_step_may_draw_more_sequences_than_there_are(folders: Path, tmp_path: Path) -> None:
    settings = asked(folders, batch=16, micro_batch=16, steps=2, evaluate_every=1)
    _, walked = walk_of(folders, settings, tmp_path / "kept")
    assert len(walked.errors) == 2


@pytest.mark.slow
def test_finished_blocks_are_not_repeated(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, walked = walk_of(folders, asked(folders), tmp_path / "whole")

    class Cut(Exception):
        pass

    def cut(done: int, *_: Any) -> None:
        raise Cut

    with pytest.raises(Cut):
        walk_of(folders, asked(folders), tmp_path / "kept", report=cut)
    done: list[str] = []
    recover = blockwise.recover_block
    monkeypatch.setattr(blockwise, "recover_block", lambda *given: (done.append(given[-1]), recover(*given))[1])
    again, found = walk_of(folders, asked(folders), tmp_path / "kept")
    assert done == ["model.layers.1"] and found.errors == walked.errors and found.trained == walked.trained
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    with pytest.raises(InputError, match="was left by a different run .recipe changed"):
        Store(tmp_path / "kept", {"recipe": 2}).get(blockwise.record_name(0))


@pytest.mark.slow
def test_phases_follow_each_other(folders: Path, tmp_path: Path) -> None:
    phases = [
        {"kind": "blockwise", "rates": RATES, "latents": "teacher", "steps": 12, "evaluate_every": 4},
        {"kind": "end_to_end", "steps": 6, "rates": {"factors": 1e-2}, "adapt": {"rank": 2, "factor_bits": 8}},
    ]
    whole = distill(folders / "small", folders / "dense", recipe(folders, phases=phases), tmp_path / "whole")
    assert [(row["phase"], row["step"]) for row in whole.history] == [(1, 0), (1, 12), (2, 0), (2, 6), (2, 6)]
    distances = [row["kl"] for row in whole.history]
    assert distances[1] < 0.8 * distances[0] and math.isclose(distances[2], distances[1], rel_tol=1e-4)
    assert distances[3] < 0.97 * distances[2] and whole.steps == 6
    assert [phase["kind"] for phase in whole.phases] == ["blockwise", "end_to_end"]
    assert all(block["after"] < block["before"] for block in whole.phases[0]["blocks"].values())
    assert set(whole.trained) == {*RATES, "factors"} and whole.bytes_before < whole.bytes_after
    assert json.loads((tmp_path / "whole" / "distillation.json").read_text())["phases"] == whole.phases
    assert verify(tmp_path / "whole", text=folders / "text.txt", length=16).layers == 16
    assert not (tmp_path / "whole.training").exists()
    first = distill(folders / "small", folders / "dense", recipe(folders, phases=phases[:1]), tmp_path / "first")
    second = distill(tmp_path / "first", folders / "dense", recipe(folders, phases=phases[1:]), tmp_path / "second")
    assert math.isclose(first.history[-1]["kl"], distances[1], rel_tol=1e-6)
    assert math.isclose(second.history[-1]["kl"], distances[-1], rel_tol=1e-3)


@pytest.mark.parametrize("calls", tiered_nightly([1, 4], lambda calls: calls == 4))
def test_a_run_interrupted_in_a_phase_resumes_exactly(calls: int, folders: Path, tmp_path: Path) -> None:
    """After the first of two blocks, and after the second of three steps."""
    phases = [{"kind": "blockwise", "steps": 2}, {"kind": "end_to_end", "steps": 3}]
    settings = recipe(folders, phases=phases, save_every=1)
    whole = distill(folders / "small", folders / "dense", settings, tmp_path / "whole")
    cut_short(folders, settings, tmp_path / "cut", calls)
    again = distill(folders / "small", folders / "dense", settings, tmp_path / "cut")
    assert [row["kl"] for row in again.history] == [row["kl"] for row in whole.history]
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_work_of_a_recipe_without_phases_is_not_taken_for_that_of_one_with_them(folders: Path, tmp_path: Path) -> None:
    """Nor are the metrics of one that left no work."""
    plain = recipe(folders, steps=3, save_every=1)
    phased = recipe(folders, phases=[{"kind": "blockwise", "steps": 1}, {"kind": "end_to_end", "steps": 1}])
    cut_short(folders, plain, tmp_path / "out", 2)
    with pytest.raises(InputError, match="out.training was left by a different run .recipe changed"):
        distill(folders / "small", folders / "dense", phased, tmp_path / "out")
    cut_short(folders, plain | {"save_every": 1000}, tmp_path / "other", 1)
    distill(folders / "small", folders / "dense", phased, tmp_path / "other")
    rows = map(json.loads, (tmp_path / "other" / "metrics.jsonl").read_text().splitlines())
    assert {row.get("phase") for row in rows} == {1, 2}


def test_an_interrupt_says_where_finished_blocks_are(folders: Path, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    settings = recipe(folders, phases=[{"kind": "blockwise", "steps": 2}])
    with pytest.raises(KeyboardInterrupt) as raised:
        distill(folders / "small", folders / "dense", settings, tmp_path / "out", progress=stop)
    state = f"finished work is kept in {tmp_path / 'out.training'}, from where the same command resumes"
    assert verdict(raised.value) == (130, f"stopped from the keyboard; {state}")


def test_a_recipe_without_phases_is_one(folders: Path) -> None:
    plain = asked(folders)
    assert plain.stages() == (("end_to_end", plain),)
    phased = asked(folders, phases=[{"kind": "blockwise", "steps": 3}, {"kind": "end_to_end", "rates": {"norms": 0.1}}])
    (first, one), (second, other) = phased.stages()
    assert (first, second) == ("blockwise", "end_to_end")
    assert one == plain.model_copy(update={"steps": 3})
    assert other == plain.model_copy(update={"rates": {"norms": 0.1}})
    blocks = asked(folders, phases=BLOCKWISE)
    assert read_as(Distillation, blocks.model_dump(mode="json")) == blocks, "every value is written"


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"phases": [{"kind": "blockwise", "rates": {}}]}, "rates.*must not be empty"),
        ({"phases": [{"kind": "blocks"}]}, 'kind is "blocks"; it must be "blockwise" or "end_to_end"'),
        ({"phases": [{"kind": "blockwise", "stepz": 2}]}, 'did you mean "steps"'),
        ({"phases": [{"kind": "blockwise", "micro_batch": 3}]}, "batch 4 is no multiple of micro_batch 3"),
        ({"phases": [{"kind": "end_to_end", "adapt": {"rank": 2}}]}, "and rates has none for them"),
        ({"phases": [{"kind": "blockwise"}], "adapt": {"rank": 2}}, "adapt does not go with phases"),
        ({"phases": [{"kind": "blockwise", "rates": {"factors": 0.1}}]}, "no block has factors to train"),
        ({"phases": BLOCKWISE, "data": {"boundaries": True}}, "a blockwise phase cannot keep documents apart"),
        ({"phases": BLOCKWISE, "losses": CONTROLS["no_teacher"]}, "losses: blockwise phases read no predictions"),
        ({"phases": BLOCKWISE, "losses": TWO, "balance": True}, "losses: blockwise phases read no predictions"),
        ({"phases": BLOCKWISE, "teacher": {"kind": "cached"}}, "teacher: blockwise phases read no predictions"),
        (
            {"phases": BLOCKWISE, "mixture": {"reweight": "ddk"}, "data": [{"name": "a"}, {"name": "b"}]},
            "ddk}: blockwise phases read no predictions, but all text; leave it out",
        ),
        ({"latents": "teacher"}, "latents needs codes that train, and rates has none for them"),
        ({"phases": [{"kind": "end_to_end", "estimator": "reste"}]}, "estimator needs codes that train"),
    ],
)
def test_impossible_phases_are_refused(more: dict[str, Any], sentence: str, folders: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        distill(folders / "small", folders / "dense", recipe(folders, **more), tmp_path / "out")


def test_impossible_runs_are_refused(folders: Path, tmp_path: Path) -> None:
    deep = save_tiny("llama", tmp_path / "deep", tie_word_embeddings=True, num_hidden_layers=3)
    settings = recipe(folders, phases=[{"kind": "blockwise", "steps": 2}])
    with pytest.raises(InputError, match="needs a student with as many blocks as its teacher"):
        distill(folders / "small", deep, settings, tmp_path / "out")
    two: Any = SimpleNamespace(recipe=read_as(Distillation, settings), accelerator=SimpleNamespace(num_processes=2))
    with pytest.raises(RecipeError, match="a blockwise phase runs in one process, and 2 were started"):
        run_phases(two)
    student, block, train, held_out = first_block(folders)
    part = relaxed_student(student, {"scales": 1e-3}, None, f"{PATH}.")
    broken = replace(train, wanted=torch.full_like(train.wanted, float("nan")))
    with pytest.raises(NumericsError, match="model.layers.0, step 1: the gradient's norm is nan"):
        recover_block(block, part, broken, held_out, asked(folders, rates={"scales": 1e-3}, latents="codes"), PATH)
