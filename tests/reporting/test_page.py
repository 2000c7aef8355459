"""The report of a checkpoint as a page: complete, self-contained, safe, and honest about what is missing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmcompress.errors import DiskError, InputError, LLMCompressError, RecipeError
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import check_manifest, seal
from llmcompress.reporting.formatting import without_folders
from llmcompress.reporting.html.charts import curve, heat_map, ticks
from llmcompress.reporting.html.context import NO_GENERATIONS, NO_LAYERS, NO_SCORES
from llmcompress.reporting.html.page import add_generations, read_generations, write_page
from llmcompress.reporting.report import LayerReport, Report

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
BLOCKS = 3
EVIL = "<script>alert(1)</script>"
RECIPE = """\
version: 1
name: small
rules:
  - match: '*.2.mlp.up_proj'
    steps: []
  - match: ['*.q_proj', '*.v_proj', '*.up_proj']
    steps: [{method: rtn, bits: 3}]
"""
SCORES: dict[str, Any] = {
    "text": "Python's documentation",
    "limit": None,
    "seed": 0,
    "dense": {
        "perplexity": 20.0,
        "perplexity_stderr": 0.5,
        "calibration_error": 0.02,
        "tasks": {"pairs": {"acc": 0.9, "acc_stderr": 0.03}},
    },
    "compressed": {
        "perplexity": 25.0,
        "perplexity_stderr": 0.6,
        "tokens": 4092,
        "calibration_error": 0.05,
        "tasks": {"pairs": {"acc": 0.85, "acc_stderr": 0.04, "samples": 100}},
        "kl": 0.1234,
        "kl_stderr": 0.002,
        "top1_agreement": 0.81,
        "top1_agreement_stderr": 0.01,
        "domains": {"law": {"kl": 0.4321, "kl_stderr": 0.02}},
    },
}
DISTILLATION: dict[str, Any] = {
    "output": "/folder/somebody/out",
    "teacher": "/folder/somebody/dense",
    "teacher_id": None,
    "steps": 2,
    "tokens": 2000,
    "seconds": 4.0,
    "bytes_before": 4000,
    "bytes_after": 4400,
    "trained": {"scales": 96, "codes": 0},
    "data": {"source": "/folder/somebody/text.txt"},
    "history": [
        {"step": step, "kl": 0.4 / (step + 1), "perplexity": 30.0 - step, "teacher_perplexity": 22.0, "tokens": tokens}
        for step, tokens in enumerate((0, 1000, 2000))
    ],
    "phases": [],
    "losses": {"forward_kl": 1.0, "hidden": 0.5},
}
GENERATIONS = {"Once upon a time": {"dense": " there was a fox.", "compressed": " there was a box."}}


def report_of(blocks: int = BLOCKS, kinds: tuple[str, ...] = KINDS, **changes: Any) -> Report:
    """Three bits for every linear but the last block's `up_proj`, which stays dense."""
    names = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in kinds]
    rows = [
        LayerReport(name, (48, 32), ("rtn",), 3.0 + index / 100, 0.01 + index / 1000, None, None, "3-bit row")
        for index, name in enumerate(names)
    ]
    made = Report(
        model="/folder/somebody/models/tiny",
        revision=None,
        recipe="small",
        dense_bytes=200_000,
        bytes=50_000,
        bpw=3.05,
        model_bpw=4.0,
        parameters=100_000,
        seconds=75.0,
        peak_memory_bytes=500_000_000,
        calibration={"source": "stdlib", "tokens": 12_800, "hash": "0123456789abcdef"},
        layers=tuple(rows[:-1]),
        warnings=(f"{names[-1]} stays dense", "lm_head stays dense", "something is odd"),
        base_model="maker/tiny",
        license="apache-2.0",
        versions={"python": "3.11.9", "torch": "2.10.0"},
    )
    return replace(made, **changes)


