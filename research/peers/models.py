"""Peers and ours on several models, from the same calibration tokens, by the KL on six kinds of text.

    python research/peers/models.py --environments ENVIRONMENTS --data DATA --out OUT [--jsonl FILE] [--arms NAME ...]
        NAME=MODEL ...

Each arm, a peer's or one of `OURS`, reads the first 16 windows of 1024 tokens of `wikitext2-valid.txt`, with BOS where
the model was taught with it, and changes the decoder's linears alone; AWQ changes the norms before them too. Its model
is scored as those of `regrets.py` are, on text that no arm reads. `bytes` are those of the whole model. What FILE has
is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from compare import HERE
from run import ARMS, run_once, write_tokens

sys.path.insert(0, str(HERE.parent))
from records import RESULTS, Record, measure_missing
from regrets import measure_row, score_kinds, write_kinds
from rows import calibration_words
from score import linear_headers

from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import resolve

PEERS = {f"{tool}-{arm}": (tool, script, arm) for tool, (script, arms) in ARMS.items() for arm in arms}
WINDOWS = 2  # of each kind: the logits of a large vocabulary take most of the time
DENSE_TABLE = ["--set", "embeddings=[]", "--set", "table=null"]
OURS: dict[str, list[str]] = {
    "gptq-4-g64": ["gptq-4-g64"],
    "gptq-3-g64": ["gptq-3-g64"],
    "trellises of quick": ["quick", *DENSE_TABLE],
    "trellises of default": ["default", *DENSE_TABLE],
    "--bpw 2.05": ["--bpw", "2.05"],
    "--bpw 3.05": ["--bpw", "3.05"],
}


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokens, logs and weights")
    parser.add_argument("--jsonl", type=Path, default=RESULTS / "peers_models.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=(*PEERS, *OURS), required=True)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    given = parser.parse_args()
    write_kinds(given.data, given.out / "kinds")

    def measure(name: str, model: str, arm: str) -> Record:
        numbers = measure_ours(model, arm, given) if arm in OURS else measure_peer(name, model, arm, given)
        command = f"python research/peers/models.py --arms '{arm}' {name}={name}"
        text = {"calibration": "wikitext2-valid.txt, 16x1024", "text": "wikitext2-test.raw"}
        return {"table": "peers-models", "command": command, **text, "numbers": numbers}

    measure_missing(given.jsonl, given.models, given.arms, measure)


def measure_ours(model: str, arm: str, given: argparse.Namespace) -> Record:
    """Return the numbers of one of our own arms."""
    numbers = measure_row(model, [*OURS[arm], *calibration_words(given.data)], given.data, given.out, WINDOWS)
    return {"tool": "llmcompress", "tool_arm": arm, **numbers}


def measure_peer(name: str, model: str, arm: str, given: argparse.Namespace) -> Record:
    """Return the numbers of a peer's arm, which runs in its own environment."""
    source, place = resolve(model), given.out / name
    folder, rest = locate(model).folder, source.bytes - sum(header.bytes for header in linear_headers(source))
    place.mkdir(parents=True, exist_ok=True)
    write_tokens(folder, given.data, place)
    run_once(arm, *PEERS[arm], folder, argparse.Namespace(**vars(given) | {"out": place}))
    report: dict[str, Any] = json.loads((place / arm / "peer.json").read_text())
    numbers = score_kinds(place / arm, model, given.data, given.out / "kinds", WINDOWS)
    shutil.rmtree(place / arm)
    sizes = {
        "bytes": round(report["bytes"]) + rest,
        "bpw": report["bpw"],
        "peak_memory_bytes": report["peak_rss_bytes"],
    }
    return {"tool": report["tool"], "tool_arm": report["arm"], **sizes, "seconds": report["seconds"], **numbers}


if __name__ == "__main__":
    main()
