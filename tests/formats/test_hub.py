"""Publishing against a stand-in Hub: what is pushed comes back, and a failure publishes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from llmcompress.errors import HubError, InputError, RecipeError
from llmcompress.evaluation.score import score
from llmcompress.formats.hub import push
from llmcompress.formats.model_card import card
from llmcompress.models.dense.locate import locate
from llmcompress.models.files.checkpoint import check_manifest, files_of
from llmcompress.reporting.plots import layers_png
from llmcompress.reporting.report import group_by_kind, read
from tests.rules.source_tree import ROOT
from tests.stand_in_hub import StandInHub
from tests.tiers import tiered
from tests.tiny import save_tiny

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 3, "group_size": 16}]}]
PUSH = """
import json, sys
from llmcompress.errors import LLMCompressError
from llmcompress.formats.hub import push
folder, repository, *flags = sys.argv[1:]
try:
    print(json.dumps(push(folder, repository, dry_run="dry" in flags).to_json()))
except LLMCompressError as error:
    print(f"[{error.exit_code}] {type(error).__name__}: {error}")
"""
PULL = """
import sys, torch, llmcompress
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
AutoTokenizer.from_pretrained(sys.argv[1])
torch.save(model(torch.arange(20)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("hub")
    dense = save_tiny("llama", place / "dense")
    (dense / "README.md").write_text("---\nlicense: mit\n---\nA model.")
    out = lc.compress(dense, {"version": 1, "rules": RULES}, place / "out").folder
    return {"dense": dense, "out": out}


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with StandInHub() as server:
        yield server


def python(hub: StandInHub, cache: Path, code: str, *words: str, token: str | None = "hf_test") -> str:
    """Runs a program whose Hub is the stand-in; Hugging Face reads these variables when it is imported."""
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    dropped = ("HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    secret = {} if token is None else {"HF_TOKEN": token}
    environment = inherited | own | secret | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert token is None or token not in done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


@pytest.mark.nightly
def test_pushed_checkpoint_loads_from_the_hub(hub: StandInHub, folders: dict[str, Path], tmp_path: Path) -> None:
    dry = json.loads(python(hub, tmp_path / "a", PUSH, str(folders["out"]), "me/small", "dry"))
    assert dry["commit"] is None and hub.commits == {}
    sent = json.loads(python(hub, tmp_path / "a", PUSH, str(folders["out"]), "me/small"))
    assert sent["files"] == dry["files"] and len(hub.commits["me/small"]) == 2, "the initial commit, and one more"
    assert {name: len(data) for name, data in hub.files("me/small").items()} == sent["files"]
    python(hub, tmp_path / "b", PULL, "me/small", str(tmp_path / "logits"))
    model = AutoModelForCausalLM.from_pretrained(folders["out"], dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), model(torch.arange(20)[None]).logits)
    metadata = ModelCard(hub.files("me/small")["README.md"].decode()).data
    assert isinstance(metadata, ModelCardData)
    assert metadata.license == "mit" and metadata.library_name == "transformers" and "llmcompress" in metadata.tags
    # a smaller checkpoint over it: no shard of the old one stays
    one = [{"match": "*.0.*", "steps": RULES[0]["steps"]}, {"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]
    lc.compress(folders["dense"], {"version": 1, "rules": one}, tmp_path / "other")
    python(hub, tmp_path / "a", PUSH, str(tmp_path / "other"), "me/small")
    assert hub.files("me/small").keys() == sent["files"].keys()


COMPRESS = """
import json, sys, llmcompress as lc
from llmcompress.errors import LLMCompressError
steps = [{"method": "rtn", "bits": 3, "group_size": 16}]
try:
    report = lc.compress(sys.argv[1], {"version": 1, "rules": [{"match": "*", "steps": steps}]}, sys.argv[2]).report
    print(json.dumps([report.base_model, report.revision, report.license]))
except LLMCompressError as error:
    print(f"[{error.exit_code}] {error}")
"""


@pytest.mark.nightly
def test_a_model_of_the_hub_is_compressed(hub: StandInHub, tmp_path: Path) -> None:
    """Of the revision asked for, after two mishaps, without reading anything that is not needed, or anything twice."""
    dense = save_tiny("llama", tmp_path / "dense", max_shard_size="20KB")
    files = {path.name: path.read_bytes() for path in dense.iterdir()}
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    unneeded = {"pytorch_model.bin": b"pickled", "onnx/model.onnx": b"another", "model.gguf": b"a third"}
    commit = hub.commit("org/dense", files | unneeded | {"README.md": b"---\nlicense: mit\n---\n"})
    hub.commit("org/dense", {"config.json": b"{}"})  # what the branch has become
    words = (f"org/dense@{commit}", str(tmp_path / "out"))
    hub.fail = lambda method, path: 500 if path.endswith(shards[-1]) else None
    failed = python(hub, tmp_path / "cache", COMPRESS, *words)
    assert failed.startswith("[5] the Hub") and not (tmp_path / "out").exists()
    cut: list[str] = []

    def once(method: str, path: str) -> str | None:
        if method != "GET" or not path.endswith(shards[-1]) or cut:
            return None
        cut.append(path)
        return "truncate"

    hub.fail = once
    before = len(hub.asked)
    assert json.loads(python(hub, tmp_path / "cache", COMPRESS, *words)) == ["org/dense", commit, "mit"]
    got = [path.rpartition("/")[2] for method, path in hub.asked[before:] if method == "GET" and "/resolve/" in path]
    assert got == [shards[-1], shards[-1]], "the second time only what was missing, and its rest"
    assert not any(name.rpartition("/")[2] in path for name in unneeded for _, path in hub.asked)
    there = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    steps = [{"method": "rtn", "bits": 3, "group_size": 16}]
    lc.compress(dense, {"version": 1, "rules": [{"match": "*", "steps": steps}]}, tmp_path / "local")
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "local").glob("*.safetensors")}


@pytest.fixture
def here(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandInHub:
    """The stand-in for pushes from this process, which does not wait between tries."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("llmcompress.formats.hub.verify", lambda folder, **_: None)  # tested elsewhere, and slow
    monkeypatch.setattr("llmcompress.formats.hub.layers_png", lambda report: b"a plot")
    return hub


LOCATE = """
import json, sys
from llmcompress.models.dense.locate import locate
print(json.dumps([str(locate(name).folder) for name in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_checkpoint_is_whole_by_its_hub_id(hub: StandInHub, folders: dict[str, Path], tmp_path: Path) -> None:
    """Of a model of ours every file that its manifest lists is downloaded, of a dense one no report."""
    hub.commit("me/small", {path.name: path.read_bytes() for path in folders["out"].iterdir()} | {"notes.md": b"more"})
    hub.commit("me/dense", {path.name: path.read_bytes() for path in folders["dense"].iterdir()} | {"recipe.yaml": b""})
    whole, dense = map(Path, json.loads(python(hub, tmp_path / "cache", LOCATE, "me/small", "me/dense")))
    assert check_manifest(whole) and files_of(whole) == files_of(folders["out"])
    assert not (dense / "recipe.yaml").exists()


def test_files_that_tools_put_beside_a_copy_are_no_damage(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders["out"], tmp_path / "copy"))
    for name in (".gitattributes", ".git/HEAD", ".cache/huggingface/download/config.json.lock"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("")
    (copy / ".empty").mkdir()
    assert check_manifest(copy)
    (copy / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"notes\.txt is not part of the checkpoint"):
        check_manifest(copy)


@pytest.mark.parametrize("failure", tiered([500, "drop"], lambda failure: failure == "drop"))
@pytest.mark.parametrize(
    "at",
    tiered(
        ["/api/repos/create", "/preupload/", "/objects/batch", "/stored/", "/commit/"],
        {"/stored/", "/commit/"}.__contains__,
    ),
)
def test_failed_push_publishes_nothing_and_the_next_finishes(
    at: str, failure: int | str, here: StandInHub, folders: dict[str, Path]
) -> None:
    here.fail = lambda method, path: failure if at in path and method != "GET" else None
    with pytest.raises(HubError, match="^me/small: .*; push again$"):
        push(folders["out"], "me/small")
    assert all(files == {} for _, files in here.commits.get("me/small", []))
    here.fail = lambda method, path: None
    sent = len([1 for method, _ in here.asked if method == "PUT"])
    assert push(folders["out"], "me/small").commit is not None
    assert "model.safetensors" in here.files("me/small")
    if at == "/commit/":
        assert sent == len([1 for method, _ in here.asked if method == "PUT"]), "stored files were sent again"


@pytest.mark.parametrize(
    "token, status, sentence",
    [
        ("", None, "there is no token for the Hub"),
        ("hf_other", None, "does not accept the token"),
        ("hf_test", 403, "may not write there"),
        ("hf_test", 412, "somebody else is writing"),
    ],
)
def test_hub_errors_become_one_sentence(
    token: str,
    status: int | None,
    sentence: str,
    here: StandInHub,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    here.fail = lambda method, path: status if "/commit/" in path else None
    with pytest.raises(HubError, match=sentence) as refused:
        push(folders["out"], "me/small")
    assert "\n" not in str(refused.value) and ";" in str(refused.value)


def test_another_model_is_not_overwritten(here: StandInHub, folders: dict[str, Path]) -> None:
    here.commit("me/small", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"precious"})
    with pytest.raises(HubError, match="holds a model that llmcompress did not write; choose another name"):
        push(folders["out"], "me/small")
    assert here.files("me/small")["model.safetensors"] == b"precious"


def test_a_push_leaves_nothing_of_the_model_before(here: StandInHub, folders: dict[str, Path]) -> None:
    """Files of ours that the new model lacks go, with its tokenizer's and templates; what others put there stays."""
    stale = ["eval.json", "allocation.json", "distillation.json", "passport.json", "special_tokens_map.json"]
    stale += ["tokenizer.model", "model-00001-of-00002.safetensors", "additional_chat_templates/tools.jinja"]
    mine = ("notes.md", "onnx/model.safetensors")
    push(folders["out"], "me/small")
    whole = here.files("me/small")
    here.commit("me/small", whole | dict.fromkeys((*stale, *mine), b"{}"))
    push(folders["out"], "me/small")
    assert here.files("me/small").keys() == whole.keys() | set(mine)


def test_templates_and_licences_of_a_hub_model_are_downloaded(
    here: StandInHub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = here.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
    wanted = ("additional_chat_templates/tools.jinja", "NOTICE", "COPYING.md", "LICENCE.txt", "USE_POLICY.md")
    files = {path.name: path.read_bytes() for path in folders["dense"].iterdir()}
    here.commit("org/dense", files | dict.fromkeys((*wanted, "onnx/config.json", "onnx/other.jinja"), b"{}"))
    assert set(files_of(locate("org/dense").folder)) == files.keys() | set(wanted)


def test_who_sees_a_new_repository_is_left_to_the_account(here: StandInHub, folders: dict[str, Path]) -> None:
    push(folders["out"], "me/small")
    push(folders["out"], "me/other", private=True)
    assert here.visibility == {"me/small": None, "me/other": "private"}


def test_push_refuses_damaged_checkpoints_and_wrong_names(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["out"], tmp_path / "damaged")
    [weights, *_] = sorted((tmp_path / "damaged").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="not as it was written"):
        push(tmp_path / "damaged", "me/small", dry_run=True)
    with pytest.raises(RecipeError, match="is not a Hub repository; give owner/name"):
        push(folders["out"], "small", dry_run=True)
    AutoModelForCausalLM.from_pretrained(folders["out"]).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folders["out"]).save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match=r"has no manifest.json, report and recipe for a card; push a folder that"):
        push(tmp_path / "saved", "me/small", dry_run=True)
    with pytest.raises(InputError, match="holds no model compressed by llmcompress"):
        push(folders["dense"], "me/small", dry_run=True)


def test_card_has_scores_and_limits(folders: dict[str, Path], tmp_path: Path) -> None:
    report = read(folders["out"])
    plain = card(report, "me/small", "version: 1")
    assert (
        "Nobody has scored this checkpoint" in plain and f"{report.bytes:,}" in plain and f"{report.bpw:.3f}" in plain
    )
    assert "install it from its repository" in plain and "pip install" not in plain, "it is on no index"
    text = tmp_path / "text.txt"
    text.write_text("The miller counts every sack of corn that comes from the forty farms. " * 40)
    protocol = lc.Protocol(text, windows=2, length=32)
    found = score(folders["out"], protocol, against=str(folders["dense"]), save=True)
    scores = json.loads((folders["out"] / "eval.json").read_text())
    scores["compressed"]["tasks"] = {"arc_easy": {"acc": 0.5, "acc_stderr": 0.1, "samples": 9}}
    scores["dense"]["tasks"] = {"arc_easy": {"acc": 0.6, "acc_stderr": 0.1, "samples": 9}}
    full = card(report, "me/small", "version: 1", scores)
    assert "There is no plot" in plain and "](layers.png)" in card(report, "me/small", "version: 1", plot="layers.png")
    assert f"| 0 | {found['kl']:.4f} ± {found['kl_stderr']:.4f} |" in full
    assert "| arc_easy: acc | 0.6000 ± 0.1000 | 0.5000 ± 0.1000 |" in full
    for side in ("dense", "compressed"):  # as saved before there were standard errors
        scores[side] = {name: value for name, value in scores[side].items() if not name.endswith("_stderr")}
    assert f"| {scores['dense']['perplexity']:.3f} | {scores['compressed']['perplexity']:.3f} |" in card(
        report, "me/small", "version: 1", scores
    )
    metadata = ModelCard(full).data
    assert isinstance(metadata, ModelCardData) and metadata.eval_results is not None
    [result] = metadata.eval_results
    assert result.dataset_name == "arc_easy" and result.metric_value == 0.5
    assert push(folders["out"], "me/small", dry_run=True).files["eval.json"] > 100
    with pytest.raises(RecipeError, match="saving scores needs"):
        score(folders["dense"], protocol, save=True)


def test_card_has_every_layer(here: StandInHub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.formats.hub.layers_png", layers_png)  # the real one
    report = read(folders["out"])
    kinds = group_by_kind(report)
    assert {kind: [depth for depth, _ in rows] for kind, rows in kinds.items()} == {kind: [0, 1] for kind in kinds}
    assert len(kinds) == 7 and kinds["mlp.down_proj"][1][1].name == "model.layers.1.mlp.down_proj"
    push(folders["out"], "me/small")
    published = here.files("me/small")
    assert published["layers.png"].startswith(b"\x89PNG") and b"](layers.png)" in published["README.md"]


@pytest.mark.slow
def test_without_matplotlib_the_card_says_so(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.formats.hub.find_spec", lambda name: None)
    assert "layers.png" not in push(folders["out"], "me/small", dry_run=True).files
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RecipeError, match="plots need matplotlib"):
        layers_png(read(folders["out"]))
