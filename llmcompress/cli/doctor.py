"""The command that looks at the machine and the environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llmcompress.cli.options import AsJson, Quiet
from llmcompress.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

UNHEALTHY = 1  # the exit code where something is wrong


def doctor(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Check this machine and environment: Python, torch, cores, memory, disk, GPU, packages, and combinations known to
    fail. Exits with 1 where something is wrong; warnings do not count.

    Example: llmcompress doctor
    """
    with Terminal(as_json, quiet=quiet) as terminal:
        from huggingface_hub import constants

        from llmcompress.models.dense.smollm2 import cache_folder
        from llmcompress.runtime.doctor import OPTIONAL, find_faults
        from llmcompress.runtime.facts import gather

        facts = gather(cache_folder(), Path(constants.HF_HUB_CACHE), tuple(OPTIONAL))
        findings = find_faults(facts)
        healthy = all(one.level != "error" for one in findings)
        packages = [
            {"package": name, "version": facts.packages[name], "enables": enables, "install": install}
            for name, (enables, install) in OPTIONAL.items()
        ]
        found = {"healthy": healthy, "findings": list(map(asdict, findings)), "optional": packages}
        terminal.show({**found, "facts": asdict(facts)}, doctor_view)
    if not healthy:
        raise typer.Exit(UNHEALTHY)


def doctor_view(values: dict[str, Any], _every: bool) -> Iterator[RenderableType]:
    """Yield what there is, what optional packages enable, and what is wrong."""
    from rich.table import Table

    yield from _machine(values["facts"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("optional package", "version", "enables"):
        table.add_column(heading, overflow="fold")
    for row in values["optional"]:
        missing = f"{row['enables']}: {row['install']}"
        table.add_row(row["package"], row["version"] or "-", row["enables"] if row["version"] else missing)
    yield ""
    yield table
    yield ""
    for finding in values["findings"]:
        yield f"{finding['level']}: {finding['sentence']}"
    count = Counter(finding["level"] for finding in values["findings"])
    yield f"{_counted(count['error'], 'error')}, {_counted(count['warning'], 'warning')}"


def _machine(facts: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each part of the machine."""
    packages, torch = facts["packages"], facts["torch"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if packages.get(name))
    yield f"python  {'.'.join(map(str, facts['python']))} on {facts['system']}; {versions}"
    if torch["error"] is None:
        libraries = f"{torch['blas']} {'with' if torch['onednn'] else 'without'} oneDNN, {torch['capability']} kernels"
        products = f"float32 products {'precise' if torch['precise'] else 'rounded'}"
        threads = _counted(torch["threads"], "thread")
        yield f"torch   for {torch['gpu_build'] or 'CPUs alone'}; {libraries}, {products}, {threads}"
        flags = ", ".join(torch["flags"]) or "none that torch knows of"
        yield f"cpu     {torch['cpu'] or 'unknown'}: {_counted(facts['cores'], 'usable core')}; {flags}"
    yield f"memory  {_gigabytes(facts['memory'])} usable, {_gigabytes(facts['available'])} free"
    for name, key in (("cache", "cache"), ("hub", "hub_cache"), ("here", "current")):
        folder = facts[key]
        state = "" if folder["writable"] else ", not writable"
        yield f"{name:<8}{_gigabytes(folder['free'])} free at {folder['path']}{state}"
    gpus = [f"{gpu['name']} ({_gigabytes(gpu['memory'])})" for gpu in torch["gpus"]]
    seen = f"none that torch finds; driver {facts['driver']}" if facts["driver"] else "none"
    yield f"gpu     {', '.join(gpus) + '; driver ' + (facts['driver'] or 'unknown') if gpus else seen}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