def checkpoint(folder: Path, report: Report | None = None, **files: Any) -> Path:
    """The files that a page reads, without weights; names of `files` are those of file_names."""
    folder.mkdir()
    contents: dict[str, Any] = {"REPORT": (report or report_of()).to_json(), "RECIPE": RECIPE, **files}
    for name, content in contents.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / getattr(file_names, name)).write_text(text, encoding="utf-8")
    return folder


def page_of(folder: Path, **more: Any) -> str:
    """The page of a checkpoint as text."""
    output = folder.with_suffix(".html")
    write_page(folder, output, **more)
    return output.read_text(encoding="utf-8")


class _Reader(HTMLParser):
    """Elements and attributes of a page; raises for an element that is closed out of order."""

    EMPTY = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        """The attributes of every element `tag`."""
        return (attributes for name, attributes in self.elements if name == tag)


FULL = {"SCORES": SCORES, "DISTILLATION": DISTILLATION, "GENERATIONS": GENERATIONS, "DISTILLATION_RECIPE": "steps: 2\n"}


def test_a_page_says_what_the_files_say(tmp_path: Path) -> None:
    page = page_of(checkpoint(tmp_path / "full", **FULL))
    said = " ".join(" ".join(_Reader(page).text).split())
    for fact in (
        "maker/tiny",
        "compressed and distilled by llmcompress with the recipe small",
        "200,000 50,000",  # bytes
        "4.0 times smaller",
        "25.000 ± 0.600 ×1.250",
        "0.1234 ± 0.0020",
        "0.4321 ± 0.0200",
        "0.8500 ± 0.0400 -0.0500",  # the task, and the change
        "model.layers.2.mlp.up_proj 1 rule 1 of the recipe keeps it dense",
        "lm_head 1 it is in no block, and the recipe has no steps for it",
        "something is odd",
        "KL to the teacher, nats/token 0.4000 0.1333 0",
        "forward_kl + 0.5 hidden",
        "4,000 bytes before, 4,400 after",
        "there was a box.",
        "12,800 tokens of stdlib",
        "apache-2.0",
        "2.10.0",
    ):
        assert fact in said, fact
    assert "name: small" in said and "steps: 2" in said  # both recipes
    assert "somebody" not in page  # nobody's folders


@pytest.mark.parametrize(("limit", "said"), [(None, "all items"), (100, "a limit of 100 items"), (0.07, "7% of the")])
def test_tasks_of_some_items_say_how_many(limit: float | None, said: str, tmp_path: Path) -> None:
    page = page_of(checkpoint(tmp_path / "scored", SCORES=SCORES | {"limit": limit}))
    assert f"; tasks with {said}" in page


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "bare", RECIPE=None)
    written = write_page(folder, tmp_path / "bare.html")
    page = (tmp_path / "bare.html").read_text(encoding="utf-8")
    assert written.missing == (NO_SCORES, NO_GENERATIONS) and written.bytes == len(page.encode())
    assert NO_SCORES in page and 'id="distillation"' not in page and 'id="recipe"' not in page
    assert "unknown: there is no recipe.yaml of this version" in page


def test_a_dense_student_has_a_page(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "student", REPORT=None, RECIPE=None, DISTILLATION=DISTILLATION)
    written = write_page(folder, tmp_path / "student.html")
    assert NO_LAYERS in written.missing
    assert "held-out perplexity" in (tmp_path / "student.html").read_text(encoding="utf-8")


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    rows = tuple(
        replace(row, name=f"model.layers.{index}.{EVIL}", stored=EVIL, fallback=EVIL, steps=(EVIL,))
        for index, row in enumerate(report_of().layers)
    )
    names = {"model": EVIL, "base_model": EVIL, "recipe": EVIL, "license": EVIL, "revision": EVIL}
    report = report_of(**names, layers=rows, warnings=(EVIL,), fused=(EVIL,), versions={EVIL: EVIL})
    tasks = {EVIL: {"acc": 0.5}}
    scores = SCORES | {"text": EVIL}
    scores |= {side: SCORES[side] | {"tasks": tasks} for side in ("dense", "compressed")}
    done = DISTILLATION | {"teacher_id": EVIL, "losses": {EVIL: EVIL}, "data": {"source": EVIL}, "trained": {EVIL: 1}}
    sentences = {EVIL: {EVIL: EVIL}}
    files = {"RECIPE": f"# {EVIL}", "SCORES": scores, "DISTILLATION": done, "GENERATIONS": sentences}
    page = page_of(checkpoint(tmp_path / "evil", report, **files))
    assert "script" not in {tag for tag, _ in _Reader(page).elements}
    assert page.count("&lt;script&gt;") > 15 and EVIL not in page
    assert not any(name.startswith("on") for _, attributes in _Reader(page).elements for name in attributes)
    assert "huggingface.co" not in page  # an address is made of a model's name only where it is one


