"""Compare rings and chains of a trellis on a Gaussian: squared error and processor time, by run.

    python research/rings.py [--bits 1 2 3] [--columns 320] [--jsonl FILE]

Columns of 768 rows, a memory of 12, `code: linear`, each arm at the best scale of its own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from records import append, provenance

from llmcompress.methods.solvers.block_search import TrellisStreams
from llmcompress.weight.expression import dense
from llmcompress.weight.trellis import Trellis

ROWS = 768
ARMS = ((False, 768), (False, 256), (True, 256), (True, 384), (True, 768))  # ring, run


def main() -> None:
    """Print a line for every arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=float, nargs="+", default=[1, 1.5, 2, 2.5, 3, 4])
    parser.add_argument("--columns", type=int, default=320)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each arm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for bits in options.bits:
        for ring, run in ARMS:
            numbers = measure_arm(bits, ring, run, options.columns)
            arm = f"{bits:g} bits, {'rings' if ring else 'chains'} of {run}"
            print(f"| {arm} | {numbers['error']:.5f} | {numbers['microseconds']:.3f} |", flush=True)
            if options.jsonl:
                command = f"python research/rings.py --bits {bits:g} --columns {options.columns}"
                record = {"table": "rings", "arm": arm, "command": command, "model": None, "text": None}
                append(options.jsonl, record | {"calibration": None, "numbers": numbers, **provenance()})


def measure_arm(bits: float, ring: bool, run: int, columns: int) -> dict[str, float]:
    """Return the squared error, and the microseconds of a processor for a weight."""
    values = 1 if bits == int(bits) else 2
    trellis = Trellis(int(bits * values), values, 12, "linear", ring)
    wanted = torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(0))
    streams = TrellisStreams(torch.ones(ROWS, 1).half(), columns, trellis, run)
    streams.choose(0, wanted[:, :1].T.contiguous())  # which compiles
    before = time.process_time()
    streams.choose(0, wanted.T.contiguous())
    seconds = time.process_time() - before
    stored = dense(streams.weight(wanted))
    scale = (wanted * stored).sum() / stored.square().sum()
    return {"error": float((wanted - scale * stored).square().mean()), "microseconds": 1e6 * seconds / wanted.numel()}


if __name__ == "__main__":
    main()
