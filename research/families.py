"""Do the doors open for every family? Takes tiny random models of all of them from the plan to the exports.

    python research/families.py [FAMILY ...] [--jsonl FILE]

Each is compressed to 4 bits by GPTQ in groups of 16, on a few short samples of the text that comes with the library,
loaded, asked for three tokens, distilled for one step, and exported. A cell is "yes", or the first words of the
sentence that refused.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from records import ROOT, Record, append, provenance

import llmcompress as lc

sys.path.insert(0, str(ROOT))
from tests.zoo import EVERY, save_any

WORDS = 11  # of a refusal
CALIBRATION: Record = {"dataset": "builtin", "samples": 4, "length": 32, "held_out": 1}
RECIPE: Record = {
    "version": 1,
    "calibration": CALIBRATION,
    "rules": [{"match": "*", "steps": [{"method": "gptq", "bits": 4, "group_size": 16}]}],
}
DISTILLATION: Record = {
    "version": 1,
    "data": CALIBRATION,
    "rates": {"scales": 1e-3},
    "steps": 1,
    "batch": 2,
    "micro_batch": 2,
}
DOORS = ("dense", "gguf", "compressed-tensors")


def main() -> None:
    """Try every family, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(EVERY)}")
    parser.add_argument("--jsonl", type=Path, help="collects a record of each family")
    options = parser.parse_args()
    where = provenance()
    for family in options.families or EVERY:
        with tempfile.TemporaryDirectory() as place:
            row = support(family, Path(place))
        print(f"| {family} | {' | '.join(row.values())} |", flush=True)
        if options.jsonl:
            append(options.jsonl, record(family, row, where))


def record(family: str, row: dict[str, str], where: Record) -> Record:
    """Return the record of a family."""
    return {
        "table": "support",
        "arm": family,
        "command": "python research/families.py --jsonl docs/results/support.jsonl",
        **where,
        "model": "random, two blocks",
        "text": None,
        "calibration": CALIBRATION,
        "numbers": row,
    }


def support(family: str, place: Path) -> dict[str, str]:
    """Return what came of each thing that can be done with a family; `place` is an empty folder."""
    dense, small = save_any(family, place / "model"), place / "small"

    def distil() -> None:
        lc.distill(small, dense, DISTILLATION, place / "taught")

    def leave(door: str) -> None:
        lc.export(small, place / door, door, allow_dense=door != "dense")
        if door == "dense":
            _entered(place / door, lc.read(small).auto_class)

    return {
        "plan": tried(lambda: lc.plan(dense, RECIPE), place),
        "compress": tried(lambda: lc.compress(dense, RECIPE, small), place),
        **dict.fromkeys(("load", "generate", "distil", *map(_key, DOORS)), ""),
        **(
            {
                "load": tried(lambda: _loaded(small), place),
                "generate": tried(lambda: _generated(small), place),
                "distil": tried(distil, place),
                **{_key(door): tried(partial(leave, door), place) for door in DOORS},
            }
            if small.exists()
            else {}
        ),
    }


def tried(work: Callable[[], Any], place: Path) -> str:
    """Return "yes", or the first words of the refusal, without the temporary `place` and what is in brackets.

    What fails otherwise is named by its kind of error.
    """
    try:
        work()
    except lc.LLMCompressError as error:
        said = re.sub(rf"{re.escape(str(place))}\S*", "it", str(error))
        return " ".join(re.sub(r" \([^()]*\)", "", said).partition(";")[0].split()[:WORDS]).rstrip(",")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome
        return f"fails: {type(error).__name__}"
    return "yes"


def _key(door: str) -> str:
    return door.replace("-", "_")


def _loaded(folder: Path) -> None:
    """Compare the outputs of packed weights with those of decoded ones."""
    model = _model(folder)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        found = model(input_ids=ids)[0]  # logits, or hidden states of a body
        with lc.decoded(model):
            torch.testing.assert_close(found, model(input_ids=ids)[0], rtol=1e-3, atol=1e-3)


def _generated(folder: Path) -> None:
    """Ask for three tokens."""
    model = _model(folder)
    if not model.can_generate():
        raise lc.LLMCompressError("it predicts no next token")
    ids = torch.arange(3, 27)[None]
    found = model.generate(input_ids=ids, min_new_tokens=3, max_new_tokens=3, do_sample=False)
    if found.shape != (1, 27):
        raise ValueError(f"{found.shape} tokens")


def _model(folder: Path) -> Any:
    """Return a compressed model, loaded by its auto class."""
    return getattr(transformers, lc.read(folder).auto_class).from_pretrained(folder)


def _entered(folder: Path, loader: str) -> None:
    """See that transformers finds every weight."""
    loaded: Any = getattr(transformers, loader).from_pretrained(folder, output_loading_info=True)
    found = loaded[1]
    if found["missing_keys"] or found["unexpected_keys"]:
        raise ValueError(f"weights are missing or unexpected: {found}")


if __name__ == "__main__":
    main()