def test_a_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = _Reader(page_of(checkpoint(tmp_path / "full", **FULL)))
    assert not {"script", "img", "link", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.elements}
    assert not any({"src", "srcset"} & attributes.keys() for _, attributes in page.elements)
    assert not re.search(r"url\(|@import", "".join(page.text))
    links = {attributes["href"] for attributes in page.named("a")}
    assert {link for link in links if not link.startswith("#")} == {"https://huggingface.co/maker/tiny"}
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    policy = next(one["content"] for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_a_page_is_accessible(tmp_path: Path) -> None:
    text = page_of(checkpoint(tmp_path / "full", **FULL))
    page = _Reader(text)
    assert next(page.named("html"))["lang"] == "en"
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        assert "<caption>" in table and 'scope="row"' in table
    targets = {attributes.get("id") for _, attributes in page.elements}
    drawings = list(page.named("svg"))
    assert len(drawings) == 4  # errors, bits, two curves
    for drawing in drawings:
        assert drawing["role"] == "img" and drawing["aria-labelledby"] in targets
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in text


@pytest.mark.slow
def test_a_page_of_a_huge_model_stays_small(tmp_path: Path) -> None:
    experts = tuple(f"mlp.experts.{number}.{name}_proj" for number in range(64) for name in ("up", "gate", "down"))
    report = report_of(80, experts)
    texts = {f"prompt {number}": {"dense": "word " * 5000} for number in range(100)}
    long = DISTILLATION | {"history": [DISTILLATION["history"][0] | {"tokens": count} for count in range(20_000)]}
    recipe = RECIPE + "# comment\n" * 100_000
    files = {"RECIPE": recipe, "DISTILLATION": long, "GENERATIONS": texts, "SCORES": SCORES}
    page = page_of(checkpoint(tmp_path / "huge", report, **files))
    assert len(page.encode()) < 2_000_000
    assert "mlp.experts.*.up_proj" in page and "medians of layers that share a row" in page


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "full", **FULL)
    pages = [tmp_path / name for name in ("one.html", "two.html")]
    for page in pages:
        write_page(folder, page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_an_output_that_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "small")
    (folder / file_names.MANIFEST).write_text("{}")
    (tmp_path / "there.html").write_text("mine")
    for output, kind in (
        (tmp_path / "there.html", DiskError),
        (tmp_path / "page.pdf", RecipeError),
        (tmp_path / "no" / "page.html", DiskError),
        (folder / "page.html", DiskError),
    ):
        with pytest.raises(kind):
            write_page(folder, output)
    assert (tmp_path / "there.html").read_text() == "mine" and not list(folder.glob("*.html"))


