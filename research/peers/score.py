"""Scores the folders of the peers by one evaluator, and prints their table.

    python research/peers/score.py --data DATA --model MODEL --jsonl SCORES --peers PEERS FOLDER ...

A FOLDER is what a peer's script handed over, or a checkpoint of ours; all are loaded in float32. MODEL, the dense one,
is scored first: gaps, ln(perplexity / dense perplexity), are to it. DATA holds `wikitext2-test.raw` and paradigms of
BLiMP, `blimp/*.jsonl`; 12 are asked, 50 pairs of each: where dense itself guesses, nothing is seen of what was lost.
Text of another domain is Python's documentation, which llmcompress takes from the standard library. SCORES collects the
rows as they come, and folders that it holds are not scored again. PEERS is those of other tools once more, for
`llmcompress frontier --peers`: there, bytes are of the whole model, what is no linear of the decoder being dense; else
bpw and bytes are those of the decoder's linears.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from llmcompress.evaluation.evaluate import evaluate
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.score import size_of
from llmcompress.models.dense.families import architecture
from llmcompress.models.dense.headers import Header
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import DenseModel, resolve
from llmcompress.models.dense.tokenizer import load_tokenizer

WINDOWS, OTHER_WINDOWS, PAIRS = 32, 16, 50
DENSE, OURS = "dense", "llmcompress"
PARADIGMS = (  # the 12 of 24 in which dense SmolLM2-135M-Instruct is right in more than 4 of 5 pairs
    "anaphor_number_agreement",
    "determiner_noun_agreement_1",
    "determiner_noun_agreement_irregular_2",
    "determiner_noun_agreement_with_adj_irregular_1",
    "determiner_noun_agreement_with_adjective_1",
    "irregular_past_participle_verbs",
    "irregular_plural_subject_verb_agreement_2",
    "principle_A_case_1",
    "principle_A_case_2",
    "principle_A_domain_2",
    "transitive",
    "wh_questions_object_gap",
)
QUALITY = ("perplexity", "gap", "BLiMP", "Python docs", "gap there")
COLUMNS = ("tool", "arm", "bpw", "MB", *QUALITY, "seconds", "CPU s", "peak MB")


def main() -> None:
    """Scores what was asked for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2", help="the dense model: a name or a folder")
    parser.add_argument("--jsonl", type=Path, required=True, help="collects finished rows")
    parser.add_argument("--peers", type=Path, help="writes the peers' points for a plot of sizes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("folders", nargs="*", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    held = given.jsonl.read_text(encoding="utf-8").splitlines() if given.jsonl.exists() else []
    rows = {row["folder"]: row for row in map(json.loads, held)}
    folders = [given.model, *map(str, given.folders)]
    for folder in folders:
        if folder not in rows:
            row = described(folder, given.model) | scored(folder, given.data)
            rows[folder] = row | gaps(row, rows.get(given.model, row))
            with given.jsonl.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[folder]) + "\n")
    found = [rows[folder] for folder in folders]
    if given.peers:
        given.peers.write_text(json.dumps({"peers": points(found, given.model)}, indent=1) + "\n", encoding="utf-8")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in found:
        print(line(row))


def described(folder: str, dense: str) -> dict[str, Any]:
    """Tool, arm, bpw and bytes of a folder, and what it took to make where a peer's script has said so."""
    handed_over = Path(folder, "peer.json")
    if handed_over.is_file():
        return {"folder": folder, **json.loads(handed_over.read_text(encoding="utf-8"))}
    weights = sum(math.prod(header.shape) for header in linear_headers(resolve(dense)))
    bpw = size_of(locate(folder)).bpw or math.nan
    tool = DENSE if folder == dense else OURS
    return {"folder": folder, "tool": tool, "arm": Path(folder).name, "bpw": bpw, "bytes": bpw * weights / 8}


def scored(folder: str, data: Path) -> dict[str, float]:
    """Perplexity on WikiText-2 and on text of another domain, and the mean accuracy of BLiMP's paradigms."""
    place = locate(folder)
    model, tokenizer = load_model(place), load_tokenizer(place.folder)
    tasks = tuple(str(data / "blimp" / f"{paradigm}.jsonl") for paradigm in PARADIGMS)
    found = evaluate(model, tokenizer, Protocol(data / "wikitext2-test.raw", WINDOWS, tasks=tasks, limit=PAIRS))
    other = evaluate(model, tokenizer, Protocol(windows=OTHER_WINDOWS))
    return {
        "perplexity": found.perplexity.value,
        "blimp": statistics.mean(scores["acc"] for scores in found.tasks.scores.values()),
        "other_perplexity": other.perplexity.value,
    }


def gaps(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """Return the distances of a row from dense, in nats per token."""
    texts = {"gap": "perplexity", "other_gap": "other_perplexity"}
    return {name: math.log(row[text] / dense[text]) for name, text in texts.items()}


def linear_headers(source: DenseModel) -> list[Header]:
    """Those of the weights of the decoder's linears."""
    return [source.tensors[f"{name}.weight"] for name in architecture(source.config, source.skeleton()).linears()]


def points(rows: list[dict[str, Any]], dense: str) -> list[dict[str, Any]]:
    """The rows of other tools as `llmcompress.pipeline.frontier_inputs` reads them."""
    source = resolve(dense)
    rest = source.bytes - sum(header.bytes for header in linear_headers(source))
    return [
        {
            "name": f"{row['tool']} {row['arm']}",
            "bpw": row["bpw"],
            "bytes": round(row["bytes"]) + rest,
            "perplexity": row["perplexity"],
            "tasks": {"blimp": row["blimp"]},
        }
        for row in rows
        if row["tool"] not in (DENSE, OURS)
    ]


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    cells = [row["tool"], row["arm"], f"{row['bpw']:.3f}", f"{row['bytes'] / 1e6:.1f}"]
    cells += [short(row["perplexity"]), f"{row['gap']:.3f}", f"{row['blimp']:.3f}"]
    cells += [short(row["other_perplexity"]), f"{row['other_gap']:.3f}"]
    if "seconds" in row:
        cells += [f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", f"{row['peak_rss_bytes'] / 1e6:.0f}"]
    return f"| {' | '.join(cells + [''] * (len(COLUMNS) - len(cells)))} |"


def short(perplexity: float) -> str:
    """Three digits after the point, or powers of ten where they say nothing."""
    return f"{perplexity:.3f}" if perplexity < 1000 else f"{perplexity:.2e}"


if __name__ == "__main__":
    main()
