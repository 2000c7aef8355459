"""The whole way: a model folder and a recipe to a checkpoint that transformers loads, for every family."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.compression import run
from llmcompress.compression.job import prepare
from llmcompress.compression.plan import plan_of
from llmcompress.errors import DiskError, InputError, MemoryLimitError, NumericsError, RecipeError
from llmcompress.methods.layer import relative_error
from llmcompress.models.dense.model import resolve
from llmcompress.recipe.read import read_recipe
from llmcompress.runtime.ranks import Ranks
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.modules import compressed_linears
from tests.tiers import tiered
from tests.tiny import FAMILY_CONFIGS, save_tiny, tiny_tokenizer

ROTATED = [{"method": "rotate"}, {"method": "gptq", "bits": 3}, {"method": "eora", "rank": 2}]
TEXT = "The quick brown fox jumps over the lazy dog, and 42 grey geese fly past the old mill by the river. "


def recipe(text: Path, steps: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(text), "samples": 8, "length": 32, "held_out": 2}
    rules = [{"match": "*", "steps": ROTATED if steps is None else steps}]
    return {"version": 1, "name": "test", "calibration": calibration, "rules": rules, **more}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "dense")


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model(torch.arange(20)[None] % 200).logits


@pytest.mark.parametrize("family", tiered(FAMILY_CONFIGS, "gpt2".__eq__))
def test_every_family_compresses_saves_and_loads(family: str, tmp_path: Path, text: Path) -> None:
    source = save_tiny(family, tmp_path / "dense")
    result = lc.compress(source, recipe(text), tmp_path / "out")
    report = result.report
    assert {row.name for row in report.layers} == set(compressed_linears(result.model))
    assert all(0 < row.error < 0.2 for row in report.layers)
    assert all(row.error_heldout is not None and row.fallback is None for row in report.layers)
    # in the dense model's place, the decoded matrices must give the same logits
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, layer in compressed_linears(result.model).items():
        weight = model.get_submodule(name).weight
        matrix = dense(layer.expression())
        weight.data = matrix.T if type(model.get_submodule(name)).__name__ == "Conv1D" else matrix
    with torch.no_grad():
        expected = model(torch.arange(20)[None] % 200).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def test_reported_bits_are_the_bits_on_disk(folder: Path, tmp_path: Path, text: Path) -> None:
    result = lc.compress(folder, recipe(text), tmp_path / "out")
    report = result.report
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert report.bytes == sum(path.stat().st_size for path in files)
    assert report.model_bpw == pytest.approx(report.bytes * 8 / report.parameters)
    stored = sum(bits(layer.expression()) for layer in compressed_linears(result.model).values())
    assert report.bpw == pytest.approx(stored / sum(prod(row.shape) for row in report.layers))


def test_exact_errors_are_those_of_all_rows(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.compression.layers.MANY", 32)
    monkeypatch.setattr("llmcompress.methods.layer.SAMPLED", 8)
    before = AutoModelForCausalLM.from_pretrained(folder)
    asked = {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 3}]}]}
    for exact in (True, False):
        result = lc.compress(folder, asked | {"exact_errors": exact}, tmp_path / str(exact))
        stored = compressed_linears(result.model)
        for row in result.report.layers:
            weight, approx = before.get_submodule(row.name).weight.detach(), dense(stored[row.name].expression())
            is_whole = row.error == pytest.approx(relative_error(weight, approx), rel=1e-6)
            assert is_whole == (exact or len(weight) < 32), row.name


def test_plan_announces_what_the_run_does(folder: Path, tmp_path: Path, text: Path) -> None:
    planned = lc.plan(folder, recipe(text))
    report = lc.compress(folder, recipe(text), tmp_path / "out").report
    assert [(row.name, row.shape, row.steps) for row in planned.layers] == [
        (row.name, row.shape, row.steps) for row in report.layers
    ]
    assert planned.bpw == pytest.approx(report.bpw)
    assert planned.bytes <= report.bytes  # headers of the files come on top
    assert planned.peak_memory_bytes > 0 and planned.seconds > 0


def test_a_report_tells_where_the_seconds_went(folder: Path, tmp_path: Path, text: Path) -> None:
    steps = [{"method": "trellis", "memory": 8}, {"method": "refine"}]
    report = lc.compress(folder, recipe(text, steps), tmp_path / "out").report
    hosts = {name: seconds["host"] for name, seconds in report.phases.items()}
    named = {"text", "load", "forward", "moments", "factor", "search", "refine", "methods", "report", "pack", "write"}
    assert hosts.keys() - {"gates"} == named
    assert 0.6 * report.seconds <= sum(hosts.values()) <= report.seconds
    assert lc.read(tmp_path / "out").phases == report.phases


def test_the_same_run_gives_the_same_files(folder: Path, tmp_path: Path, text: Path) -> None:
    for name in ("a", "b"):
        lc.compress(folder, recipe(text), tmp_path / name)
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.slow
def test_a_result_without_output_can_be_saved(folder: Path, tmp_path: Path, text: Path) -> None:
    result = lc.compress(folder, recipe(text))
    result.save(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(result.folder))
    assert lc.read(tmp_path / "saved") == result.report
    with pytest.raises(DiskError, match="exists already"):
        result.save(tmp_path / "saved")


def test_tokenizer_and_recipe_travel_with_the_result(
    folder: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe names its text without a folder, and runs where that text lies."""
    monkeypatch.chdir(text.parent)
    out = lc.compress(folder, recipe(text), tmp_path / "out").folder
    names = {path.name for path in out.iterdir()}
    assert {path.name for path in folder.iterdir()} - names <= {"model.safetensors"}
    assert {"recipe.yaml", "report.json", "manifest.json"} <= names
    again = lc.compress(folder, out / "recipe.yaml", tmp_path / "again")
    assert torch.equal(logits(out), logits(again.folder))


