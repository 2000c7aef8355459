"""A distillation beside TRL's GKD trainer: the same student, start, tokens, loss, rates and threads, each on its own.

python research/peers/distillation.py STUDENT --out OUT [--teacher smollm2] [--steps 30] [--rounds 1] [--threads 1]

Both train low-rank terms of rank 16 on every compressed linear of the decoder, on Python's documentation, and write a
checkpoint that holds them; one evaluator scores both on documentation that no training saw. Ours is `distill`. TRL's is
its `GKDTrainer` (1.16) on the student with PEFT's LoRA on it, folded in afterwards, told to do the same:

- Generalized knowledge distillation (arXiv 2306.13649) on given text, so nothing is generated (`lmbda` 0), and every
  token but a sequence's first is a target. `beta` 0 is its forward KL: `F.kl_div(log student, log teacher)`, which is
  KL(teacher || student). Its loss is at temperature 1 in any case; its `temperature` is that of what it generates.
- The low-rank terms begin at the numbers where ours do. AdamW has our groups, betas, rates, warm-up, cosine, clipping;
  sequences come in our order, in micro-batches as large; no activation is computed again; products are bfloat16.
- Its packed weights are decoded once for the whole training, as ours are, where PEFT alone would decode them at each
  call. What is the trainer's own is left as it is: whole logits in float32, torch's attention, PEFT's way through LoRA.

`seconds` are those of all steps; `in all` is the time of the process: imports, models, text, training, writing, and on
our side two looks at held-out sequences and a state to resume from. Processes alternate, and swap who goes first with
every round; seconds are medians, memory is the largest resident size. Needs `pip install "llmcompress[distill]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handover import peak_rss_bytes

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmcompress.recipe.distillation import Distillation

BATCH, PART, LENGTH, HELD_OUT, RANK, RATE = 8, 4, 256, 2, 16, 3e-3
OURS, PEER = "llmcompress", "trl"
SAME = ("text", "tokens", "trained")  # of both reports


def recipe(steps: int) -> Distillation:
    """Return the recipe that both are given."""
    from llmcompress.recipe.distillation import Distillation

    samples = BATCH * steps + HELD_OUT
    asked = {
        "data": {"dataset": "stdlib", "samples": samples, "length": LENGTH, "held_out": HELD_OUT},
        "rates": {"factors": RATE},
        "adapt": {"rank": RANK},
        "batch": BATCH,
        "micro_batch": PART,
        "steps": steps,
        "compute": "bfloat16",
        "evaluate_every": steps,
        "save_every": steps,
    }
    return Distillation.model_validate(asked)


def ours(student: str, teacher: str, asked: Distillation, output: Path) -> dict[str, Any]:
    """Distils into the folder `output`; the seconds of all steps, the loss of each, how much trained and was read."""
    from llmcompress.distillation.run import distill

    done = distill(student, teacher, asked, output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    return {
        "seconds": sum(done.tokens / len(steps) / line["tokens_per_second"] for line in steps),
        "losses": [line["loss"] for line in steps],
        "trained": sum(done.trained.values()),
        "tokens": done.tokens,
        "text": done.data["hash"],
    }


def peer(student: str, teacher: str, asked: Distillation, output: Path) -> dict[str, Any]:
    """The same by TRL."""
    import torch

    from llmcompress.data.distillation import read_data
    from llmcompress.data.schedule import span
    from llmcompress.models.dense.load import load_model
    from llmcompress.models.dense.locate import locate
    from llmcompress.models.dense.tokenizer import load_tokenizer
    from llmcompress.models.transformers.lora import fold, plain_head
    from llmcompress.runtime.precision import product_dtype
    from llmcompress.weight.modules import decoded

    place = locate(student)
    model, dense = load_model(place), load_model(locate(teacher))
    placed: torch.nn.Module = dense
    placed.to(product_dtype(asked.compute, torch.device("cpu")))
    tokenizer = load_tokenizer(place.folder)
    data = read_data(asked.data, tokenizer, lambda: dense, dense.config)
    steps = asked.steps or len(data.sequences) // asked.batch
    ids = data.sequences.ids[span(0, steps * asked.batch, len(data.sequences), asked.seed)]
    adapted = with_lora(model, dense, asked)
    trained = [value for value in adapted.parameters() if value.requires_grad]
    with plain_head(model), decoded(model):
        seconds, losses = gkd(adapted, dense, tokenizer, ids, asked, steps)
    for value in trained:
        value.data = value.data.to(torch.bfloat16)  # as our terms are stored
    fold(adapted).save_pretrained(output)
    tokenizer.save_pretrained(output)
    return {
        "seconds": seconds,
        "losses": losses,
        "trained": sum(value.numel() for value in trained),
        "tokens": ids[:, 1:].numel(),
        "text": data.report["hash"],
    }


def with_lora(model: PreTrainedModel, dense: PreTrainedModel, asked: Distillation) -> PeftModel:
    """`model` with PEFT's LoRA where `asked` adds low-rank terms, beginning at their numbers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from llmcompress.distillation.student.low_rank import add_terms
    from llmcompress.weight.expression import dense as value_of
    from llmcompress.weight.modules import compressed_linears, put
    from llmcompress.weight.nodes import LowRank, Sum

    if asked.adapt is None:
        raise TypeError("there is no low-rank term to train")
    layers, starts = compressed_linears(model), {}
    names = add_terms(model, asked.adapt, dense, asked.seed)
    for name, grown in compressed_linears(model).items():
        if name not in names:
            continue
        match grown.expression():
            case Sum((*_, LowRank(left, right))):
                starts[name] = value_of(left), value_of(right)
        put(model, name, layers[name])
    rank = asked.adapt.rank
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(starts), task_type="CAUSAL_LM")
    adapted: PeftModel = get_peft_model(model, lora)
    with torch.no_grad():
        for name, (b, a) in starts.items():
            layer: Any = model.get_submodule(name)
            layer.lora_B["default"].weight.copy_(b)
            layer.lora_A["default"].weight.copy_(a)
    return adapted


