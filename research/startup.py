"""Time the package's import on top of torch, and the answer of `llmcompress --help`; medians of seven.

python research/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

TIMES = 7
IMPORT = "import time, torch; start = time.perf_counter(); import llmcompress; print(time.perf_counter() - start)"


def main() -> None:
    """Prints both."""
    imports = [float(subprocess.check_output([sys.executable, "-c", IMPORT])) for _ in range(TIMES)]
    command = [str(Path(sys.executable).with_name("llmcompress")), "--help"]
    helps = []
    for _ in range(TIMES):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        helps.append(time.perf_counter() - started)
    print(f"import llmcompress, torch being there: {statistics.median(imports):.3f} s")
    print(f"llmcompress --help: {statistics.median(helps):.3f} s")


if __name__ == "__main__":
    main()
