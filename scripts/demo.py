"""The main job, end to end: compress a model, let the dense one teach the result, load, score and show it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llmcompress as lc
from llmcompress.cli.process import contain_others
from llmcompress.cli.stages import Stage, beating
from llmcompress.distillation.run import distill
from llmcompress.errors import LLMCompressError, Termination
from llmcompress.evaluation.evaluate import Evaluation, evaluate_all
from llmcompress.evaluation.local_tasks import PAIRS
from llmcompress.evaluation.score import save_scores
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.file_names import DISTILLATION, REPORT
from llmcompress.recipe.distillation import Distillation
from llmcompress.recipe.read import read_as
from llmcompress.reporting.html.page import add_generations, write_page
from llmcompress.reporting.report import read

ROOT = Path(__file__).parent.parent
SIDES = ("dense", "compressed", "distilled")
PROMPTS = ("The capital of France is", "Water boils when", "To learn to play the piano, one should")
NEW_TOKENS = 24
LOCATE = "import sys; from llmcompress.models.dense.locate import locate; locate(sys.argv[1])"
RELOAD = """
import json, sys, torch, llmcompress
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, count = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with llmcompress.decoded(model):
    inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    print(json.dumps(model.generate(**inputs, max_new_tokens=int(count), do_sample=False)[0].tolist()))
