"""Interrupted runs: what stays, and that the same command ends with the files of a whole run, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.calibration.walk import Block
from llmcompress.cli.app import app
from llmcompress.cli.terminal import verdict
from llmcompress.compression import block
from llmcompress.compression.block import BlockResult
from llmcompress.compression.run_files import FINISHED
from llmcompress.errors import DiskError, NumericsError
from llmcompress.evaluation.verify import verify
from llmcompress.models.files.store import Store
from llmcompress.reporting.report import LayerReport, Report
from tests.compression.test_run import TEXT
from tests.tiers import tiered, tiered_nightly
from tests.tiny import save_tiny

DEPTH = 4
TRELLIS = [{"method": "rotate"}, {"method": "trellis", "bits": 2, "memory": 8}]
GPTQ = [{"method": "gptq", "bits": 3, "group_size": 8}]
RTN: list[dict[str, Any]] = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 8}]}]
RTN3: list[dict[str, Any]] = [{"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 8}]}]
TABLES: dict[str, Any] = {"embeddings": [{"method": "rtn", "bits": 8, "group_size": 8}], "head": GPTQ}
SCALES: dict[str, Any] = {"rates": {"scales": 1e-2, "norms": 1e-2}, "steps": 4, "evaluate_every": 2}
ROUNDING: dict[str, Any] = {"rates": {"codes": 5e-3}, "latents": "weights", "optimizer": "sign", "steps": 8}
# name -> what the recipe says besides its rule
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"compute": "bfloat16", "asymmetric": 0.5},
    "dense stream": {"asymmetric": 0.5},
    "dense prefix": {"prefix": "dense"},
    "attention": {"token_weights": {"by": "attention"}},
    "rows": {"token_weights": {"by": "norm", "rows": True}, "rules": [{"match": "*", "steps": TRELLIS}]},
    "gradient": {"token_weights": {"by": "gradient", "rows": True}, "rules": [{"match": "*", "steps": TRELLIS}]},
    "tables": TABLES,
    "awq": {"fuse": {"awq": True}},
    "fused rotation": {"fuse": {"rotation": True}},
    "learning": {"reconstruct": SCALES},
    "learning between layers": {"reconstruct": SCALES | {"rates": {"weights": 1e-3, "scales": 1e-2}}},
    "windows": {"reconstruct": SCALES | {"window": 2}, "asymmetric": 0.5, **TABLES},
    "awq in windows": {
        "rules": RTN3,
        "fuse": {"awq": True},
        "reconstruct": ROUNDING | {"window": 2, "evaluate_every": 1},
    },
    "low rank": {"rules": [{"match": "*", "steps": [*TRELLIS, {"method": "eora", "rank": 2}]}]},
    "some layers": {"rules": [{"match": "model.layers.1.*", "steps": []}, {"match": "*", "steps": GPTQ}]},
    "some layers in windows": {
        "rules": [{"match": "model.layers.1.*", "steps": []}, {"match": "*", "steps": GPTQ}],
        "reconstruct": SCALES | {"window": 2},
    },
    "without data": {"calibration": None, "rules": RTN, "embeddings": RTN[0]["steps"], "head": RTN[0]["steps"]},
}
SLOW = ("gradient", "fused rotation", "learning between layers", "awq in windows", "some layers in windows")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of four blocks, and a text."""
    folder = tmp_path_factory.mktemp("journal")
    save_tiny("llama", folder / "dense", num_hidden_layers=DEPTH, tie_word_embeddings=False)
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    return folder


def recipe(place: Path, **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(place / "text.txt"), "samples": 8, "length": 32, "held_out": 2}
    rules = [{"match": "*", "steps": GPTQ}]
    return {"version": 1, "name": "test", "calibration": calibration, "rules": rules} | more


def cut(place: Path, asked: dict[str, Any], output: Path, after: int) -> KeyboardInterrupt:
    """Stops a run when `after` blocks are finished."""

    def stop(done: int, blocks: int, rate: float) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        lc.compress(place / "dense", asked, output, progress=stop)
    assert not output.exists()
    return raised.value