@pytest.mark.slow
def test_decoded_model_generates_the_same_tokens(folder: Path, tmp_path: Path, text: Path) -> None:
    model = lc.compress(folder, recipe(text), tmp_path / "out").model
    prompt = tiny_tokenizer()("geese", return_tensors="pt")
    plain = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    with lc.decoded(model):
        assert torch.equal(plain, model.generate(**prompt, max_new_tokens=8, do_sample=False))


def test_data_free_methods_need_no_calibration(folder: Path, tmp_path: Path) -> None:
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]
    report = lc.compress(folder, {"version": 1, "rules": rules}, tmp_path / "out").report
    assert report.calibration is None and all(row.error > 0 for row in report.layers)
    with pytest.raises(RecipeError, match="gptq requires calibration"):
        lc.compress(folder, {"version": 1, "rules": [{"match": "*", "steps": [{"method": "gptq"}]}]})


@pytest.mark.slow
def test_aiming_at_dense_outputs_lowers_the_output_error(folder: Path, tmp_path: Path, text: Path) -> None:
    """Two bits on a random model: what reaches the head must be nearer to the dense model's with the correction."""
    steps = [{"method": "gptq", "bits": 2}]
    ids = torch.tensor(tiny_tokenizer()(f"7. {TEXT}")["input_ids"][:60])[None]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    distance = {}
    for share in (0.0, 0.5):
        out = lc.compress(folder, recipe(text, steps, asymmetric=share), tmp_path / f"out{share}").folder
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            distance[share] = (model(ids).logits - reference(ids).logits).square().mean().item()
    assert distance[0.5] < distance[0.0]


def test_layers_that_no_rule_compresses_are_reported(folder: Path, tmp_path: Path, text: Path) -> None:
    rules = [{"match": "*.mlp.*", "steps": [{"method": "rtn", "bits": 4}]}]
    planned = lc.plan(folder, recipe(text, rules=rules))
    assert len(planned.layers) == 6
    assert "model.layers.0.self_attn.q_proj stays dense" in planned.warnings
    assert lc.compress(folder, recipe(text, rules=rules), tmp_path / "out").report.warnings == planned.warnings


def test_a_search_on_another_device_than_asked_for_is_reported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [{"match": "*", "steps": [{"method": "trellis", "memory": 8}]}]
    found = []
    for there in (True, False):
        monkeypatch.setattr(run, "can_search", lambda device, there=there: there)
        report = lc.compress(folder, {"version": 1, "rules": rules}, tmp_path / str(there)).report
        found.append(sum("searched on the CPU" in warning for warning in report.warnings))
    assert found == [0, 1]


