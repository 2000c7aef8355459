"""The end of a run, and what stands in its way: nothing finished is lost, nothing of somebody else's is removed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmcompress as lc
from llmcompress.cli.terminal import verdict
from llmcompress.compression import run, run_files
from llmcompress.distillation import result as distillation_result
from llmcompress.distillation.run import distill
from llmcompress.errors import DiskError, InputError, LLMCompressError, LockedError
from llmcompress.evaluation.verify import verify
from llmcompress.models.files import checkpoint, tensor_files
from llmcompress.models.files.file_names import MANIFEST
from llmcompress.models.files.output import MARK, claim_folder, lock_output
from tests.compression.test_journal import RTN, begun, files, recipe
from tests.compression.test_run import TEXT
from tests.tiers import tiered
from tests.tiny import save_tiny

DEPTH = 3
TABLES: dict[str, Any] = {"embeddings": [{"method": "rtn", "bits": 8, "group_size": 8}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model of three blocks, a text, and the files of a `whole` run."""
    folder = tmp_path_factory.mktemp("end")
    save_tiny("llama", folder / "dense", num_hidden_layers=DEPTH, tie_word_embeddings=False)
    (folder / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(60)))
    lc.compress(folder / "dense", recipe(folder, **TABLES), folder / "whole")
    return folder


class Cut(BaseException):
    """Stand for the end of the process: nothing but `finally` runs."""


def nth(number: int, original: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Return `original`, failing at its call `number`, counted from 0."""
    calls = [0]

    def counted(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == number + 1:
            raise error
        return original(*given, **named)

    return counted


ENDS = {  # where the end comes: module, function, at which call
    "before the rest is written": (run_files.RunFiles, "write_rest", 0),
    "before the merge": (checkpoint, "merge_parts", 0),
    "while headers are made": (tensor_files, "_encode_header", 0),
    "before the first part is merged": (tensor_files, "_move", 0),
    "before the last part is merged": (tensor_files, "_move", 4),
    "before the report": (run, "_report", 0),
    "before the check": (run_files, "check_written", 0),
    "before the manifest": (checkpoint, "seal", 0),
    "before the rename": (checkpoint, "_publish", 0),
    "behind the rename": (run_files, "remove_folder", 0),
}


CUTS = [(end, full) for end in ENDS for full in (False, True)]
FAST = {("before the rename", True)}
SLOW = {("while headers are made", True), ("before the last part is merged", False), ("before the report", False)}
SLOW |= {("before the manifest", True), ("behind the rename", False)}


@pytest.mark.parametrize("cut", tiered(CUTS, FAST.__contains__, slow=SLOW.__contains__))
def test_the_last_phase_loses_nothing(
    cut: tuple[str, bool], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is killed or finds a full disk, no block is compressed again, and the files are those of a whole
    run."""
    end, full = cut
    module, name, call = ENDS[end]
    error = OSError(28, "No space left on device") if full else Cut()
    asked = recipe(place, **TABLES)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, nth(call, getattr(module, name), error))
        with pytest.raises((Cut, DiskError, OSError)) as raised:
            lc.compress(place / "dense", asked, tmp_path / "out")
    if end != "behind the rename":
        assert not (tmp_path / "out").exists()
        kept = (
            f"{DEPTH + 2} finished blocks are kept in {tmp_path / 'out.partial'}, from where the same command resumes"
        )
        assert kept in raised.value.__notes__
    compressed = begun(monkeypatch)
    again = lc.compress(place / "dense", asked, tmp_path / "out")
    assert compressed == [] and files(again.folder) == files(place / "whole")
    assert not list(tmp_path.glob("out.*")) and verify(again.folder, windows=1, length=16).layers == 7 * DEPTH + 2