def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are compressed from now on."""
    found: list[int] = []
    original = block.compress_block

    def counted(run: block.CompressionState, block: Any) -> Any:
        found.append(block.index)
        return original(run, block)

    monkeypatch.setattr("llmcompress.compression.run.compress_block", counted)
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Read the files of a checkpoint, except those that tell the time."""
    timed = ("report.json", "manifest.json", "allocation.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in timed}


def told(report: Report) -> dict[str, Any]:
    """A report without what depends on the day."""
    cuts = ("seconds", "phases", "peak_memory_bytes", "warnings")
    return {name: value for name, value in report.to_json().items() if name not in cuts}


@pytest.mark.parametrize("name", tiered(SETTINGS, "tables".__eq__, slow=SLOW.__contains__))
def test_a_run_that_was_cut_ends_with_the_same_files(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted twice: behind the first block, and then behind one more."""
    asked = recipe(place, **SETTINGS[name])
    blocks = DEPTH + (2 if "head" in asked else 0)
    whole = lc.compress(place / "dense", asked, tmp_path / "whole")
    cut(place, asked, tmp_path / "out", 1)
    cut(place, asked, tmp_path / "out", 2)
    compressed = begun(monkeypatch)
    again = lc.compress(place / "dense", asked, tmp_path / "out")
    assert compressed == list(range(2, blocks)), "finished blocks are not compressed again"
    assert files(again.folder) == files(whole.folder)
    assert told(again.report) == told(whole.report)
    assert f"2 of {blocks} blocks and tables are from an earlier run, which was interrupted" in again.report.warnings
    assert again.report.seconds > 0 and not list(tmp_path.glob("out.*"))
    verify(again.folder, text=place / "text.txt", length=16)


def test_the_default_dtype_changes_nothing(place: Path, tmp_path: Path) -> None:
    """Nor do gradients that are off, or inference mode: of a run with draws, statistics and a backward pass."""
    asked = recipe(place, **SETTINGS["gradient"])
    wanted = lc.compress(place / "dense", asked, tmp_path / "wanted").folder
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            found = lc.compress(place / "dense", asked, tmp_path / "found").folder
    finally:
        torch.set_default_dtype(torch.float32)
    assert files(found) == files(wanted)


def test_cost_is_that_of_all_processes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak, asked = "llmcompress.compression.run.peak_memory", recipe(place)
    monkeypatch.setattr(peak, lambda: 10**10)
    cut(place, asked, tmp_path / "out", DEPTH - 1)
    first = json.loads((tmp_path / "out.partial" / FINISHED / "block-00002.json").read_text())["phases"]
    monkeypatch.setattr(peak, lambda: 10**9)
    report = lc.compress(place / "dense", asked, tmp_path / "out").report
    assert report.peak_memory_bytes == 10**10
    assert all(first[name]["host"] < report.phases[name]["host"] for name in ("forward", "search"))


@pytest.mark.parametrize("family", tiered_nightly(["gpt2", "qwen2", "gemma2"], "gpt2".__eq__))
def test_other_families_go_on_too(family: str, place: Path, tmp_path: Path) -> None:
    """Weights that lie transposed, biases, and more norms."""
    save_tiny(family, tmp_path / "dense")
    asked = recipe(place, asymmetric=0.25, rules=[{"match": "*", "steps": TRELLIS}])

    def stop(done: int, blocks: int, rate: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lc.compress(tmp_path / "dense", asked, tmp_path / "out", progress=stop)
    again, whole = (lc.compress(tmp_path / "dense", asked, tmp_path / name).folder for name in ("out", "whole"))
    assert files(again) == files(whole)


@pytest.mark.parametrize("table", tiered_nightly([0, 1], lambda table: table == 0))
def test_tables_are_kept_as_well(table: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while the token table or the head is compressed, which come after all blocks."""
    asked = recipe(place, **TABLES)
    original = block.compress_block

    def failing(run: block.CompressionState, block: Block) -> BlockResult:
        if block.index == DEPTH + table:
            raise MemoryError
        return original(run, block)

    with monkeypatch.context() as context:
        context.setattr("llmcompress.compression.run.compress_block", failing)
        with pytest.raises(MemoryError) as raised:
            lc.compress(place / "dense", asked, tmp_path / "out")
    assert verdict(raised.value) == (
        7,
        "there is not enough memory; take a smaller model or fewer samples; "
        f"{DEPTH + table} finished blocks are kept in {tmp_path / 'out.partial'}, from where the same command resumes",
    )
    compressed = begun(monkeypatch)
    again, whole = (lc.compress(place / "dense", asked, tmp_path / name).folder for name in ("out", "whole"))
    assert files(again) == files(whole)
    assert compressed[: 2 - table] == [DEPTH, DEPTH + 1][table:]


@pytest.mark.slow
def test_a_process_that_was_killed_is_gone_on_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal handler, no `finally`: what is on the disk is all there is."""
    asked = recipe(place)
    script = (
        "import json, sys, time, llmcompress as lc\n"
        "asked, model, output = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]\n"
        "lc.compress(model, asked, output, progress=lambda done, blocks, rate: done == 2 and time.sleep(600))\n"
    )
    words = [sys.executable, "-c", script, json.dumps(asked), str(place / "dense"), str(tmp_path / "out")]
    process = subprocess.Popen(words)
    second = tmp_path / "out.partial" / FINISHED / "block-00001.json"
    try:
        while not second.is_file():
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    compressed = begun(monkeypatch)
    again, whole = (lc.compress(place / "dense", asked, tmp_path / name).folder for name in ("out", "whole"))
    assert compressed == [2, 3, 0, 1, 2, 3] and files(again) == files(whole)


@pytest.mark.parametrize("name", tiered_nightly(["plain", "windows"], "plain".__eq__))
@pytest.mark.parametrize("torn", tiered_nightly([False, True], bool))
def test_power_that_fails_before_a_report_is_written(
    name: str, torn: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without a report are written again; of half a report nothing is believed."""
    asked = recipe(place, **SETTINGS[name])
    original = Store.put

    def failing(store: Store, name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        if name == "block-00002":
            if torn:
                (store.folder / ".block-00002.json.partial").write_text(json.dumps(entry)[:100])
            raise KeyboardInterrupt
        original(store, name, entry, tensors)

    with monkeypatch.context() as context:
        context.setattr(Store, "put", failing)
        with pytest.raises(KeyboardInterrupt):
            lc.compress(place / "dense", asked, tmp_path / "out")
    compressed = begun(monkeypatch)
    again = lc.compress(place / "dense", asked, tmp_path / "out").folder
    assert compressed[:2] == [2, 3]
    assert files(again) == files(lc.compress(place / "dense", asked, tmp_path / "whole").folder)


@pytest.mark.slow
def test_what_the_kept_blocks_are_of_is_compared(place: Path, tmp_path: Path) -> None:
    """Another recipe, text or model is refused by name, and nothing is lost; asked to, the run starts over."""
    shutil.copytree(place / "dense", tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text((place / "text.txt").read_text())
    asked = recipe(place, calibration={"dataset": str(text), "samples": 8, "length": 32, "held_out": 2})

    def attempt(said: str, **more: Any) -> None:
        with pytest.raises(
            DiskError, match=f"out.partial was left by a different run .{said} changed.; remove it, ask to start over"
        ):
            lc.compress(tmp_path / "dense", asked | more, tmp_path / "out")
        assert files(tmp_path / "out.partial" / FINISHED) == kept

    def stop(done: int, blocks: int, rate: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lc.compress(tmp_path / "dense", asked, tmp_path / "out", progress=stop)
    kept = files(tmp_path / "out.partial" / FINISHED)
    attempt("recipe", seed=1)
    before = text.read_text()
    text.write_text(before.replace("quick", "slow"))
    attempt("calibration tokens")
    text.write_text(before)
    for name, what in (
        ("model.safetensors", "weights"),
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer"),
    ):
        path = tmp_path / "dense" / name
        content, times = path.read_bytes(), path.stat()
        path.write_bytes(_changed(content, name))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as an older copy of the same size has
        attempt(f"the model's {what}")
        path.write_bytes(content)
    fresh = lc.compress(tmp_path / "dense", asked, tmp_path / "out", resume=False)
    assert not [warning for warning in fresh.report.warnings if "earlier run" in warning]


def _changed(content: bytes, name: str) -> bytes:
    """Return a file of the same length that says something else."""
    if name == "config.json":
        return content.replace(b"1e-06", b"1e-05")
    return content[:-6] + bytes([content[-6] ^ 1]) + content[-5:] if name == "model.safetensors" else content + b" "


def test_a_temporary_result_keeps_nothing(place: Path) -> None:
    def stop(done: int, blocks: int, rate: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        lc.compress(place / "dense", recipe(place), progress=stop)
    assert verdict(raised.value) == (130, "stopped from the keyboard")


@pytest.mark.parametrize("damage", ["part", "journal"])
def test_damage_is_a_sentence(damage: str, place: Path, tmp_path: Path) -> None:
    cut(place, recipe(place), tmp_path / "out", 2)
    path = (
        tmp_path
        / "out.partial"
        / ("checkpoint/part-00001.safetensors" if damage == "part" else f"{FINISHED}/block-00001.json")
    )
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content if damage == "part" else b"[1]\n" + content)
    said = (
        r"part-00001.safetensors is not as it was written; remove" if damage == "part" else "cannot be read .* remove"
    )
    with pytest.raises(DiskError, match=said):
        lc.compress(place / "dense", recipe(place), tmp_path / "out")


@pytest.mark.slow
def test_gates_may_be_set_anew(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends at the block whose fallbacks are too many: with another gate it goes on behind it."""
    asked = recipe(place)

    def fallen(self: block.CompressionState) -> list[LayerReport]:
        return [replace(row, fallback="damped") for entry in self.entries for row in entry.rows]

    with monkeypatch.context() as context:
        context.setattr(block.CompressionState, "rows", property(fallen))
        with pytest.raises(NumericsError, match=r"7 of \d+ layers needed a fallback.*allows a share of 0.02") as raised:
            lc.compress(place / "dense", asked, tmp_path / "out")
    assert verdict(raised.value)[1].endswith("from where the same command resumes")  # type: ignore[index]
    compressed = begun(monkeypatch)
    lc.compress(place / "dense", asked | {"gates": {"max_fallback_layers": 0.5}}, tmp_path / "out")
    assert compressed[:2] == [1, 2] and 0 not in compressed


@pytest.mark.slow
def test_prices_are_kept_until_the_model_is_there(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [[{"method": "gptq", "bits": bits, "group_size": 8}] for bits in (2, 4)]
    asked = recipe(place, rules=[], options=options, target={"bpw": 5.0})
    said = cut(place, asked, tmp_path / "out", 2)
    prices = tmp_path / "out.prices.json"
    assert prices.is_file() and f"the prices of the options are kept in {prices}" in said.__notes__

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("priced again")

    with monkeypatch.context() as context:
        context.setattr("llmcompress.allocation.price_file.measure_prices", never)
        again = lc.compress(place / "dense", asked, tmp_path / "out")
        with pytest.raises(AssertionError, match="priced again"):
            lc.compress(place / "dense", asked, tmp_path / "other")
    whole = lc.compress(place / "dense", asked, tmp_path / "whole")
    assert files(again.folder) == files(whole.folder)
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.slow
def test_the_command_says_what_it_keeps(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And resumes, or starts over."""
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(place)))
    words = ["compress", str(place / "dense"), str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]
    original = block.compress_block

    def terminated(run: block.CompressionState, block: Block) -> BlockResult:
        if block.index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, block)

    with monkeypatch.context() as context:
        context.setattr("llmcompress.compression.run.compress_block", terminated)
        ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 143
    kept = f"one finished block is kept in {tmp_path / 'out.partial'}, from where the same command resumes"
    assert ended.stderr.splitlines()[-1] == f"[143] stopped by a signal; {kept}"
    ended = CliRunner().invoke(app, [*words, "--set", "seed=3"])
    assert ended.exit_code == 4 and "a different run (recipe changed)" in ended.stderr and "--no-resume" in ended.stderr
    compressed = begun(monkeypatch)
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0 and compressed == [1, 2, 3]
    assert f"warning: 1 of {DEPTH} blocks and tables are from an earlier run, which was interrupted" in ended.stderr
    shutil.rmtree(tmp_path / "out")
    cut(place, recipe(place), tmp_path / "out", 2)
    assert CliRunner().invoke(app, [*words, "--no-resume"]).exit_code == 0 and compressed[-DEPTH:] == [0, 1, 2, 3]
