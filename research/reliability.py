"""Try to lose, to mix and to let in: kills, faults, damage and hostile input from seeds, as one table.

    python research/reliability.py [--kills 500] [--faults 100] [--mutations 600] [--inputs 300] [--seed 0]
        [--jsonl FILE]

Every trial has a seed and a tiny model of its own, so that runs of several seeds add up. A run of five kinds is killed
at a change of the disk that the seed chooses, once or twice, and resumed; one change of the disk fails, and the run is
resumed; a checkpoint is damaged, and loaded; recipes, texts and dense models are hostile. What must not happen: files
that differ from those of an uncut run, other numbers than before the damage, a traceback, a hang, memory beyond twice
the file and 500 MB.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from records import append, provenance
from reliability_inputs import fed, loaded, logits
from reliability_runs import faulty, fresh, killed, prepared, scenarios
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trials import BAD, tried

import llmcompress as lc
from llmcompress.models.files import tensor_files

TEXT = "Forty farms bring their corn to the mill by the river, and the miller counts every sack of it. "
RULES = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 8}]}]
Found = Counter[tuple[str, str, str]]  # (trial, class, outcome) -> how often


def main() -> None:
    """Run the trials and print the table; exit with 1 where something bad happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 500), ("faults", 100), ("mutations", 600), ("inputs", 300)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jsonl", type=Path, help="collects a record of each row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = trials(Path(folder), options.kills, options.faults, options.mutations, options.inputs, options.seed)
    for row in table(found):
        print(f"| {' | '.join(map(str, row))} |")
    if options.jsonl is not None:
        for record in records(found, options):
            append(options.jsonl, record)
    sys.exit(int(bool(bad(found))))


def trials(place: Path, kills: int, faults: int, mutations: int, inputs: int, seed: int = 0) -> Found:
    """Return how often each class of trial had each outcome."""
    said = tried(lambda: make(place), seconds=600)
    if said.kind != "done":
        raise SystemExit(f"nothing can be tried: {said.said}")
    found: Found = Counter()
    stages = [prepared(name, place) for name in scenarios("")] if kills or faults else []
    wanted = tried(lambda: logits(place / "one.4")).said

    def count(trial: str, number: int, work: Callable[[int, Path], tuple[str, str]]) -> None:
        for at in range(number):
            found[trial, *work(seed + at, fresh(place / "trial"))] += 1
            print(f"{trial} {at + 1} of {number}", end="\r", file=sys.stderr)

    count("killed", kills, lambda at, folder: killed(stages[at % len(stages)], at, folder))
    count("fault", faults, lambda at, folder: faulty(stages[at % len(stages)], at, folder))
    count("damaged", mutations, lambda at, folder: loaded(place / "one.4", place / "two.4", wanted, at, folder))
    count("hostile", inputs, lambda at, folder: fed(place, at, folder))
    return found


def make(place: Path) -> None:
    """Write a dense model, a sibling of it, a text, and checkpoints of both models by one recipe."""
    words = {chr(number): number for number in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(_symbols(words))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(place / "dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(place / "dense")
    (place / "text.txt").write_text("".join(f"{i}. {TEXT}" for i in range(80)))
    shutil.copytree(place / "dense", place / "sibling")
    path = place / "sibling" / "model.safetensors"
    save_file({name: value * 1.5 for name, value in load_file(path).items()}, path, {"format": "pt"})
    tensor_files.SHARD = 20_000  # several files
    for name, output in (("dense", "one.4"), ("sibling", "two.4")):
        lc.compress(place / name, {"version": 1, "rules": RULES}, place / output)


def _symbols(words: dict[str, int]) -> list[str]:
    """Return the 256 symbols that stand for bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())[: len(words)]


def bad(found: Found) -> dict[tuple[str, str, str], int]:
    """Return what must not happen, and did."""
    return {key: count for key, count in found.items() if key[2] in BAD or key[2].startswith("left behind")}


def table(found: Found) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of the table: trial, class, how many, and their outcomes."""
    yield "trial", "where, or how", "trials", "outcomes"
    yield "---", "---", "---", "---"
    for trial, kind in sorted({key[:2] for key in found}):
        outcomes = {key[2]: count for key, count in found.items() if key[:2] == (trial, kind)}
        words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        yield trial, kind, sum(outcomes.values()), words


def records(found: Found, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a record for each row."""
    command = f"python research/reliability.py --kills {options.kills} --faults {options.faults} "
    command += f"--mutations {options.mutations} --inputs {options.inputs} --seed {options.seed}"
    for trial, kind, count, words in list(table(found))[2:]:
        yield {
            "table": "reliability",
            "arm": f"{trial}: {kind}",
            "command": command,
            "model": "a Llama of 3 blocks, width 32",
            "text": None,
            "calibration": None,
            "numbers": {"trials": count, "outcomes": words},
            **provenance(),
        }


if __name__ == "__main__":
    main()
