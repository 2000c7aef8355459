"""Time models beside their dense one, in turns, and keep the rows for docs/results/speed.md.

    python research/speed.py [--gguf FILE] [--threads 1 2] [--rounds 9] [--prompt 512] NAME=FOLDER ...

Each NAME=FOLDER is a compressed checkpoint of `--against`; NAME is what the row is called. It is `llmcompress bench`
with 32 tokens behind a prompt; `--jsonl` collects a record of every model and number of threads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from records import Record, append, provenance

import llmcompress as lc

COLUMNS = ("model", "MB", "tokens/s", "to dense", "tokens/s of a prompt", "to dense", "peak MB")


def main() -> None:
    """Measure the models and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--against", default="smollm2")
    parser.add_argument("--gguf", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each row")
    options = parser.parse_args()
    pairs = [given.split("=", 1) for given in (*options.models, *options.gguf)]
    names = {path: name for name, path in pairs} | {options.against: "dense bfloat16"}
    folders, files = ([given.split("=", 1)[1] for given in group] for group in (options.models, options.gguf))
    protocol = lc.SpeedProtocol(tuple(options.threads), rounds=options.rounds, prompt=options.prompt)
    found = lc.bench(folders, protocol, against=options.against, ggufs=[Path(file) for file in files])
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for model in found["models"]:
        for threads, speed in model["threads"].items():
            name = next(name for path, name in names.items() if str(path).endswith(model["model"]))
            record = of(name, int(threads), model, speed, options)
            if options.jsonl:
                append(options.jsonl, record)
            print(line(record), flush=True)
    print("\n".join(found["notes"]))


def of(name: str, threads: int, model: Record, speed: Record, options: argparse.Namespace) -> Record:
    """Return the record of a model with so many threads."""
    memory = model["memory"]
    numbers = {
        "megabytes": model["bytes"] / 1e6,
        "decode": speed["decode"]["median"],
        "decode_ratio": speed["ratios"]["decode"]["median"],
        "prefill": speed["prefill"]["median"],
        "prefill_ratio": speed["ratios"]["prefill"]["median"],
        "peak_megabytes": (memory["peak"] - memory["empty"]) / 1e6,
        "bandwidth_share": speed["bandwidth_share"]["median"],
    }
    where = {
        "table": "speed",
        "arm": f"{name}, {threads} thread{'s' * (threads > 1)}, behind {options.prompt}",
        "threads": threads,
        "model": options.against,
        "text": None,
    }
    said = f"--threads {threads} --rounds {options.rounds} --prompt {options.prompt}"
    return where | {
        "command": f"python research/speed.py {said}",
        "calibration": None,
        **provenance(),
        "numbers": numbers,
    }


def line(record: Record) -> str:
    """Return one line of the table."""
    numbers = record["numbers"]
    decode = f"{numbers['decode']:.1f} | {numbers['decode_ratio']:.2f}"
    prefill = f"{numbers['prefill']:.0f} | {numbers['prefill_ratio']:.2f}"
    size = f"{numbers['megabytes']:.1f}"
    return (
        f"| {record['arm']} | {record['threads']} | {size} | {decode} | {prefill} | {numbers['peak_megabytes']:.0f} |"
    )


if __name__ == "__main__":
    main()
