"""Measure the time and memory of `from_pretrained`, compressed beside dense, in turn, each in a fresh process.

    python research/load.py COMPRESSED DENSE [--times 7]

Prints medians of the seconds and of the memory on top of the imports (`VmHWM`), and their ratios to the bytes on disk.
The files are in the page cache, as both loads read them again and again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

LOAD = """
import json, sys, time
import llmcompress, torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
def held(entry):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(entry)) * 1024
before, started = held("VmRSS"), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "memory": held("VmHWM") - before}))
"""


def main() -> None:
    """Prints both models' figures and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--times", type=int, default=7)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"compressed": [], "dense": []}
    for _ in range(options.times):
        for name, found in runs.items():
            command = [sys.executable, "-c", LOAD, str(getattr(options, name))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
    for name, found in runs.items():
        size = sum(path.stat().st_size for path in getattr(options, name).glob("*.safetensors"))
        memory = statistics.median(run["memory"] for run in found)
        print(
            f"{name}: {seconds[name]:.3f} s, {memory / 1e6:.1f} MB for {size / 1e6:.1f} MB on disk, "
            f"ratio {memory / size:.2f}"
        )
    print(f"seconds, compressed to dense: {seconds['compressed'] / seconds['dense']:.2f}")


if __name__ == "__main__":
    main()
