"""A checkpoint is one thing: its weight files, the entries of its config that change numbers, and its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.score import score
from llmcompress.models.files import tensor_files
from llmcompress.models.files.file_names import MANIFEST
from llmcompress.models.files.identity import read_binding
from llmcompress.models.files.integrity import SINGLE
from llmcompress.models.files.tensor_files import shard_files
from tests.tiers import tiered
from tests.tiny import FAMILY_CONFIGS, save_tiny
from tests.unbound import unbound

RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}]
NUMBERS: list[dict[str, Any]] = [  # what changes the numbers of a Llama without changing a shape
    {"rms_norm_eps": 0.1},
    {"hidden_act": "relu"},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    {"tie_word_embeddings": True},
]
SILENT: list[dict[str, Any]] = [{"pad_token_id": 3}, {"architectures": ["Mine"]}, {"transformers_version": "5.0.0"}]


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def edited(source: Path, target: Path, change: dict[str, Any]) -> Path:
    """Return a copy without a manifest, with other entries in its config."""
    shutil.copytree(source, target)
    (target / MANIFEST).unlink(missing_ok=True)
    entries = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(entries | change))
    return target


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models by one recipe, in several files each."""
    folder = tmp_path_factory.mktemp("siblings")
    save_tiny("llama", folder / "one", tie_word_embeddings=False)
    shutil.copytree(folder / "one", folder / "two")
    path = folder / "two" / "model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "SHARD", 20_000)
        found = [
            lc.compress(folder / name, {"version": 1, "rules": RULES}, folder / f"{name}.4").folder
            for name in ("one", "two")
        ]
    return found[0], found[1]


def test_a_file_of_a_sibling_does_not_load(siblings: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = siblings
    names = [path.name for path in shard_files(one)]
    assert len(names) > 3 and names == [path.name for path in shard_files(two)]
    for name in names:
        folder = edited(one, tmp_path / name, {})
        shutil.copyfile(two / name, folder / name)
        with pytest.raises(InputError, match="belongs to another checkpoint than"):
            loaded(folder)


@pytest.mark.parametrize("change", NUMBERS, ids=lambda change: next(iter(change)))
def test_an_edited_config_does_not_load(change: dict[str, Any], siblings: tuple[Path, Path], tmp_path: Path) -> None:
    folder = edited(siblings[0], tmp_path / "out", change)
    with pytest.raises(InputError, match=r"config\.json"):
        loaded(folder)


@pytest.mark.parametrize("change", SILENT, ids=lambda change: next(iter(change)))
def test_what_changes_no_number_may_be_edited(
    change: dict[str, Any], siblings: tuple[Path, Path], tmp_path: Path
) -> None:
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(
            loaded(edited(siblings[0], tmp_path / "out", change))(ids).logits, loaded(siblings[0])(ids).logits
        )


def test_a_changed_tokenizer_is_not_scored(siblings: tuple[Path, Path], tmp_path: Path) -> None:
    folder = edited(siblings[0], tmp_path / "out", {})
    text = tmp_path / "text.txt"
    text.write_text("The mill by the river. " * 40)
    score(folder, Protocol(text, 1, 16))
    path = folder / "tokenizer.json"
    entries = json.loads(path.read_text())
    first, second, *_ = entries["model"]["vocab"]
    vocabulary = entries["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match="the tokenizer in .* is not the one that its weights were written with"):
        score(folder, Protocol(text, 1, 16))


@pytest.mark.parametrize("family", tiered(sorted(FAMILY_CONFIGS), lambda family: family in {"llama", "gpt2", "gemma2"}))
def test_what_transformers_saves_is_bound_again(family: str, tmp_path: Path) -> None:
    """Of every family, after edits that its user may make; the new files know of each other and of their config."""
    dense = save_tiny(family, tmp_path / "dense")
    folder = lc.compress(dense, {"version": 1, "rules": RULES}, tmp_path / "small").folder
    model = loaded(folder)
    model.config.pad_token_id = 1  # type: ignore[union-attr]
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")  # type: ignore[operator]
    again = loaded(tmp_path / "saved")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "twice")  # type: ignore[operator]
    loaded(tmp_path / "twice")
    entries = [read_binding(path) for path in shard_files(tmp_path / "saved")]
    assert len(entries) > 1 and "config" in entries[0] and all(entry == entries[0] for entry in entries)
    with pytest.raises(InputError, match=r"config\.json"):
        loaded(edited(tmp_path / "saved", tmp_path / "edited", {"initializer_range": 0.5}))


def test_files_of_earlier_versions_load(siblings: tuple[Path, Path], tmp_path: Path) -> None:
    """They say nothing of what they belong to."""
    folder = tmp_path / "old"
    model = loaded(siblings[0])
    model.save_pretrained(folder)  # type: ignore[operator]
    path = unbound(folder) / SINGLE
    assert read_binding(path) == {}
    loaded(folder)
