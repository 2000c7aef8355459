"""A sweep over budgets: one pricing for all, resumed if interrupted, shown in a table and a plot of its figures."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.calibration.gradients import Importance
from llmcompress.cli.app import app
from llmcompress.compression import job
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.errors import DiskError, InputError, LLMCompressError, RecipeError
from llmcompress.evaluation.evaluate import evaluate
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.verify import verify
from llmcompress.models.dense.families import Architecture
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.checkpoint import check_manifest
from llmcompress.models.files.file_names import ALLOCATION, DISTILLATION, MANIFEST, RECIPE, SCORES
from llmcompress.pipeline import frontier as sweep
from llmcompress.pipeline.frontier import PRICES, SILENT, SweepCallbacks, frontier
from llmcompress.pipeline.frontier_inputs import budgets, read_peers
from llmcompress.recipe.compression import Recipe
from llmcompress.recipe.read import dump, read_recipe
from llmcompress.reporting.tables import frontier_markdown
from tests.tiny import save_tiny

TEXT = "The quick brown fox jumps over the lazy dog, and 42 grey geese fly past the old mill by the river. "
GRIDS = [[{"method": "gptq", "bits": bits}] for bits in (2, 3, 5)]
BPW = "2.5,4"
Found = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of two blocks, a text to calibrate on, another one to read, a task, and a peer."""
    folder = tmp_path_factory.mktemp("frontier")
    save_tiny("llama", folder / "dense", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    (folder / "other.txt").write_text(
        "Rain fell on the slate roofs of the harbour all night long, and boats lay still. " * 9
    )
    pairs = [{"sentence_good": f"The {i} geese fly.", "sentence_bad": f"The {i} geese flies."} for i in range(4)]
    (folder / "geese.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    peer = {"name": "Tool <g64>", "bpw": 3.25, "perplexity": 300.0, "kl": 0.1, "tasks": {"geese": 0.5}}
    (folder / "peers.json").write_text(json.dumps({"peers": [peer]}))
    (folder / "one.yaml").write_text(dump(read_recipe(values(folder))))
    return folder


def values(place: Path, **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(place / "text.txt"), "samples": 12, "length": 48, "held_out": 4}
    base = {"version": 1, "name": "one", "calibration": calibration, "target": {"bpw": 3}, "options": GRIDS}
    return base | more


def protocol(place: Path, *tasks: str) -> Protocol:
    return Protocol(place / "other.txt", 4, 48, tasks)


def swept(place: Path, output: Path, bpw: str = BPW, told: SweepCallbacks = SILENT, **more: Any) -> Found:
    recipe = read_recipe(values(place, **more))
    return frontier(place / "dense", [recipe], budgets(bpw, None), output, protocol(place), callbacks=told)


@pytest.fixture(scope="module")
def curve(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    """A sweep by the command line, with a task and a peer."""
    out = tmp_path_factory.mktemp("swept") / "curve"
    words = ["frontier", place / "dense", place / "one.yaml", "--bpw", BPW, "-o", out, "--peers", place / "peers.json"]
    words += ["--text", place / "other.txt", "--windows", 4, "--length", 48, "--tasks", place / "geese.jsonl", "--json"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    for said in ("one: prices for 2 budgets", "priced block 2/2", "one: bpw-2.5, 1 of 2", "scoring bpw-4"):
        assert said in done.stderr
    return out, json.loads(done.stdout)


# --- one pricing, many budgets ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_pricing_gives_what_separate_runs_give_to_the_bit(
    curve: tuple[Path, Found], place: Path, tmp_path: Path
) -> None:
    out, _ = curve
    for name, bpw in (("bpw-2.5", 2.5), ("bpw-4", 4.0)):
        alone = lc.compress(place / "dense", values(place, target={"bpw": bpw}), tmp_path / name).folder
        paths = [path.name for path in alone.glob("*.safetensors")]
        assert paths and all((alone / path).read_bytes() == (out / name / path).read_bytes() for path in paths)
        assert (alone / RECIPE).read_text() == (out / name / RECIPE).read_text()
        plans = [json.loads((folder / ALLOCATION).read_text()) for folder in (alone, out / name)]
        assert all(plan.pop("seconds") > 0 for plan in plans) and plans[0] == plans[1]


def test_every_point_is_an_ordinary_checkpoint_with_its_scores(curve: tuple[Path, Found], place: Path) -> None:
    out, found = curve
    points = found["series"][0]["points"]
    assert [one["budget"] for one in points] == ["bpw-2.5", "bpw-4"] and found["series"][0]["recipe"] == "one"
    model = load_model(locate(str(place / "dense")))
    own = evaluate(model, load_tokenizer(place / "dense"), protocol(place)).to_json()
    assert found["dense"]["perplexity"] == own["perplexity"] and found["dense"]["kl"] == 0.0
    for one, budget in zip(points, (2.5, 4), strict=True):
        folder = out / one["folder"]
        assert verify(folder, text=place / "text.txt", length=16).layers == 14 and check_manifest(folder)
        assert 0.9 * budget < one["bpw"] <= budget
        assert one["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        scores = lc.score(folder, protocol(place), against=str(place / "dense"))
        assert all(one[key] == scores[key] for key in ("perplexity", "kl", "top1_agreement", "model_bpw"))
        assert one["gap"] == pytest.approx(math.log(scores["perplexity"] / own["perplexity"]))
        assert (
            json.loads((folder / SCORES).read_text())["compressed"]["tasks"]["geese"]["acc"]
            == one["tasks"]["geese"]["acc"]
        )
    assert points[0]["predicted_kl"] > points[1]["predicted_kl"] and points[0]["kl"] > points[1]["kl"]


@pytest.mark.slow
def test_sizes_price_the_table_too_and_files_keep_to_them(place: Path, tmp_path: Path) -> None:
    recipe = read_recipe(values(place))
    found = frontier(place / "dense", [recipe], budgets(None, "32kB,0.04 MB"), tmp_path / "out", protocol(place))
    assert found["axis"] == "bytes"
    points = found["series"][0]["points"]
    assert [one["budget"] for one in points] == ["size-0.032MB", "size-0.04MB"]
    assert all(0.9 * size < one["bytes"] <= size for one, size in zip(points, (32_000, 40_000), strict=True))
    assert "weight files, MB" in (tmp_path / "out" / "frontier.svg").read_text()


@pytest.mark.slow
def test_recipes_are_lines_of_their_own(place: Path, tmp_path: Path) -> None:
    recipes = [read_recipe(values(place)), read_recipe(values(place, name="two", options=GRIDS[1:]))]
    found = frontier(place / "dense", recipes, budgets("3.4", None), tmp_path / "out", protocol(place))
    assert [series["recipe"] for series in found["series"]] == ["one", "two"]
    for name in ("one", "two"):
        assert (tmp_path / "out" / name / "bpw-3.4" / RECIPE).is_file() and (tmp_path / "out" / name / PRICES).is_file()
        assert f">{name}<" in (tmp_path / "out" / "frontier.svg").read_text()


# --- an interrupted sweep -------------------------------------------------------------------------------------------


class Cut(Exception):
    """A process dies."""


def dying(act: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """`act`, which dies after so many calls."""
    left: Iterator[int] = iter(range(calls))

    def mortal(*given: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise Cut
        return act(*given, **named)

    return mortal


@pytest.mark.slow
@pytest.mark.parametrize("name, calls", [("compress_job", 0), ("record_allocation", 1), ("_publish", 1)])
def test_a_sweep_that_was_cut_goes_on(
    name: str, calls: int, place: Path, tmp_path: Path, curve: tuple[Path, Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context, pytest.raises(Cut):
        context.setattr(sweep, name, dying(getattr(sweep, name), calls))
        swept(place, tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert (tmp_path / "out" / PRICES).is_file() and bool(kept) == bool(calls)
    priced: list[int] = []
    again = swept(place, tmp_path / "out", told=SweepCallbacks(pricing=lambda done, total, speed: priced.append(done)))
    assert not priced, "prices are measured once"
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items()), "what is finished stays"
    points = {one["budget"]: one for one in again["series"][0]["points"]}
    for one in curve[1]["series"][0]["points"]:
        same = ("bytes", "bpw", "perplexity", "kl", "predicted_kl", "measured_kl")
        assert [points[one["budget"]][key] for key in same] == [one[key] for key in same]


@pytest.mark.slow
def test_what_is_finished_is_read_and_more_budgets_are_added(
    place: Path, tmp_path: Path, curve: tuple[Path, Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(curve[0], tmp_path / "out")

    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("this was done before")

    tasks = str(place / "geese.jsonl")
    with monkeypatch.context() as context:
        for module, name in ((sweep, "compress_job"), (sweep, "record_allocation")):
            context.setattr(module, name, never)
        context.setattr("llmcompress.pipeline.frontier.load_model", never)
        context.setattr(DenseModel, "load", never)
        sizes, recipe = budgets(BPW, None), read_recipe(values(place))
        again = frontier(place / "dense", [recipe], sizes, tmp_path / "out", protocol(place, tasks))
    assert [one["kl"] for one in again["series"][0]["points"]] == [one["kl"] for one in curve[1]["series"][0]["points"]]
    more = swept(place, tmp_path / "out", "4,3")  # and another protocol: without the task
    assert [one["budget"] for one in more["series"][0]["points"]] == ["bpw-3", "bpw-4"]
    both = [recipe, read_recipe(values(place, name="two", options=GRIDS[1:]))]
    written = (tmp_path / "out" / "bpw-4" / "model.safetensors").stat().st_mtime_ns
    found = frontier(place / "dense", both, budgets("4", None), tmp_path / "out", protocol(place))
    for result in (found, swept(place, tmp_path / "out", "4")):  # the first recipe stays where it was
        lines = {series["recipe"]: [one["budget"] for one in series["points"]] for series in result["series"]}
        assert lines == {"one": ["bpw-3", "bpw-4"], "two": ["bpw-4"]}
    assert (tmp_path / "out" / "bpw-4" / "model.safetensors").stat().st_mtime_ns == written
    assert not (tmp_path / "out" / "one").exists() and (tmp_path / "out" / "two" / PRICES).is_file()
    assert not more["dense"]["tasks"] and json.loads((tmp_path / "out" / "bpw-4" / SCORES).read_text())["tasks"] == []


@pytest.mark.slow
def test_what_was_cut_between_a_file_and_its_manifest_is_written_again(
    place: Path, tmp_path: Path, curve: tuple[Path, Found]
) -> None:
    shutil.copytree(curve[0] / "bpw-4", tmp_path / "out" / "bpw-4")
    for name in (PRICES, "frontier.json"):
        shutil.copy(curve[0] / name, tmp_path / "out" / name)
    path = tmp_path / "out" / "bpw-4" / MANIFEST
    entries = json.loads(path.read_text())
    entries["sha256"] = {name: value for name, value in entries["sha256"].items() if name not in (ALLOCATION, SCORES)}
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match="is not part of the checkpoint"):
        check_manifest(path.parent)
    swept(place, tmp_path / "out", "4")
    assert check_manifest(path.parent)


@pytest.mark.slow
def test_a_text_of_the_same_name_is_read_again(place: Path, tmp_path: Path, curve: tuple[Path, Found]) -> None:
    shutil.copytree(curve[0], tmp_path / "out")
    (tmp_path / "other.txt").write_text((place / "text.txt").read_text())
    recipe = read_recipe(values(place))
    asked = Protocol(tmp_path / "other.txt", 4, 48)
    found = frontier(place / "dense", [recipe], budgets("4", None), tmp_path / "out", asked)
    assert found["dense"]["perplexity"] != curve[1]["dense"]["perplexity"]


def test_a_stopped_sweep_says_what_it_keeps(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "compress_job", stopped)
    with pytest.raises(KeyboardInterrupt, match="out keeps what is finished, and the same command resumes from there"):
        swept(place, tmp_path / "out")


@pytest.mark.slow
def test_text_and_gradients_are_read_once_for_all_budgets(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, sequences = [], []
    read, measure = job.calibration_tokens, job.measure_importance

    def count_texts(*arguments: Any, **options: Any) -> CalibrationTokens:
        texts.append(arguments)
        return read(*arguments, **options)

    def count_gradients(source: DenseModel, arch: Architecture, tokens: Tensor, **options: Any) -> Importance:
        sequences.append(tokens.numpy().tobytes())
        return measure(source, arch, tokens, **options)

    monkeypatch.setattr(job, "calibration_tokens", count_texts)
    monkeypatch.setattr(job, "measure_importance", count_gradients)
    swept(place, tmp_path / "curve", token_weights={"by": "gradient"})
    assert len(texts) == 1
    assert sequences and len(sequences) == len(set(sequences))  # those of the prices, and those of the checkpoints


def test_a_distilled_point_is_kept_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"dataset": str(place / "text.txt"), "samples": 12, "length": 32, "held_out": 4}
    section = {"data": data, "rates": {"scales": 5e-3}, "batch": 4, "compute": "float32", "steps": 2}
    first = swept(place, tmp_path / "out", "4", distill=section)
    [point] = first["series"][0]["points"]
    taught = json.loads((tmp_path / "out" / "bpw-4" / DISTILLATION).read_text())
    assert point["seconds"] > taught["seconds"] > 0
    monkeypatch.setattr(sweep, "compress_job", dying(sweep.compress_job, 0))
    assert swept(place, tmp_path / "out", "4", distill=section)["series"][0]["points"] == [point]
    with pytest.raises(DiskError, match="bpw-4 was distilled with another recipe"):
        swept(place, tmp_path / "out", "4", distill=section | {"steps": 3})


# --- the table and the plot ------------------------------------------------------------------------------------------


def test_the_table_holds_the_figures(curve: tuple[Path, Found]) -> None:
    out, found = curve
    assert json.loads((out / "frontier.json").read_text()) == found
    text = (out / "frontier.md").read_text()
    assert text == frontier_markdown(found)
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    rows = [dict(zip(table[0], cells, strict=True)) for cells in table[2:]]
    assert [(row["recipe"], row["budget"]) for row in rows] == [
        ("dense", ""),
        ("one", "bpw-2.5"),
        ("one", "bpw-4"),
        ("Tool &lt;g64>", "peer"),
    ]
    for row, one in zip(rows[1:3], found["series"][0]["points"], strict=True):
        assert float(row["bpw"]) == pytest.approx(one["bpw"], abs=1e-3) and row["bytes"] == f"{one['bytes']:,}"
        assert row["perplexity"].startswith(f"{one['perplexity']:.3f} ± ") and row["gap"] == f"{one['gap']:.3f}"
        assert row["KL"].startswith(f"{one['kl']:.4f}") and row["geese: acc"].startswith(
            f"{one['tasks']['geese']['acc']:.4f}"
        )
        assert row["predicted KL"] == f"{one['predicted_kl']:.4f}" and row["measured KL"] == f"{one['measured_kl']:.4f}"
    ratio = 300 / found["dense"]["perplexity"]
    assert rows[3]["gap"] == f"{math.log(ratio):.3f}" and rows[3]["geese: acc"] == "0.5000" and rows[3]["bytes"] == "?"
    assert "once for all its budgets" in text and "other.txt" in text


def test_the_plot_shows_lines_peers_and_the_dense_model(curve: tuple[Path, Found]) -> None:
    from llmcompress.reporting.plots import frontier_pictures

    out, found = curve
    svg = (out / "frontier.svg").read_text()
    for words in ("perplexity", "geese: acc", "bits per weight of the decoder", "Tool &lt;g64&gt;", ">one<", ">dense<"):
        assert words in svg
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert frontier_pictures(found)["svg"].decode() == svg, "the same figures make the same picture"
    moved = json.loads(json.dumps(found))
    moved["series"][0]["points"][0]["perplexity"] *= 1.5
    assert frontier_pictures(moved)["svg"].decode() != svg


def test_the_terminal_shows_the_same_table(curve: tuple[Path, Found], place: Path) -> None:
    words = [
        "frontier",
        place / "dense",
        place / "one.yaml",
        "--bpw",
        BPW,
        "-o",
        curve[0],
        "--windows",
        4,
        "--length",
        48,
    ]
    words += ["--text", place / "other.txt", "--tasks", place / "geese.jsonl", "--peers", place / "peers.json"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert re.search(r"one +bpw-2.5 +2\.\d{3} ", done.stdout) and "frontier.png and .svg; table" in done.stdout


# --- what cannot be --------------------------------------------------------------------------------------------------

SIZES = [
    (None, None, "give the budgets either as --bpw 1.25,1.6,2 or as --sizes 30MB,40MB"),
    ("2", "30MB", "give the budgets either as"),
    (" , ", None, "there are no budgets"),
    ("2,two", None, "--bpw: 'two' is not a number of bits per weight, above 0 and at most 16"),
    ("nan", None, "--bpw: 'nan' is not a number"),
    ("2,17", None, "--bpw: '17' is not a number of bits per weight, above 0 and at most 16"),
    ("2,2.0", None, "the budget bpw-2 is given twice"),
    (None, "30 megs", "--sizes: '30 megs' is no size; write a number and one of B, kB, MB"),
    (None, "0MB", "--sizes: '0MB' is not the size of a model"),
]


@pytest.mark.parametrize("bpw, sizes, complaint", SIZES)
def test_budgets_that_are_none(bpw: str | None, sizes: str | None, complaint: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(complaint)):
        budgets(bpw, sizes)


def test_budgets_are_sorted_and_named() -> None:
    assert [one.name for one in budgets("3,1.25,2", None)] == ["bpw-1.25", "bpw-2", "bpw-3"]
    assert [one.name for one in budgets(None, "40MB,1.5 MiB")] == ["size-1.572864MB", "size-40MB"]


PEERS = [
    ("[]", "holds no peers; write"),
    ("{", "cannot be read"),
    ('{"peers": [{"name": "a", "bpw": 2}]}', 'peers[0]: peers: the key "perplexity" is missing'),
    ('{"peers": [{"name": "a", "bpw": 2, "perplexity": "x"}]}', 'perplexity is "x"; it must be a number more than 0'),
    ('{"peers": [{"name": "a", "bpw": 2, "perplexity": true}]}', "perplexity is true; it must be a number"),
    ('{"peers": [{"name": "a", "bpw": 2, "ppl": 3}]}', 'unknown key "ppl" in peers'),
    (
        '{"peers": [{"name": "a", "bytes": 2, "perplexity": 3}]}',
        "the peer 'a' has no bpw, the unit of this sweep's sizes",
    ),
]


@pytest.mark.parametrize("text, complaint", PEERS)
def test_peers_that_are_none(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "peers.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(complaint)) as raised:
        read_peers(tmp_path / "peers.json", "bpw")
    assert "peers.json" in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_file_of_peers() -> None:
    with pytest.raises(InputError, match="the peers in none.json cannot be read"):
        read_peers(Path("none.json"), "bpw")


def named(place: Path, name: str) -> Recipe:
    return read_recipe(values(place, name=name))


def unreachable(place: Path, out: Path) -> Any:
    return swept(place, out, "1.5,3")


def two_of_a_name(place: Path, out: Path) -> Any:
    return frontier(place / "dense", [named(place, "a")] * 2, budgets("3", None), out, protocol(place))


def no_name_of_a_folder(place: Path, out: Path) -> Any:
    return frontier(place / "dense", [named(place, "a"), named(place, "../b")], budgets("3", None), out)


def something_else(place: Path, out: Path) -> Any:
    out.mkdir()
    (out / "model.safetensors").touch()
    return swept(place, out)


def a_file(place: Path, out: Path) -> Any:
    out.touch()
    return swept(place, out)


def a_damaged_record(place: Path, out: Path) -> Any:
    out.mkdir()
    (out / sweep.FILE).write_text("{")
    return swept(place, out)


def too_little_text(place: Path, out: Path) -> Any:
    recipe = read_recipe(values(place))
    return frontier(place / "dense", [recipe], budgets("3", None), out, Protocol("short", 4, 48))


def a_task_that_is_not_there(place: Path, out: Path) -> Any:
    recipe = read_recipe(values(place))
    return frontier(place / "dense", [recipe], budgets("3", None), out, protocol(place, "none.yaml"))


def no_model(place: Path, out: Path) -> Any:
    return frontier(place / "nothing", [read_recipe(values(place))], budgets("3", None), out, protocol(place))


CANNOT = [
    (unreachable, 2, r"one: target: 1.5 bpw cannot be reached, 2\.\d+ is the least that the options can do"),
    (two_of_a_name, 2, "two recipes are named 'a'; give each a name of its own"),
    (no_name_of_a_folder, 2, r"the recipe's name '\.\./b' cannot name a folder"),
    (something_else, 4, "out exists and is not an earlier sweep"),
    (a_file, 4, "out exists and is not an earlier sweep"),
    (a_damaged_record, 5, "frontier.json is not readable JSON .*; remove that file"),
    (too_little_text, 5, "the evaluation text has 5 tokens, less than one window of 48"),
    (a_task_that_is_not_there, 5, "there is no task file none.yaml"),
    (no_model, 5, "nothing"),
]


@pytest.mark.parametrize("act, code, complaint", CANNOT, ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_is_said_before_anything_is_priced(
    act: Callable[[Path, Path], Any], code: int, complaint: str, place: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def never(*given: Any, **named: Any) -> None:
        raise AssertionError("options were priced")

    monkeypatch.setattr(sweep, "price_list", never)
    with pytest.raises(LLMCompressError, match=complaint) as raised:
        act(place, tmp_path / "out")
    assert raised.value.exit_code == code and "\n" not in str(raised.value)


def test_prices_and_checkpoints_of_something_else_are_not_taken(
    place: Path, tmp_path: Path, curve: tuple[Path, Found]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(curve[0], out)
    with pytest.raises(DiskError, match="was left by a different run .recipe changed"):
        swept(place, out, seed=1)
    with pytest.raises(DiskError, match="was left by a different run .kind of budget changed"):
        frontier(place / "dense", [named(place, "one")], budgets(None, "60kB"), out, protocol(place))
    shutil.copytree(out / "bpw-4", out / "bpw-4.5")
    shutil.rmtree(out / "bpw-4")
    (out / "bpw-2.5").rename(out / "bpw-4")
    with pytest.raises(DiskError, match="bpw-4 was left by a run with another recipe"):
        swept(place, out, "4")
    (out / PRICES).write_text("{")
    with pytest.raises(DiskError, match="prices.json cannot be read"):
        swept(place, out)


def test_without_recipe_the_command_takes_default_options(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["frontier", "none", "--bpw", "2", "-o", str(tmp_path / "out")])
    assert done.exit_code == 5 and "none is not in the cache" in done.output
    done = CliRunner().invoke(app, ["frontier", "none", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and "give the budgets either as --bpw" in done.output
