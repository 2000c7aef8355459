"""Files beside the weights: what transformers names goes along, whatever else lies there does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmcompress.errors import InputError
from llmcompress.models.dense.companions import companions, copy_companions
from tests.tiny import save_tiny

SECRETS = (
    "wandb_key.json",
    "vocab.txt",
    "notes.txt",
    "prompt.jinja",
    "spm.model",
    "keys.tiktoken",
    "adapter_config.json",
    "modeling_tiny.py",
    "LICENSE_keys.json",
)
NAMED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE-MODEL.txt",
    "NOTICE.md",
)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with everything that a folder may hold beside the weights."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("companions") / "dense")
    for name in SECRETS:
        (folder / name).write_text('{"key": "marker"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (folder / "preprocessor_config.json").write_text("{}")
    for name in ("LICENSE", "LICENSE-MODEL.txt", "NOTICE.md"):
        (folder / name).write_text("You may.")
    return folder


def copied(folder: Path, target: Path) -> set[str]:
    """The names that a copy of the companions consists of."""
    target.mkdir()
    copy_companions(folder, target)
    return {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}


def linked(folder: Path, cache: Path) -> Path:
    """The folder as the Hub's cache holds it: a snapshot of links to blobs."""
    snapshot, blobs = cache / "models--org--name" / "snapshots" / ("c" * 40), cache / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        name = path.relative_to(folder)
        (blobs / f"{number:040x}").write_bytes(path.read_bytes())
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to("../" * (1 + len(name.parts)) + f"blobs/{number:040x}")
    return snapshot


def test_what_transformers_names_goes_along_and_nothing_else(
    filled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert copied(filled, tmp_path / "out") == set(NAMED)
    assert all(name in caplog.text for name in SECRETS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(tokenizer.chat_template) == {"default", "tools"}


def test_the_links_of_the_hubs_cache_are_followed(filled: Path, tmp_path: Path) -> None:
    assert copied(linked(filled, tmp_path / "cache"), tmp_path / "out") == set(NAMED)


def test_no_other_link_is_followed(filled: Path, tmp_path: Path) -> None:
    outside = tmp_path / "passwd"
    outside.write_text('{"root": "marker"}')
    folder = save_tiny("llama", tmp_path / "dense")
    for name in ("passwd.txt", "LICENSE", "NOTICE"):
        (folder / name).symlink_to(outside)
    assert not copied(folder, tmp_path / "out") & {"passwd.txt", "LICENSE", "NOTICE"}
    (folder / "special_tokens_map.json").symlink_to(outside)
    with pytest.raises(InputError, match=r"special_tokens_map.json is a link out of its folder"):
        companions(folder)
    snapshot = linked(filled, tmp_path / "cache")
    blob = snapshot.parent.parent / "blobs" / ("f" * 40)
    blob.symlink_to(outside)
    (snapshot / "added_tokens.json").symlink_to(os.path.relpath(blob, snapshot))
    with pytest.raises(InputError, match=r"added_tokens.json is a link out of its folder"):
        companions(snapshot)


BROKEN: dict[str, Callable[[Path], object]] = {
    "generation_config.json is not readable JSON": lambda it: (it / "generation_config.json").write_text("{"),
    "generation_config.json is not readable JSON .it holds no JSON object": lambda it: (
        it / "generation_config.json"
    ).write_text("[]"),
    "generation_config.json is broken": lambda it: (it / "generation_config.json").write_text('{"max_new_tokens": -1}'),
    "tokenizer_config.json is not readable JSON": lambda it: (it / "tokenizer_config.json").write_text("{"),
    "chat template in .* is broken": lambda it: (it / "chat_template.jinja").write_text("{% if %}"),
    "preprocessor_config.json is not readable": lambda it: (it / "preprocessor_config.json").write_text("x"),
    "more than any tokenizer": lambda it: os.truncate(it / "tokenizer.json", 10**10),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_a_broken_companion_is_refused(sentence: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "dense")
    BROKEN[sentence](folder)
    with pytest.raises(InputError, match=sentence):
        companions(folder)


def test_a_template_is_not_computed(tmp_path: Path) -> None:
    """In a process of its own: no signal ends a power of so many digits."""
    folder = save_tiny("llama", tmp_path / "dense")
    (folder / "chat_template.jinja").write_text("{{ 9**(9**9) }}")
    program = "import sys, pathlib; from llmcompress.models.dense.companions import companions as of; of(pathlib.Path("
    words = [sys.executable, "-c", f"{program}sys.argv[1]))", str(folder)]
    assert subprocess.run(words, check=False, timeout=90).returncode == 0


def test_a_folder_without_a_tokenizer_has_no_fault(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "dense", tokenizer=False)
    (folder / "vocab.txt").write_text("marker")
    found = companions(folder)
    assert found.names == ("generation_config.json",) and found.left == ("vocab.txt",)


def test_what_stays_behind_is_named_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tokenizer's older form stays behind where its newer one is read, and is not called anything else."""
    folder = save_tiny("gpt2", tmp_path / "dense")
    for name in (
        "merges.txt",
        "vocab.json",
        "notes.txt",
        "key.pem",
        "pytorch_model.bin",
        ".gitattributes",
        "README.md",
    ):
        (folder / name).write_text("{}")
    assert "merges.txt" not in copied(folder, tmp_path / "out")
    [told] = [record.getMessage() for record in caplog.records]
    assert told == (
        f"left behind in {folder}: merges.txt, vocab.json (its tokenizer is read from other files); "
        f"key.pem, notes.txt, pytorch_model.bin (no part of the model)"
    )


def test_code_and_paths_in_configs_stay_behind(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "dense")
    path = folder / "tokenizer_config.json"
    private = {
        "auto_map": {"AutoTokenizer": ["x.Y", None]},
        "name_or_path": "/marker",
        "tokenizer_file": "/marker",
    }
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | private))
    copied(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == before
