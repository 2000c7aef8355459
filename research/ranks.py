"""Time compressing in one process and in several, of one thread each, side by side in turn.

    python research/ranks.py [--processes 2 4] [--rounds 3] [--recipe gptq-4-g64] [--width 1024] [--jsonl FILE]

The model is four Llama blocks with random weights, as its time does not depend on them. Arms run one after the other
in each round, and rounds repeat; the medians count. Seconds are those of the report, without the start of processes and
the reading of the model; those of the whole command are printed beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from records import ROOT, Record, append, provenance
from shapes import VOCABULARY, write
from transformers import LlamaConfig

BLOCKS = 4
TEXT = "text.txt"


def main() -> None:
    """Measure the arms and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", default="gptq-4-g64")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=18)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each arm")
    options = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in (1, *options.processes)}
    with tempfile.TemporaryDirectory() as place:
        dense = model(Path(place) / "dense", options.width)
        for _ in range(options.rounds):
            for count, times in found.items():
                times.append(run(dense, Path(place) / "out", count, options))
    medians = {count: [statistics.median(each) for each in zip(*times, strict=True)] for count, times in found.items()}
    print("| processes | seconds | of the command | to one | in each round |\n|---|---|---|---|---|")
    for count, (seconds, whole) in medians.items():
        rounds = ", ".join(f"{alone[0] / each[0]:.2f}" for alone, each in zip(found[1], found[count], strict=True))
        print(f"| {count} | {seconds:.1f} | {whole:.1f} | {medians[1][0] / seconds:.2f} | {rounds} |")
        if options.jsonl:
            append(options.jsonl, record(count, found[count], medians[1][0], options))


def model(folder: Path, width: int) -> Path:
    """Write the model, with the tokenizer of the embedded one, and random words beside it."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=BLOCKS,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    tokenizer = write(config, folder)
    words = str(tokenizer.decode(torch.randint(VOCABULARY, (200_000,))))
    (folder / TEXT).write_text(words, encoding="utf-8")
    return folder


def run(dense: Path, out: Path, count: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds of a run in so many processes, as reported and of the whole command."""
    text = {"dataset": dense / TEXT, "samples": options.samples, "length": options.length}
    settings = [f"calibration.{key}={value}" for key, value in text.items()]
    words = ["-m", "llmcompress", "compress", str(dense), options.recipe, "-o", str(out), "--no-resume", "--json"]
    words += [word for setting in settings for word in ("--set", setting)]
    port = ["--master-port", str(free_port())]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), *port] if count > 1 else []
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    done = subprocess.run([sys.executable, *launcher, *words], env=os.environ | own, capture_output=True, text=True)
    whole = time.monotonic() - started
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    shutil.rmtree(out)
    return float(json.loads(done.stdout)["seconds"]), whole


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def record(count: int, times: list[tuple[float, float]], alone: float, options: argparse.Namespace) -> Record:
    """Return the record of an arm; `alone`: the seconds of one process."""
    seconds = [each for each, _ in times]
    median = statistics.median(seconds)
    numbers = {"seconds": median, "rounds": seconds, "speedup": alone / median}
    shape = f"{BLOCKS} random Llama blocks of width {options.width}"
    words = f"--processes {' '.join(map(str, options.processes))} --rounds {options.rounds} --recipe {options.recipe}"
    command = f"python research/ranks.py {words} --width {options.width}"
    text = {"samples": options.samples, "length": options.length}
    arm = f"{count}, {options.recipe}"
    place = {"table": "ranks", "arm": arm, "command": command, "model": shape, "text": None, "calibration": text}
    return {**place, "numbers": numbers, **provenance()}


if __name__ == "__main__":
    main()