"""


@dataclass(frozen=True)
class Job:
    """Two recipes by name or file, settings of the second, and the windows of 1024 tokens that models are scored on."""

    recipe: str
    lesson: str
    settings: tuple[str, ...]
    windows: int


QUICK = Job("quick", "quick-lesson", (), 4)
FULL = Job("default", "scales-norms", ("steps=24",), 16)


@contextmanager
def show_stage(name: str) -> Iterator[Stage]:
    """Show a stage while the context lasts; a failed one says so."""
    stage = Stage(name, sys.stdout)
    verb = "failed after "
    try:
        with beating(stage.beat):
            yield stage
        verb = ""
    finally:
        stage.end(verb)


def main() -> None:
    """Run the demo and write its numbers and its page beside the checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="longer searches, more text, more training, more scoring")
    parser.add_argument("--model", default="smollm2", help="a folder, a Hub id, or smollm2 (embedded)")
    parser.add_argument("--recipe", help="of the compression: a name or a file")
    parser.add_argument("--steps", type=int, help="of the distillation")
    parser.add_argument("--windows", type=int, help="windows of 1024 tokens that perplexity is measured on")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "demo", help="replaced if it is there")
    options = parser.parse_args()
    job, output, started = FULL if options.full else QUICK, options.output, time.monotonic()
    recovered, page = output.with_name(f"{output.name}-distilled"), output.with_suffix(".html")
    unfinished = begin(output, recovered, {"version": lc.__version__} | vars(options))
    with show_stage("unpack the model"):  # once; in a process of its own, as it takes more memory than compressing
        subprocess.run([sys.executable, "-c", LOCATE, options.model], check=True)
    if not (output / REPORT).is_file():
        with show_stage("compress, block") as stage:
            lc.compress(options.model, options.recipe or job.recipe, output, progress=stage.progress)
    if not (recovered / DISTILLATION).is_file():
        with show_stage("distil, step") as stage:
            steps = job.settings if options.steps is None else (f"steps={options.steps}",)
            distill(output, options.model, read_as(Distillation, job.lesson, steps), recovered, progress=stage.progress)
    models = [load_model(locate(str(place))) for place in (options.model, output, recovered)]
    tokenizer = load_tokenizer(output)
    with show_stage("score"):
        protocol = lc.Protocol(windows=options.windows or job.windows, tasks=(PAIRS,))
        scores = evaluate_all(models[0], [lambda: models[1], lambda: models[2]], tokenizer, protocol)
    with show_stage("write sentences"):
        sentences = [written(model, tokenizer) for model in models]
    with show_stage("load again in a new process"):
        again = reloaded(recovered)
    lesson = json.loads((recovered / DISTILLATION).read_text(encoding="utf-8"))
    numbers = gathered(read(output), lesson, scores) | {
        "same_tokens_after_reload": again == sentences[-1][0],
        "seconds": time.monotonic() - started,
    }
    texts = [[str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in each] for each in sentences]
    for side, lines in zip(SIDES, texts, strict=True):
        numbers[side]["sentences"] = lines
    output.with_suffix(".json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    save_scores(recovered, protocol.to_json(), scores[0], scores[2])
    add_generations(recovered, side_by_side(texts))
    write_page(recovered, page)
    unfinished.unlink()
    show(numbers, Console())
    print(f"report  {page}\nnumbers {output.with_suffix('.json')}\n\nNext:")
    print(f"  .venv/bin/llmcompress inspect {recovered}")
    print(f"  .venv/bin/llmcompress compress {options.model} --size 60MB -o out/60MB")
    print("  .venv/bin/llmcompress recipes")
    if not numbers["same_tokens_after_reload"]:
        sys.exit("the checkpoint does not generate the same tokens when it is loaded again")


def begin(output: Path, recovered: Path, asked: Mapping[str, Any]) -> Path:
    """Remove what earlier demos left, but not what an interrupted one has finished if the same was `asked` of it.

    Returns the file that says what was asked; it is there until the demo is finished.
    """
    unfinished, words = output.with_suffix(".unfinished.json"), json.dumps(asked, default=str)
    if unfinished.is_file() and unfinished.read_text(encoding="utf-8") == words:
        done = [str(folder) for folder in (output, recovered) if folder.is_dir()]
        print(f"an interrupted demo goes on{', from ' * bool(done)}{' and '.join(done)}")
        return unfinished
    for made in (output, recovered):
        for left in (made, made.with_name(f"{made.name}.partial"), made.with_name(f"{made.name}.training")):
            shutil.rmtree(left, ignore_errors=True)
    output.with_suffix(".html").unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(words, encoding="utf-8")
    return unfinished


def gathered(report: lc.Report, lesson: Mapping[str, Any], scores: list[Evaluation]) -> dict[str, Any]:
    """Return the numbers of all sides, and the cost of each step."""
    sizes = {"bytes": report.bytes, "bpw": report.bpw, "model_bpw": report.model_bpw}
    numbers: dict[str, Any] = {
        side: found.to_json() | ({"bytes": report.dense_bytes} if side == "dense" else sizes)
        for side, found in zip(SIDES, scores, strict=True)
    }
    ratios = {
        f"{side}_perplexity_ratio": numbers[side]["perplexity"] / numbers["dense"]["perplexity"] for side in SIDES[1:]
    }
    cost = {
        "compress_seconds": report.seconds,
        "distill_seconds": lesson["seconds"],
        "distill_tokens": lesson["tokens"],
    }
    return numbers | ratios | cost | {"peak_memory_bytes": report.peak_memory_bytes}


@torch.no_grad()
def written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompts, each with the model's greedy continuation, as token ids."""
    generate: Any = model.generate
    with lc.decoded(model):
        return [
            generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
            for prompt in PROMPTS
        ]


def side_by_side(texts: list[list[str]]) -> dict[str, dict[str, str]]:
    """The continuations by prompt, then by side."""
    return {
        prompt: {side: lines[number].removeprefix(prompt) for side, lines in zip(SIDES, texts, strict=True)}
        for number, prompt in enumerate(PROMPTS)
    }


def reloaded(folder: Path) -> list[int]:
    """The tokens of a new process that only imports llmcompress and calls `from_pretrained`."""
    command = [sys.executable, "-c", RELOAD, str(folder), PROMPTS[0], str(NEW_TOKENS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    ids: list[int] = json.loads(done.stdout.splitlines()[-1])
    return ids


def show(numbers: dict[str, Any], console: Console) -> None:
    """Print the table and the sentences."""
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
        f"{numbers['distill_seconds']:.0f} s · {numbers['seconds']:.0f} s in this run",
        soft_wrap=True,
    )


def told() -> int:
    """Run the demo, and return its exit code; what a user can act on is told in one sentence."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # in the processes that it starts
    try:
        with contain_others(lambda sentences: print(*sentences, file=sys.stderr)):
            main()
    except (KeyboardInterrupt, Termination) as error:
        print("stopped; the same command goes on after what is finished", file=sys.stderr)
        return 143 if isinstance(error, Termination) else 130
    except LLMCompressError as error:
        print(f"[{error.exit_code}] {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(told())
