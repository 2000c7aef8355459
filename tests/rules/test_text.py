"""Rules on every text file: no machine's paths, no addresses but those that readers can use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.rules.source_tree import ROOT, repository_files

MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:home|Users|root|work|tmp|mnt|opt|srv|data)/[\w.]")
ADDRESS = re.compile(r"https?://([\w.-]+)")
READERS_HOSTS = {"arxiv.org", "github.com", "huggingface.co", "aclanthology.org", "doi.org"}
FORMATS_HOSTS = {"www.apache.org", "git-lfs.github.com", "127.0.0.1"}  # in a licence, in a pointer file, and oneself
BINARY = {".png", ".safetensors", ".parquet"}


@pytest.mark.parametrize("path", repository_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_text_is_for_every_reader(path: Path) -> None:
    if path.suffix in BINARY:
        return
    text = path.read_text(encoding="utf-8")
    paths = MACHINE_PATH.findall(text)
    assert not paths, (
        f"{paths}: a path of one machine; use an argument, a temporary folder, or a path in the repository"
    )
    hosts = set(ADDRESS.findall(text)) - READERS_HOSTS - FORMATS_HOSTS
    assert not hosts, (
        f"{sorted(hosts)}: name packages and papers, not the machines that serve them (or add to the list)"
    )
