"""Numbers, sizes, times and names as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from llmcompress.errors import format_bytes


def duration(seconds: float) -> str:
    """Return seconds as "48 s", "3 min 20 s" or "1 h 2 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def phases_text(phases: Mapping[str, Mapping[str, float]], most: int = 5) -> str:
    """Return the longest phases of a report and their seconds, as "search 2 min 10 s, forward 31 s"; "" for none."""
    ranked = sorted(phases, key=lambda name: -phases[name]["host"])
    return ", ".join(f"{name} {duration(phases[name]['host'])}" for name in ranked[:most])


def target_text(target: Mapping[str, Any]) -> str:
    """Return a target of an allocation, such as "40.0 MB for vllm"."""
    [(kind, value)] = [(key, value) for key, value in target.items() if key not in ("engine", "worst")]
    sizes = {"sparsity": f"{value:g} of the weights zero", "bytes": format_bytes(value)}
    wanted = sizes.get(kind, f"{value:g} {kind}")
    wanted += f" for {target['engine']}" if "engine" in target else ""
    return f"{wanted} by the worst kind of text" if target.get("worst") else wanted


def without_folders(name: str) -> str:
    """Return a name without the folders of the machine that it was made on."""
    path = PurePath(name)
    return path.name if path.is_absolute() or name.startswith((".", "~")) else name


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """Return a value with its standard error, if it has one, as "3.120 ± 0.045"."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def number(value: float | None) -> str:
    """Return a number with three decimals; "?" for None."""
    return "?" if value is None else f"{value:.3f}"
