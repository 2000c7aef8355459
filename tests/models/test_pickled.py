"""Weights of `torch.save` are read as safetensors are, or refused before anything runs; wrappers' names go."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.models.dense.companions import companions
from llmcompress.models.dense.headers import read_headers
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve
from tests.stand_in_hub import StandInHub
from tests.tiny import VOCABULARY, save_tiny
from tests.zoo import expert_slices, save_zoo, zoo

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
IDS = torch.arange(24)[None] * 7 % VOCABULARY
RECIPE: dict[str, Any] = {
    "version": 1,
    "rules": [{"match": "*_proj", "steps": [{"method": "rtn", "bits": 4, "group_size": 16}]}],
}


def as_pickle(folder: Path, change: Callable[[dict[str, Tensor]], Any] = dict) -> Path:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(change(tensors), folder / PICKLED)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain, tmp_path / "model")


def same(folder: Path, plain: Path) -> None:
    ours, theirs = resolve(folder), resolve(plain)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.tensors)


# --- pickled --------------------------------------------------------------------------------------------------------


def test_a_pickled_model_is_compressed_as_the_same_in_safetensors(copied: Path, plain: Path, tmp_path: Path) -> None:
    as_pickle(copied, lambda tensors: {name: nn.Parameter(value) for name, value in tensors.items()})
    same(copied, plain)
    assert companions(copied).left == ()
    for folder in (copied, plain):
        lc.compress(folder, RECIPE, tmp_path / f"from-{folder.parent.name}")
    results = [load_file(tmp_path / f"from-{folder.parent.name}" / WEIGHTS) for folder in (copied, plain)]
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_pickled_parts_and_experts_are_read(tmp_path: Path) -> None:
    """Rows of fused experts are pieces of a stored tensor; two files have an index."""
    folder, model = save_zoo("mixtral", tmp_path / "model"), zoo("mixtral")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    (folder / WEIGHTS).unlink()
    names = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        torch.save({name: value for name, value in tensors.items() if names[name] == file}, folder / file)
    (folder / f"{PICKLED}.index.json").write_text(json.dumps({"weight_map": names}))
    source, expected = resolve(folder), expert_slices("mixtral", model)
    assert expected and all(torch.equal(source.read(name), value) for name, value in expected.items())


class Program:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def deflated(folder: Path) -> None:
    with ZipFile(folder / PICKLED) as before:
        parts = {part.filename: before.read(part) for part in before.infolist()}
    with ZipFile(folder / PICKLED, "w", ZIP_DEFLATED) as after:
        for name, data in parts.items():
            after.writestr(name, data)


def edited(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], object]:
    return lambda folder: torch.save(change(torch.load(folder / PICKLED)), folder / PICKLED)


def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(iter(tensors))
    return tensors | {name: torch.ones(1).expand(2**40, 2**20)}


def cut(folder: Path) -> None:
    (folder / PICKLED).write_bytes((folder / PICKLED).read_bytes()[:-200])


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a program": (
        lambda folder: torch.save({"a": Program(folder / "ran")}, folder / PICKLED),
        r"holds more than tensors, which may run code \(UnpicklingError\), and is not read; take the model's",
    ),
    "a program alone": (
        lambda folder: (folder / PICKLED).write_bytes(pickle.dumps(Program(folder / "ran"))),
        "is damaged, or was saved by a torch before 1.6",
    ),
    "an old file": (
        lambda folder: torch.save({}, folder / PICKLED, _use_new_zipfile_serialization=False),
        "is damaged, or was saved by a torch before 1.6",
    ),
    "a packed file": (deflated, "is packed in a way in which torch saves no weights"),
    "a cut file": (cut, "is damaged"),
    "a list": (edited(list), "holds a list that maps no names to tensors"),
    "a state of training": (edited(lambda t: {"model": t, "step": 3}), "holds 'model', which is no plain tensor"),
    "more numbers than bytes": (edited(spread), "which is no plain tensor"),
    "a sparse tensor": (edited(lambda t: {n: v.to_sparse() for n, v in t.items()}), "which is no plain tensor"),
    "nothing": (edited(lambda t: {}), "maps no names to tensors"),
    "a pipe": (
        lambda folder: ((folder / PICKLED).unlink(), os.mkfifo(folder / PICKLED)),
        "has its weights only as pickle files of other names|no file named .*pytorch_model.bin.* download or write",
    ),
    "an index that leads out": (
        lambda folder: (
            (folder / PICKLED).rename(folder / "x.bin"),
            (folder / f"{PICKLED}.index.json").write_text('{"weight_map": {"a": "../x.bin"}}'),
        ),
        r"names '\.\./x\.bin', which is no bin file of the folder",
    ),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_hostile_pickles_are_refused_in_one_sentence(damage: str, copied: Path) -> None:
    edit, sentence = HOSTILE[damage]
    edit(as_pickle(copied))
    for opened in (resolve, lambda folder: load_model(locate(folder))):
        with pytest.raises(InputError, match=sentence) as caught:
            opened(copied)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (copied / "ran").exists()


@pytest.mark.slow
def test_pickles_are_downloaded_where_there_is_nothing_better(copied: Path, plain: Path, tmp_path: Path) -> None:
    with StandInHub() as hub:
        hub.commit("org/old", {file.name: file.read_bytes() for file in as_pickle(copied).iterdir()})
        hub.commit("org/both", {file.name: file.read_bytes() for file in [*plain.iterdir(), copied / PICKLED]})
        code = (
            "import sys; from llmcompress.models.dense.model import *; print(*[resolve(n).name for n in sys.argv[1:]])"
        )
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_TOKEN": hub.token}
        command = [sys.executable, "-c", code, "org/old", "org/both"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["org/old", "org/both"]
    assert sum(PICKLED in path for _, path in hub.asked if "org/both" in path) == 0


# --- wrappers -------------------------------------------------------------------------------------------------------


def inside(name: str) -> str:
    return name.replace(".layers.0.", ".layers.0._orig_mod.").replace(".mlp.", ".mlp._checkpoint_wrapped_module.")


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "in several processes": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "by Lightning": lambda name: f"_forward_module.{name}",
    "by PEFT": lambda name: f"base_model.model.{name}",
    "a language model": lambda name: f"language_model.{name}",
    "inside the model": lambda name: name.replace("model.", "model.language_model."),
    "parts of it": inside,
}


@pytest.mark.parametrize("pickled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_wrappers_are_taken_off(wrapper: str, pickled: bool, copied: Path, plain: Path) -> None:
    rename = WRAPPED[wrapper]
    tensors = {rename(name): value for name, value in load_file(copied / WEIGHTS).items()}
    if wrapper == "inside the model":
        tensors["model.vision_tower.weight"] = torch.ones(2)
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    same(as_pickle(copied) if pickled else copied, plain)
    source = resolve(copied)
    assert source.notes[0].startswith("names of a wrapper are taken off: ") and " is read as " in source.notes[0]
    assert (len(source.notes) == 2) == (wrapper == "inside the model"), "what it sees with is not read"
    expected = AutoModelForCausalLM.from_pretrained(plain)(IDS).logits
    for model in (load_model(locate(copied)), source.load()):
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_an_unknown_wrapper_is_named(copied: Path) -> None:
    tensors = {f"net.{name}": value for name, value in load_file(copied / WEIGHTS).items()}
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks .*, and stores net\.model\.embed_tokens\.weight; give tensors"):
        resolve(copied)


def test_what_a_wrapped_model_becomes_has_its_own_names(copied: Path, plain: Path, tmp_path: Path) -> None:
    tensors = {f"_orig_mod.{name}": value for name, value in load_file(copied / WEIGHTS).items()}
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt"})
    result = lc.compress(copied, RECIPE, tmp_path / "small")
    assert any(warning.startswith("names of a wrapper") for warning in result.report.warnings)
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "small" / WEIGHTS))


def test_a_model_that_sees_keeps_its_names(tmp_path: Path) -> None:
    """Its config has a part for text, so `language_model` is a name of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    parts = {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}}
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", **parts}))
    assert AutoConfig.from_pretrained(folder).model_type == "llava"
    save_file({"language_model.model.norm.weight": torch.ones(2)}, folder / WEIGHTS)
    assert list(read_headers(folder)) == ["language_model.model.norm.weight"]


def test_a_tensor_under_two_names_is_refused(copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {f"_orig_mod.{name}": tensors[name].clone()}, copied / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match="is stored twice, in model.safetensors and model.safetensors of"):
        resolve(copied)
