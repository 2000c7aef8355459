"""llmcompress and llm-compressor side by side: same model, calibration tokens, threads and evaluator.

Runs alternate between the tools (and swap who goes first with every repeat), each in a fresh process of its own
environment; afterwards every tool's dequantized weights are put into one dense model and scored. Prints a Markdown
table and writes it with all runs to OUT/compare.json. How to make the peer's environment: README.md here.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
OURS, PEER = "llmcompress", "llm-compressor"
ARMS = {  # what both tools do, and our recipe of it
    "wanda50": "methods/wanda-50",
    "sparsegpt50": "methods/sparsegpt-50",
    "sparsegpt24": "methods/sparsegpt-2-4",
    "gptq3g64": "recommended/gptq-3-g64",
    "gptq3g64mse": "recommended/gptq-3-g64",
}


def windows(model: Path, text: Path, count: int, length: int) -> "Tensor":
    """The first `count` windows of `length` tokens of the whole text, tokenized once without special tokens."""
    from transformers import AutoTokenizer

    from llmcompress.evaluation.perplexity import text_windows

    found = text_windows(AutoTokenizer.from_pretrained(model), text.read_text(encoding="utf-8"), count, length)
    if len(found) < count:
        sys.exit(f"{text} has only {len(found)} of the {count} windows of {length} tokens; name a longer text.")
    return found


def run_once(tool: str, arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """One fresh process; its report. Weights land in the folder OUT/<tool>-<arm> (a repeat writes them again)."""
    common = ["--model", given.model, "--arm", arm, "--threads", given.threads, "--out", given.out / f"{tool}-{arm}"]
    if tool == PEER:
        command = [given.peer_python, HERE / "llm_compressor.py", "--tokens", given.out / "tokens.safetensors"]
        command += ["--dtype", given.peer_dtype]
    else:
        command = [sys.executable, HERE / "ours.py", "--recipe", CONFIGS / f"{ARMS[arm]}.yaml"]
        command += ["--text", given.text, "--sequences", given.sequences, "--length", given.length]
    threads = str(given.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    print(f"running {tool} {arm}", file=sys.stderr, flush=True)
    log = given.out / f"{tool}-{arm}.log"
    words = [str(word) for word in command + common]
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(
            words, check=False, env=environment, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        )
    if done.returncode != 0:
        sys.exit(f"{tool} failed on {arm} with exit code {done.returncode}; its messages are in {log}.")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if report.get("tokens_sha256", given.tokens_sha256) != given.tokens_sha256:
        sys.exit(f"{tool} made other calibration tokens of {given.text} for {arm} than the peer was given.")
    return report | {"process_seconds": time.monotonic() - begun}


def measure(given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """{"<tool>-<arm>": its runs}. With --reuse, a pair that OUT already holds is not run again."""
    record = given.out / "runs.json"
    runs: dict[str, list[dict[str, Any]]] = json.loads(record.read_text()) if given.reuse and record.exists() else {}
    kept = {key for key, reports in runs.items() if len(reports) >= given.repeats}
    runs = {key: reports for key, reports in runs.items() if key in kept}
    for arm in given.arms:
        for repeat in range(given.repeats):
            for tool in given.tools if repeat % 2 == 0 else given.tools[::-1]:
                if f"{tool}-{arm}" in kept:
                    continue
                runs.setdefault(f"{tool}-{arm}", []).append(run_once(tool, arm, given))
                record.write_text(json.dumps(runs, indent=1))
    return runs


def score(pairs: list[tuple[str, str]], given: argparse.Namespace) -> tuple[float, dict[str, dict[str, float]]]:
    """The dense perplexity, and per "<tool>-<arm>" the perplexity and the fraction of nonzero decoder weights."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from llmcompress.evaluation.perplexity import perplexity

    torch.set_num_threads(given.threads)
    sequences = windows(given.model, given.eval_text, given.windows, given.eval_length)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)  # comes in evaluation mode
    linears = {name: weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")}
    dense = perplexity(model, sequences).value
    scores = {}
    for tool, arm in pairs:
        stored = load_file(given.out / f"{tool}-{arm}" / "model.safetensors")
        weights = {name: stored[name] for name in linears}
        kept = sum(int(weight.count_nonzero()) for weight in weights.values())
        with torch.no_grad():
            for name, weight in weights.items():
                linears[name].copy_(weight)
        total = sum(weight.numel() for weight in weights.values())
        value = perplexity(model, sequences).value
        scores[f"{tool}-{arm}"] = {"perplexity": value, "nonzero": kept / total}
        print(f"{tool} {arm}: perplexity {value:.3f}", file=sys.stderr, flush=True)
    return dense, scores


def row(tool: str, arm: str, runs: list[dict[str, Any]], scored: dict[str, float]) -> dict[str, Any]:
    """One line of the table: median seconds, largest peak; the peer's bits by rule, ours as reported."""
    return {
        "tool": tool,
        "arm": arm,
        "bpw": runs[-1]["bpw"],
        "ppl": scored["perplexity"],
        "seconds": statistics.median(run["seconds"] for run in runs),
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "process_seconds": statistics.median(run["process_seconds"] for run in runs),
        "peak_mb": max(run["peak_rss_bytes"] for run in runs) / 1e6,
        "threads": runs[-1]["threads"],
        "runs": len(runs),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; on our rows the ratios to the peer's row of the same arm, where it was measured."""
    heads = ("tool", "arm", "bpw", "ppl", "seconds", "CPU s", "times faster", "peak MB", "of the peer's peak")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    peers = {entry["arm"]: entry for entry in rows if entry["tool"] == PEER}
    for entry in rows:
        faster = share = "-"
        if entry["tool"] == OURS and entry["arm"] in peers:
            peer = peers[entry["arm"]]
            faster = f"{peer['seconds'] / entry['seconds']:.2f}"
            share = f"{entry['peak_mb'] / peer['peak_mb']:.2f}"
        cells = [entry["tool"], entry["arm"], f"{entry['bpw']:.3f}", f"{entry['ppl']:.2f}"]
        cells += [f"{entry['seconds']:.1f}", f"{entry['cpu_seconds']:.1f}", faster, f"{entry['peak_mb']:.0f}", share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face folder with its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--eval-text", type=Path, required=True, help="another text, for perplexity")
    parser.add_argument("--peer-python", type=Path, help="python of the peer's environment")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, logs and figures")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--tools", nargs="+", choices=(OURS, PEER), default=[OURS, PEER])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--reuse", action="store_true", help="keep the runs that OUT already holds; score again")
    parser.add_argument("--peer-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--sequences", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a calibration window")
    parser.add_argument("--windows", type=int, default=32, help="scored windows")
    parser.add_argument("--eval-length", type=int, default=1024, help="tokens in a scored window")
    given = parser.parse_args()
    if PEER in given.tools and given.peer_python is None:
        parser.error(f"--peer-python is needed to run {PEER}; README.md beside this script says how to make one")
    return given


def main() -> None:
    """Tokens, runs, scores, table."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    from safetensors.torch import load_file, save_file

    sequences = windows(given.model, given.text, given.sequences, given.length)
    tokens = given.out / "tokens.safetensors"
    if given.reuse and tokens.exists() and not load_file(tokens)["sequences"].equal(sequences):
        sys.exit(
            f"{tokens} holds other calibration tokens than {given.text} gives; leave out --reuse or name a new --out."
        )
    save_file({"sequences": sequences}, tokens)
    given.tokens_sha256 = hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
    runs = measure(given)
    pairs = [(tool, arm) for arm in given.arms for tool in given.tools]
    dense, scores = score(pairs, given)
    rows = [row(tool, arm, runs[f"{tool}-{arm}"], scores[f"{tool}-{arm}"]) for tool, arm in pairs]
    printed = table(rows)
    print(f"dense perplexity {dense:.3f}, {given.threads} thread(s)\n\n{printed}")
    settings = {key: str(value) for key, value in vars(given).items()}
    result = {"dense_perplexity": dense, "rows": rows, "runs": runs, "settings": settings, "table": printed}
    (given.out / "compare.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
