"""Everything that only a GPU can show, in stages, within 25 minutes: one file of records.

    scripts/gpu_check [--json FILE] [--stages search,kernels] [--seconds 1500] [--data DATA] [--tokens 1,4,16]
        [--forms PART] [--sweep]
    scripts/gpu_check --device cpu --small
    scripts/gpu_check --loan FILE [--parts NAMES] [--small --device cpu]

A stage has a process and a time of its own; one that fails or runs out of time is recorded with its sentence, and the
others go on. FILE gets a record a line, as docs/results/*.jsonl: after each stage all that it found, and one that says
how it ended. `--data` names a folder with `wikitext2-valid.txt` and `wikitext2-test.raw`: then models are calibrated
and scored as most records of the CPU were. `--sweep` only times other shares of a program, to find better ones.
`--small` shows on tiny models that all stages run, without their limits; its numbers mean nothing.
Exits with 1 where a stage failed, with 2 where the device is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from records import ROOT, Record, append, provenance

from llmcompress.errors import RecipeError
from llmcompress.runtime.devices import device_of
from scripts.gpu.given import LATE, Given
from scripts.gpu.stages import MOST, STAGES, Stage

RESULTS = ROOT / "out" / "gpu_check.jsonl"
LOAN = 540.0  # seconds of a loan
LINES = 25  # of the log of a stage that did not end well
DONE, FAILED, OUT_OF_TIME = "done", "failed", "out of time"


def main() -> int:
    """Run the stages; return the exit code."""
    options = _parsed()
    try:
        device = device_of(options.device)
    except RecipeError as error:
        print(f"Nothing was checked: {error}.", file=sys.stderr)
        return 2
    if options.sweep:
        return _sweep(options, device)
    if options.loan is not None:
        return _borrowed(options, device)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text("")
    facts, ends = provenance(), time.monotonic() + options.seconds
    facts["machine"] |= device_facts(device)
    print(f"{facts['machine']['device']}, torch {torch.__version__}; records go to {options.json}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        for stage in options.stages:
            left = options.seconds if options.small else min(stage.seconds, ends - time.monotonic())
            task = Given(stage.name, str(device), options.small, Path(folder), left)
            given = replace(task, data=options.data, tokens=options.tokens, forms=options.forms)
            outcome, said, seconds = ended(stage, given)
            print(f"{stage.name:10}{outcome:12}{seconds:6.0f} s  {said or stage.shows}", flush=True)
            for record in records(stage, given, outcome, said, seconds):
                append(options.json, record | facts)
            failed += outcome != DONE
    return 1 if failed else 0


def ended(stage: Stage, given: Given) -> tuple[str, str | None, float]:
    """Run a stage in a process; return its outcome, the sentence of one that failed, and its seconds."""
    started, log = time.monotonic(), given.work / f"{stage.name}.log"
    if given.seconds <= 0:
        return OUT_OF_TIME, "the stages before it took all of the time", 0.0
    command = [sys.executable, "-m", "scripts.gpu.worker", stage.name, given.to_json()]
    with log.open("wb") as file:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=given.seconds).returncode
        except subprocess.TimeoutExpired:
            code = None
    seconds = time.monotonic() - started
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code == 0:
        return DONE, None, seconds
    print(*lines[-LINES:], sep="\n", file=sys.stderr)
    if code is None:
        return OUT_OF_TIME, f"it was stopped after {seconds:.0f} seconds", seconds
    said = lines[-1] if code > 0 and lines else f"it was ended by signal {-code}"
    return OUT_OF_TIME if code == LATE else FAILED, said, seconds


def records(stage: Stage, given: Given, outcome: str, said: str | None, seconds: float) -> list[Record]:
    """Return a record of everything that a stage found, and one of how it ended, all without their provenance."""
    lines = given.findings.read_text().splitlines() if given.findings.exists() else []
    place = {
        "table": "gpu",
        "stage": stage.name,
        "command": f"./scripts/gpu_check --stages {stage.name}{' --small' if given.small else ''}",
        "model": "a tiny random Llama" if given.small else "smollm2",
        "text": None,
        "calibration": None,
        "small": given.small,
    }
    end = {"arm": stage.name, "outcome": outcome, "said": said, "numbers": {"seconds": seconds, "limit": given.seconds}}
    return [place | json.loads(line) for line in lines] + [place | end]


def device_facts(device: torch.device) -> Record:
    """Return the name of a device, and of a GPU its driver, its memory in bytes and torch's CUDA."""
    if device.type != "cuda":
        return {"device": device.type, "driver": None}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "driver": _driver(),
        "gpu_bytes": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
    }


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; None where its tool is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else None


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS, help="replaced if it is there")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="try every stage on tiny models")
    parser.add_argument("--stages", type=_stages, default=STAGES, metavar="NAMES", help="only these; all by default")
    parser.add_argument("--seconds", type=float, default=MOST, help="of all stages together, 25 minutes by default")
    parser.add_argument("--data", type=Path, help="folder with the two WikiText-2 files")
    parser.add_argument("--tokens", default="1,4,16", help="of the kernels' inputs")
    parser.add_argument("--forms", default="", metavar="PART", help="only kernels of forms whose names have this part")
    parser.add_argument("--sweep", action="store_true", help="only time other shares of a program")
    parser.add_argument("--parts", default="", metavar="NAMES", help="of a loan, only these")
    parser.add_argument("--loan", type=Path, metavar="FILE", help="ten minutes in one process, most valuable first")
    return parser.parse_args()


def _stages(names: str) -> tuple[Stage, ...]:
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in names.split(",") if name not in known]:
        raise argparse.ArgumentTypeError(f"there is no stage {unknown[0]!r}; choose among {', '.join(known)}")
    return tuple(stage for stage in STAGES if stage.name in names.split(","))


def _borrowed(options: argparse.Namespace, device: torch.device) -> int:
    if device.type == "cpu":  # before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    from scripts.gpu.loan import run
    from scripts.gpu.loan_parts import PARTS

    options.loan.parent.mkdir(parents=True, exist_ok=True)
    facts = provenance() | {"table": "gpu-loan", "model": "random weights", "text": None, "calibration": None}
    facts |= {
        "command": f"./scripts/gpu_check --loan FILE{' --small' if options.small else ''}",
        "small": options.small,
    }
    facts["machine"] |= device_facts(device)
    names = [name for name in options.parts.split(",") if name]
    parts = [part for part in PARTS if not names or part.name in names]
    return run(options.loan, device, facts, min(options.seconds, LOAN), parts, options.small)


def _sweep(options: argparse.Namespace, device: torch.device) -> int:
    from scripts.gpu.kernels import forms_with, sweep

    tokens = [int(count) for count in options.tokens.split(",")]
    for row in sorted(sweep(device, forms_with(options.forms), tokens), key=lambda row: (row[0], row[1], row[3])):
        print("| {} | {} | {} | {:.1f} |".format(*row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
