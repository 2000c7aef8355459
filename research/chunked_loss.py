"""The chunked loss on predictions against whole logits: peak memory and time, for four numbers of tokens.

python research/chunked_loss.py [--width 576] [--vocabulary 49152] [--repeats 5]

Each cell is a process of its own; the memory is what it takes above its hidden states and heads, as Linux counts it.
Times of both ways are taken in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

TOKENS = (256, 1024, 4096, 16384)
MOST_WHOLE = 4096  # tokens of which whole logits fit in a small machine
WORK = """
import json, sys, time
import torch
from llmcompress.distillation.objective.chunked_loss import chunked_loss
from llmcompress.distillation.teacher.predictions import Online
from llmcompress.losses.forward_kl import ForwardKL
from llmcompress.losses.loss import Predictions, measure

width, vocabulary, tokens, repeats = (int(value) for value in sys.argv[1:5])
ways = sys.argv[5].split(",")
torch.manual_seed(0)
heads = [(torch.randn(vocabulary, width) * 0.05).bfloat16() for _ in range(2)]
hidden = [torch.randn(tokens, width).bfloat16() for _ in range(2)]
targets = torch.zeros(tokens, dtype=torch.long)
hidden[0].requires_grad_()


def whole():
    logits = [torch.nn.functional.linear(states, head) for states, head in zip(hidden, heads)]
    total, _ = measure(Predictions(logits[0], logits[1].detach(), targets), ForwardKL())
    total.backward()


def chunked():
    chunked_loss(hidden[0], heads[0], Online(hidden[1], heads[1]), targets, [(ForwardKL(), None, 1.0)]).total.backward()


def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is held now
before = status("VmRSS")
seconds = {way: [] for way in ways}
for _ in range(repeats):
    for way in ways:
        start = time.perf_counter()
        {"whole": whole, "chunked": chunked}[way]()
        seconds[way].append(time.perf_counter() - start)
peak = (status("VmHWM") - before) * 1024
print(json.dumps({"peak": peak, "seconds": {way: sorted(found)[len(found) // 2] for way, found in seconds.items()}}))
"""


def main() -> None:
    """Prints a row for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print("| tokens | chunked MB | whole MB | chunked s | whole s | time |\n|---|---|---|---|---|---|")
    for tokens in TOKENS:
        size = [str(value) for value in (options.width, options.vocabulary, tokens)]
        chunked = measured([*size, "2", "chunked"])
        if tokens > MOST_WHOLE:
            print(f"| {tokens} | {chunked['peak'] / 1e6:.0f} | | {chunked['seconds']['chunked']:.2f} | | |")
            continue
        whole, both = (
            measured([*size, "2", "whole"]),
            measured([*size, str(options.repeats), "whole,chunked"])["seconds"],
        )
        print(
            f"| {tokens} | {chunked['peak'] / 1e6:.0f} | {whole['peak'] / 1e6:.0f} | {both['chunked']:.2f} | "
            f"{both['whole']:.2f} | {both['chunked'] / both['whole']:.2f} |"
        )


def measured(arguments: list[str]) -> dict[str, Any]:
    """Return the figures that one process prints."""
    done = subprocess.run([sys.executable, "-c", WORK, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
