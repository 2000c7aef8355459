"""Merging parts into shards: the same tensors, whenever it is interrupted, and no more of the disk than one part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llmcompress.errors import InputError
from llmcompress.models.files import tensor_files
from llmcompress.models.files.checkpoint import Writer
from llmcompress.models.files.identity import read_binding
from llmcompress.models.files.integrity import BINDING, DIGESTS, INDEX, SINGLE, digest
from llmcompress.models.files.tensor_files import merge_parts, part_file, shard_files, write_tensors

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.float16)


class Cut(Exception):
    """Stand for the end of a process."""


def tensors() -> list[dict[str, torch.Tensor]]:
    """Return four parts with odd sizes, empty tensors and scalars of many dtypes."""
    draws = torch.Generator().manual_seed(0)
    parts: list[dict[str, torch.Tensor]] = []
    for part in range(4):
        found = {}
        for number, dtype in enumerate(DTYPES):
            values = torch.randint(0, 2, (part, 2 * number + 1, 3) if number else (), generator=draws)
            found[f"part{part}.{number}"] = values.to(dtype)
        parts.append(found)
    return parts


def write(folder: Path) -> dict[str, torch.Tensor]:
    """Write the parts; return all tensors."""
    folder.mkdir()
    for number, part in enumerate(tensors()):
        write_tensors(part_file(folder, number), part)
    return {name: value for part in tensors() for name, value in part.items()}


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in shard_files(folder) for name, value in load_file(path).items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


@pytest.mark.parametrize("size, files", [(10**9, 1), (200, 4), (1, 20)])
def test_shards_hold_every_tensor(size: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "SHARD", size)
    wanted = write(tmp_path / "a")
    found = merge_parts(tmp_path / "a", tmp_path / "mark", {"config": "x"})
    assert same(read(tmp_path / "a"), wanted) and not list((tmp_path / "a").glob("part*"))
    assert (len(found) == 1) == (files == 1) and (found[0].name == SINGLE) == (files == 1)
    for path in found:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), list(file.keys())
        digests = json.loads(metadata[DIGESTS])
        assert digests == {name: digest(wanted[name]) for name in names} and metadata["format"] == "pt"
        assert read_binding(path) == read_binding(found[0]) and json.loads(metadata[BINDING])["config"] == "x"
        if len(names) > 1:
            assert sum(wanted[name].nbytes for name in names) <= size


@pytest.mark.parametrize("size", [10**9, pytest.param(200, marks=pytest.mark.slow)])
def test_an_interrupted_merge_is_resumed(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call that changes the disk: while headers are made, within a copy, between a copy and the removal."""
    monkeypatch.setattr(tensor_files, "SHARD", size)
    write(tmp_path / "whole")
    wanted = {path.name: path.read_bytes() for path in merge_parts(tmp_path / "whole", tmp_path / "mark0")}
    fsync, copy = tensor_files.os.fsync, tensor_files._copy
    for end in range(200):
        folder, mark, calls = tmp_path / f"cut{end}", tmp_path / f"mark{end + 1}", [0]
        write(folder)

        def counted(original: object, *given: object, calls: list[int] = calls, end: int = end) -> object:
            if calls[0] == end:
                raise Cut
            calls[0] += 1
            return original(*given)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            patch.setattr(tensor_files.os, "fsync", lambda *given, counted=counted: counted(fsync, *given))
            patch.setattr(tensor_files, "_copy", lambda *given, counted=counted: counted(copy, *given))
            try:
                merge_parts(folder, mark)
                interrupted = False
            except Cut:
                interrupted = True
        merge_parts(folder, mark)
        assert {path.name: path.read_bytes() for path in shard_files(folder)} == wanted, f"cut at {end}"
        if not interrupted:
            break
    assert end > 20 and not interrupted


def test_the_disk_holds_one_part_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "a").iterdir())]
    seen = []
    move = tensor_files._move

    def watched(part: Path, *given: object) -> None:
        seen.append(sum(path.stat().st_blocks * 512 for path in (tmp_path / "a").glob("part*")))
        move(part, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_files, "_move", watched)
    merge_parts(tmp_path / "a", tmp_path / "mark")
    assert len(seen) == len(sizes) and seen == sorted(seen, reverse=True) and seen[-1] < seen[0]


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    """Weight files have the permissions that the umask gives to any new file."""
    (tmp_path / "plain").touch()
    writer = Writer(tmp_path / "a")
    writer.folder.mkdir()
    writer.add({"w": torch.ones(3)})
    part = part_file(writer.folder, 0)
    assert part.stat().st_mode == (tmp_path / "plain").stat().st_mode
    writer.close()
    assert (writer.folder / SINGLE).stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert not (writer.folder / INDEX).exists()


def test_a_part_that_ends_early_is_no_shard(tmp_path: Path) -> None:
    write(tmp_path / "a")
    path = part_file(tmp_path / "a", 3)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(OSError, match="bytes early"):
        merge_parts(tmp_path / "a", tmp_path / "mark")


def test_a_damaged_binding_is_a_sentence(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / SINGLE, metadata={BINDING: "[1]"})
    with pytest.raises(InputError, match="is damaged"):
        read_binding(tmp_path / SINGLE)
