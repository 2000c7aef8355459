"""Forms of MLX and vLLM, filled by the engines' own tools and by ours, by the KL on six kinds of text.

    python research/peers/engine_forms.py --environments ENVIRONMENTS --data DATA --out OUT [--jsonl FILE]
        [--calibration N] [--windows N] [--arms NAME ...] NAME=MODEL ...

An arm's folder is what the engine loads: the numbers in it are scored, and where it rounds inputs they are rounded, as
compressed-tensors does in transformers. Ours and llm-compressor's read the first N windows of 1024 tokens of
`wikitext2-valid.txt`, mlx-lm reads no text. `bytes` are those of the weight files. An arm with `{...}` is made as large
as that arm's. What FILE has is not measured again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from functools import partial
from pathlib import Path

from compare import HERE
from run import run_once, write_tokens

sys.path.insert(0, str(HERE.parent))
from engine_doors import write_mlx
from records import RESULTS, Record, measure_missing, read_records
from regrets import score_kinds, write_kinds
from rows import calibration_words
from three_models import run_command

from llmcompress.models.dense.locate import locate

BITS = {"mlx-lm, 4 bits": 4, "mlx-lm, 3 bits": 3}
PEERS = {
    "llm-compressor, FP8_DYNAMIC": "fp8-dynamic",
    "llm-compressor, W8A8 by GPTQ": "w8a8",
    "llm-compressor, W8A8 by SmoothQuant and GPTQ": "w8a8-smooth",
}
THREE = [word for key in ("rules[0].steps[0]", "embeddings[0]") for word in ("--set", f"{key}.bits=3")]
OURS = {
    "mlx-4": ["mlx-4", "--for", "mlx"],
    "mlx-4, of 3 bits": ["mlx-4", "--for", "mlx", *THREE],
    "--for mlx --size, as 4 bits": ["--for", "mlx", "--size", "{mlx-lm, 4 bits}"],
    "--for mlx --size, as 3 bits": ["--for", "mlx", "--size", "{mlx-lm, 3 bits}"],
    "vllm-fp8": ["vllm-fp8", "--for", "vllm"],
    "vllm-int8": ["vllm-int8", "--for", "vllm"],
    "vllm-int8, smoothed": ["vllm-int8", "--for", "vllm", "--set", "fuse={awq: true}"],
}


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokens, logs and weights")
    parser.add_argument("--jsonl", type=Path, default=RESULTS / "engine_forms.jsonl")
    parser.add_argument("--calibration", type=int, default=16, help="windows of calibration text")
    parser.add_argument("--windows", type=int, default=2, help="of each kind of text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=(*BITS, *PEERS, *OURS), default=[*BITS, *PEERS, *OURS])
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    given = parser.parse_args()
    sizes = [f"--{key} {getattr(given, key)}" for key in ("calibration", "windows")]
    write_kinds(given.data, given.out / "kinds")

    def measure(name: str, model: str, arm: str) -> Record:
        command = " ".join(["python research/peers/engine_forms.py", *sizes, f"--arms '{arm}' {name}={name}"])
        read = None if arm in BITS else f"wikitext2-valid.txt, {given.calibration}x1024"
        held = {record["arm"]: record["numbers"] for record in read_records(given.jsonl)}
        others = {other: held.get(f"{name}, {other}", {}) for other in BITS}
        numbers = measure_row(model, arm, others, given)
        said = {"table": "engine-forms", "command": command, "calibration": read, "text": "wikitext2-test.raw"}
        return said | {"numbers": numbers}

    measure_missing(given.jsonl, given.models, given.arms, measure)


def measure_row(model: str, arm: str, others: dict[str, Record], given: argparse.Namespace) -> Record:
    """Return the numbers of one arm; `others`: those of the arms whose size it may have."""
    folder = given.out / "out"
    shutil.rmtree(folder, ignore_errors=True)
    if arm in BITS:
        folder.mkdir()
        write_mlx(model, folder, BITS[arm])
    elif arm in PEERS:
        dense = locate(model).folder
        write_tokens(dense, given.data, given.out, given.calibration)
        run_once("out", "llm-compressor", "llm_compressor", PEERS[arm], dense, given)
    else:
        words = [re.sub(r"\{(.*,.*)\}", partial(bytes_of, others), word) for word in OURS[arm]]
        sets = calibration_words(given.data, samples=given.calibration, held_out=0)
        run_command(["compress", model, *words, *sets, "--no-resume", "-o", str(folder)])
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    kinds = score_kinds(folder, model, given.data, given.out / "kinds", given.windows)
    return {"bytes": size, "windows": given.windows, **kinds}


def bytes_of(others: dict[str, Record], found: re.Match[str]) -> str:
    """Return the bytes of the arm that a word names."""
    return str(others[found[1]]["bytes"])


if __name__ == "__main__":
    main()
