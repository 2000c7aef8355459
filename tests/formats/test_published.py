"""Nothing that is written for others names a folder, a text's folder, a home or a token of this machine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.distillation.run import distill
from llmcompress.formats.export import export
from llmcompress.formats.hub import _card, _proof, push
from llmcompress.formats.model_card import card
from llmcompress.models.files.checkpoint import add_file, check_manifest
from llmcompress.reporting import report as reports
from tests.compression.test_run import TEXT
from tests.tiny import save_tiny

FOLDER, WORDS, HOME, TOKEN = "markermodels", "markertexts", "markerhome", "hf_markertoken"
OPTIONS = [[{"method": "rtn", "bits": bits, "group_size": 8}] for bits in (2, 4)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in a folder that nobody is to know, with what lies beside it, and texts in another."""
    folder = tmp_path_factory.mktemp("published")
    dense = save_tiny("llama", folder / FOLDER / "dense")
    for name, text in (("wandb_key.json", '{"key": "markerkey"}'), ("notes.txt", "markernotes")):
        (dense / name).write_text(text)
    (dense / "merges.txt").symlink_to("/etc/passwd")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"_name_or_path": f"/opt/{FOLDER}/secret"}))
    (folder / WORDS).mkdir()
    (folder / WORDS / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    return folder


@pytest.fixture(autouse=True)
def _markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path / HOME))


def recipe(place: Path, **more: Any) -> dict[str, Any]:
    calibration = {"dataset": str(place / WORDS / "text.txt"), "samples": 8, "length": 32, "held_out": 2}
    return {"version": 1, "calibration": calibration, "rules": [{"match": "*", "steps": OPTIONS[1]}]} | more


def markers(folder: Path, place: Path) -> Iterator[str]:
    """Yield each place where a file of the folder names what it must not."""
    secret = [FOLDER, WORDS, HOME, TOKEN, "markerkey", "markernotes", "root:", str(place)]
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        yield from (f"{path.name}: {word}" for word in secret if word.encode() in content or word in path.name)


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    """A folder with a checkpoint of each kind."""
    out = place / "out"
    lc.compress(place / FOLDER / "dense", recipe(place), out / "plain")
    ranks = [{"match": "*", "steps": [*OPTIONS[1], {"method": "svd", "rank": 2}]}]
    lc.compress(place / FOLDER / "dense", recipe(place, rules=ranks), out / "ranks")
    tables = dict.fromkeys(("embeddings", "table", "head"), OPTIONS[1])  # a warning names the model, whose head is tied
    lc.compress(save_tiny("qwen3", place / FOLDER / "tied"), recipe(place, **tables), out / "tied")
    asked = recipe(place, rules=[], options=OPTIONS, target={"bpw": 5.0})
    lc.compress(place / FOLDER / "dense", asked, out / "target")
    data = {"dataset": str(place / WORDS / "text.txt"), "samples": 20, "length": 32, "held_out": 4}
    section = {"version": 1, "data": data, "rates": {"scales": 1e-3}, "batch": 4, "compute": "float32", "steps": 2}
    distill(out / "plain", place / FOLDER / "dense", section, out / "distilled")
    return out


def test_checkpoints_and_cards_have_no_private_entries(made: Path, place: Path, tmp_path: Path) -> None:
    for name in ("plain", "tied", "target", "distilled"):
        found = shutil.copytree(made / name, tmp_path / name)
        assert (found / "recipe.yaml").is_file() and "text.txt" in (found / "recipe.yaml").read_text()
        for file, content in _card(found, "me/small", _proof(found)).items():
            (found / file).write_bytes(content)
    assert len(list(tmp_path.rglob("README.md"))) == 4
    assert not list(markers(tmp_path, place))


@pytest.mark.parametrize("to", ["dense", "compressed-tensors", "mlx", "peft"])
def test_exports_have_no_private_entries(to: str, made: Path, place: Path, tmp_path: Path) -> None:
    export(made / ("ranks" if to == "peft" else "plain"), tmp_path / to, to, allow_dense=True)
    assert list(tmp_path.rglob("*.safetensors"))
    assert not list(markers(tmp_path, place))


