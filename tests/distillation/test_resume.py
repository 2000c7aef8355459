"""The state that an interrupted run leaves: at every moment the state before or the one after, whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from llmcompress.distillation.resume import Progress, last_state, save_state
from llmcompress.errors import DiskError, InputError
from llmcompress.models.files.store import Store
from tests.interrupted import die_before

RUN = {"recipe": {"seed": 1}, "data": "a"}


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"value.a": torch.full((1000,), float(step)), "exp_avg.a": torch.full((1000,), step / 7)}


def is_whole(folder: Path, steps: set[int]) -> int:
    """The step of the state in a folder, which is one of these, 0 for none, with its own tensors."""
    progress, found = last_state(Store(folder, RUN))
    assert progress.step in steps
    if progress.step:
        assert all(torch.equal(found[name], value) for name, value in tensors(progress.step).items())
    return progress.step


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 4])
def test_a_save_that_is_cut_anywhere_leaves_the_old_state_or_the_new_one(before: int, tmp_path: Path) -> None:
    seen, calls = [], 0
    while True:
        folder = tmp_path / str(calls)
        if before:
            save_state(Store(folder, RUN), Progress(step=before), tensors(before))
        died = die_before(calls, partial(save_state, Store(folder, RUN), Progress(step=5), tensors(5)))
        seen.append(is_whole(folder, {before, 5}))
        if not died:
            break
        save_state(Store(folder, RUN), Progress(step=6), tensors(6))  # and the run resumes
        assert is_whole(folder, {6}) == 6 and len(list(folder.iterdir())) == 1
        calls += 1
    assert seen == sorted(seen) and seen[0] == before and seen[-1] == 5 and calls >= 8


def test_a_state_is_one_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "state", RUN)
    for step in range(1, 5):
        save_state(store, Progress(step=step, history=[{"kl": 0.5}]), tensors(step))
        assert is_whole(store.folder, {step}) == step and len(list(store.folder.iterdir())) == 1
    assert last_state(store)[0].history == [{"kl": 0.5}]
    store.clear()
    assert not store.folder.exists() and last_state(store)[0] == Progress()


def test_damaged_and_foreign_states_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "state", RUN)
    save_state(store, Progress(step=1), tensors(1))
    with pytest.raises(InputError, match=r"was left by a different run \(data changed\); remove it, or choose another"):
        last_state(Store(store.folder, RUN | {"data": "b"}))
    store.put("state", {"steps": 1}, {})
    with pytest.raises(InputError, match=r"cannot be read .*steps.* remove .* to start over"):
        last_state(store)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        save_state(Store(blocked / "state", RUN), Progress(step=1), tensors(1))
