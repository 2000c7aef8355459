"""Reports that a user sees of a distillation: metrics of every step, its curve, its card, trackers."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.cli.distill import distilled_view
from llmcompress.cli.terminal import Terminal
from llmcompress.data.schedule import rate
from llmcompress.distillation.result import DistillationResult
from llmcompress.distillation.run import distill
from llmcompress.errors import RecipeError
from llmcompress.formats.hub import push
from llmcompress.formats.model_card import DistillationRecord, _distillation
from llmcompress.reporting.html.page import write_page
from llmcompress.reporting.plots import distillation_png, running_count
from llmcompress.reporting.report import KNOWN_TEXT, read
from tests.distillation import miniature
from tests.tiny import save_tiny

STEPS = 7
LOSSES = [
    {"of": {"loss": "forward_kl"}},
    {"of": {"loss": "reverse_kl"}, "weight": 0.5},
    {"of": {"loss": "forward_kl", "temperature": 2.0}},
]
STEP = {"step", "loss", "terms", "rate", "gradient_norm", "tokens", "tokens_per_second", "seconds"}
LOOK = {"step", "tokens", "kl", "perplexity", "teacher_perplexity"}  # and seconds, but for the first
TIMED = {"seconds", "tokens_per_second"}


class Remembering(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "remembering"
    requires_logging_directory = True
    seen: list[tuple[str, Any]]

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        type(self).seen = [("opened", (run_name, Path(logging_dir).name))]

    @property
    def tracker(self) -> None:
        """Nothing."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keeps the recipe."""
        self.seen.append(("recipe", values))

    def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        """Keeps the numbers of a step."""
        self.seen.append((f"step {step}", values))

    def finish(self) -> None:
        """Keeps that it ended."""
        self.seen.append(("closed", None))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model, a `small` one made from it, and a text."""
    place = tmp_path_factory.mktemp("reporting")
    save_tiny("llama", place / "dense", num_hidden_layers=1)
    (place / "text.txt").write_text("".join(f"{i}. {miniature.TEXT}" for i in range(80)))
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]
    lc.compress(place / "dense", {"version": 1, "rules": rules}, place / "small")
    return place


def recipe(folders: Path, **more: Any) -> dict[str, Any]:
    rates = {"scales": 5e-3, "norms": 2e-3}
    return miniature.recipe(folders, **{"rates": rates, "losses": LOSSES, "evaluate_every": 3, "steps": STEPS} | more)


@pytest.fixture(scope="module")
def whole(folders: Path) -> DistillationResult:
    """An uninterrupted distillation, in `whole`."""
    return distill(folders / "small", folders / "dense", recipe(folders, save_every=3), folders / "whole")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def test_every_step_and_every_look_is_a_line(whole: DistillationResult, folders: Path) -> None:
    found = lines(folders / "whole" / "metrics.jsonl")
    steps, looks = [row for row in found if "loss" in row], [row for row in found if "kl" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1)) and len(found) == len(steps) + len(looks)
    assert [row["step"] for row in looks] == [0, 3, 6, 7] == [row["step"] for row in whole.history]
    assert all(row.keys() == STEP for row in steps) and all(row.keys() - {"seconds"} == LOOK for row in looks)
    assert [row["kl"] for row in looks] == [row["kl"] for row in whole.history]
    for row in steps:
        terms = row["terms"]
        assert list(terms) == ["forward_kl", "reverse_kl", "forward_kl_2"]
        weighted = terms["forward_kl"] + 0.5 * terms["reverse_kl"] + terms["forward_kl_2"]
        assert math.isclose(row["loss"], weighted, rel_tol=1e-12)
        assert row["rate"] == rate(row["step"] - 1, STEPS, 0.05, 0.1)
        assert row["tokens"] == row["step"] * 4 * 31 and row["gradient_norm"] > 0 and row["tokens_per_second"] > 0
    assert steps[-1]["tokens"] == looks[-1]["tokens"] == whole.tokens
    assert (folders / "whole" / "distillation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "at, kept",
    [
        pytest.param(2, 0, id="before a state", marks=pytest.mark.slow),
        pytest.param(5, 3, id="after a state", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_same_metrics(
    at: int, kept: int, whole: DistillationResult, folders: Path, tmp_path: Path
) -> None:
    def cut(done: int, *_: Any) -> None:
        assert lines(running)[-1]["step"] == done, "on the disk while it runs"
        if done == at:
            raise miniature.Cut

    running, asked = tmp_path / "out.training" / "metrics.jsonl", recipe(folders, save_every=3)
    with pytest.raises(miniature.Cut):
        distill(folders / "small", folders / "dense", asked, tmp_path / "out", progress=cut)
    with running.open("a") as file:
        file.write('{"step": 6, "lo')  # a line that a crash interrupted
    seen: list[int] = []
    distill(folders / "small", folders / "dense", asked, tmp_path / "out", progress=lambda done, *_: seen.append(done))
    assert seen[0] == kept + 1
    assert untimed(lines(tmp_path / "out" / "metrics.jsonl")) == untimed(lines(folders / "whole" / "metrics.jsonl"))


def test_trackers_get_the_same_numbers(
    whole: DistillationResult, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "remembering", Remembering)
    asked = recipe(folders, trackers=["remembering"], name="farms", steps=2)
    distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    (opened, recipe_seen), *logged, closed = Remembering.seen[0], *Remembering.seen[1:]
    assert (opened, recipe_seen) == ("opened", ("farms", "out.logs")) and closed == ("closed", None)
    (kind, values), *steps = logged
    assert kind == "recipe" and values["steps"] == 2 and all(isinstance(v, int | float | str) for v in values.values())
    rows = lines(tmp_path / "out" / "metrics.jsonl")
    assert [name for name, _ in steps] == [f"step {row['step']}" for row in rows]
    for (_, seen), row in zip(steps, rows, strict=True):
        flat = {f"terms/{name}": value for name, value in row.pop("terms", {}).items()}
        assert seen == {key: value for key, value in (row | flat).items() if key != "step"}


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("tensorboard", "trackers: tensorboard requires a package that is not installed; run pip install tensorboard"),
        ("comet_ml", "run pip install comet-ml"),
        ("tensorbored", 'trackers: accelerate knows no "tensorbored"; did you mean "tensorboard"?'),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused_at_once(
    name: str, sentence: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(RecipeError) as refused:
        distill(folders / "small", folders / "dense", recipe(folders, trackers=[name]), tmp_path / "out")
    assert sentence in str(refused.value) and not list(tmp_path.iterdir())


def test_progress_has_the_held_out_kl_and_starts_over_after_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal() as terminal:
        terminal.progress(2, 2, 10.0)
        for done in range(1, 5):
            terminal.training(done, 4, 0.5, 1234.5, 0.25)
    blocks, steps = capsys.readouterr().err.splitlines()
    assert blocks.startswith("block 2/2 · 10 tokens/s ... ")
    assert steps.startswith("step 4/4 · loss 0.5000 · held-out KL 0.2500 · 1,234 tokens/s ... ")


@pytest.mark.slow
def test_progress_reports_the_last_held_out_kl(folders: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    done = distill(
        folders / "small",
        folders / "dense",
        recipe(folders, steps=4),
        tmp_path / "out",
        progress=lambda step, steps, loss, speed, kl: seen.append((step, kl)),
    )
    start, third, last = [row["kl"] for row in done.history]
    assert seen == [(1, start), (2, start), (3, third), (4, last)]


def test_the_card_tells_the_distillation(
    whole: DistillationResult, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, bytes] = {}
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("llmcompress.formats.hub.verify", lambda folder, **_: None)
    monkeypatch.setattr(
        "llmcompress.formats.hub._upload", lambda folder, to, names, made, *_: sent.update(made) or "there"
    )
    files = push(folders / "whole", "me/small").files
    assert {"metrics.jsonl", "distillation.png", "distillation.json", "distillation.yaml"} <= files.keys()
    text = sent["README.md"].decode()
    before, after = whole.history[0], whole.history[-1]
    for part in (
        ", then distilled.",
        f"in 7 steps on {whole.tokens:,} tokens of `text.txt`",
        "Loss: forward_kl + 0.5 reverse_kl + forward_kl_2.",
        f"What trained: {whole.trained['scales']:,} scales, {whole.trained['norms']:,} norms.",
        f"| KL to the teacher, nats/token | {before['kl']:.4f} | {after['kl']:.4f} | 0 |",
        f"| perplexity | {before['perplexity']:.3f} | {after['perplexity']:.3f} | {after['teacher_perplexity']:.3f} |",
        "](distillation.png)",
        "reverse_kl",
    ):
        assert part in text, part
    push(folders / "small", "me/small")
    assert "## Distillation" not in sent["README.md"].decode() and "distilled" not in sent["README.md"].decode()


def test_blocks_that_train_alone_are_told_as_such(folders: Path, tmp_path: Path) -> None:
    alone = {"kind": "blockwise", "steps": 3}
    for phases, words, losses in (
        ([alone], "3 steps of each block on", "outputs of each block"),
        (
            [alone, {"kind": "end_to_end", "steps": 2}],
            "3 steps of each block and 2 of the whole on",
            "outputs of each block and forward_kl",
        ),
    ):
        output = tmp_path / str(len(phases))
        asked = miniature.recipe(folders, rates={"scales": 5e-3}, phases=phases)
        done = distill(folders / "small", folders / "dense", asked, output).to_json()
        tokens = (3 + 2 * (len(phases) - 1)) * 4 * 31
        card = "".join(_distillation(DistillationRecord(done, "version: 1")))
        assert f" in {words} {tokens:,} tokens of `text.txt`. Loss: {losses}." in card
        assert any(f" · {words} {tokens:,} tokens in " in str(line) for line in distilled_view(done, False))
        page = output.with_suffix(".html")
        write_page(output, page)
        assert f"{words} {tokens:,} tokens in " in page.read_text()


def test_held_out_text_that_a_student_knows_is_no_measure(folders: Path, tmp_path: Path) -> None:
    def taught(student: Path, name: str, samples: int, **more: Any) -> DistillationResult:
        asked = miniature.recipe(folders, steps=1)
        data = asked["data"] | {"samples": samples} | more
        return distill(student, folders / "dense", asked | {"data": data}, tmp_path / name)

    assert not taught(folders / "small", "first", 28).warnings  # trains on 24
    for name, samples, more, known in (
        ("fewer", 27, {}, True),
        ("share", 24, {"held_out": 0.25}, True),
        ("as-many", 28, {}, False),
        ("other-seed", 20, {"seed": 1}, False),
    ):
        said = taught(tmp_path / "first", name, samples, **more).warnings
        enough = 32 if more else 28
        assert said == ((f"{KNOWN_TEXT} of text.txt; raise samples to {enough} or more",) if known else ())
        gates = read(tmp_path / name).gates
        assert gates is not None and (gates.unmeasured == KNOWN_TEXT) == known and bool(gates.measured) != known
        assert not taught(tmp_path / name, f"{name}-again", 32).warnings
        assert not any(KNOWN_TEXT in each for each in read(tmp_path / f"{name}-again").warnings)


def test_a_missing_matplotlib_is_reported(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = lambda name: None if name == "matplotlib" else object()  # noqa: E731
    monkeypatch.setattr("llmcompress.distillation.result.find_spec", find)
    done = distill(folders / "small", folders / "dense", recipe(folders, steps=1), tmp_path / "out")
    assert not (tmp_path / "out" / "distillation.png").exists()
    assert done.plot is None
    assert "plot    none: it needs matplotlib (the extra report)" in distilled_view(done.to_json(), False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RecipeError, match="plots need matplotlib"):
        distillation_png(done.history)
    monkeypatch.setattr("llmcompress.formats.hub.verify", lambda folder, **_: None)
    monkeypatch.setattr("llmcompress.formats.hub.find_spec", lambda name: None)
    assert "distillation.png" not in push(tmp_path / "out", "me/small", dry_run=True).files


def test_json_of_distill_keeps_its_contract(folders: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(folders, steps=1)))
    words = ["distill", folders / "small", tmp_path / "recipe.yaml", "--teacher", folders / "dense"]
    done = CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    keys = {"output", "teacher", "steps", "tokens", "seconds", "trained", "data", "history", "losses", "warnings"}
    assert found.keys() >= keys and found["losses"] == {"forward_kl": 1.0, "reverse_kl": 0.5, "forward_kl_2": 1.0}
    assert "step 1/1 · loss " in done.stderr and "\nstep" not in done.stdout


@pytest.mark.slow
def test_phases_share_one_file_and_one_curve(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(done: int, steps: int, *_: Any) -> None:
        if (done, steps) == (4, 5):
            raise miniature.Cut

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "remembering", Remembering)
    phases = [{"kind": "blockwise", "steps": 2}, {"kind": "end_to_end", "steps": 3}, {"kind": "end_to_end", "steps": 5}]
    asked = recipe(folders, save_every=3, phases=phases, trackers=["remembering"])
    del asked["steps"]
    whole = distill(folders / "small", folders / "dense", asked, tmp_path / "whole")
    logged = [name for name, _ in Remembering.seen[2:-1]]
    assert logged[-1] == "step 10", "steps of trackers go on from phase to phase"
    with pytest.raises(miniature.Cut):
        distill(folders / "small", folders / "dense", asked, tmp_path / "cut", progress=cut)
    distill(folders / "small", folders / "dense", asked, tmp_path / "cut")
    found, again = (untimed(lines(tmp_path / name / "metrics.jsonl")) for name in ("whole", "cut"))
    place = lambda row: (row["phase"], row["step"], "kl" in row)  # noqa: E731
    assert sorted(found, key=place) == sorted(again, key=place)
    assert [(row["phase"], row["step"]) for row in found if "loss" in row] == [
        *((2, step) for step in (1, 2, 3)),
        *((3, step) for step in (1, 2, 3, 4, 5)),
    ]
    looks = [(row["phase"], row["step"]) for row in found if "kl" in row]
    assert looks == [(row["phase"], row["step"]) for row in whole.history]


def test_steps_of_phases_are_counted_through() -> None:
    assert list(running_count([0, 100, 200, 0, 50, 0, 10])) == [0, 100, 200, 200, 250, 250, 260]


def test_domains_are_named_in_metrics_trackers_and_card(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "remembering", Remembering)
    text = {"dataset": str(folders / "text.txt"), "samples": 14, "length": 32, "held_out": 2}
    data = [{"name": "farms", **text}, {"name": "mills", **text, "seed": 1}]
    asked = recipe(folders, data=data, steps=1, trackers=["remembering"])
    done = distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    looks = [row for row in lines(tmp_path / "out" / "metrics.jsonl") if "kl" in row]
    assert all(row["domains"].keys() == row["shares"].keys() == {"farms", "mills"} for row in looks)
    assert Remembering.seen[-2][1]["domains/mills/kl"] == done.history[-1]["domains"]["mills"]["kl"]
    source = "`text.txt`"
    assert f"tokens of {source}, {source}." in "".join(_distillation(DistillationRecord(done.to_json(), "version: 1")))
