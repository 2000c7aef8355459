"""The store of an interrupted run: whole records or none, and those of this run alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.errors import DiskError, InputError
from llmcompress.models.files import output
from llmcompress.models.files.store import Store

RUN = {"recipe": {"seed": 1, "rates": {"scales": 1e-3}}, "tokens": None, "versions": ("a", "b")}
TENSORS = {"w": torch.arange(6.0).reshape(2, 3).bfloat16(), "count": torch.tensor(3), "none": torch.empty(0)}


@pytest.mark.parametrize("tensors", [None, {}, TENSORS])
def test_a_record_comes_back(tensors: dict[str, torch.Tensor] | None, tmp_path: Path) -> None:
    store = Store(tmp_path / "kept", RUN)
    assert store.get("a") is None and store.names() == []
    store.put("a", {"step": 1}, tensors)
    store.put("a", {"step": 2, "found": [0.1]}, tensors)
    store.put("b", {})
    found = Store(tmp_path / "kept", dict(RUN)).get("a")
    assert found is not None and found.entry == {"step": 2, "found": [0.1]}
    assert found.tensors.keys() == (tensors or {}).keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in (tensors or {}).items())
    assert store.names() == ["a", "b"] and len(list(store.folder.iterdir())) == 2
    store.remove("a")
    assert store.get("a") is None and store.names() == ["b"]
    store.clear()
    assert not store.folder.exists()


def test_equal_records_are_equal_files(tmp_path: Path) -> None:
    first, second = (Store(tmp_path / name, RUN) for name in "ab")
    for store in (first, second):
        store.put("a", {"step": 1}, TENSORS)
    assert (first.folder / "a.safetensors").read_bytes() == (second.folder / "a.safetensors").read_bytes()


@pytest.mark.parametrize("tensors", [None, TENSORS])
@pytest.mark.parametrize(
    "other, changed",
    [
        ({"recipe": {"seed": 2}}, "recipe"),
        ({"tokens": "x", "versions": ("a",)}, "tokens and versions"),
        ({"device": "cuda"}, "device"),
    ],
)
def test_another_run_is_refused_by_what_changed(
    other: dict[str, Any], changed: str, tensors: dict[str, torch.Tensor] | None, tmp_path: Path
) -> None:
    store = Store(tmp_path / "kept", RUN)
    store.put("a", {}, tensors)
    said = (
        f"^{store.folder} was left by a different run .{changed} changed.; remove it, or choose another output folder$"
    )
    with pytest.raises(InputError, match=said):
        Store(store.folder, RUN | other).get("a")
    with pytest.raises(DiskError, match=rf"^{tmp_path}/x was left by .*; remove it, ask$"):
        Store(store.folder, RUN | other, tmp_path / "x", "ask", DiskError).get("a")
    part = store.within("part", phase=1)
    part.put("a", {}, tensors)
    with pytest.raises(InputError, match="phase changed"):
        store.within("part", phase=2).get("a")


def test_damage_is_a_sentence(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept", RUN)
    store.put("a", {"step": 1}, TENSORS)
    path = store.folder / "a.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"a.safetensors .*; remove {store.folder} to start over$"):
            store.get("a")
    path.unlink()
    for text in ("", "[]", "{", "3"):
        (store.folder / "a.json").write_text(text)
        with pytest.raises(InputError, match=rf"a.json cannot be read \(.*; remove {store.folder} to start over$"):
            store.get("a")


@pytest.mark.parametrize("tensors", [None, TENSORS])
def test_a_record_is_on_the_disk_before_it_takes_its_name(
    tensors: dict[str, torch.Tensor] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is waited for under another name, then renamed, then the folder is waited for."""
    store, seen = Store(tmp_path / "kept", RUN), []
    original = output.sync

    def noted(path: Path) -> None:
        seen.append((path.name, store.path("a") is not None))
        original(path)

    monkeypatch.setattr(output, "sync", noted)
    store.put("a", {"step": 1}, tensors)
    [(staged, there), last] = seen
    assert staged.startswith(".a.") and not there and last == ("kept", True)


@pytest.mark.parametrize("tensors", [None, TENSORS])
def test_a_full_disk_leaves_the_record_before(
    tensors: dict[str, torch.Tensor] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "kept", RUN)
    store.put("a", {"step": 1}, tensors)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(DiskError, match="No space left on device.*; free some space"):
            store.put("a", {"step": 2}, tensors)
    found = store.get("a")
    assert found is not None and found.entry == {"step": 1} and len(list(store.folder.iterdir())) == 1


def test_an_entry_must_not_hide_the_identity(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe"):
        Store(tmp_path, RUN).put("a", {"recipe": 1})