def gkd(
    adapted: PeftModel, dense: PreTrainedModel, tokenizer: Any, ids: Tensor, asked: Distillation, steps: int
) -> tuple[float, list[float]]:
    """Trains what moves in `adapted` on `ids [sequences, length]`; the seconds of all steps, and the loss of each."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from llmcompress.data.schedule import rate
    from llmcompress.distillation.optimizers import BETAS

    moving = [value for value in adapted.parameters() if value.requires_grad]
    groups = [{"params": [value], "lr": asked.rates["factors"] * size_of(value)} for value in moving]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    shares = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(step, steps, asked.warmup, asked.final_rate)
    )
    times: list[float] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        settings = GKDConfig(
            folder,
            lmbda=0.0,
            beta=0.0,
            max_steps=steps,
            per_device_train_batch_size=asked.micro_batch,
            gradient_accumulation_steps=asked.batch // asked.micro_batch,
            gradient_checkpointing=False,
            max_grad_norm=asked.clip,
            train_sampling_strategy="sequential",
            bf16=asked.compute == "bfloat16",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GKDTrainer(
            adapted,
            dense,
            settings,
            collated,
            Dataset.from_dict({"input_ids": ids.tolist()}),
            processing_class=tokenizer,
            optimizers=(optimizer, shares),
            callbacks=[Watch()],
        )
        trainer.train()
    return times[-1] - times[0], [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def size_of(value: Tensor) -> float:
    """Return what a rate is a share of: the root mean square of the numbers as they are at first, or 1."""
    return float(value.detach().square().mean().sqrt()) or 1.0


def collated(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A micro-batch for the GKD trainer: whole sequences, of which nothing predicts the first token."""
    import torch

    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


