"""Compress a mixture whose experts have learned: by method, by price, by use, pruned, merged, replaced.

    python research/learned_mixture.py --data DATA [--work FOLDER] [--steps 45] [--anew 0.25] [--jsonl FILE]
        [--arms NAME ...]

The mixture is that of upcycled.py: SmolLM2 with four copies of every MLP, two of them a token by a random router; with
`--anew` that share of the neurons of each copy is drawn again, so that experts differ from the start. Its routers and
experts learn to predict three kinds of text in turn: WikiText-2 validation, GSM8K's training set and Python's library.
`before` and `learned` say how uneven the routing is, how it differs between kinds, and how far experts are from each
other. The other arms change the experts alone, by 12 sequences of all three kinds, and have the KL to the mixture that
learned, on text of each kind that nothing has read. FOLDER keeps the models; what FILE has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sysconfig
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import yaml
from records import RESULTS, Record, measure_missing, read_records
from three_models import run_command, write_code
from torch import Tensor
from transformers import AutoTokenizer, MixtralForCausalLM, Trainer, TrainingArguments
from upcycled import upcycle

from llmcompress.models.dense.locate import locate

EXPERTS, BATCH, LENGTH = 4, 16, 256
SAMPLES, HELD = 12, 2  # sequences that the arms read, and of these to judge on
PART = 4_000  # letters of a kind in turn
TEXT = "wikitext2-test.raw"
GRID: dict[str, Any] = {"method": "gptq", "group_size": 64}
ARMS = (
    "before",
    "learned",
    "3 bits, rounded",
    "3 bits",
    "2 to 4 bits by price",
    "4 bits for the two most used, 2 for the others",
    "4 bits for the two least used, 2 for the others",
    "3 of 4 experts by reap",
    "3 of 4 experts by frequency",
    "3 of 4 experts at random",
    "4 experts merged into 3",
    "1 of 4 experts as factors by reap",
    "1 of 4 experts as factors by frequency",
)


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the WikiText-2 files and tasks/")
    parser.add_argument("--work", type=Path, default=Path("learned-mixture"))
    parser.add_argument("--steps", type=int, default=45, help=f"of {BATCH}x{LENGTH} tokens")
    parser.add_argument("--anew", type=float, default=0.0, help="share of the neurons of each expert to draw again")
    parser.add_argument("--jsonl", type=Path, default=RESULTS / "learned_mixture.jsonl")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    given = parser.parse_args()
    given.work = given.work / f"{given.steps} steps, {given.anew:g} anew"  # other settings are other mixtures
    given.work.mkdir(parents=True, exist_ok=True)
    write_kinds(given)

    def measure(name: str, model: str, arm: str) -> Record:
        learned = make_mixture(given)
        if arm in ("before", "learned"):
            numbers = score(given.work / arm, given) | describe(given.work / arm, given)
        else:
            folder = given.work / "changed"
            shutil.rmtree(folder, ignore_errors=True)
            run_command([*words_of(arm, learned, given), "-o", str(folder)])
            numbers = score(folder, given, learned)
        options = f"--steps {given.steps}" + (f" --anew {given.anew}" if given.anew else "")
        command = f"python research/learned_mixture.py --data DATA {options} --arms '{arm}'"
        table = "learned-mixture-state" if arm in ("before", "learned") else "learned-mixture"
        length = 1024 if " bits" in arm else 512  # what `experts` reads
        read = {"dataset": "mixed.txt", "samples": SAMPLES, "length": length, "held_out": HELD}
        changed = None if table.endswith("state") else read
        return {"table": table, "command": command, "calibration": changed, "text": TEXT, "numbers": numbers}

    measure_missing(given.jsonl, [f"{name_of(given)}=smollm2"], given.arms, measure)


def name_of(given: argparse.Namespace) -> str:
    """Return the name of the mixture in records."""
    return f"smollm2 as {EXPERTS} experts" + (f", {100 * given.anew:.0f} % anew" if given.anew else "")


def write_kinds(given: argparse.Namespace) -> None:
    """Write the texts to learn from, in `read`, one of all kinds in turn to fit to, and those to score on, `kinds`."""
    reads, tasks = given.work / "read", given.data / "tasks"
    reads.mkdir(exist_ok=True)
    write_code(tasks / "humaneval.jsonl", given.work / "kinds")
    for folder, part in ((reads, "train"), (given.work / "kinds", "test")):
        rows = [json.loads(line) for line in (tasks / f"gsm8k_{part}.jsonl").read_text().splitlines()]
        (folder / "sums.txt").write_text("\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows))
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    (reads / "code.txt").write_text("\n\n".join(file.read_text() for file in sources))
    shutil.copy(given.data / "wikitext2-valid.txt", reads / "articles.txt")
    texts = [file.read_text() for file in sorted(reads.glob("*.txt"))]
    parts = [text[start : start + PART] for start in range(0, 20 * PART, PART) for text in texts]
    (given.work / "mixed.txt").write_text("\n\n".join(parts))


def make_mixture(given: argparse.Namespace) -> Path:
    """Return the folder of the mixture that learned; it and the one `before` are made if they are missing."""
    before, learned = given.work / "before", given.work / "learned"
    if not before.is_dir():
        upcycle(locate("smollm2").folder, before, EXPERTS, given.anew)
    if not learned.is_dir():
        model = MixtralForCausalLM.from_pretrained(before, dtype=torch.float32, experts_implementation="eager")
        model.requires_grad_(False)
        for block in model.model.layers:
            block.mlp.requires_grad_(True)
        settings = TrainingArguments(
            output_dir=str(given.work / "trainer"),
            per_device_train_batch_size=BATCH,
            max_steps=given.steps,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=given.steps // 10,
            bf16=True,
            use_cpu=True,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        )
        rows = [{"input_ids": row, "labels": row} for row in lessons(before, given)]
        Trainer(model=model, args=settings, train_dataset=rows).train()
        model.bfloat16().save_pretrained(learned)
        AutoTokenizer.from_pretrained(before).save_pretrained(learned)
    return learned


def lessons(folder: Path, given: argparse.Namespace) -> list[Tensor]:
    """Return sequences of tokens, as many of each kind, in random order."""
    count = given.steps * BATCH // 3 + 1
    rows = [row for file in sorted((given.work / "read").glob("*.txt")) for row in cut(folder, file, LENGTH)[:count]]
    random.Random(0).shuffle(rows)
    return rows


def cut(folder: Path, file: Path, length: int) -> Tensor:
    """Return the tokens of a text in sequences, `[sequences, length]`."""
    tokens = AutoTokenizer.from_pretrained(folder)(file.read_text(), verbose=False).input_ids
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)


@torch.no_grad()
def describe(folder: Path, given: argparse.Namespace) -> Record:
    """Return what the routers of a mixture do, and how far its experts are from each other.

    `least_used` and `most_used`: shares of the choices, means over blocks (a quarter each if routing were even);
    `routing_difference`: the share of choices that another kind of text makes otherwise, mean over pairs of kinds;
    `expert_distance`: of the matrices of two experts, relative to their norm, mean over pairs.
    """
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    uses = {}
    for file in [given.data / TEXT, *sorted((given.work / "kinds").glob("*.txt"))]:
        logits = model(cut(folder, file, 512)[:8], output_router_logits=True).router_logits
        chosen = torch.stack([block.topk(2).indices.flatten().bincount(minlength=EXPERTS) for block in logits])
        uses[file.stem] = chosen / chosen.sum(1, keepdim=True)
    whole = torch.stack(list(uses.values())).mean(0)
    differences = [(a - b).abs().sum(1).mean() / 2 for a, b in combinations(uses.values(), 2)]
    distances = [
        (weight[a] - weight[b]).float().norm() / weight[a].float().norm()
        for block in model.model.layers
        for weight in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj)
        for a, b in combinations(range(EXPERTS), 2)
    ]
    return {
        "least_used": float(whole.amin(1).mean()),
        "most_used": float(whole.amax(1).mean()),
        "routing_difference": float(torch.stack(differences).mean()),
        "expert_distance": float(torch.stack(distances).mean()),
    }


def words_of(arm: str, learned: Path, given: argparse.Namespace) -> list[str]:
    """Return the words of an arm's command, without its output."""
    if " bits" in arm:
        file = given.work / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe_of(arm, learned, given)))
        return ["compress", str(learned), str(file)]
    text = ["--text", str(given.work / "mixed.txt"), "--samples", str(SAMPLES)]
    if "factors" in arm:
        return ["experts", "replace", str(learned), "--count", "1", "--by", arm.split()[-1], *text]
    if "merged" in arm:
        return ["experts", "merge", str(learned), "--keep", "3", *text]
    return ["experts", "prune", str(learned), "--keep", "3", "--by", arm.split()[-1], *text]


