"""Rules on every text file: no machine's paths, no addresses but those that readers can use."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.rules.source_tree import ROOT, repository_files

MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:home|Users|root|work|tmp|mnt|opt|srv|data)/[\w.]")
ADDRESS = re.compile(r"https?://([\w.-]+)")
READERS_HOSTS = {"arxiv.org", "github.com", "huggingface.co", "aclanthology.org", "doi.org"}
FORMATS_HOSTS = {  # in a licence, in a pointer file, in the schema of recipes, and oneself
    "www.apache.org",
    "git-lfs.github.com",
    "json-schema.org",
    "127.0.0.1",
}
BINARY = {".png", ".safetensors", ".parquet"}


def texts() -> Iterator[tuple[str, str]]:
    """The name and the words of every text file."""
    for path in repository_files():
        if path.suffix not in BINARY:
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_no_text_names_a_path_of_one_machine() -> None:
    wrong = {name: found for name, text in texts() if (found := MACHINE_PATH.findall(text))}
    assert not wrong, f"{wrong}: use an argument, a temporary folder, or a path in the repository"


def test_every_address_is_one_that_readers_can_use() -> None:
    others = {name: set(ADDRESS.findall(text)) - READERS_HOSTS - FORMATS_HOSTS for name, text in texts()}
    wrong = {name: sorted(hosts) for name, hosts in others.items() if hosts}
    assert not wrong, f"{wrong}: name packages and papers, not the machines that serve them (or add to the list)"
