"""Code that a model brings along: run only where it is trusted, needed and there; then it goes with the output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils as modules
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.errors import InputError
from llmcompress.formats.model_card import card
from llmcompress.models.dense.companions import companions
from llmcompress.models.dense.config import code_files
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.model import resolve
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.identity import teacher_digest
from llmcompress.reporting import report as reports
from tests.own_code import AUTO_MAP, FILES, MARKER, save_own
from tests.stand_in_hub import StandInHub
from tests.tiny import save_tiny
from tests.zoo import text_for_calibration

STEPS = [{"method": "gptq", "bits": 4, "group_size": 16}]
IDS = torch.arange(3, 27)[None]
FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
import llmcompress
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[3] == "yes")
torch.save(model(input_ids=torch.arange(3, 27)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the model, `dense`, and the model compressed, `small`.

    transformers' copies of code have a place of their own meanwhile.
    """
    place = tmp_path_factory.mktemp("own")
    copies = str(place / "modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", copies)
        patch.setattr(modules, "HF_MODULES_CACHE", copies)
        patch.setattr(sys, "path", list(sys.path))
        save_own(place / "dense")
        lc.compress(place / "dense", recipe(place), place / "small", trust_remote_code=True)
        yield place
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def marker(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in which code leaves a line when it is run, even if it was run before."""
    monkeypatch.setenv(MARKER, str(tmp_path / "marker"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "marker"


@pytest.fixture
def dense(place: Path, tmp_path: Path) -> Path:
    """The model of an architecture of its own, to be changed."""
    return Path(shutil.copytree(place / "dense", tmp_path / "dense"))


@pytest.fixture
def small(place: Path) -> Path:
    """The model, compressed."""
    return place / "small"


def recipe(place: Path) -> dict[str, Any]:
    """Every linear in 4 bits."""
    calibration = {"dataset": str(text_for_calibration(place)), "samples": 4, "length": 32, "held_out": 1}
    return {"version": 1, "calibration": calibration, "rules": [{"match": "*", "steps": STEPS}]}


def lesson(place: Path, **rates: float) -> dict[str, Any]:
    """One step of a distillation."""
    settings = {"rates": rates, "steps": 1, "batch": 2, "micro_batch": 2}
    return {"version": 1, "data": recipe(place)["calibration"]} | settings


def fresh(folder: Path, output: Path, trusted: str) -> subprocess.CompletedProcess[str]:
    """Run a process that loads `folder` and writes logits to `output`."""
    command = [sys.executable, "-c", FRESH, str(folder), str(output), trusted]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def test_untrusted_code_is_refused_by_every_command_and_never_runs(dense: Path, tmp_path: Path, marker: Path) -> None:
    asked, lessons, out = tmp_path / "recipe.json", tmp_path / "lesson.json", str(tmp_path / "out")
    asked.write_text(json.dumps(recipe(tmp_path)))
    lessons.write_text(json.dumps(lesson(tmp_path, scales=1e-3)))
    prompts = text_for_calibration(tmp_path)
    commands = [
        ["plan", dense, asked],
        ["compress", dense, asked, "-o", out],
        ["compress", dense, "--bpw", "4", "-o", out],
        ["frontier", dense, "--bpw", "4", "-o", out],
        ["eval", dense],
        ["compare", dense, dense],
        ["bench", dense],
        ["distill", dense, lessons, "--teacher", dense, "-o", out],
        ["drop", dense, "--blocks", "0", "-o", out],
        ["answer", dense, prompts, "-o", out],
    ]
    for command in commands:
        found = CliRunner().invoke(app, list(map(str, command)))
        said = " ".join(found.output.split())
        assert found.exit_code == InputError.exit_code, command
        assert "needs Python code of its own" in said and "--trust-remote-code" in said, command
    assert not marker.exists() and not Path(out).exists()


def test_experts_of_unknown_code_stay(dense: Path, marker: Path) -> None:
    found = CliRunner().invoke(app, ["experts", "prune", str(dense), "--keep", "2", "--dry-run"])
    said = " ".join(found.output.split())
    assert found.exit_code == InputError.exit_code and "needs Python code of its own, trusted or not" in said
    assert "--trust-remote-code" not in said and not marker.exists()


def test_untrusted_code_of_an_output_is_refused_and_never_runs(small: Path, tmp_path: Path, marker: Path) -> None:
    for use in (
        lambda: lc.verify(small),
        lambda: lc.export(small, tmp_path / "out", "dense"),
        lambda: lc.push(small, "me/small", dry_run=True),
        lambda: lc.score(small),
    ):
        with pytest.raises(InputError, match="--trust-remote-code"):
            use()
    assert lc.read(small).trust_remote_code  # which needs no code
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(small, trust_remote_code=False)
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_the_code_goes_with_the_output(small: Path) -> None:
    for name, text in FILES.items():
        assert (small / name).read_text() == text
    entries = json.loads((small / "config.json").read_text())
    assert entries["auto_map"] == AUTO_MAP


@pytest.mark.nightly
def test_a_fresh_process_loads_the_output_if_it_is_told_to_trust_it(small: Path, tmp_path: Path, marker: Path) -> None:
    refused = fresh(small, tmp_path / "logits", "no")
    assert refused.returncode != 0 and "trust_remote_code" in refused.stderr and not marker.exists()
    done = fresh(small, tmp_path / "logits", "yes")
    assert done.returncode == 0, done.stderr
    model = load_model(Place("small", small, trust_remote_code=True))
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits"), model(input_ids=IDS).logits)


def test_what_is_stored_is_what_the_report_and_the_dense_export_say(small: Path, dense: Path, tmp_path: Path) -> None:
    report = reports.read(small)
    assert report.trust_remote_code and len(report.layers) == 10
    assert not any(row.fallback for row in report.layers)
    lc.export(small, tmp_path / "plain", "dense", trust_remote_code=True)
    found = [load_model(Place("", folder, trust_remote_code=True)) for folder in (small, tmp_path / "plain", dense)]
    with torch.no_grad():
        compressed, plain, original = (model(input_ids=IDS).logits for model in found)
    torch.testing.assert_close(compressed, plain, rtol=2e-2, atol=2e-3)  # bfloat16
    assert not torch.equal(compressed, original)


@pytest.mark.slow
def test_verify_eval_distill_and_push_work_where_code_is_trusted(small: Path, dense: Path, tmp_path: Path) -> None:
    trust: dict[str, Any] = {"trust_remote_code": True}
    text = text_for_calibration(tmp_path)
    assert lc.verify(small, str(dense), text, windows=1, length=32, **trust).layers == 10
    assert lc.score(small, lc.Protocol(text, windows=1, length=32), **trust)["perplexity"] > 1
    lc.distill(small, dense, lesson(tmp_path, scales=1e-3), tmp_path / "taught", **trust)
    assert code_files(tmp_path / "taught") == tuple(sorted(FILES))
    assert reports.read(tmp_path / "taught").trust_remote_code
    assert set(FILES) < lc.push(small, "me/small", dry_run=True, **trust).files.keys()
    told = card(reports.read(small), "me/small", "version: 1")
    assert 'from_pretrained("me/small", trust_remote_code=True)' in told and "Read it before you" in told


@pytest.mark.slow
def test_a_dense_student_keeps_its_code(dense: Path, tmp_path: Path) -> None:
    lc.distill(dense, dense, lesson(tmp_path, norms=1e-3), tmp_path / "taught", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "taught", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"


def test_code_counts_in_the_identity_of_a_model(dense: Path) -> None:
    before = resolve(dense, trust_remote_code=True).content(), teacher_digest(dense)
    (dense / "norm_own.py").write_text(FILES["norm_own.py"].replace("1e-6", "1e-5"))
    after = resolve(dense, trust_remote_code=True).content(), teacher_digest(dense)
    assert before[1] != after[1]
    assert [what for what, digest in before[0].items() if after[0][what] != digest] == ["the model's code"]


def test_a_native_model_never_runs_code(tmp_path: Path, marker: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": AUTO_MAP}))
    plain = resolve(folder)
    trusted = resolve(folder, trust_remote_code=True)
    assert plain.content() == trusted.content() and not trusted.code
    assert any("transformers knows llama itself" in note for note in trusted.notes) and not plain.notes
    assert type(load_model(locate(folder, trust_remote_code=True))).__module__.startswith("transformers.")
    found = companions(folder, trust_remote_code=True)
    assert not set(FILES) & set(found.names) and "auto_map" not in trusted.config_entries()
    assert not marker.exists()


def test_a_known_type_of_an_unknown_class_needs_its_code(dense: Path, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    path = folder / "config.json"
    map_ = {"AutoModelForCausalLM": AUTO_MAP["AutoModelForCausalLM"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": map_, "architectures": ["OwnForCausalLM"]}))
    with pytest.raises(InputError, match="needs Python code of its own"):
        resolve(folder)


TOKENIZER = """
import os
from transformers import PreTrainedTokenizerFast
with open(os.environ["OWN_CODE_MARKER"], "a") as file:
    file.write(__name__ + "\\n")
class OwnTokenizerFast(PreTrainedTokenizerFast):
    pass
"""


def test_a_tokenizer_may_bring_code_too(tmp_path: Path, marker: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    (folder / "tokenization_own.py").write_text(TOKENIZER)
    path = folder / "tokenizer_config.json"
    named = {
        "tokenizer_class": "OwnTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    with pytest.raises(InputError, match="the tokenizer in .* needs Python code of its own"):
        load_tokenizer(folder)
    assert not marker.exists()
    assert type(load_tokenizer(folder, trust_remote_code=True)).__name__ == "OwnTokenizerFast"
    small = lc.compress(folder, recipe(tmp_path), tmp_path / "small", trust_remote_code=True)
    assert small.report.trust_remote_code and code_files(small.folder) == ("tokenization_own.py",)
    assert type(load_tokenizer(small.folder, trust_remote_code=True)).__name__ == "OwnTokenizerFast"


FAULTS = {
    "another repository": ({"AutoConfig": "org/other--configuration_own.OwnConfig"}, "no class in a file beside it"),
    "a path": ({"AutoConfig": "../configuration_own.OwnConfig"}, "no class in a file beside it"),
    "a missing file": ({"AutoConfig": "elsewhere.OwnConfig"}, "lacks code that its config.json names"),
    "no causal model": ({"AutoConfig": AUTO_MAP["AutoConfig"]}, "not a causal language model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_code_that_cannot_be_taken_along_is_refused(fault: str, dense: Path) -> None:
    changes, sentence = FAULTS[fault]
    entries = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(entries | {"auto_map": changes}))
    with pytest.raises(InputError, match=sentence):
        resolve(dense, trust_remote_code=True)


def test_imports_do_not_lead_out_of_the_folder(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("")
    with (dense / "norm_own.py").open("a") as file:
        file.write("\nfrom ../../secret import x\n")
    with pytest.raises(InputError, match="norm_own|not beside it|lacks code"):
        resolve(dense, trust_remote_code=True)
    (dense / "norm_own.py").unlink()
    (dense / "norm_own.py").symlink_to(tmp_path / "secret.py")
    with pytest.raises(InputError, match="a link out of its folder"):
        companions(dense, trust_remote_code=True)


def test_broken_code_is_one_sentence(dense: Path) -> None:
    for text, said in (("def", "syntax"), ("import nonsense_package", "nonsense_package"), ("x = y", "not defined")):
        (dense / "configuration_own.py").write_text(text)
        with pytest.raises(InputError, match=said) as raised:
            resolve(dense, trust_remote_code=True)
        assert "\n" not in str(raised.value)


DOWNLOAD = """
import sys
from llmcompress.models.dense.locate import locate
print(*(path.name for path in locate("org/own", trust_remote_code=sys.argv[1] == "yes").folder.iterdir()))
"""


@pytest.mark.slow
def test_code_comes_from_the_hub_only_if_it_is_trusted(dense: Path, tmp_path: Path, marker: Path) -> None:
    with StandInHub() as hub:
        hub.commit("org/own", {path.name: path.read_bytes() for path in dense.iterdir()})
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": hub.token}
        for trusted in ("no", "yes"):
            command = [sys.executable, "-c", DOWNLOAD, trusted]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            assert set(FILES) & set(done.stdout.split()) == (set(FILES) if trusted == "yes" else set())
    assert not marker.exists()