def recipe_of(arm: str, learned: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe of an arm that gives bits to experts; everything else stays dense."""
    read = str(given.work / "mixed.txt")
    recipe: dict[str, Any] = {"version": 1, "calibration": {"dataset": read, "samples": SAMPLES, "held_out": HELD}}
    if "price" in arm:
        same = next(
            row["numbers"]["bpw"] for row in read_records(given.jsonl) if row["arm"] == f"{name_of(given)}, 3 bits"
        )
        options = [[GRID | {"bits": bits}] for bits in (2, 3, 4)]
        rules: list[dict[str, Any]] = [{"role": ["query", "key", "value", "output"], "steps": []}]
        return recipe | {"target": {"bpw": same}, "options": options, "rules": rules}
    if "used" not in arm:
        step = GRID | {"bits": 3, "method": "rtn" if "rounded" in arm else "gptq"}
        return recipe | {"rules": [{"match": "*.experts.*", "steps": [step]}]}
    command = ["experts", "prune", str(learned), "--keep", "3", "--by", "frequency", "--text", read, "--dry-run"]
    favoured: list[str] = []
    for block in run_command([*command, "--samples", str(SAMPLES)])["blocks"]:
        by_use = sorted(block["experts"], key=lambda expert: expert["tokens"], reverse="most used" in arm)
        favoured += [f"{block['path']}.{expert['number']}.*" for expert in by_use[:2]]
    rules = [
        {"match": favoured, "steps": [GRID | {"bits": 4}]},
        {"match": "*.experts.*", "steps": [GRID | {"bits": 2}]},
    ]
    return recipe | {"rules": rules}


def score(folder: Path, given: argparse.Namespace, against: Path | None = None) -> Record:
    """Return the size of a mixture and its perplexity on each kind of text; with `against`, its KL too."""
    words = ["eval", str(folder), "--text", str(given.data / TEXT), "--windows", "8", "--length", "512"]
    words += ["--domains", str(given.work / "kinds"), *(["--against", str(against)] if against else [])]
    scores = run_command(words)
    kinds = {"articles": scores, **scores["domains"]}
    names = ("perplexity", "kl") if against else ("perplexity",)
    numbers = {f"{kind}_{name}": entry[name] for kind, entry in kinds.items() for name in names}
    return {"bytes": scores["bytes"], "bpw": scores["bpw"], "kl_stderr": scores.get("kl_stderr")} | numbers


if __name__ == "__main__":
    main()
