"""The process of one stage: `python -m scripts.gpu.worker STAGE GIVEN`, as `scripts/gpu_check.py` starts it."""

from __future__ import annotations

import sys

import torch

from scripts.gpu.given import LATE, Given, OutOfTimeError
from scripts.gpu.stages import STAGES


def main() -> int:
    """Run a stage. Its errors end the process; the last line that they print is their sentence."""
    stages, given = {stage.name: stage for stage in STAGES}, Given.of_json(sys.argv[2])
    if given.device.startswith("cuda:"):
        torch.cuda.set_device(given.device)  # for what is written to `cuda`
    try:
        stages[sys.argv[1]].run(given)
    except OutOfTimeError as error:
        print(error, file=sys.stderr)
        return LATE
    return 0


if __name__ == "__main__":
    sys.exit(main())