def test_push_announces_all_files_before_it_sends_them(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list comes before anything goes, and nothing goes that is not on it."""
    order: list[Any] = []

    def upload(folder: Path, to: str, names: list[str], cards: dict[str, bytes], *_: Any) -> str:
        order.append({*names, *cards})
        return "there"

    monkeypatch.setattr("llmcompress.formats.hub._upload", upload)
    monkeypatch.setattr("llmcompress.formats.hub.verify", lambda folder, **_: None)  # tested elsewhere, and slow
    (made / "plain" / "left.txt").unlink(missing_ok=True)
    push(made / "plain", "me/small", announce=lambda files: order.append(set(files)))
    assert order[0] == order[1] and {"model.safetensors", "config.json", "README.md"} <= order[0]
    ended = CliRunner().invoke(app, ["push", str(made / "plain"), "me/small"])
    assert ended.exit_code == 0 and " files go to me/small" in ended.stderr and "model.safetensors  " in ended.stderr


@pytest.mark.slow
def test_push_leaves_out_files_of_older_releases(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(made / "plain", tmp_path / "old")
    add_file(folder, "wandb_key.json", '{"key": "markerkey"}')
    add_file(folder, "LICENSE", "You may.")
    sent: dict[str, bytes] = {}

    def upload(folder: Path, to: str, names: list[str], cards: dict[str, bytes], *_: Any) -> str:
        sent.update({name: (folder / name).read_bytes() for name in names} | cards)
        return "there"

    monkeypatch.setattr("llmcompress.formats.hub._upload", upload)
    monkeypatch.setattr("llmcompress.formats.hub.verify", lambda folder, **_: None)  # tested elsewhere, and slow
    assert set(push(folder, "me/small").files) == set(sent) and "wandb_key.json" in caplog.text
    assert "LICENSE" in sent and not [name for name, content in sent.items() if b"markerkey" in content + name.encode()]
    assert b"wandb_key" not in sent["manifest.json"]
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name, content in sent.items():
        (pulled / name).write_bytes(content)
    assert check_manifest(pulled)


@pytest.mark.slow
def test_code_names_in_configs_are_dropped_with_a_warning(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dense = shutil.copytree(place / FOLDER / "dense", tmp_path / "dense", symlinks=True)
    entries = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(entries | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    out = lc.compress(dense, recipe(place), tmp_path / "out").folder
    assert not {"auto_map", "_name_or_path"} & json.loads((out / "config.json").read_text()).keys()
    assert "config.json goes along without the names of code" in caplog.text
    lc.drop_blocks(dense, [1], tmp_path / "short")
    assert "auto_map" not in (tmp_path / "short" / "config.json").read_text()


HOSTILE = "x|](https://huggingface.co) <img src=x> ![a](b) `</code>`\n---\n# title\n```\n**bold** _it_ ~~no~~ &lt;"


def test_card_escapes_markdown_in_names(made: Path) -> None:
    """Names, sentences and the recipe of others: no tag, link, picture, heading, end of a block or a cell."""
    report = reports.read(made / "plain")
    rows = tuple(
        replace(row, name=HOSTILE, stored=HOSTILE, fallback=HOSTILE, steps=(HOSTILE,)) for row in report.layers
    )
    calibration = dict(report.calibration or {}) | {"source": HOSTILE}
    names = {"base_model": HOSTILE, "license": HOSTILE, "recipe": HOSTILE, "warnings": (HOSTILE,)}
    text = card(replace(report, layers=rows, calibration=calibration, **names), "me/small", f"name: {HOSTILE}")
    front, body = ModelCard(text).data.to_dict(), ModelCard(text).text
    assert front["tags"] == ["llmcompress", HOSTILE] and "base_model" not in front and "license" not in front
    shown, inside, fence = [], False, ""
    for line in body.splitlines():
        marks = line[: len(line) - len(line.lstrip("`"))]
        if len(marks) >= 3 and (not inside or len(marks) >= len(fence)):
            inside, fence = not inside, marks
        elif not inside:
            shown.append(line)
    assert not inside and not [line for line in shown if line.startswith("# title") or line == "---"]
    outside = [re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(r"\\.", "", line)) for line in shown]
    for mark in ("<", "://", "![", "**", "~~"):
        assert not [line for line in outside if mark in line], mark
    bars = {line.count("|") - line.count("\\|") for line in shown if line.startswith("| x")}
    assert bars == {7}


def test_a_card_loads_by_a_class_of_transformers_alone(made: Path) -> None:
    """Its program is run as it stands."""
    report = reports.read(made / "plain")
    for name in ("AutoModel\nimport os; os.system('x')  #", "AutoModelé", "exec_it"):
        text = card(replace(report, auto_class=name), "me/small", "version: 1")
        assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in text and name not in text
    vision = card(replace(report, auto_class="AutoModelForImageTextToText"), "me/small", "version: 1")
    assert "AutoModelForImageTextToText.from_pretrained" in vision


@pytest.mark.parametrize("quiet", [False, True])
def test_command_warns_of_files_that_stay_behind(quiet: bool, place: Path, tmp_path: Path) -> None:
    words = ["drop", str(place / FOLDER / "dense"), "--blocks", "1", "-o", str(tmp_path / "short")]
    ended = CliRunner().invoke(app, [*words, *(["--quiet"] if quiet else [])])
    assert ended.exit_code == 0 and "wandb_key.json" not in ended.stdout
    said = [line for line in ended.stderr.splitlines() if "wandb_key.json" in line]
    assert not said if quiet else [line.startswith("warning: ") for line in said] == [True]