def test_a_folder_of_another_tool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither report.json nor distillation.json"):
        write_page(tmp_path, tmp_path.with_suffix(".html"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("SCORES", "{"),
        ("SCORES", {"dense": {}}),
        ("SCORES", SCORES | {"dense": SCORES["dense"] | {"perplexity": 0}}),
        ("DISTILLATION", {"history": []}),
        ("DISTILLATION", []),
        ("ALLOCATION", {"target": {}}),
        ("GENERATIONS", {"prompt": "text"}),
        ("GENERATIONS", ["prompt"]),
        ("REPORT", report_of().to_json() | {"bytes": "many"}),
        ("REPORT", report_of().to_json() | {"bytes": 0}),
        ("REPORT", report_of().to_json() | {"layers": None}),
    ],
)
def test_damage_is_one_sentence_about_its_file(tmp_path: Path, name: str, content: Any) -> None:
    folder = checkpoint(tmp_path / "small", **{name: content})
    with pytest.raises(LLMCompressError) as found:
        write_page(folder, tmp_path / "page.html")
    assert getattr(file_names, name) in str(found.value) and found.value.exit_code == 5
    assert not (tmp_path / "page.html").exists()


def test_generations_are_kept_in_the_checkpoint(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "small")
    seal(folder)
    add_generations(folder, GENERATIONS)
    assert check_manifest(folder)  # it is one of its files now
    assert read_generations(folder / file_names.GENERATIONS) == GENERATIONS
    page = page_of(folder)
    assert "there was a box." in page
    other = write_page(folder, tmp_path / "other.html", {"Why": {"both": "not"}})
    assert other.missing == (NO_SCORES,) and "there was a box." not in (tmp_path / "other.html").read_text()
    with pytest.raises(InputError, match="must be"):
        add_generations(folder, {"prompt": {"model": 3}})


def test_a_heat_map_places_and_shades() -> None:
    values = {("q", 0): 0.01, ("q", 1): 0.1, ("v", 0): 1.0, ("v", 1): None, ("v", 2): 0.0}
    found = heat_map("Error", values, "", ".2f", logarithmic=True)
    strengths = [cell.strength for cell in found.cells]
    assert strengths[0] == pytest.approx(0.08) and strengths[2] == 1.0 and strengths[3] is None
    assert strengths[1] == pytest.approx((strengths[0] + strengths[2]) / 2, abs=1e-3)  # halfway, in the logarithm
    assert strengths[4] == pytest.approx(0.08)  # zero has no logarithm
    assert [cell.x for cell in found.cells[:2]] == [cell.x for cell in found.cells[2:4]]  # columns are blocks
    assert found.cells[2].y == found.cells[3].y > found.cells[0].y
    assert (found.low, found.high) == ("0.01", "1.00") and found.cells[3].title == "block 1, v: stayed dense"
    bits = heat_map("Bits", {("q", 0): 2.0, ("q", 1): 4.0}, "bits", ".1f", logarithmic=False)
    assert bits.cells[0].strength == pytest.approx(0.54) and bits.low == "0.0"  # half of the way from nothing


def test_a_curve_stays_inside_its_picture() -> None:
    points = [(0.0, 30.0), (1000.0, 27.0), (2000.0, math.nan), (3000.0, 25.0)]
    found = curve("perplexity", points, 24.0, zero=False)
    assert found is not None and len(found.points) == 3 and found.level is not None
    heights = [y for _, y, _ in found.points]
    assert heights == sorted(heights) and all(0 <= y <= 230 for y in (*heights, found.level))
    assert found.level > heights[-1]  # the teacher is better, so lower in the picture
    assert curve("one point", points[:1], zero=True) is None
    level = curve("constant", [(0.0, 5.0), (9.0, 5.0)], zero=False)
    assert level is not None and all(math.isfinite(y) for _, y, _ in level.points)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (21.7, 30.2), (0.0013, 0.0019), (-3.0, 5.0), (7.0, 7.0), (0, 9e9)]
)
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9
    steps = {round(after - before, 9) for before, after in pairwise(found)}
    assert len(steps) == 1


def test_names_lose_the_machine() -> None:
    assert without_folders("/folder/somebody/model") == "model" and without_folders("../model") == "model"
    assert without_folders("maker/tiny") == "maker/tiny" and without_folders("stdlib") == "stdlib"