def test_an_idle_pattern_warns_in_the_plan_and_stops_the_run(folder: Path, tmp_path: Path, text: Path) -> None:
    rules = [{"match": "*.attn.v", "steps": ROTATED}, {"match": "*", "steps": ROTATED}]
    assert any("*.attn.v" in warning for warning in lc.plan(folder, recipe(text, rules=rules)).warnings)
    with pytest.raises(RecipeError, match="nearest name"):
        lc.compress(folder, recipe(text, rules=rules), tmp_path / "out")


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([{"method": "eora", "rank": 33}], "rank 33 is larger than the matrix"),
        ([{"method": "wanda", "pattern": "2:5"}], "does not divide the width 32"),
        ([{"method": "rtn"}, {"method": "magnitude", "sparsity": 0.5}], "would undo"),
    ],
)
def test_impossible_steps_are_refused_before_any_work(
    steps: list[dict[str, Any]], sentence: str, folder: Path, tmp_path: Path, text: Path
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        lc.compress(folder, recipe(text, steps), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_ragged_last_group_is_stored(folder: Path, tmp_path: Path, text: Path) -> None:
    report = lc.compress(folder, recipe(text, [{"method": "rtn", "bits": 2, "group_size": 20}]), tmp_path / "o").report
    by_width = {row.shape[1]: row.bpw for row in report.layers}
    assert by_width[32] == 2 + 16 * 2 / 32 and by_width[48] == 2 + 16 * 3 / 48


def test_bad_outputs_are_refused_and_nothing_is_left(folder: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(DiskError, match="exists already"):
        lc.compress(folder, recipe(text), tmp_path / "full")
    with pytest.raises(DiskError, match="exists already"):
        lc.compress(folder, recipe(text), text)
    with pytest.raises(DiskError, match="not a folder that can be written to"):
        lc.compress(folder, recipe(text), text / "out")


def test_a_folder_without_the_right_to_write_is_refused(
    folder: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(DiskError, match="not a folder that can be written to"):
        lc.compress(folder, recipe(text), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_machine_with_too_little_memory_is_refused_before_any_work(
    folder: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompress.compression.plan.total_memory", lambda: 100_000_000)
    with pytest.raises(MemoryLimitError, match=r"about \d+\.\d MB.*this machine has 100\.0 MB"):
        lc.compress(folder, recipe(text), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_host_that_cannot_hold_the_writer_of_text_is_refused(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the device is."""
    monkeypatch.setattr("llmcompress.models.dense.load.total_memory", lambda: 1000)
    own = {"dataset": "self", "samples": 4, "length": 16, "held_out": 1}
    job = prepare(resolve(folder), read_recipe(recipe(text, calibration=own)))
    with pytest.raises(MemoryLimitError, match="writing calibration text holds .*; give another text than dataset: se"):
        _ = job.tokens


def test_processes_of_one_machine_need_what_each_of_them_holds(
    folder: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Four(Ranks):
        @contextmanager
        def agree_on_errors(self) -> Iterator[None]:
            yield

    monkeypatch.setattr("llmcompress.compression.plan.total_memory", lambda: 100_000_000)
    job = prepare(resolve(folder), read_recipe(recipe(text)))
    needed = 4 * plan_of(job, processes=4).peak_memory_bytes
    assert needed < 4 * plan_of(job).peak_memory_bytes
    with pytest.raises(MemoryLimitError, match=f"in 4 processes takes about {needed / 1e6:.1f} MB"):
        run.compress(job, tmp_path / "out", ranks=Four(count=4, here=4))


def test_a_disk_that_is_too_small_is_refused(
    folder: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="0.0 MB free"):
        lc.compress(folder, recipe(text), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_disk_has_room_to_merge_what_stays_dense(
    folder: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    planned = lc.plan(folder, recipe(text))
    usage = shutil.disk_usage(tmp_path)._replace(free=planned.bytes * 21 // 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="out needs"):
        lc.compress(folder, recipe(text), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_failing_run_leaves_nothing(folder: Path, tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"layers\.0\.mlp\.up_proj"):
        lc.compress(folder, recipe(text), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_compressed_model_cannot_be_compressed_again(folder: Path, tmp_path: Path, text: Path) -> None:
    lc.compress(folder, recipe(text), tmp_path / "out")
    with pytest.raises(InputError, match="already compressed"):
        lc.compress(tmp_path / "out", recipe(text), tmp_path / "again")


def test_another_run_holds_the_lock(folder: Path, tmp_path: Path, text: Path) -> None:
    from filelock import FileLock

    from llmcompress.errors import LockedError

    with FileLock(tmp_path / "out.partial.lock"), pytest.raises(LockedError, match="another process"):
        lc.compress(folder, recipe(text), tmp_path / "out")


def test_a_newer_format_is_refused_with_a_sentence(folder: Path, tmp_path: Path, text: Path) -> None:
    out = lc.compress(folder, recipe(text), tmp_path / "out").folder
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="format version 99"):
        AutoModelForCausalLM.from_pretrained(out)


def test_layers_that_share_an_input_share_the_rotation(folder: Path, tmp_path: Path, text: Path) -> None:
    layers = compressed_linears(lc.compress(folder, recipe(text), tmp_path / "out").model)
    signs = {name.split(".", 2)[2]: layer.expression().signs for name, layer in layers.items()}  # type: ignore[union-attr]
    assert torch.equal(signs["0.self_attn.q_proj"], signs["0.self_attn.v_proj"])
    assert not torch.equal(signs["0.self_attn.q_proj"], signs["1.self_attn.q_proj"])
