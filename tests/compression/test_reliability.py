"""A small share of `research/reliability.py`: kills, faults, damage and hostile input, from other seeds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.rules.source_tree import ROOT


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="trials are forks")
def test_nothing_is_lost_mixed_or_let_in() -> None:
    counts = ["--kills", "10", "--faults", "6", "--mutations", "30", "--inputs", "20", "--seed", "7000"]
    words = [sys.executable, str(ROOT / "research" / "reliability.py"), *counts]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert "| killed |" in done.stdout and "| hostile |" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="its limit of memory is that of Linux")
def test_readers_take_whatever_they_are_fed() -> None:
    words = [sys.executable, str(ROOT / "research" / "fuzz.py"), "--inputs", "2000", "--seed", "900000"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert done.stdout.count("refused") == 5