def test_an_output_that_appears_meanwhile(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def appear(done: int, blocks: int, rate: float) -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").touch()

    with pytest.raises(DiskError, match="out has appeared while it was made; move it away") as raised:
        lc.compress(place / "dense", recipe(place), out, progress=appear)
    assert "finished blocks are kept" in raised.value.__notes__[0] and [path.name for path in out.iterdir()] == [
        "theirs"
    ]
    shutil.rmtree(out)
    compressed = begun(monkeypatch)
    lc.compress(place / "dense", recipe(place), out)
    assert compressed == []


def test_where_a_disk_is_mounted_no_folder_can_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, and at its end where the disk is the same, which `ismount` does not see."""
    out, sentence = tmp_path / "out", "out is where a disk is mounted"
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == out)
        with pytest.raises(DiskError, match=sentence):
            checkpoint.check_writable(out, 0)
    monkeypatch.setattr(Path, "rename", nth(0, Path.rename, OSError(errno.EBUSY, "Device or resource busy")))
    with pytest.raises(DiskError, match=sentence), checkpoint.write_checkpoint(out) as writer:
        writer.write("config.json", "{}")


def test_what_lies_beside_an_output_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "weights").write_bytes(bytes(60))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50))
    checkpoint.check_writable(tmp_path / "out", 100, [tmp_path / "copy", tmp_path / "none"])
    with pytest.raises(DiskError, match="its disk has .* free"):
        checkpoint.check_writable(tmp_path / "out", 100)


def test_what_is_not_ours_stays(place: Path, tmp_path: Path) -> None:
    """Links, files and folders of somebody else's, where ours would be."""
    asked, ours = recipe(place, calibration=None, rules=RTN), recipe(place, calibration=None, rules=RTN)
    section = {"data": {"dataset": str(place / "text.txt"), "samples": 12, "length": 32, "held_out": 4}, "steps": 1}
    both = ours | {"distill": section | {"rates": {"scales": 1e-3}, "batch": 2}}
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to(tmp_path / "empty")
    (tmp_path / "to-nothing").symlink_to(tmp_path / "nothing")
    for name in ("to-empty", "to-nothing"):
        with pytest.raises(DiskError, match=f"{name} is a link; give the folder itself"):
            lc.compress(place / "dense", asked, tmp_path / name)
    for name, what in (("a", "partial"), ("b", "compressed"), ("c", "training")):
        theirs = tmp_path / f"{name}.{what}" / "thesis.tex"
        theirs.parent.mkdir()
        theirs.write_text("years of work")
        for resume in (True, False):
            with pytest.raises(LLMCompressError) as raised:
                lc.compress(place / "dense", asked if what == "partial" else both, tmp_path / name, resume=resume)
            assert isinstance(raised.value, (DiskError, InputError)) and str(theirs.parent) in str(raised.value)
            assert theirs.read_text() == "years of work"
    (tmp_path / "d.partial").write_text("a file")
    with pytest.raises(DiskError, match="d.partial is in the way and was not made by llmcompress"):
        lc.compress(place / "dense", asked, tmp_path / "d")
    (tmp_path / "e.prices.json").write_text('{"mine": 1}')
    options = [[{"method": "rtn", "bits": bits, "group_size": 8}] for bits in (2, 4)]
    with pytest.raises(LLMCompressError, match=r"e\.prices\.json"):
        target = recipe(place, rules=[], options=options, target={"bpw": 5.0})
        lc.compress(place / "dense", target, tmp_path / "e", resume=False)
    assert (tmp_path / "e.prices.json").read_text() == '{"mine": 1}'


def test_an_empty_folder_of_that_name_is_taken(tmp_path: Path) -> None:
    """Between making the folder and marking it the end can come, too."""
    (tmp_path / "out.partial").mkdir()
    claim_folder(tmp_path / "out.partial")
    assert (tmp_path / "out.partial" / MARK).is_file()


def test_a_model_that_is_replaced_meanwhile(place: Path, tmp_path: Path) -> None:
    """An older copy of the weights takes their place, with times and size as before."""
    dense = shutil.copytree(place / "dense", tmp_path / "dense")
    weights = dense / "model.safetensors"
    times = weights.stat()

    def swap(done: int, blocks: int, rate: float) -> None:
        if done == 1:
            save_file(
                {name: value * 1.5 for name, value in load_file(weights).items()}, tmp_path / "other", {"format": "pt"}
            )
            os.replace(tmp_path / "other", weights)
            os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(InputError, match="dense was replaced while it was compressed .the model's weights changed"):
        lc.compress(dense, recipe(place), tmp_path / "out", progress=swap)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DiskError, match="left by a different run .the model's weights changed"):
        lc.compress(dense, recipe(place), tmp_path / "out")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_numbers_that_are_none_are_found_before_work(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what no method looks at, too."""
    dense = shutil.copytree(place / "dense", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors[name].view(-1)[5] = torch.nan
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    compressed = begun(monkeypatch)
    with pytest.raises(InputError, match=f"{name} holds NaN or Inf"):
        lc.compress(dense, recipe(place, calibration=None, rules=RTN), tmp_path / "out")
    assert compressed == [] and not list(tmp_path.glob("out*"))


def test_what_cannot_load_is_no_success(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage between writing and the end is found by the run itself."""
    original = run._report

    def damaging(*given: Any) -> Any:
        [path] = (tmp_path / "out.partial").glob("checkpoint/model.safetensors")
        content = bytearray(path.read_bytes())
        content[-3] ^= 4
        path.write_bytes(content)
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_report", damaging)
        with pytest.raises(InputError, match="is not as it was written, so the file is damaged"):
            lc.compress(place / "dense", recipe(place), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_target_run_goes_on_behind_its_rename(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is there and its plan is not: the same command measures the plan, and compresses nothing."""
    options = [[{"method": "rtn", "bits": bits, "group_size": 8}] for bits in (2, 4)]
    asked = recipe(place, rules=[], options=options, target={"bpw": 5.0})
    whole = lc.compress(place / "dense", asked, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("llmcompress.pipeline.compress.record_allocation", nth(0, lambda *_: None, Cut()))
        with pytest.raises(Cut) as raised:
            lc.compress(place / "dense", asked, tmp_path / "out")
    assert (tmp_path / "out").is_dir() and "prices of the options are kept" in raised.value.__notes__[-1]
    compressed = begun(monkeypatch)
    monkeypatch.setattr("llmcompress.allocation.price_file.measure_prices", nth(0, lambda *_: None, Cut()))
    again = lc.compress(place / "dense", asked, tmp_path / "out")
    assert compressed == [] and files(again.folder) == files(whole.folder) and not list(tmp_path.glob("out.*"))
    assert again.allocation is not None and whole.allocation is not None
    assert {**again.allocation, "seconds": 0} == {**whole.allocation, "seconds": 0}
    with pytest.raises(DiskError, match="exists already"):
        lc.compress(place / "dense", asked, tmp_path / "out")


def student(place: Path, output: Path) -> Path:
    return lc.compress(place / "dense", recipe(place, calibration=None, rules=RTN), output).folder


def lesson(place: Path, **more: Any) -> dict[str, Any]:
    data = {"dataset": str(place / "text.txt"), "samples": 28, "length": 32, "held_out": 4}
    asked = {"version": 1, "data": data, "rates": {"scales": 1e-3}, "batch": 4, "compute": "float32"}
    return asked | {"steps": 4, "save_every": 1, "evaluate_every": 4} | more


def stopped(place: Path, tmp_path: Path, teacher: Path) -> None:
    """Leave the state of a training behind its second step."""

    def stop(done: int, *_: Any) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(student(place, tmp_path / "small"), teacher, lesson(place), tmp_path / "out", progress=stop)


@pytest.mark.parametrize("changed", ["teacher", pytest.param("student's config.json", marks=pytest.mark.slow)])
def test_a_training_goes_on_with_its_models_alone(changed: str, place: Path, tmp_path: Path) -> None:
    """The teacher's folder holds other weights of the same size and time; or the student another epsilon."""
    teacher = shutil.copytree(place / "dense", tmp_path / "dense")
    stopped(place, tmp_path, teacher)
    path = teacher / "model.safetensors" if changed == "teacher" else tmp_path / "small" / "tokenizer_config.json"
    times = path.stat()
    if changed == "teacher":
        save_file({name: value * 1.1 for name, value in load_file(path).items()}, path, {"format": "pt"})
    else:
        path.write_text(path.read_text() + "\n")
        (tmp_path / "small" / MANIFEST).unlink()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    what = "teacher" if changed == "teacher" else "student"
    with pytest.raises(LLMCompressError, match=f"{what} changed|not the one that its weights were written with"):
        distill(tmp_path / "small", teacher, lesson(place), tmp_path / "out")


@pytest.mark.slow
def test_one_training_at_a_time(place: Path, tmp_path: Path) -> None:
    """The second is refused before it reads a model, and the state of the first stays."""
    stopped(place, tmp_path, place / "dense")
    kept = files(tmp_path / "out.training")
    with (
        lock_output(tmp_path / "out", "output folder"),
        pytest.raises(LockedError, match="is being written by another"),
    ):
        distill(tmp_path / "small", tmp_path / "no such teacher", lesson(place), tmp_path / "out")
    assert files(tmp_path / "out.training") == kept


@pytest.mark.slow
def test_a_bit_of_a_kept_training_that_flips(place: Path, tmp_path: Path) -> None:
    """In any part of the state: numbers, steps taken, history."""
    stopped(place, tmp_path, place / "dense")
    path = tmp_path / "out.training" / "state.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    places = [
        8 + content[8:].index(b'\\"step\\": 2') + 10,
        8 + content[8 : 8 + size].index(b"kl") + 7,
        len(content) - 3,
    ]
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(InputError, match="to start over"):
            distill(tmp_path / "small", place / "dense", lesson(place), tmp_path / "out")
    path.write_bytes(content)
    assert distill(tmp_path / "small", place / "dense", lesson(place), tmp_path / "out").steps == 4


@pytest.mark.slow
def test_a_distilled_output_is_checked_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation_result, "check_written", nth(0, lambda *_: None, InputError("cannot load")))
    with pytest.raises(InputError, match="cannot load"):
        distill(student(place, tmp_path / "small"), place / "dense", lesson(place), tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.training" / "state.safetensors").is_file()


def test_the_message_says_what_is_kept(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop in the last phase is no exception."""
    monkeypatch.setattr(tensor_files, "_move", nth(1, tensor_files._move, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt) as raised:
        lc.compress(place / "dense", recipe(place), tmp_path / "out")
    code, said = verdict(raised.value) or (0, "")
    assert code == 130 and said.endswith(
        f"3 finished blocks are kept in {tmp_path / 'out.partial'}, from where the same command resumes"
    )


@pytest.mark.slow
def test_a_copied_part_of_a_sibling_is_noticed(place: Path, tmp_path: Path) -> None:
    """A part that another run of the same recipe left does not fit the reports."""
    other = shutil.copytree(place / "dense", tmp_path / "dense") / "model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(other).items()}, other, {"format": "pt"})
    for name, model in (("a", place), ("b", tmp_path)):
        asked = recipe(place)

        def stop(done: int, blocks: int, rate: float) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            lc.compress(model / "dense", asked, tmp_path / name, progress=stop)
    part = "checkpoint/part-00001.safetensors"
    shutil.copyfile(tmp_path / "b.partial" / part, tmp_path / "a.partial" / part)
    with pytest.raises(DiskError, match="part-00001.safetensors .*; remove"):
        lc.compress(place / "dense", recipe(place), tmp_path / "a")
