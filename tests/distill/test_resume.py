"""What a run that is cut leaves: at every moment the state before or the one after, whole."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from llmcompress.distill.resume import STATE, Keeper, Progress
from llmcompress.errors import DiskError, InputError

CALLS = {"mkdir", "open", "write", "close", "fsync", "rename", "unlink", "remove", "rmdir", "serialize_file"}


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"value.a": torch.full((1000,), float(step)), "exp_avg.a": torch.full((1000,), step / 7)}


def is_whole(folder: Path, steps: set[int]) -> int:
    """The step of the state in a folder, which is one of these, 0 for none, with its own tensors."""
    progress, found = Keeper(folder, "run").load()
    assert progress.step in steps
    if progress.step:
        assert all(torch.equal(found[name], value) for name, value in tensors(progress.step).items())
    return progress.step


def cut(folder: Path, step: int, after: int) -> bool:
    """Saves in a process that dies, without any cleaning up, before call number `after` of the system; did it die?"""
    child = os.fork()
    if child == 0:
        left = after

        def watch(frame: FrameType, event: str, called: Any) -> None:
            nonlocal left
            if event == "c_call" and called.__name__ in CALLS:
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.setprofile(watch)
        Keeper(folder, "run").save(Progress(step=step), tensors(step))
        sys.setprofile(None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("before", [0, 4])
def test_a_save_that_is_cut_anywhere_leaves_the_old_state_or_the_new_one(before: int, tmp_path: Path) -> None:
    seen, calls = [], 0
    while True:
        folder = tmp_path / str(calls)
        if before:
            Keeper(folder, "run").save(Progress(step=before), tensors(before))
        died = cut(folder, 5, calls)
        seen.append(is_whole(folder, {before, 5}))
        if not died:
            break
        Keeper(folder, "run").save(Progress(step=6), tensors(6))  # and the run goes on
        assert is_whole(folder, {6}) == 6 and len(list(folder.iterdir())) == 2
        calls += 1
    assert seen == sorted(seen) and seen[0] == before and seen[-1] == 5 and calls >= 8


def test_a_state_is_two_files(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "state", "run")
    for step in range(1, 5):
        keeper.save(Progress(step=step, history=[{"kl": 0.5}]), tensors(step))
        assert is_whole(keeper.folder, {step}) == step and len(list(keeper.folder.iterdir())) == 2
    assert keeper.load()[0].history == [{"kl": 0.5}]
    keeper.remove()
    assert not keeper.folder.exists() and keeper.load()[0] == Progress()


def test_damage_and_other_runs_are_told(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "state", "run")
    keeper.save(Progress(step=1), tensors(1))
    with pytest.raises(InputError, match="was left by a run with another recipe"):
        Keeper(keeper.folder, "other").load()
    [file] = keeper.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot be read .* remove it to start again"):
        keeper.load()
    (keeper.folder / STATE).write_text(json.dumps({"run": "run", "step": 1}))
    with pytest.raises(InputError, match="cannot be read"):
        keeper.load()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        Keeper(blocked / "state", "run").save(Progress(step=1), tensors(1))
