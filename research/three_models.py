"""Every door on several models: what each command takes, and how near to dense its model is.

    python research/three_models.py --data DATA [--work FOLDER] [--jsonl FILE] [--doors NAME ...] NAME=MODEL ...

MODEL is what the command line takes: smollm2, gemma3-270m, a folder, or a GGUF file. Each door of `DOORS` compresses it
in a process of its own. Its result is scored on windows of WikiText-2's test split and of HumanEval's problems with
their solutions, and on PIQA and LAMBADA, beside the dense model. `--jsonl` collects a record of each row; what it has
is not measured again. Models stay below `--work`, where regrets.py takes those of the same commit from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from records import RESULTS, Record, measure_missing, provenance, read_records, recipe_facts

TABLE = "three-models"
DOORS: dict[str, tuple[str, ...]] = {
    "default": ("default",),
    "balanced": ("balanced",),
    "quick": ("quick",),
    "data-free": ("data-free",),
    "gptq-4-g64": ("gptq-4-g64",),
    "sparsegpt-50-refine": ("sparsegpt-50-refine",),
    "partial-binarization": ("partial-binarization",),
    "--bpw 2.05": ("--bpw", "2.05"),
    "--bpw 3.05": ("--bpw", "3.05"),
    "--size a fifth": ("--size", "{fifth}"),
    "--size a sixth": ("--size", "{sixth}"),
    "quick --tune": ("quick", "--tune"),
    "--for vllm": ("--for", "vllm"),
    "--for llama.cpp": ("--for", "llama.cpp"),
}
TEXT = "wikitext2-test.raw"
TASKS = ("piqa_valid.jsonl", "lambada_test.jsonl")


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2-test.raw and tasks/")
    parser.add_argument("--work", type=Path, default=Path("three-models"))
    parser.add_argument("--jsonl", type=Path, default=RESULTS / "three_models.jsonl")
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    write_code(options.data / "tasks" / "humaneval.jsonl", options.work / "code")

    def measure(name: str, model: str, door: str) -> Record:
        known = {record["arm"]: record["numbers"] for record in read_records(options.jsonl)}
        numbers = measure_row(model, door, known.get(f"{name}, dense"), options)
        command = " ".join(["llmcompress", *command_of(name, door, numbers["dense_bytes"])])
        first, *_ = DOORS.get(door, ("dense",))
        facts = {} if first == "dense" or first.startswith("--") else recipe_facts(first)
        return {"table": TABLE, "command": command, "calibration": None, "text": TEXT, **facts, "numbers": numbers}

    measure_missing(options.jsonl, options.models, ("dense", *options.doors), measure)


def write_code(problems: Path, folder: Path) -> None:
    """Write HumanEval's problems with their solutions as one text."""
    folder.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    (folder / "code.txt").write_text("\n".join(row["prompt"] + row["canonical_solution"] for row in rows))


def command_of(model: str, door: str, dense_bytes: int) -> list[str]:
    """Return the words of a door's command, without its output."""
    if door == "dense":
        return ["eval", model]
    sizes = {"fifth": str(dense_bytes // 5), "sixth": str(dense_bytes // 6)}
    return ["compress", model, *(word.format(**sizes) for word in DOORS[door])]


def measure_row(model: str, door: str, dense: Record | None, options: argparse.Namespace) -> Record:
    """Return the numbers of one row; `dense`: those of the dense model, None for itself."""
    place, numbers, report = model, {}, None
    if dense is not None:
        words = command_of(model, door, dense["dense_bytes"])
        plan = run_command(["plan", *words[1:]])
        folder, report = make_model(words, options.work)
        place = str(folder)
        numbers = {key: report[key] for key in ("seconds", "peak_memory_bytes")}
        numbers |= {"planned_seconds": plan["seconds"], "planned_memory_bytes": plan["peak_memory_bytes"]}
    text = ["--text", str(options.data / TEXT), "--windows", "8", "--length", "512"]
    tasks = ",".join(str(options.data / "tasks" / name) for name in TASKS)
    text += ["--domains", str(options.work / "code"), "--tasks", tasks, "--limit", str(options.limit)]
    scores = run_command(["eval", place, *([] if dense is None else ["--against", model]), *text])
    code, piqa, lambada = scores["domains"]["code"], scores["tasks"]["piqa_valid"], scores["tasks"]["lambada_test"]
    sizes = scores if report is None else report  # an engine's file is unpacked to be scored
    return numbers | {
        **{key: sizes[key] for key in ("bytes", "bpw", "model_bpw")},
        **{key: scores[key] for key in ("perplexity", "kl", "kl_stderr", "top1_agreement")},
        "dense_bytes": run_command(["plan", model, "quick"])["dense_bytes"] if dense is None else dense["dense_bytes"],
        "code_perplexity": code["perplexity"],
        "code_kl": code["kl"],
        "piqa": piqa["acc_norm"],
        "lambada": lambada["acc"],
        "items": options.limit,
    }


def make_model(words: list[str], work: Path) -> tuple[Path, Record]:
    """Return the folder below `work` of what a `compress` command wrote, and its report with `seconds`.

    It stays there, so that another table does not make it again at the same commit.
    """
    commit = str(provenance()["commit"])
    out = work / hashlib.sha256(json.dumps([words, commit]).encode()).hexdigest()[:16]
    file = out.with_suffix(".json")
    if not file.exists() or commit.endswith("+changes"):
        shutil.rmtree(out, ignore_errors=True)
        before = time.monotonic()
        report = run_command([*words, "-o", str(out)])
        file.write_text(json.dumps(report | {"seconds": time.monotonic() - before}))
    return out, json.loads(file.read_text())


def run_command(words: list[str]) -> dict[str, Any]:
    """Return what a command of ours prints as JSON; its progress goes on to standard error."""
    done = subprocess.run([sys.executable, "-m", "llmcompress", *words, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):  # 3: beyond a gate, with the model in place
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}: {done.stdout[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    main()
