"""The command that checks the machine and the environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llmcompress.cli.options import command
from llmcompress.cli.terminal import Terminal, build_table
from llmcompress.reporting.tables import Row

if TYPE_CHECKING:
    from rich.console import RenderableType

UNHEALTHY = 1  # the exit code where something is wrong


@command(output=("as_json", "quiet"))
def doctor(terminal: Terminal) -> None:
    """Check this machine and environment for what is missing or known to fail.

    Looks at Python, torch, cores, memory, disk, GPU and packages. Exits with 1 if there is an error; warnings do not
    count.

    Example: llmcompress doctor
    """
    from huggingface_hub import constants

    from llmcompress.models.dense.gguf_model import cache_folder
    from llmcompress.runtime.doctor import OPTIONAL, find_faults
    from llmcompress.runtime.facts import gather

    facts = gather(cache_folder(), Path(constants.HF_HUB_CACHE), tuple(OPTIONAL))
    findings = find_faults(facts)
    healthy = all(finding.level != "error" for finding in findings)
    packages = [
        {"package": name, "version": facts.packages[name], "enables": enables, "install": install}
        for name, (enables, install) in OPTIONAL.items()
    ]
    result = {"healthy": healthy, "findings": list(map(asdict, findings)), "optional": packages}
    terminal.show({**result, "facts": asdict(facts)}, doctor_view)
    if not healthy:
        raise typer.Exit(UNHEALTHY)


def doctor_view(result: Row, every: bool) -> Iterator[RenderableType]:
    """Yield the parts of the machine, the features of optional packages, and what is wrong."""
    yield from _machine_lines(result["facts"])
    cells = []
    for row in result["optional"]:
        enables = row["enables"] if row["version"] else f"{row['enables']}: {row['install']}"
        cells.append((row["package"], row["version"] or "-", enables))
    yield ""
    yield build_table(("optional package", "version", "enables"), cells)
    yield ""
    for finding in result["findings"]:
        yield f"{finding['level']}: {finding['sentence']}"
    count = Counter(finding["level"] for finding in result["findings"])
    yield f"{_count(count['error'], 'error')}, {_count(count['warning'], 'warning')}"


def _machine_lines(facts: Row) -> Iterator[str]:
    """Yield a line for each part of the machine."""
    packages, torch = facts["packages"], facts["torch"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if packages.get(name))
    yield f"python  {'.'.join(map(str, facts['python']))} on {facts['system']}; {versions}"
    if torch["error"] is None:
        libraries = f"{torch['blas']} {'with' if torch['onednn'] else 'without'} oneDNN, {torch['capability']} kernels"
        products = f"float32 products {'precise' if torch['precise'] else 'rounded'}"
        threads = _count(torch["threads"], "thread")
        yield f"torch   for {torch['gpu_build'] or 'CPUs alone'}; {libraries}, {products}, {threads}"
        flags = ", ".join(torch["flags"]) or "none that torch knows of"
        yield f"cpu     {torch['cpu'] or 'unknown'}: {_count(facts['cores'], 'usable core')}; {flags}"
    yield f"memory  {_gigabytes(facts['memory'])} usable, {_gigabytes(facts['available'])} free"
    for name, key in (("cache", "cache"), ("hub", "hub_cache"), ("here", "current")):
        folder = facts[key]
        state = "" if folder["writable"] else ", not writable"
        yield f"{name:<8}{_gigabytes(folder['free'])} free at {folder['path']}{state}"
    gpus = [f"{gpu['name']} ({_gigabytes(gpu['memory'])})" for gpu in torch["gpus"]]
    if gpus:
        yield f"gpu     {', '.join(gpus)}; driver {facts['driver'] or 'unknown'}"
    else:
        yield f"gpu     none that torch finds; driver {facts['driver']}" if facts["driver"] else "gpu     none"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _count(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"
