"""The command line: what reaches the functions behind it, what is printed where, and how every command ends."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import llmcompress.evaluation.score
import llmcompress.pipeline.compress
from llmcompress import errors
from llmcompress.cli.app import PANELS, app
from llmcompress.cli.compress import report_view
from llmcompress.cli.terminal import Terminal, verdict
from llmcompress.compression.plan import LayerPlan, Plan, TimeEstimate
from llmcompress.data.generate import AnswerSampling
from llmcompress.data.self_data import Answering
from llmcompress.evaluation.protocol import Protocol
from llmcompress.models.files.file_names import RECIPE
from llmcompress.models.files.file_names import REPORT as REPORT_FILE
from llmcompress.models.files.output import lock_work
from llmcompress.recipe.read import dump, parse_recipe
from llmcompress.reporting.formatting import duration
from llmcompress.reporting.report import LayerReport, Report
from llmcompress.reporting.tables import comparison_markdown, comparison_table, group_rows, merge_sentences, size_rows
from tests.tiny import save_tiny

TEXT = """\
version: 1
name: three
calibration: {samples: 4, length: 32}
rules:
  - match: '*.mlp.*'
    steps: [{method: rtn, bits: 3}, {method: svd, rank: 2}]
"""
COMPRESS_KEYS = {"bytes", "bpw", "model_bpw", "seconds", "peak_memory_bytes", "calibration", "layers"}
LAYER_KEYS = {"name", "shape", "steps", "bpw", "error", "error_heldout", "fallback"}
EVAL_KEYS = {"perplexity", "tokens", "tasks", "kl", "top1_agreement", "bytes", "bpw", "model_bpw", "protocol"}
EVAL_KEYS |= {"domains", "calibration_error", "perplexity_stderr", "kl_stderr", "top1_agreement_stderr"}
LAYERS = [f"model.layers.{block}.mlp.{name}" for block in range(3) for name in ("up_proj", "down_proj")]
REPORT = Report(
    model="tiny",
    revision=None,
    recipe="three",
    dense_bytes=2_000_000_000,
    bytes=400_000,
    bpw=3.25,
    model_bpw=4.5,
    parameters=1_000_000,
    seconds=75.0,
    peak_memory_bytes=500_000_000,
    calibration={"source": "stdlib", "tokens": 128, "hash": "0123456789abcdef"},
    layers=tuple(
        LayerReport(name, (48, 32), ("rtn", "svd"), 3.25, 0.01 * index, 0.02 * index, None, "3-bit row")
        for index, name in enumerate(LAYERS)
    ),
    warnings=("lm_head stays dense",),
)
PLAN = Plan(
    model="tiny",
    recipe="three",
    layers=tuple(LayerPlan(name, (48, 32), ("rtn", "svd"), 4992, 3.25, "3-bit row [x]") for name in LAYERS),
    bytes=400_000,
    dense_bytes=900_000,
    bpw=3.25,
    model_bpw=4.5,
    peak_memory_bytes=500_000_000,
    timed=lambda: TimeEstimate(3.0, 250e9),
    warnings=("pattern '*.foo' matches no linear layer", *(f"model.layers.{i}.q stays dense" for i in range(3))),
)
KIND = {"perplexity": 30.5, "perplexity_stderr": 1.5, "calibration_error": 0.06, "tokens": 64}
KIND |= {"top1_agreement": 0.8, "top1_agreement_stderr": 0.02}
SCORES = {
    "perplexity": 24.0061,
    "perplexity_stderr": 0.5,
    "tokens": 32736,
    "calibration_error": 0.05,
    "tasks": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.05, "samples": 100}},
    "domains": {"law": KIND | {"kl": 0.3, "kl_stderr": 0.01}, "code": KIND | {"kl": 0.45, "kl_stderr": 0.02}},
    "kl": 0.1,
    "kl_stderr": None,
    "top1_agreement": 0.9,
    "top1_agreement_stderr": 0.01,
    "bytes": 400_000,
    "bpw": None,
    "model_bpw": 4.5,
    "protocol": Protocol().to_json(),
}
SAME = {"value": 0.01, "stderr": 0.01, "items": 32, "beyond_noise": False}
COMPARED = {
    "protocol": Protocol().to_json(),
    "versions": {"python": "3.11.0"},
    "models": [
        SCORES | {"model": "dense", "differences": None},
        SCORES
        | {
            "model": "small",
            "differences": {"nll": SAME | {"beyond_noise": True}, "tasks": {"arc_easy": {"acc": SAME}}},
        },
        SCORES | {"model": "odd", "differences": {"nll": SAME | {"beyond_noise": None}, "tasks": {}}},
    ],
}

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def run(*words: object) -> Any:
    """The command line with these words, in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe in a file."""
    path = tmp_path / "three.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record the calls that commands make of the functions behind them. Those only return."""
    made: Calls = []

    def returning(value: Any) -> Callable[..., Any]:
        def fake(*given: Any, **named: Any) -> Any:
            made.append((given, named))
            return value

        return fake

    result = SimpleNamespace(report=REPORT, distillation=None, allocation=None)
    monkeypatch.setattr(llmcompress.pipeline.compress, "compress", returning(result))
    monkeypatch.setattr(llmcompress.pipeline.compress, "plan", returning(PLAN))
    monkeypatch.setattr(llmcompress.evaluation.score, "score", returning(SCORES))
    monkeypatch.setattr(llmcompress.evaluation.score, "compare", returning(COMPARED))
    return made


