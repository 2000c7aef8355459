"""Nothing that is written for others names a folder, a text's folder, a home or a token of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.distill.run import distill
from llmcompress.export.formats import export
from llmcompress.export.hub import _card, push
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
    asked = recipe(place, rules=[], options=OPTIONS, target={"bpw": 5.0})
    lc.compress(place / FOLDER / "dense", asked, out / "target")
    data = {"dataset": str(place / WORDS / "text.txt"), "samples": 20, "length": 32, "held_out": 4}
    section = {"version": 1, "data": data, "rates": {"scales": 1e-3}, "batch": 4, "compute": "float32", "steps": 2}
    distill(out / "plain", place / FOLDER / "dense", section, out / "distilled")
    return out


def test_checkpoints_and_cards_tell_nothing(made: Path, place: Path, tmp_path: Path) -> None:
    for name in ("plain", "target", "distilled"):
        found = shutil.copytree(made / name, tmp_path / name)
        assert (found / "recipe.yaml").is_file() and "text.txt" in (found / "recipe.yaml").read_text()
        for file, content in _card(found, "me/small").items():
            (found / file).write_bytes(content)
    assert len(list(tmp_path.rglob("README.md"))) == 3
    assert not list(markers(tmp_path, place))


@pytest.mark.parametrize("to", ["dense", "compressed-tensors", "mlx"])
def test_exports_tell_nothing(to: str, made: Path, place: Path, tmp_path: Path) -> None:
    export(made / "plain", tmp_path / to, to, allow_dense=True)
    assert not list(markers(tmp_path, place))


def test_a_push_says_first_what_it_sends(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list comes before anything goes, and nothing goes that is not on it."""
    order: list[Any] = []

    def upload(folder: Path, to: str, names: list[str], cards: dict[str, bytes], *_: Any) -> str:
        order.append({*names, *cards})
        return "there"

    monkeypatch.setattr("llmcompress.export.hub._upload", upload)
    (made / "plain" / "left.txt").unlink(missing_ok=True)
    push(made / "plain", "me/small", announce=lambda files: order.append(set(files)))
    assert order[0] == order[1] and {"model.safetensors", "config.json", "README.md"} <= order[0]
    ended = CliRunner().invoke(app, ["push", str(made / "plain"), "me/small"])
    assert ended.exit_code == 0 and "to me/small go " in ended.stderr and "model.safetensors  " in ended.stderr
