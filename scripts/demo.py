"""The main job, end to end: compress a model, let the dense one teach the result, load and score it."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llmcompress as lc
from llmcompress.distill.run import Distilled, distill
from llmcompress.evaluate.lm_eval import PAIRS
from llmcompress.evaluate.scores import evaluate_all
from llmcompress.models.dense import load_model, load_tokenizer
from llmcompress.models.locate import locate
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import read_as

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs" / "recommended" / "default.yaml"
LESSON = ROOT / "configs" / "distillation" / "scales-norms.yaml"
SIDES = ("dense", "compressed", "distilled")
PROMPTS = ("The capital of France is", "Water boils when", "To learn to play the piano, one should")
NEW_TOKENS = 24
LOCATE = "import sys; from llmcompress.models.locate import locate; locate(sys.argv[1])"
RELOAD = """
import json, sys, torch, llmcompress
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, count = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with llmcompress.decoded(model):
    inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    print(json.dumps(model.generate(**inputs, max_new_tokens=int(count), do_sample=False)[0].tolist()))
"""


def main() -> None:
    """Runs the demo and writes its numbers beside the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder, a Hub id, or smollm2 (embedded)")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--steps", type=int, default=24, help="of the distillation")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "demo", help="replaced if it is there")
    parser.add_argument("--windows", type=int, default=16, help="windows of 1024 tokens that perplexity is measured on")
    options = parser.parse_args()
    console = Console()
    started = time.monotonic()
    shutil.rmtree(options.output, ignore_errors=True)
    # unpacking the embedded model, once, takes more memory than compressing it: not in the process that is measured
    subprocess.run([sys.executable, "-c", LOCATE, options.model], check=True)
    report = compress(options, console).report
    lesson = distilled(options, console)
    console.print("scoring on text that neither calibration nor training saw ...")
    dense, *small = (load_model(locate(str(place))) for place in (options.model, options.output, lesson.output))
    tokenizer = load_tokenizer(options.output)
    protocol = lc.Protocol(windows=options.windows, tasks=(PAIRS,))
    measured = evaluate_all(dense, [lambda: small[0], lambda: small[1]], tokenizer, protocol)
    sizes = {"bytes": report.bytes, "bpw": report.bpw, "model_bpw": report.model_bpw}
    numbers: dict[str, Any] = {name: one.to_json() for name, one in zip(SIDES, measured, strict=True)}
    for name, model in zip(SIDES, (dense, *small), strict=True):
        with lc.decoded(model):
            sentences = [write(model, tokenizer, prompt) for prompt in PROMPTS]
        numbers[name] |= {"bytes": report.dense_bytes} if name == "dense" else sizes
        numbers[name]["sentences"] = texts(tokenizer, sentences)
    ratios = {
        f"{name}_perplexity_ratio": numbers[name]["perplexity"] / numbers["dense"]["perplexity"] for name in SIDES[1:]
    }
    numbers |= {
        **ratios,
        "compress_seconds": report.seconds,
        "distill_seconds": lesson.seconds,
        "distill_tokens": lesson.tokens,
        "peak_memory_bytes": report.peak_memory_bytes,
        "same_tokens_after_reload": reloaded(Path(lesson.output)) == sentences[0],
        "seconds": time.monotonic() - started,
    }
    target = options.output.with_suffix(".json")
    target.write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    show(numbers, console)
    console.print(f"checkpoints {options.output}, {lesson.output}\nnumbers     {target}", soft_wrap=True)
    if not numbers["same_tokens_after_reload"]:
        sys.exit("the checkpoint does not generate the same tokens when it is loaded again")


def compress(options: argparse.Namespace, console: Console) -> lc.Result:
    """The compressed model, with a progress bar over its blocks on a terminal."""
    columns = (TextColumn("blocks"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        return lc.compress(
            options.model,
            options.recipe,
            options.output,
            progress=lambda done, total, speed: bar.update(task, completed=done, total=total),
        )


def distilled(options: argparse.Namespace, console: Console) -> Distilled:
    """The dense model's lesson: scales and norms of the compressed one move, its codes and bytes stay."""
    output = options.output.with_name(options.output.name + "-distilled")
    for left in (output, output.with_name(output.name + ".training")):
        shutil.rmtree(left, ignore_errors=True)
    columns = (TextColumn("steps"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        return distill(
            options.output,
            options.model,
            read_as(Distillation, LESSON, [f"steps={options.steps}"]),
            output,
            progress=lambda done, total, *_: bar.update(task, completed=done, total=total),
        )


@torch.no_grad()
def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt and the model's greedy continuation, as token ids."""
    inputs = tokenizer(prompt, return_tensors="pt")
    generate: Any = model.generate
    ids: list[int] = generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    return ids


def texts(tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]]) -> list[str]:
    """Token ids as text."""
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in sequences]


def reloaded(folder: Path) -> list[int]:
    """What a fresh process generates that only imports llmcompress and calls `from_pretrained`."""
    command = [sys.executable, "-c", RELOAD, str(folder), PROMPTS[0], str(NEW_TOKENS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    ids: list[int] = json.loads(done.stdout.splitlines()[-1])
    return ids


def show(numbers: dict[str, Any], console: Console) -> None:
    """The table and the sentences."""
    table = Table("", *SIDES)
    for name, form in (
        ("bytes", "{:,}"),
        ("bpw", "{:.3f}"),
        ("model_bpw", "{:.3f}"),
        ("perplexity", "{:.3f}"),
        ("kl", "{:.4f}"),
        ("top1_agreement", "{:.4f}"),
    ):
        cells = [form.format(numbers[side][name]) if name in numbers[side] else "16" for side in SIDES]
        table.add_row(name, *cells)
    accuracies = [f"{numbers[side]['tasks'][PAIRS]['acc']:.3f}" for side in SIDES]
    table.add_row(f"{PAIRS} accuracy", *accuracies)
    console.print(table)
    for side in SIDES:
        for sentence in numbers[side]["sentences"]:
            console.print(f"{side:<11}{json.dumps(sentence, ensure_ascii=False)}", soft_wrap=True)
    tokens = f"{numbers['distill_tokens']:,}"
    ratios = ", ".join(f"{name} x{numbers[f'{name}_perplexity_ratio']:.3f}" for name in SIDES[1:])
    console.print(
        f"perplexity {ratios} · compressed in {numbers['compress_seconds']:.0f} s with "
        f"{numbers['peak_memory_bytes'] / 1e6:.0f} MB at the peak, distilled on {tokens} tokens in "
        f"{numbers['distill_seconds']:.0f} s · {numbers['seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    main()
