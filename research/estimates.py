"""Is `plan` right about memory and time? Predicted beside measured, of random models, each in a process of its own.

python research/estimates.py [--widths 512 1024 2048]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import make

import llmcompress as lc

TEXT = {"dataset": "builtin", "samples": 6, "length": 512, "held_out": 2}
GPTQ = [{"match": "*", "steps": [{"method": "gptq", "bits": 4, "group_size": 64}]}]
TRELLIS = [{"match": "*", "steps": [{"method": "rotate"}, {"method": "trellis", "bits": 2}]}]
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"version": 1, "rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 64}]}]},
    "gptq": {"version": 1, "calibration": TEXT, "rules": GPTQ},
    "trellis, asymmetric": {"version": 1, "calibration": TEXT, "asymmetric": 0.5, "rules": TRELLIS},
    "target": {"version": 1, "calibration": TEXT, "token_weights": {"by": "gradient"}, "target": {"bpw": 2.5}},
    "gptq, learned blocks": {"version": 1, "calibration": TEXT, "reconstruct": {"steps": 2}, "rules": GPTQ},
}
RUN = """
import json, sys
import llmcompress as lc
done = lc.compress(sys.argv[1], json.loads(sys.argv[2]))
prices = 0 if done.allocation is None else done.allocation["seconds"]
print(json.dumps([done.report.peak_memory_bytes, done.report.seconds + prices]))
"""


def main() -> None:
    """Print each prediction, the peak, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for width in options.widths:
            model = Path(folder) / str(width)
            make(model, width, 2)
            for name, recipe in RECIPES.items():
                plan = lc.plan(model, recipe)
                words = [sys.executable, "-c", RUN, str(model), json.dumps(recipe)]
                done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                peak, seconds = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{width} {name}: plan {plan.peak_memory_bytes / 1e9:.2f} GB and {plan.seconds:.0f} s, measured "
                    f"{peak / 1e9:.2f} and {seconds:.0f}, {plan.peak_memory_bytes / peak:.2f}x and "
                    f"{plan.seconds / seconds:.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
