"""Time and memory in the shape of a model of a billion: ours, llm-compressor and AutoRound on the same four blocks.

    python research/peers/billion.py --environments ENVIRONMENTS --data DATA --out OUT [--threads 2] [ARM ...]

Weights are random, so quality says nothing here; README.md says how to make the environments. Each arm runs in a fresh
process, one at a time, on the first 16 windows of 1024 tokens of `wikitext2-valid.txt`. Ours reads the model, tokenizes
the text and writes the checkpoint in its seconds; the peers' are of the tool alone, on a loaded model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from compare import CONFIGS, HERE
from run import launch, run_once, write_tokens

sys.path.insert(0, str(HERE.parent))
from records import Record, append, provenance
from shapes import shape, write

BLOCKS, SEQUENCES, LENGTH = 4, 16, 1024
OURS = {"gptq-3-g64": "recommended/gptq-3-g64", "trellis-2": "methods/trellis-2"}  # recipe below configs/
PEERS = {  # environment, script, arm
    "llm-compressor-gptq3g64": ("llm-compressor", "llm_compressor", "gptq3g64"),
    "autoround-w2g64-40x1": ("autoround", "autoround", "w2g64-40x1"),
}


def main() -> None:
    """Run every arm and print a line on each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each arm")
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join([*OURS, *PEERS])}; all by default")
    given = parser.parse_args()
    model, text = given.out / "dense", given.data / "wikitext2-valid.txt"
    if not (model / "config.json").exists():
        config = shape(tied=True)
        config.num_hidden_layers = BLOCKS
        write(config, model)
        write_tokens(model, given.data, given.out, SEQUENCES)
    print("| arm | seconds | CPU s | peak MB |\n|---|---|---|---|")
    for arm in given.arms or [*OURS, *PEERS]:
        found = run(arm, model, text, given)
        megabytes = found["peak_rss_bytes"] / 1e6
        print(f"| {arm} | {found['seconds']:.0f} | {found['cpu_seconds']:.0f} | {megabytes:.0f} |", flush=True)
        if given.jsonl:
            append(given.jsonl, record(arm, found | {"peak_megabytes": megabytes}, given))


def run(arm: str, model: Path, text: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return what an arm says of itself; end the program where it fails."""
    if arm in OURS:
        asked = ["--recipe", CONFIGS / f"{OURS[arm]}.yaml", "--text", text, "--sequences", SEQUENCES]
        common = ["--model", model, "--arm", arm, "--out", given.out / arm, "--threads", given.threads]
        launch(arm, [sys.executable, HERE / "ours.py", *asked, "--length", LENGTH, *common], given)
    else:
        run_once(arm, *PEERS[arm], model, given)
    found: dict[str, Any] = json.loads((given.out / arm / "peer.json").read_text())
    return found


def record(arm: str, found: dict[str, Any], given: argparse.Namespace) -> Record:
    """Return the record of an arm."""
    said = f"--environments ENVIRONMENTS --data DATA --out OUT --threads {given.threads} {arm}"
    numbers = {name: found[name] for name in ("seconds", "cpu_seconds", "peak_megabytes", "bpw")}
    return {
        "table": "billion",
        "arm": arm,
        "command": f"python research/peers/billion.py {said}",
        "model": f"random, {BLOCKS} blocks of 2048",
        "text": None,
        "calibration": f"wikitext2-valid.txt, {SEQUENCES} windows of {LENGTH}",
        "numbers": numbers,
        **provenance(),
        "peer": found["versions"],
    }


if __name__ == "__main__":
    main()
