"""Every peer on the same calibration tokens, then one table: all of `score.py`.

    python research/peers/run.py --environments ENVIRONMENTS --data DATA --out OUT [NAME ...]

ENVIRONMENTS holds one virtual environment per tool, README.md here says how to make them; DATA holds WikiText-2 and
BLiMP. Each arm runs in a fresh process, cheapest first, one at a time, on the first 16 windows of 1024 tokens of
`wikitext2-valid.txt`, and hands over OUT/NAME; arms that OUT holds are not run again. A NAME is the tool's and the
arm's, as `autoround-w2g64`; all of them by default.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare import windows
from safetensors.torch import save_file

from llmcompress.models.dense.locate import locate

HERE = Path(__file__).resolve().parent
LLAMA, BITSANDBYTES = "llama.cpp", "bitsandbytes"
OURS = (LLAMA, BITSANDBYTES)  # need no environment but ours
ARMS = {  # the tool, as its environment is called: script, arms
    "quanto": ("quanto", ("qint2",)),
    "torchao": ("torchao_int2", ("int2-g64",)),
    "hqq": ("hqq_solve", ("4bit-g64", "3bit-g64", "2bit-g64", "2bit-g32", "1bit-g64", "1bit-g32")),
    BITSANDBYTES: ("bitsandbytes_nf4", ("nf4-b64",)),
    LLAMA: (
        "ggml",
        (
            "iq1_s",
            "iq2_xxs",
            "q2_k",
            "tq1_0",
            "tq2_0",
            "iq1_s-joined",
            "iq2_xxs-joined",
            "iq3_xxs-joined",
            "q2_k-joined",
            "q3_k-joined",
            "q4_k-joined",
            "q4_0",
        ),
    ),
    "llm-compressor": (
        "llm_compressor",
        ("gptq2g64", "gptq2g64mse", "gptq3g64", "gptq3g64mse", "gptq4g64mse", "awq4g64", "sparsegpt50"),
    ),
    "autoround": (
        "autoround",
        (
            "w2g64-40x1",
            "w2g32-40x1",
            "w2g128-40x1",
            "w3g64-40x1",
            "w4g64-40x1",
            "w2g128-200x1",
            "w2g64-200x1",
            "w2g32-200x1",
        ),
    ),
}


def main() -> None:
    """Tokens, arms, scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2", help="a dense model of one safetensors file: a name or a folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokens, logs, dense weights and scores")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("names", nargs="*", metavar="NAME")
    given = parser.parse_args()
    known = {f"{tool}-{arm}": (tool, script, arm) for tool, (script, arms) in ARMS.items() for arm in arms}
    chosen = given.names or list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"there is no arm {unknown[0]}; choose of {', '.join(known)}")
    given.out.mkdir(parents=True, exist_ok=True)
    folder = locate(given.model).folder
    write_tokens(folder, given.data, given.out)
    for name in chosen:
        if not (given.out / name / "peer.json").is_file():
            run_once(name, *known[name], folder, given)
    scores = ["--jsonl", given.out / "scores.jsonl", "--peers", given.out / "peers.json", "--threads", given.threads]
    folders = [given.out / name for name in chosen]
    command = [sys.executable, HERE / "score.py", "--data", given.data, "--model", given.model, *scores, *folders]
    subprocess.run(list(map(str, command)), check=True)


def write_tokens(model: Path, data: Path, out: Path, count: int = 16) -> None:
    """Write the first windows of 1024 tokens of the text that arms read into the folder `out`."""
    text = data / "wikitext2-valid.txt"
    save_file({"sequences": windows(model, text, count, 1024)}, out / "tokens.safetensors")


def run_once(name: str, tool: str, script: str, arm: str, model: Path, given: argparse.Namespace) -> None:
    """One arm in a fresh process of the tool's environment; ends the program where it fails."""
    python = sys.executable if tool in OURS else given.environments / tool / "bin" / "python"
    command = [python, HERE / f"{script}.py", "--model", model, "--tokens", given.out / "tokens.safetensors"]
    command += ["--arm", arm, "--out", given.out / name, "--threads", given.threads]
    if tool == LLAMA:
        command += ["--importance", given.out / "importance.safetensors"]
    launch(name, command, given)


def launch(name: str, command: list[Any], given: argparse.Namespace) -> None:
    """A command in a fresh process with so many threads, its words in OUT/NAME.log; ends the program where it fails."""
    threads = str(given.threads)
    variables = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    log = given.out / f"{name}.log"
    print(f"running {name}", file=sys.stderr, flush=True)
    with log.open("w", encoding="utf-8") as messages:
        done = subprocess.run(list(map(str, command)), check=False, env=variables, stdout=messages, stderr=messages)
    if done.returncode != 0:
        sys.exit(f"{name} failed with exit code {done.returncode}; its messages are in {log}.")


if __name__ == "__main__":
    main()