TOOLS: dict[str, Callable[[str, str, Any, Path], dict[str, Any]]] = {OURS: ours, PEER: peer}


def run_once(tool: str, output: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One fresh process; its report."""
    threads = str(given.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, given.student, "--teacher", given.teacher, "--steps", given.steps]
    words = [str(word) for word in [*command, "--out", output, "--tool", tool]]
    print(f"running {tool}", file=sys.stderr, flush=True)
    log, begun = output.with_name(f"{output.name}.log"), time.monotonic()
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(
            words, check=False, env=environment, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        )
    if done.returncode != 0:
        sys.exit(f"{tool} failed with exit code {done.returncode}; its messages are in {log}.")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report | {"in_all": time.monotonic() - begun}


def measured(given: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The reports of both tools. Ends the program where they did not do the same."""
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], PEER: []}
    for number in range(given.rounds):
        for tool in (OURS, PEER) if number % 2 == 0 else (PEER, OURS):
            runs[tool].append(run_once(tool, given.out / f"{tool}-{number}", given))
    for key in SAME:
        if runs[OURS][0][key] != runs[PEER][0][key]:
            sys.exit(f"{key} differ: {runs[OURS][0][key]} of {OURS}, {runs[PEER][0][key]} of {PEER}.")
    return runs


def scored(model: str | Path, given: argparse.Namespace) -> tuple[float, float]:
    """(KL to the teacher, perplexity) on documentation that no training saw."""
    import torch

    import llmcompress as lc

    torch.set_num_threads(given.threads)
    found = lc.score(model, lc.Protocol(None, windows=given.windows, length=512), against=given.teacher)
    return found["kl"], found["perplexity"]


def table(runs: dict[str, list[dict[str, Any]]], given: argparse.Namespace) -> str:
    """Markdown: the student, and what each tool made of it in which time."""
    heads = (
        "",
        "steps",
        "tokens",
        "seconds",
        "in all",
        "tokens/s",
        "KL",
        "perplexity",
        "KL less per 1000 s",
        "peak MB",
    )
    before, perplexity = scored(given.student, given)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines.append(f"| student | | | | | | {before:.4f} | {perplexity:.3f} | | |")
    for tool, reports in runs.items():
        kl, perplexity = scored(given.out / f"{tool}-0", given)
        tokens, seconds = reports[0]["tokens"], statistics.median(report["seconds"] for report in reports)
        in_all = statistics.median(report["in_all"] for report in reports)
        peak = max(report["peak_rss_bytes"] for report in reports) / 1e6
        cells = [tool, str(given.steps), f"{tokens:,}", f"{seconds:.1f}", f"{in_all:.1f}", f"{tokens / seconds:.0f}"]
        cells += [f"{kl:.4f}", f"{perplexity:.3f}", f"{1000 * (before - kl) / seconds:.3f}", f"{peak:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs both, prints the table and the losses by which to see that both did the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, scored")
    parser.add_argument("--out", type=Path, required=True, help="new folder for students and logs")
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)  # in a process of one tool
    given = parser.parse_args()
    if given.tool is not None:
        report = TOOLS[given.tool](given.student, given.teacher, recipe(given.steps), given.out)
        print(json.dumps(report | {"peak_rss_bytes": peak_rss_bytes()}), flush=True)
        return
    if given.out.exists():
        parser.error(f"{given.out} is there already; name a new folder with --out")
    given.out.mkdir(parents=True)
    runs = measured(given)
    (given.out / "runs.json").write_text(json.dumps(runs, indent=1), encoding="utf-8")
    print(table(runs, given))
    for step in sorted({0, given.steps // 2, given.steps - 1}):
        losses = [f"{tool} {reports[0]['losses'][step]:.5f}" for tool, reports in runs.items()]
        print(f"loss of step {step + 1}: {', '.join(losses)}")


if __name__ == "__main__":
    main()
