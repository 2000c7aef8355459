"""One command from a dense model to a recovered checkpoint: a recipe with a section `distill:`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.compression import run
from llmcompress.compression.job import prepare
from llmcompress.distillation.run import distill
from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.evaluation.verify import verify
from llmcompress.formats.hub import _card, _proof
from llmcompress.models.dense.locate import Place
from llmcompress.models.dense.model import resolve
from llmcompress.models.files.output import claim_folder
from llmcompress.pipeline.compress import completed_result, compress_job
from llmcompress.recipe.read import dump, parse_recipe, read_recipe
from llmcompress.runtime.ranks import Ranks
from tests.lockstep import in_lockstep
from tests.tiny import save_tiny

TEXT = "Forty farms bring their corn to the mill by the river, and the miller counts every sack of it. "
RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model and a text."""
    folder = tmp_path_factory.mktemp("recover")
    save_tiny("llama", folder / "dense")
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    return folder


def recipe(place: Path, **section: Any) -> dict[str, Any]:
    """Of a compression without calibration, and of the distillation that follows."""
    data = {"dataset": str(place / "text.txt"), "samples": 28, "length": 32, "held_out": 4}
    rates = {"scales": 5e-3, "norms": 2e-3}
    asked = {"data": data, "rates": rates, "batch": 4, "compute": "float32", "steps": 6, "evaluate_every": 3}
    return {"version": 1, "name": "both", "seed": 5, "rules": RULES, "distill": asked | section}


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.slow
def test_one_command_gives_what_two_give(place: Path, tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(recipe(place)))
    done = invoke("compress", place / "dense", tmp_path / "both.yaml", "-o", tmp_path / "one", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    asked = recipe(place)
    section = asked.pop("distill")
    lc.compress(place / "dense", asked, tmp_path / "small")
    two = distill(tmp_path / "small", place / "dense", section | {"version": 1, "seed": 5}, tmp_path / "two")
    assert [row["kl"] for row in found["distillation"]["history"]] == [row["kl"] for row in two.history]
    for path in (tmp_path / "two").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert not list(tmp_path.glob("one.*")), "the intermediate folder and the training's state are gone"
    assert verify(tmp_path / "one", text=place / "text.txt", length=16).layers == 14
    assert found["bytes"] == lc.read(tmp_path / "one").bytes and found["recipe"] == "both"
    assert read_recipe(tmp_path / "one" / "recipe.yaml").distill is None
    assert yaml.safe_load((tmp_path / "one" / "distillation.yaml").read_text())["seed"] == 5
    shown = invoke("inspect", tmp_path / "one").stdout
    assert "trained " in shown and "KL" in shown


def test_a_cut_run_goes_on_and_does_not_compress_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, out = recipe(place, save_every=2), tmp_path / "out"

    class Cut(Exception):
        pass

    def cut(done: int, *_: Any) -> None:
        if done == 3:
            raise Cut

    with pytest.raises(Cut) as raised:
        lc.compress(place / "dense", asked, out, training=cut)
    kept = tmp_path / "out.compressed"
    assert raised.value.__notes__ == [f"the compressed model is kept in {kept}, from where the same command resumes"]
    assert not out.exists() and (tmp_path / "out.compressed" / "report.json").is_file()
    with pytest.raises(DiskError, match=r"out\.compressed was left by a run with another recipe"):
        lc.compress(place / "dense", asked | {"seed": 6}, out)
    compress, calls = run.compress, []
    monkeypatch.setattr(run, "compress", lambda *given, **named: (calls.append(given), compress(*given, **named))[1])
    seen: list[int] = []
    result = lc.compress(place / "dense", asked, out, training=lambda done, *_: seen.append(done))
    assert not calls and seen == [3, 4, 5, 6]
    assert result.distillation is not None and result.distillation["steps"] == 6 and result.folder == out
    assert not (tmp_path / "out.compressed").exists()


def test_a_complete_output_leaves_nothing_beside_it(place: Path, tmp_path: Path) -> None:
    """Leftovers of a kill at the end of a run to a target, or of a budget of a sweep, go at the next start."""
    asked, out = recipe(place, steps=1), tmp_path / "out"
    lc.compress(place / "dense", asked, out)
    lc.compress(place / "dense", {key: asked[key] for key in asked.keys() - {"distill"}}, tmp_path / "out.compressed")
    claim_folder(tmp_path / "out.training")
    job = prepare(resolve(str(place / "dense")), read_recipe(asked))
    assert completed_result(out, job, "cpu") is not None
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    others = {key: asked[key] for key in asked.keys() - {"distill"}} | {"seed": 9}
    lc.compress(place / "dense", others, tmp_path / "out.compressed")
    assert completed_result(out, job, "cpu") is not None
    assert (tmp_path / "out.compressed").is_dir(), "what another recipe made stays"


@pytest.mark.slow
def test_asked_to_a_run_begins_anew(place: Path, tmp_path: Path) -> None:
    """Finished blocks, a compressed model or a state of training that another recipe left are no hindrance then."""
    asked, out = recipe(place, save_every=2), tmp_path / "out"

    def stop(done: int, *_: Any) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lc.compress(place / "dense", asked, out, training=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"out.compressed", "out.training"}
    seen: list[int] = []
    result = lc.compress(
        place / "dense", asked | {"seed": 6}, out, training=lambda done, *_: seen.append(done), resume=False
    )
    assert seen == [1, 2, 3, 4, 5, 6] and result.folder == out
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_model_that_changed_is_not_taken_for_compressed(place: Path, tmp_path: Path) -> None:
    dense = save_tiny("llama", tmp_path / "dense")
    asked = recipe(place)
    lc.compress(dense, {key: value for key, value in asked.items() if key != "distill"}, tmp_path / "out.compressed")
    weights = dense / "model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    os.utime(weights, (0, 0))  # an older copy
    with pytest.raises(DiskError, match="another recipe, model, text, device or version; remove it, or choose another"):
        lc.compress(dense, asked, tmp_path / "out")


def test_a_hub_model_is_resolved_once_and_is_the_teacher(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, asked = "0123456789" * 4, []

    def download(name: str, revision: str | None, *_: object) -> Place:
        asked.append(revision)
        return Place(name, place / "dense", revision=commit, hub_id=name)

    monkeypatch.setattr("llmcompress.models.dense.locate.download", download)
    result = lc.compress("org/dense@main", recipe(place, steps=1), tmp_path / "out")
    assert asked[0] == "main" and set(asked[1:]) == {commit}, "a branch may move while a model is compressed"
    assert result.report.revision == commit and result.report.base_model == "org/dense"
    assert result.distillation["teacher_id"] == "org/dense"
    text = _card(tmp_path / "out", "me/small", _proof(tmp_path / "out"))["README.md"].decode()
    assert "Taught by [org/dense](https://huggingface.co/org/dense) in " in text


@pytest.mark.slow
def test_without_an_output_the_result_is_in_memory_of_its_own(place: Path, tmp_path: Path) -> None:
    result = lc.compress(place / "dense", recipe(place, steps=1))
    assert result.distillation is not None
    result.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "distillation.json").is_file()


@pytest.mark.parametrize(
    "section, sentence",
    [
        ({"stepz": 3}, 'distill.stepz: unknown key "stepz".*did you mean "steps"'),
        ({"rates": {"codez": 1e-3}}, "distill.rates.*codez"),
        ({"losses": [{"of": {"loss": "forward_lk"}}]}, r"distill.losses\[0\].*forward_kl"),
        ({"batch": 3}, "batch 3 is no multiple of micro_batch 2"),
        ({"steps": True}, "distill.steps: steps is true; it must be a whole number"),
        ({"data": {"length": 65}}, "length 65 is more than the model's context of 64"),
        ({"trackers": ["tensorbord"]}, 'trackers: accelerate knows no "tensorbord"; did you mean "tensorboard"'),
        ({"optimizer": "paged_adamw_8bit"}, "requires a GPU to page memory from"),
    ],
)
def test_a_bad_section_is_found_before_anything_is_compressed(
    section: dict[str, Any], sentence: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        lc.compress(place / "dense", recipe(place, **section), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data, sentence",
    [
        ({"dataset": "none.txt"}, "there is no file none.txt"),
        ({"samples": 10_000}, r"gives \d+ of 10000 sequences of 32 tokens; give more text, or lower samples or length"),
    ],
)
def test_bad_text_is_found_before_anything_is_compressed(
    data: dict[str, Any], sentence: str, place: Path, tmp_path: Path
) -> None:
    asked = recipe(place)
    asked["distill"]["data"] |= data
    with pytest.raises(InputError, match=sentence):
        lc.compress(place / "dense", asked, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_bad_section_of_a_file_names_its_line(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("version: 1\nrules: [{match: '*', steps: [{method: rtn}]}]\ndistill:\n  steps: 3\n  batsh: 8\n")
    done = invoke("compress", place / "dense", path, "-o", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith('[2] both.yaml:5: unknown key "batsh"') and '"batch"' in done.stderr
    path.write_text("version: 1\nrules: [{match: '*', steps: [{method: rtn}]}]\ndistill: [1]\n")
    assert invoke("plan", place / "dense", path).stderr.startswith(
        "[2] both.yaml:3: distill is [1]; it must be a map of keys"
    )


def test_settings_reach_the_section(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text("version: 1\nrules: [{match: '*', steps: [{method: rtn}]}]\ndistill: {}\n")
    words = ["--set", "distill.steps=3", "--set", "distill.rates.codes=1e-3", "--set", "distill.data.length=48"]
    planned = invoke("plan", place / "dense", path, *words, "--json")
    assert planned.exit_code == 0, planned.output
    found = json.loads(planned.stdout)["distillation"]
    assert (found["steps"], found["rates"], found["data"]["length"]) == (3, {"codes": 1e-3}, 48)
    wrong = invoke("plan", place / "dense", path, "--set", "distill.stepz=3")
    assert wrong.exit_code == 2 and wrong.stderr.startswith('[2] --set distill.stepz=3: unknown key "stepz"')
    path.write_text("version: 1\nrules: [{match: '*', steps: [{method: rtn}]}]\n")
    found = json.loads(invoke("plan", place / "dense", path, *words, "--json").stdout)["distillation"]
    assert found["steps"] == 3


def test_the_plan_says_what_follows(place: Path, tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(recipe(place)))
    shown = invoke("plan", place / "dense", tmp_path / "both.yaml").stdout
    assert "then    distillation both: norms, scales by forward_kl · 28 x 32 tokens" in shown
    blocks = invoke("plan", place / "dense", tmp_path / "both.yaml", "--set", "distill.phases=[{kind: blockwise}]")
    assert "norms, scales by outputs of each block · 28" in blocks.stdout
    assert lc.plan(place / "dense", {**recipe(place), "distill": None}).distillation is None


@pytest.mark.parametrize("factor_bits", [16, 8])
def test_the_plan_counts_the_terms_that_follow(factor_bits: int, place: Path, tmp_path: Path) -> None:
    terms = {"match": ["*.mlp.*"], "rank": 3, "factor_bits": factor_bits}
    asked = recipe(place, adapt=terms, rates={"factors": 1e-3}, steps=2)
    planned, report = lc.plan(place / "dense", asked), lc.compress(place / "dense", asked, tmp_path / "out").report
    assert planned.bpw == pytest.approx(report.bpw) and planned.bytes == pytest.approx(report.bytes, rel=0.05)
    assert [(row.name, row.bpw, row.description) for row in planned.layers] == [
        (row.name, row.bpw, row.stored) for row in report.layers
    ]
    assert sum("rank 3" in row.description for row in planned.layers) == 6


def test_recipes_with_a_section_are_written_and_read_back(place: Path) -> None:
    asked = read_recipe(recipe(place))
    assert parse_recipe(dump(asked)) == asked


def test_many_processes_are_told_to_compress_first(place: Path, tmp_path: Path) -> None:
    job = prepare(resolve(str(place / "dense")), read_recipe(recipe(place)))

    def work(ranks: Ranks) -> None:
        with pytest.raises(RecipeError, match="compress without distill:, then start llmcompress distill in many"):
            compress_job(job, tmp_path / "out", ranks=ranks)

    in_lockstep(2, work)
    assert not list(tmp_path.iterdir())
