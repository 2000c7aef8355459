"""Do all computations on a device agree with the CPU's? Every method, loss and command, and the trellis search."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from trellis_search import timed

from llmcompress.methods.solvers.stream_search import can_search
from llmcompress.weight.trellis import Trellis
from scripts.gpu.given import Given

TRELLISES = (Trellis(2, 1, 12), Trellis(2, 1, 12, "linear"), Trellis(1, 1, 12), Trellis(3, 1, 12), Trellis(4, 1, 12),
             Trellis(3, 2, 12), Trellis(2, 1, 16))  # fmt: skip
ROWS, COLUMNS = (576, 4096, 14336), 25
SMALL = ("method", "nodes", "loss", "compress", "distill")  # kinds of scenario of which the small check takes one each


def search(given: Given) -> None:
    """Compare the codes of random columns, bit for bit."""
    device = torch.device(given.device)
    if not can_search(device):
        raise SystemExit(f"{device} does not search for itself; it takes an NVIDIA GPU and Triton")
    wrong = []
    for trellis in TRELLISES[: 1 if given.small else None]:
        for rows in (96,) if given.small else ROWS:
            given.check_time("the trellis search")
            columns = 2 if given.small else COLUMNS
            values = torch.randn(columns + 1, rows, generator=torch.Generator().manual_seed(0))
            (here, expected), (there, found) = (timed(values.to(place), trellis) for place in ("cpu", device))
            same = torch.equal(expected, found)
            given.found(f"{trellis}, {rows} rows", {"same": same, "cpu_milliseconds": here, "milliseconds": there})
            wrong += [] if same else [f"{trellis} with {rows} rows"]
    if wrong:
        raise SystemExit(f"the search finds other codes than on the CPU for {', '.join(wrong)}")


def devices(given: Given) -> None:
    """Run the scenarios of tests/devices on the CPU and on the device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the next line: some check that runs repeat
    torch.use_deterministic_algorithms(True, warn_only=True)
    from tests.devices import scenarios as of

    if find_spec("bitsandbytes") is None:
        of.without_bitsandbytes()
    place = given.work / "devices"
    place.mkdir()
    of.prepare(place)
    asked = list(of.scenarios(place, same_kernels=given.device == "cpu"))
    if given.small:
        asked = [next(one for one in asked if one[0].split()[0] == kind) for kind in SMALL]
    wrong: dict[str, str] = {}
    for number, (name, scenario, near) in enumerate(asked):
        if given.left <= 0:
            given.found("scenarios", {"agree": number - len(wrong), "differ": len(wrong), "of": len(asked)})
            given.check_time(f"{number} of {len(asked)} scenarios ({len(wrong)} differ)")
        if (said := of.wrong(scenario, _new(place / "out" / str(number)), near, given.device)) is not None:
            wrong[name] = said
            given.found(name, {}, said=said[-1500:])
    given.found("scenarios", {"agree": len(asked) - len(wrong), "differ": len(wrong), "of": len(asked)})
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(asked)} scenarios differ from the CPU's, the first {next(iter(wrong))}")


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