def failing(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Makes `plan` do this."""
    monkeypatch.setattr(llmcompress.pipeline.compress, "plan", lambda *given, **named: act())


def raising(error: BaseException) -> Callable[[], Any]:
    """Something that raises `error`."""

    def act() -> None:
        raise error

    return act


# --- what reaches the functions -----------------------------------------------------------------------------------


def test_compress_passes_its_options_on(recipe: Path, tmp_path: Path, calls: Calls) -> None:
    words = ["--set", "rules[0].steps[1].rank=16", "--set", "cap=null", "--seed", 7, "--revision", "main"]
    done = run("compress", "org/name", recipe, "-o", tmp_path / "out", *words, "--device", "cuda")
    assert done.exit_code == 0, done.output
    [((model, asked, output), named)] = calls
    assert (model, output) == ("org/name", tmp_path / "out")
    assert (asked.seed, asked.cap, asked.rules[0].steps[1].rank) == (7, None, 16)
    assert (named["revision"], named["device"]) == ("main", "cuda")


def test_eval_passes_its_options_on(calls: Calls) -> None:
    words = [
        "--text",
        "a.txt",
        "--windows",
        4,
        "--length",
        64,
        "--tasks",
        "a, b",
        "--limit",
        20,
        "--against",
        "smollm2",
    ]
    words += ["--batch_size", 2, "--num_fewshot", 3, "--chat-template", "--seed", 5]
    assert run("eval", "small", *words, "-o", "out").exit_code == 0
    [((model, protocol), named)] = calls
    assert model == "small"
    assert protocol == Protocol(Path("a.txt"), 4, 64, ("a", "b"), 20, 3, 2, True, 5)
    assert isinstance(protocol.limit, int)
    assert (named["against"], named["output"], named["save"]) == ("smollm2", Path("out"), False)
    without = [word for word in words if word not in ("--against", "smollm2")]
    assert run("compare", "a", "b", "c", *without, "-o", "table.md").exit_code == 0
    (given, named) = calls[1]
    assert given == (["a", "b", "c"], protocol)
    assert named["output"] == Path("table.md")


SAMPLING = AnswerSampling(temperature=0.5, top_p=0.25)
DOMAINS = Protocol(domains=Path("kinds"))


@pytest.mark.parametrize(
    ("words", "function", "wanted"),
    [
        (
            "answer m p.jsonl -o a.jsonl --split s --column c --subset u --temperature 0.5 --top-p 0.25",
            "llmcompress.data.self_data.answer",
            {"settings": Answering("p.jsonl", subset="u", split="s", column="c", sampling=SAMPLING)},
        ),
        ("eval m --domains kinds", "llmcompress.evaluation.score.score", {"protocol": DOMAINS}),
        ("compare a b --domains kinds", "llmcompress.evaluation.score.compare", {"protocol": DOMAINS}),
        (
            "experts condense m --count 2 --experts 3 -o out",
            "llmcompress.surgery.experts.condense.condense_experts",
            {"count": 2, "experts": 3},
        ),
        (
            "narrow m --neurons 0.5 --per-block -o out",
            "llmcompress.surgery.narrow.narrow",
            {"neurons": 0.5, "per_block": True},
        ),
        (
            "export m --to gguf --round-to Q8_0 -o out",
            "llmcompress.formats.export.export",
            {"to": "gguf", "allow_dense": False, "round_to": "Q8_0"},
        ),
    ],
)
def test_an_option_reaches_the_parameter_of_its_name(
    words: str, function: str, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters, given = inspect.signature(resolve_name(function)), dict[str, Any]()

    def record(*values: Any, **named: Any) -> None:
        given.update(parameters.bind(*values, **named).arguments)
        raise errors.InputError("recorded")

    monkeypatch.setattr(function, record)
    done = run(*words.split())
    assert "recorded" in done.stderr
    assert {name: given[name] for name in wanted} == wanted


def test_the_protocol_has_the_defaults(calls: Calls) -> None:
    run("eval", "small")
    run("compare", "a", "b")
    assert [given[1] for given, _ in calls] == [Protocol(), Protocol()]
    run("eval", "small", "--tasks", "a", "--limit", 0.25)
    assert calls[2][0][1] == Protocol(tasks=("a",), limit=0.25)


def test_snake_case_options_work_and_values_keep_their_underscores(recipe: Path, calls: Calls) -> None:
    done = run("compress", "my_model", recipe, "--output_dir", "my_out", "--set", "name=a_b")
    assert done.exit_code == 0, done.output
    (model, asked, output), _ = calls[0]
    assert (model, output, asked.name) == ("my_model", Path("my_out"), "a_b")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("drop m --blocks 3 --by damage -o out", "--by and --text choose"),
        ("drop m --blocks 3 --text mine.txt -o out", "--by and --text choose"),
        ("eval m --limit 5", "--limit is for tasks"),
        ("eval m --generate", "--generate is for tasks"),
        ("compare a b --num-fewshot 3", "--num-fewshot is for tasks"),
        ("compare a b --chat-template", "--chat-template is for tasks"),
        ("compress m --bpw 2 --price-part 1/4 --no-resume -o out", "leave --no-resume out"),
        ("compress m --bpw 2 --set target.kl=0.1 -o out", "--bpw and target.kl=0.1 of --set both"),
        ("experts prune m --keep 4 --seed 3 -o out", "--seed is for --by random"),
        ("experts replace m --count 2 --seed 3 -o out", "--seed is for --by random"),
        ("narrow m --neurons 0.5 --by subset --seed 3 -o out", "--seed is for --by random"),
        ("export m --to dense --allow-dense -o out", "leave --allow-dense out"),
        ("export m --to peft --allow-dense -o out", "leave --allow-dense out"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(words: str, option: str) -> None:
    done = run(*words.split())
    assert done.exit_code == errors.RecipeError.exit_code and option in done.stderr


# --- what is printed ------------------------------------------------------------------------------------------------


def test_json_of_compress_keeps_its_contract(recipe: Path, calls: Calls) -> None:
    done = run("compress", "tiny", recipe, "-o", "out", "--json")
    found = json.loads(done.stdout)
    assert found.keys() >= COMPRESS_KEYS
    assert found["calibration"].keys() >= {"source", "tokens", "hash"}
    assert all(row.keys() >= LAYER_KEYS for row in found["layers"])
    assert "lm_head stays dense" in done.stderr


def test_json_of_eval_keeps_its_contract(calls: Calls) -> None:
    assert json.loads(run("eval", "small", "--json").stdout).keys() >= EVAL_KEYS


def test_json_of_plan_has_every_layer_and_the_warnings(recipe: Path, calls: Calls) -> None:
    found = json.loads(run("plan", "tiny", recipe, "--json").stdout)
    assert [row["name"] for row in found["layers"]] == LAYERS
    assert len(found["warnings"]) == 4
    assert found.keys() >= {"bytes", "bpw", "model_bpw", "peak_memory_bytes", "seconds"}


def test_json_of_a_schema_is_the_schema() -> None:
    plain, asked = run("recipe", "schema"), run("recipe", "schema", "--json")
    assert asked.exit_code == 0 and json.loads(asked.stdout) == json.loads(plain.stdout)


def test_json_has_null_for_numbers_that_json_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmcompress.evaluation.score, "score", lambda *a, **k: SCORES | {"perplexity": float("inf")})
    assert json.loads(run("eval", "small", "--json").stdout)["perplexity"] is None


def test_inspect_shows_the_report_and_the_recipe(tmp_path: Path) -> None:
    (tmp_path / REPORT_FILE).write_text(json.dumps(REPORT.to_json()))
    (tmp_path / RECIPE).write_text(dump(parse_recipe(TEXT)))
    found = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert found["recipe"]["rules"][0]["steps"][0]["bits"] == 3
    assert len(found["layers"]) == len(LAYERS)
    shown = run("inspect", tmp_path)
    assert shown.exit_code == 0
    assert "model.layers.*.mlp.up_proj" in shown.stdout
    assert "{method: rtn, bits: 3" in shown.stdout


def test_layers_that_differ_by_block_share_a_line_unless_asked(recipe: Path, calls: Calls) -> None:
    short, long = run("plan", "tiny", recipe).stdout, run("plan", "tiny", recipe, "-v").stdout
    assert "model.layers.*.mlp.up_proj" in short
    assert "x3" in short
    assert "3-bit row [x]" in short  # brackets are no markup
    assert all(name in long for name in LAYERS)
    assert "0.9 MB -> 0.4 MB · 3.250 bpw · model_bpw 4.500" in short
    assert "500.0 MB of memory and 3 s, where products run at 250 GFLOP/s" in short


def test_layers_of_other_forms_have_lines_of_their_own(
    recipe: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many bits, as types of llama.cpp are."""
    first, *others = PLAN.layers
    changed = replace(PLAN, layers=(replace(first, description="IQ4_NL"), *others))
    monkeypatch.setattr(llmcompress.pipeline.compress, "plan", lambda *_, **__: changed)
    shown = run("plan", "tiny", recipe).stdout
    assert "IQ4_NL" in shown and "3-bit row [x]" in shown and "x2" in shown


def test_a_report_says_sizes_quality_and_what_to_type_next(recipe: Path, calls: Calls) -> None:
    shown = run("compress", "tiny", recipe, "-o", "out").stdout
    for part in ("2.00 GB -> 0.4 MB", "1 min 15 s", "stdlib · 128 tokens", "llmcompress eval out --against tiny"):
        assert part in shown


def test_what_to_type_next_can_be_pasted(recipe: Path, calls: Calls) -> None:
    for model, revision, dense in (
        ("org/name", ["--revision", "v2"], "org/name@v2"),
        ("org/name/file.gguf", ["--revision", "v2"], "org/name@v2/file.gguf"),
        ("org/name@v2", ["--revision", "v2"], "org/name@v2"),
        ("my model", [], "'my model'"),
    ):
        shown = run("compress", model, recipe, "-o", "my out", "--trust-remote-code", *revision).stdout
        assert f"next    llmcompress eval 'my out' --against {dense} --trust-remote-code\n" in shown


def test_scores_are_shown(calls: Calls) -> None:
    shown = run("eval", "small").stdout
    for part in (
        "perplexity 24.006 ± 0.500 over 32,736 tokens",
        "? bpw",
        "KL 0.1000 nats",
        "agreement 0.9000 ± 0.0100",
    ):
        assert part in shown
    kinds = [line.split()[0] for line in shown.splitlines() if "0.0600" in line]
    assert kinds == ["code", "law"], "the worst comes first"
    assert shown.splitlines()[-1].split() == ["arc_easy", "acc", "0.5000", "±", "0.0500", "100"]


def test_a_comparison_is_one_table_with_marks(calls: Calls) -> None:
    shown = run("compare", "dense", "small", "odd").stdout
    rows = {line.split()[0]: line for line in shown.splitlines()}
    assert "*" not in rows["dense"] and "?" not in rows["dense"].replace(" ? ", "")
    assert "24.006 ± 0.500*" in rows["small"] and rows["small"].endswith("0.5000 ± 0.0500")
    assert "24.006 ± 0.500?" in rows["odd"] and rows["odd"].endswith("0.5000 ± 0.0500?")
    assert "* differs from dense beyond noise" in shown and "? cannot be told from noise" in shown
    written = comparison_markdown(COMPARED)
    scores, changes = (
        [line for line in part.splitlines() if line[:1] == "|"] for part in written.split("\n- versions")
    )
    assert "0.4500 ± 0.0200 code" in rows["small"] and "worst KL of 2 kinds" in shown
    assert {line.count("|") for line in scores} == {11} and len(scores) == 5
    assert {line.count("|") for line in changes} == {6} and len(changes) == 5
    assert changes[-2] == "| small | arc_easy: acc | 0.0100 ± 0.0100 | 32 | no |"
    assert "log perplexity" in run("compare", "dense", "small", "-v").stdout and "log perplexity" not in shown
    assert "| 24.006 ± 0.500* |" in written and "- \\* differs from dense" in written and "windows 32" in written


def test_a_comparison_has_no_score_of_tasks_that_failed() -> None:
    failed = [*COMPARED["models"][:2], COMPARED["models"][2] | {"tasks": {}, "tasks_failed": "arc_easy failed"}]
    rows = comparison_table(COMPARED | {"models": failed}).rows
    assert [row[-1] for row in rows] == ["0.5000 ± 0.0500", "0.5000 ± 0.0500", "?"]


def test_the_dense_bits_of_linears_are_known_of_files_in_one_dtype() -> None:
    for dense_bytes, bits in ((2_000_000, ("16", "16")), (4_000_000, ("32", "32")), (1_100_000, ("", "8.8"))):
        assert tuple(dense for _, dense, _ in size_rows(replace(REPORT, dense_bytes=dense_bytes))[1:]) == bits


def test_of_several_processes_the_first_one_speaks(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    for words in (["eval", "small"], ["eval", "small", "--json"]):
        done = run(*words)
        assert (done.exit_code, done.output) == (0, "")
    done = run("inspect", "none", "--json")
    assert (done.exit_code, done.stdout) == (5, "") and "[5] none holds no report.json" in done.stderr


def test_quiet_prints_nothing(recipe: Path, calls: Calls) -> None:
    for words in (["plan", "tiny", recipe], ["compress", "tiny", recipe, "-o", "out"], ["eval", "small"]):
        done = run(*words, "-q")
        assert (done.exit_code, done.output) == (0, "")


def test_what_libraries_print_does_not_reach_the_json(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy() -> Plan:
        print("from Python")
        os.write(1, b"from C\n")
        return PLAN

    failing(monkeypatch, noisy)
    done = run("plan", "tiny", recipe, "--json")
    assert json.loads(done.stdout)["recipe"] == "three"
    assert "from Python" in done.stderr
    captured = capfd.readouterr()
    assert "from C" not in captured.out
    assert "from C" in captured.err


def test_a_form_is_not_said_of_layers_that_have_another() -> None:
    other = replace(REPORT.layers[0], stored="2-bit row")
    _, table, *_ = report_view(replace(REPORT, layers=(other, *REPORT.layers[1:])).to_json(), every=False)
    assert list(table.columns[-1].cells) == ["3-bit row, 1 otherwise", "3-bit row"]


def test_like_sentences_and_rows_are_merged() -> None:
    assert merge_sentences(["a.1.b is odd", "x", "a.2.b is odd"]) == ["a.*.b is odd (2 times)", "x"]
    rows = [{"name": "a.1.b", "bits": 1}, {"name": "a.2.b", "bits": 2}, {"name": "a.3.b", "bits": 1}]
    assert [(name, len(same)) for name, same in group_rows(rows, ["bits"])] == [("a.*.b", 2), ("a.2.b", 1)]
    assert [name for name, _ in group_rows(rows, ["bits"], every=True)] == ["a.1.b", "a.2.b", "a.3.b"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (3725, "1 h 2 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_is_a_line_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal() as terminal:
        for done in range(1, 31):
            terminal.progress(done, 30, 1234.5)
        terminal.scoring("window", 1, 1)
        terminal.scoring("tasks", 0, 0)
        terminal.show({}, lambda values, every: ())
    blocks, windows, tasks = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"block 30/30 · 1,234 tokens/s \.\.\. \d+ s", blocks)
    assert windows.startswith("window 1/1 ... ") and tasks.startswith("tasks ... ")


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Terminal() as terminal:
        for done in range(1, 4):
            terminal.progress(done, 3, 10.0)
    said = capsys.readouterr().err
    assert "━" in said and "block 3/3 · 10 tokens/s ... " in said


def test_quiet_has_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(quiet=True) as terminal:
        terminal.progress(3, 3, 10.0)
    assert capsys.readouterr().err == ""


# --- how commands end -----------------------------------------------------------------------------------------------

ENDS: list[tuple[BaseException, int, str]] = [
    (errors.LLMCompressError("it failed"), 1, "it failed"),
    (errors.RecipeError("bad recipe"), 2, "bad recipe"),
    (errors.NumericsError("layer x has NaN"), 3, "layer x has NaN"),
    (errors.DiskError("out exists"), 4, "out exists"),
    (errors.InputError("no model"), 5, "no model"),
    (errors.LockedError("locked"), 6, "locked"),
    (errors.MemoryLimitError("too large"), 7, "too large"),
    (OSError(errno.ENOSPC, "No space left on device", "out/x"), 4, "the disk is full (out/x); free some space"),
    (OSError(errno.EACCES, "denied", "out/x"), 4, "out/x: denied; choose another path"),
    (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['none']"), 4, "No usable temporary"),
    (MemoryError(), 7, "there is not enough memory"),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        7,
        "there is not enough memory",
    ),
    (KeyboardInterrupt(), 130, "stopped from the keyboard"),
    (KeyboardInterrupt("step 3 is kept"), 130, "stopped from the keyboard; step 3 is kept"),
]


@pytest.mark.parametrize(("error", "code", "message"), ENDS, ids=[type(error).__name__ for error, _, _ in ENDS])
def test_errors_are_one_line_and_an_exit_code(
    error: BaseException, code: int, message: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, raising(error))
    done = run("plan", "tiny", recipe)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith(f"[{code}] {message}")
    assert len(done.stderr.splitlines()) == 1
    done = run("plan", "tiny", recipe, "--json")
    assert done.exit_code == code
    found = json.loads(done.stdout)["error"]
    assert found["code"] == code
    assert found["message"].startswith(message)


@pytest.mark.parametrize(
    ("words", "work"),
    [
        ("drop m --count 2", "block_choice.choose_blocks"),
        ("narrow m --neurons 0.5 --per-block", "narrow.narrow"),
        ("experts prune m --keep 2", "experts.prune.prune_experts"),
    ],
)
def test_a_second_change_into_an_output_does_not_begin(
    words: str, work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"llmcompress.surgery.{work}", lambda *_, **__: pytest.fail("it has begun"))
    with lock_work(tmp_path / "out"):
        done = run(*words.split(), "-o", tmp_path / "out")
    assert done.exit_code == 6 and f"{tmp_path / 'out'} is being written by another process" in done.stderr
    assert not list(tmp_path.iterdir())


def test_sigterm_unwinds_and_ends_with_143(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    failing(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    done = run("plan", "tiny", recipe, "--json")
    assert done.exit_code == 143
    assert json.loads(done.stdout)["error"]["code"] == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_errors_nobody_foresaw_keep_their_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, raising(ZeroDivisionError("a bug")))
    done = run("plan", "tiny", recipe, "--json")
    assert done.exit_code == 1
    assert isinstance(done.exception, ZeroDivisionError)
    assert json.loads(done.stdout) == {"error": {"code": 1, "message": "ZeroDivisionError: a bug"}}
    assert verdict(BrokenPipeError(errno.EPIPE, "closed")) is None


def test_very_verbose_shows_where_an_error_arose(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, raising(errors.InputError("no model")))
    assert "Traceback" in run("plan", "tiny", recipe, "-vv").stderr
    assert "Traceback" not in run("plan", "tiny", recipe, "-v").stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "m", "r.yaml"], "Missing option"),
        (["inspect"], "Missing argument"),
        (["plan", "m"], "there is no RECIPE; name one, or give a target"),
        (["plan", "m", "r", "--sett", "a=b"], "No such option"),
        (["eval", "m", "--windows", "0"], "Invalid value for '--windows'"),
        (["eval", "m", "--length", "many"], "Invalid value for '--length'"),
        (["evil", "m"], "No such command 'evil'. Did you mean 'eval'?"),
        (["plan", "m", "r", "--settt", "a=b"], "did you mean --set?"),
        (["compress", "m", "-o", "out", "--bits", "4"], "bits belongs to a recipe"),
        (["plan", "m", "r", "--xyz"], "No such option: --xyz; `"),
    ],
)
def test_mistakes_in_the_arguments_end_with_2(words: list[str], message: str) -> None:
    done = run(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    done = run(*words, "--json")
    assert done.exit_code == 2
    assert message in json.loads(done.stdout)["error"]["message"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["plan", "smollm2", "none.yaml"], 2, "the recipe none.yaml cannot be read"),
        (
            ["plan", "smollm2", "RECIPE", "--set", "rules[0].steps[0].bit=3"],
            2,
            'unknown key "bit" in step rtn; did you',
        ),
        (["compress", "./none", "RECIPE", "-o", "out"], 5, "the model folder ./none does not exist"),
        (["compress", "smollm2", "-o", "out", "--size", "banana"], 2, "--size: target: bytes: 'banana' is no size"),
        (["compress", "smollm2", "-o", "out", "--bpw=-1"], 2, "--bpw: target: bpw is -1.0"),
        (["plan", "smolm2", "RECIPE"], 5, "did you mean 'smollm2'?"),
        (["inspect", "none"], 5, "none holds no report.json"),
        (["verify", "none"], 5, "none is no folder; give a compressed checkpoint"),
        (["export", ".", "--to", "dense", "-o", "out"], 5, "has no config.json; give a compressed checkpoint"),
        (["eval", "./none"], 5, "the model folder ./none does not exist"),
    ],
)
def test_bad_input(words: list[str], code: int, message: str, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    done = run(*(str(recipe) if word == "RECIPE" else word for word in words))
    assert done.exit_code == code
    assert message in done.stderr
    assert not (recipe.parent / "out").exists()


# --- the whole way --------------------------------------------------------------------------------------------------


def test_the_help_of_every_command_is_a_line_and_ends_with_an_example() -> None:
    group: Any = typer.main.get_command(app)
    found = {name: command for name, command in group.commands.items() if not hasattr(command, "commands")}
    for name in ("experts", "recipe"):
        found |= {f"{name} {inner}": command for inner, command in group.commands[name].commands.items()}
    for name, command in found.items():
        summary, *_, example = inspect.cleandoc(command.help).split("\n\n")
        assert "\n" not in summary and summary.endswith("."), name
        assert example.startswith(f"Example: llmcompress {name}") and "\n" not in example, name
        assert all(option.help for option in command.params), name


def test_help_shows_the_example_and_the_shared_options() -> None:
    shown = " ".join(run("compress", "--help").stdout.split())
    assert "Example: llmcompress compress " in shown and "--json" in shown and "--trust-remote-code" in shown


def test_help_groups_commands_by_what_people_want() -> None:
    shown = run("--help").stdout
    places = [shown.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places) and "─ Commands ─" not in shown
    assert {name for commands in PANELS.values() for name in commands} >= {"compress", "eval", "distill", "export"}
    assert shown.index(" compress ") < shown.index(" plan ") < shown.index(" eval ") < shown.index(" distill ")


def test_a_note_of_the_library_is_said_once_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("llmcompress")
    for quiet in (False, True):
        with Terminal(as_json=True, quiet=quiet) as terminal:
            for note in ("a.csv is read as text", "a.csv is read as text", "b.csv is read as text"):
                log.info("%s", note, extra={"note": True})
            log.info("not for people")
            terminal.show({}, lambda values, every: [])
        printed = capsys.readouterr()
        assert json.loads(printed.out) == {}
        assert printed.err.splitlines() == ([] if quiet else ["a.csv is read as text", "b.csv is read as text"])


def test_help_imports_nothing_heavy() -> None:
    program = "import sys\nfrom llmcompress.cli.app import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
    program += "heavy = {'torch', 'transformers', 'pydantic', 'yaml', 'numpy', 'datasets'} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", program + "assert not heavy, heavy"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


def test_a_tiny_model_is_planned_compressed_inspected_and_scored(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", tmp_path / "dense")
    planned = json.loads(run("plan", "dense", recipe, "--json").stdout)
    done = run("compress", "dense", recipe, "-o", "small", "--json")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)
    assert made.keys() >= COMPRESS_KEYS
    assert made["bpw"] == planned["bpw"]
    assert json.loads(run("inspect", "small", "--json").stdout)["bytes"] == made["bytes"]
    scored = json.loads(run("eval", "small", "--against", "dense", "--windows", 2, "--length", 32, "--json").stdout)
    assert scored.keys() >= EVAL_KEYS
    assert (scored["bytes"], scored["bpw"]) == (made["bytes"], made["bpw"])
    assert scored["kl"] > 0
    assert run("compress", "dense", recipe, "-o", "small").exit_code == 4
