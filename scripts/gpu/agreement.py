"""Agreement of a device with the CPU: every method, loss and command."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch

from scripts.gpu.given import Given

SMALL = ("method", "nodes", "loss", "compress", "distill")  # kinds of scenario of which the small check takes one each


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
