"""Adapters of a dense model on a compressed one: shares that are known, and models left as they were."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli.app import app
from llmcompress.errors import DiskError, InputError, RecipeError
from llmcompress.evaluation.adapter_transfer import Passport, distinct_share, kept_share, passport
from llmcompress.evaluation.protocol import Protocol
from llmcompress.formats.hub import push
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.file_names import PASSPORT
from tests.tiny import save_tiny

TEXT = "The miller counts every sack of corn that the farms by the river bring. " * 60
PROTOCOL = Protocol(TEXT, windows=6, length=48)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dense`, `small` of 8 bits and `ruin` of 1; `adapter`, which learned TEXT on the dense one, and `nothing`."""
    folder = tmp_path_factory.mktemp("passport")
    dense = save_tiny("llama", folder / "dense")
    for name, bits in (("small", 8), ("ruin", 1)):
        rules = [{"match": "*", "steps": [{"method": "rtn", "bits": bits, "group_size": 16}]}]
        lc.compress(dense, {"version": 1, "rules": rules}, folder / name)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(dense), lora)
    adapted.save_pretrained(folder / "nothing")  # which is zero when it starts
    ids = load_tokenizer(dense)(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam([value for value in adapted.parameters() if value.requires_grad], lr=0.02)
    for step in range(40):
        window = ids[:, 48 * (step % 8) : 48 * (step % 8 + 1)]
        adapted(input_ids=window, labels=window).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.slow
def test_a_model_beside_itself_keeps_all(place: Path) -> None:
    [found] = passport(place / "dense", [place / "adapter"], place / "dense", PROTOCOL).adapters
    assert found.gain_dense == found.gain > 0.5 and found.kept == 1 and found.kept_stderr == 0
    assert found.kl == 0 and found.alike == pytest.approx(1)
    assert found.distinct["dense"] == found.distinct["compressed"]


def test_a_ruin_keeps_less_than_a_good_model(place: Path) -> None:
    good, ruin = (passport(place / name, [place / "adapter"], place / "dense", PROTOCOL) for name in ("small", "ruin"))
    [first], [second] = good.adapters, ruin.adapters
    assert first.kept is not None and second.kept is not None and first.kept_stderr is not None
    assert abs(first.kept - 1) < 0.05 and first.alike > 0.99 and first.kl < 0.01
    assert second.kept < 0.8 * first.kept and second.kl > first.kl and second.alike < first.alike
    assert good.adapters[0].adapter == "adapter" and (good.model, good.against) == ("small", "dense")


@pytest.mark.slow
def test_gains_are_those_of_perplexities(place: Path) -> None:
    """As PEFT's own merge has them on the dense model."""
    [found] = passport(place / "small", [place / "adapter"], place / "dense", PROTOCOL).adapters
    model = AutoModelForCausalLM.from_pretrained(place / "dense")
    merged = PeftModel.from_pretrained(model, place / "adapter").merge_and_unload()
    merged.save_pretrained(place / "merged")
    load_tokenizer(place / "dense").save_pretrained(place / "merged")
    before, after = (lc.score(place / name, PROTOCOL)["perplexity"] for name in ("dense", "merged"))
    assert found.gain_dense == pytest.approx(math.log(before / after), rel=1e-3)


@pytest.mark.slow
def test_an_adapter_without_gain_has_nothing_to_keep(place: Path) -> None:
    both = [place / "nothing", place / "adapter"]
    nothing, something = passport(place / "small", both, place / "dense", PROTOCOL).adapters
    assert nothing.gain_dense == 0 and nothing.kept is None and nothing.kept_stderr is None and nothing.alike is None
    assert something.kept is not None, "the one before is taken off again"


def test_the_share_and_its_noise() -> None:
    dense, small = [1.0, 1.2, 0.8, 1.1, 0.9, 1.0], [0.5, 0.7, 0.3, 0.6, 0.4, 0.5]
    share, error = kept_share(dense, small)
    assert share == pytest.approx(0.5)
    left = [one - 0.5 * other for one, other in zip(small, dense, strict=True)]
    assert error == pytest.approx(statistics.stdev(left) / math.sqrt(6))
    assert kept_share([1.0, -1.0, 0.5, -0.5], [0.1] * 4) == (None, None)  # noise
    assert kept_share([-1.0, -1.1, -0.9, -1.0, -1.0, -1.1], [0.1] * 6) == (None, None)  # it harms the dense model


def test_distinct_pairs() -> None:
    assert distinct_share([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4  # 12, 23, 12, 24
    assert distinct_share([[7, 7, 7, 7]], 2) == 1 / 3
    assert distinct_share([[1, 2, -1, -1]], 2) == 1 and distinct_share([[1]], 2) == 0


@pytest.mark.slow
def test_the_command_keeps_it_for_the_card(place: Path) -> None:
    (place / "mine.txt").write_text(TEXT)
    words = [str(place / "small"), str(place / "adapter"), "--against", str(place / "dense"), "--save"]
    done = CliRunner().invoke(app, ["passport", *words, "--text", str(place / "mine.txt"), "--length", "48"])
    assert done.exit_code == 0, done.output
    assert "adapter" in done.stdout and "%" in done.stdout
    kept = json.loads((place / "small" / PASSPORT).read_text())
    assert kept["adapters"][0]["kept"] > 0.9 and str(place) not in json.dumps(kept)
    assert PASSPORT in push(place / "small", "me/small", dry_run=True).files


@pytest.mark.parametrize("command", ["eval", "passport"])
def test_a_folder_that_cannot_keep_a_result_is_refused_before_measuring(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("adapter_transfer", "score"):
        monkeypatch.delattr(f"llmcompress.evaluation.{module}.locate")
    saved = Path(shutil.copytree(place / "small", tmp_path / "saved"))
    (saved / "manifest.json").unlink()
    words = [*([place / "adapter"] if command == "passport" else []), "--against", place / "dense", "--save"]
    for model in ("me/small", place / "dense", saved, tmp_path / "none.gguf"):
        done = CliRunner().invoke(app, [command, str(model), *map(str, words)])
        assert done.exit_code == RecipeError.exit_code and f"{model} is no folder with manifest.json" in done.stderr
    monkeypatch.setattr("os.access", lambda *_: False)
    done = CliRunner().invoke(app, [command, str(place / "small"), *map(str, words)])
    assert done.exit_code == DiskError.exit_code and "small cannot be written to; make the folder" in done.stderr
    assert not (saved / "manifest.json").exists()


def test_a_passport_that_cannot_be_kept_is_shown(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise DiskError("the disk is full; free some space")

    result = Passport("small", "dense", {}, ())
    monkeypatch.setattr("llmcompress.evaluation.adapter_transfer.passport", lambda *_, **__: result)
    monkeypatch.setattr("llmcompress.evaluation.adapter_transfer.save_passport", full)
    words = [place / "small", place / "adapter", "--against", place / "dense", "--save"]
    done = CliRunner().invoke(app, ["passport", *map(str, words)])
    assert done.exit_code == DiskError.exit_code and "gain    in nats per token" in done.stdout


def test_what_does_not_fit_is_a_sentence(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="give one or more"):
        passport(place / "small", [], place / "dense", PROTOCOL)
    with monkeypatch.context() as unloaded, pytest.raises(InputError, match=r"is no adapter \(Can't find"):
        unloaded.delattr("llmcompress.evaluation.adapter_transfer.load_model")
        passport(place / "small", [place / "adapter", tmp_path], place / "dense", PROTOCOL)
    wide = save_tiny("llama", tmp_path / "wide", hidden_size=64)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(wide), lora).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"the adapter .*other does not fit"):
        passport(place / "small", [tmp_path / "other"], place / "dense", PROTOCOL)
