"""Records of measurements: what was run, on what, and what came of it, one JSON object a line in docs/results/*.jsonl.

A record holds `command`, `date`, `commit`, `model`, `calibration`, `machine`, `versions` and `numbers`; one of a recipe
also `recipe` and `recipe_sha256`, so that a recipe that changed later is noticed. Where `source` is `transcribed` the
numbers were copied from an older document, and what that did not say is null.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
RESULTS = ROOT / "docs" / "results"
FLAGS = ("amx_tile", "amx_bf16", "avx512_bf16", "avx512f", "avx2")  # what decides how products are made
PARTS = ("llmcompress", "research", "configs")  # of the repository, on which a measurement rests

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Return the records of a file, in order; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    """Write a record behind those of a file, which is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def measure_missing(
    path: Path, models: Iterable[str], arms: Iterable[str], measure: Callable[[str, str, str], Record]
) -> None:
    """Append a record of each model, given as NAME=MODEL, in each arm whose row `NAME, ARM` a file lacks.

    `measure(NAME, MODEL, ARM)` returns its table, command, text, calibration and numbers.
    """
    for name, _, model in (entry.partition("=") for entry in models):
        for arm in arms:
            row = f"{name}, {arm}"
            if row not in {record["arm"] for record in read_records(path)}:
                record = measure(name, model, arm)
                append(path, {"arm": row, "model": name, **record, **provenance()})
                print(row, json.dumps(record["numbers"]), flush=True)


def require_engines(parser: argparse.ArgumentParser, engines: Iterable[str]) -> None:
    """End a program with a sentence where an engine's package is missing; warn of a version that was not tried."""
    from llmcompress.errors import RecipeError
    from llmcompress.runtime.engines import check_engine, untried_version

    for engine in sorted(engines):
        try:
            check_engine(engine)
        except RecipeError as error:
            parser.error(str(error))
        if (note := untried_version(engine)) is not None:
            print(f"warning: {note}", file=sys.stderr)


def recipe_path(name: str) -> Path:
    """Return the file of a recipe: its path as given, or the one below configs/ that has this name."""
    found = [Path(name)] if name.endswith(".yaml") else sorted(CONFIGS.glob(f"*/{name}.yaml"))
    if len(found) != 1 or not found[0].is_file():
        raise SystemExit(f"{name}: {len(found)} recipes below configs/ have this name; give the path of a file")
    return found[0]


def recipe_sha256(text: str) -> str:
    """Return the digest of what a recipe says, without its comments and layout, and without gates, which only judge."""
    said = {key: value for key, value in yaml.safe_load(text).items() if key != "gates"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def recipe_facts(name: str) -> Record:
    """Return the entries of a record by which a recipe that changes later is noticed."""
    return {"recipe": name, "recipe_sha256": recipe_sha256(recipe_path(name).read_text())}


def provenance() -> Record:
    """Return when, from which commit and on which machine this process measures."""
    from llmcompress.runtime.facts import versions

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> Record:
    """Return the processor's name, the flags that decide how products are made, and the threads in use."""
    import torch

    info = Path("/proc/cpuinfo")
    fields = dict(_fields(info.read_text())) if info.exists() else {}
    flags = set(fields.get("flags", "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    kind = [fields[key] for key in ("cpu family", "model") if key in fields]
    return {
        "cpu": name,
        "family_model": " ".join(kind),
        "flags": [flag for flag in FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
    }


def _fields(text: str) -> list[tuple[str, str]]:
    pairs = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def _commit() -> str | None:
    """Return HEAD, with `+changes` behind it where the parts that are measured differ from it; None without git."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", *PARTS]
    changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return head.stdout.strip() + ("+changes" if changed else "")
