"""Compare settings of a recipe on several models and kinds of text, to see which default none of them regrets.

    python research/regrets.py --data DATA [--work FOLDER] [--jsonl FILE] [--arms NAME ...] NAME=MODEL ...

An arm of regrets.yaml is the words of a `compress` command behind the model; arms of one name before the colon are
compared. Each is scored by KL to the dense model on windows of six kinds of text that no step reads: WikiText-2 test,
HumanEval's problems with solutions, LAMBADA, GSM8K, PIQA and BLiMP. What FILE has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import yaml
from records import RESULTS, Record, measure_missing
from three_models import TEXT, make_model, run_command, write_code

ARMS: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ROWS = 400  # of each kind's file


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2-test.raw, tasks/ and blimp/")
    parser.add_argument("--work", type=Path, default=Path("regrets"))
    parser.add_argument("--jsonl", type=Path, default=RESULTS / "regrets.jsonl")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    options = parser.parse_args()
    write_kinds(options.data, options.work / "kinds")

    def measure(name: str, model: str, arm: str) -> Record:
        numbers = measure_row(model, ARMS[arm], options.data, options.work)
        command = " ".join(["llmcompress compress", name, *ARMS[arm]])
        return {"table": "regrets", "command": command, "calibration": None, "text": TEXT, "numbers": numbers}

    measure_missing(options.jsonl, options.models, options.arms, measure)


def write_kinds(data: Path, folder: Path) -> None:
    """Write a file of text for each kind but WikiText."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_code(data / "tasks" / "humaneval.jsonl", folder)
    keys = {
        "stories": ("tasks/lambada_test.jsonl", ("text",)),
        "sums": ("tasks/gsm8k_test.jsonl", ("question", "answer")),
        "advice": ("tasks/piqa_valid.jsonl", ("goal", "sol1")),
    }
    for kind, (file, names) in keys.items():
        rows = [json.loads(line) for line in (data / file).read_text(encoding="utf-8").splitlines()[:ROWS]]
        (folder / f"{kind}.txt").write_text("\n".join(row[name] for row in rows for name in names))
    pairs = [path.read_text(encoding="utf-8").splitlines()[:20] for path in sorted((data / "blimp").glob("*.jsonl"))]
    sentences = [json.loads(line)["sentence_good"] for lines in pairs for line in lines]
    (folder / "sentences.txt").write_text("\n".join(sentences))


def measure_row(model: str, words: list[str], data: Path, work: Path, windows: int = 8) -> Record:
    """Return the numbers of one row."""
    folder, report = make_model(["compress", model, *words], work)
    kinds = score_kinds(folder, model, data, work / "kinds", windows)
    return {**{key: report[key] for key in ("bytes", "bpw", "peak_memory_bytes", "seconds")}, **kinds}


def score_kinds(folder: Path, model: str, data: Path, kinds: Path, windows: int = 8) -> dict[str, float]:
    """Return the KL of a model's folder to the dense one on each kind, and their mean as `kl`."""
    text = ["--text", str(data / TEXT), "--windows", str(windows), "--length", "512", "--domains", str(kinds)]
    scores = run_command(["eval", str(folder), "--against", model, *text])
    distances = {"wikitext": scores["kl"], **{kind: score["kl"] for kind, score in scores["domains"].items()}}
    return {"kl": statistics.mean(distances.values()), **distances}


if __name__ == "__main__":
    main()
