"""A file added to a finished checkpoint, and a checkpoint that is removed, in processes that die at any call."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from llmcompress.models.files.checkpoint import add_file, check_manifest, files_of, remove_unfinished, seal
from llmcompress.pipeline.compress import _discard
from tests.interrupted import die_before

CONFIG = '{"quantization_config": {"quant_method": "llmcompress"}}'


def write_folder(folder: Path) -> None:
    folder.mkdir()
    for name, text in (("config.json", CONFIG), ("report.json", "old"), ("model.safetensors", "numbers")):
        (folder / name).write_text(text)
    seal(folder)


def test_a_checkpoint_is_whole_wherever_a_file_was_added(tmp_path: Path) -> None:
    """It holds the old text or the new one, passes its check, and is rid of the rest by the next run."""
    texts, calls, died = [], 0, True
    while died:
        folder = tmp_path / str(calls)
        write_folder(folder)
        names = files_of(folder)
        died = die_before(calls, partial(add_file, folder, "report.json", "new"))
        assert check_manifest(folder) and files_of(folder) == names
        texts.append((folder / "report.json").read_text())
        remove_unfinished(folder)
        assert check_manifest(folder) and {path.name for path in folder.iterdir()} == set(names)
        calls += 1
    assert texts == sorted(texts, reverse=True) and texts[0] == "old" and texts[-1] == "new" and calls > 8


def test_a_removal_that_was_interrupted_is_ended(tmp_path: Path) -> None:
    calls, died = 0, True
    while died:
        folder = tmp_path / str(calls)
        write_folder(folder)
        died = die_before(calls, partial(_discard, folder, tmp_path / "training"))
        _discard(folder, tmp_path / "training")
        assert not folder.exists()
        calls += 1
    assert calls > 4
