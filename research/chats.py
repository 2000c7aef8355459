"""Does a chat model recover best by its teacher's checked answers, by references, or by plain text?

    python research/chats.py --data DATA [--work FOLDER] [--jsonl FILE] [--model qwen.gguf] [--students NAME ...]

Self-data distillation (2410.09982) asks it of pruned models. Prompts are questions of GSM8K's training set and
functions of Python's library by signature and docstring. The dense model answers them (`llmcompress answer`, the
likeliest tokens); answers stay whose last number is the reference's, or whose program is Python. `answers`: chats with
these; `references`: the same prompts with the data's own; `text`: WikiText-2 validation. Each student learns by each
from as many packed tokens, references a second time, then is scored on GSM8K as chats, on HumanEval, PIQA and LAMBADA,
and by the KL to the dense model on WikiText-2 test. `averaged`: the mean weights of those that learned by references
and by text, of a dense student. FOLDER keeps answers and students; what FILE has is not measured again.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from records import RESULTS, Record, measure_missing, recipe_path
from safetensors.torch import load_file, save_file
from three_models import run_command

STUDENTS: dict[str, tuple[list[str], str]] = {  # what makes each, and the recipe that it learns by
    "quick": (["compress", "{model}", "quick"], "quick-lesson"),
    "six blocks dropped": (["drop", "{model}", "--count", "6"], "shortened"),
}
ARMS = ("before", "answers", "references", "text", "averaged")
AVERAGED = ("references", "text")
WEIGHTS = "model.safetensors"
QUESTIONS, FUNCTIONS = 120, 40
STEPS, BATCH, HELD = 12, 3, 4
SEQUENCES = {"answers": STEPS * BATCH, "references": 21, "text": STEPS * BATCH}  # references are short, and read again
MODULES = (
    "textwrap",
    "statistics",
    "shutil",
    "posixpath",
    "random",
    "string",
    "bisect",
    "heapq",
    "calendar",
    "fnmatch",
)
TASKS = {"gsm8k_test": ("bits_per_byte", True), "humaneval": ("bits_per_byte", False)}
TASKS |= {"piqa_valid": ("acc_norm", False), "lambada_test": ("acc", False)}


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the WikiText-2 files and tasks/")
    parser.add_argument("--work", type=Path, default=Path("chats"))
    parser.add_argument("--jsonl", type=Path, default=RESULTS / "chats.jsonl")
    parser.add_argument("--model", default="qwen.gguf")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--limit", type=int, default=50, help="items of each task")
    given = parser.parse_args()
    given.work = given.work / Path(given.model).stem
    given.work.mkdir(parents=True, exist_ok=True)
    texts = write_texts(given)

    def measure(name: str, model: str, arm: str) -> Record:
        student = make_student(name, given)
        numbers: Record = {}
        if arm == "averaged":
            numbers = teach_average(student, name, texts, given)
        elif arm != "before":
            numbers = teach(student, name, arm, texts[arm], given)
        scores = score_model(student if arm == "before" else given.work / "taught", given)
        shutil.rmtree(given.work / "taught", ignore_errors=True)
        command = f"python research/chats.py --data DATA --students '{name}' --arms {arm}"
        read = " and ".join(AVERAGED) if arm == "averaged" else arm
        lesson = None if arm == "before" else f"{read}, {STEPS}x{BATCH}x256"
        text = {"calibration": lesson, "text": "wikitext2-test.raw"}
        return {"table": "chats", "command": command, **text, "numbers": numbers | scores}

    for name in given.students:
        dense = STUDENTS[name][0][0] == "drop"
        arms = [arm for arm in given.arms if arm != "averaged" or dense]  # codes have no mean
        measure_missing(given.jsonl, [f"{name}={given.model}"], arms, measure)


def write_texts(given: argparse.Namespace) -> dict[str, Path]:
    """Write the chats to learn from, unless they are there; return the file of each arm."""
    prompts, answers = given.work / "prompts.jsonl", given.work / "written.jsonl"
    texts = {arm: given.work / f"{arm}.jsonl" for arm in ("answers", "references")}
    if not answers.is_file():
        lines = islice((given.data / "tasks" / "gsm8k_train.jsonl").open(), QUESTIONS)
        asked = [chat(row["question"], row["answer"]) for row in map(json.loads, lines)]
        asked += [chat(*pair) for pair in islice(library_functions(), FUNCTIONS)]
        prompts.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in asked))
        sampling = ["--temperature", "0", "--longest", "320", "--batch-size", "16"]
        run_command(["answer", given.model, str(prompts), "-o", str(answers), *sampling])
    references = [json.loads(line)["messages"] for line in prompts.read_text().splitlines()]
    wrote = {messages[0]["content"]: messages for messages in map(written_chat, answers.read_text().splitlines())}
    pairs = [(wrote.get(messages[0]["content"]), messages) for messages in references]
    right = [(ours, theirs) for ours, theirs in pairs if ours and is_right(ours[-1]["content"], theirs[-1]["content"])]
    for place, file in enumerate(texts.values()):
        file.write_text("".join(json.dumps({"messages": pair[place]}) + "\n" for pair in right))
    print(f"{len(right)} of {len(references)} answers are right", flush=True)
    return texts | {"text": given.data / "wikitext2-valid.txt"}


def chat(prompt: str, answer: str) -> list[dict[str, str]]:
    """Return a prompt and its answer as messages."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def written_chat(line: str) -> list[dict[str, str]]:
    """Return the messages of a line that `answer` wrote."""
    messages: list[dict[str, str]] = json.loads(line)["messages"]
    return messages


def library_functions() -> Iterator[tuple[str, str]]:
    """Yield prompts for functions of Python's library, and their sources."""
    for module in map(import_module, MODULES):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or function.__code__.co_filename != module.__file__ or not inspect.getdoc(function):
                continue
            source = inspect.getsource(function)
            if len(source) < 1500:
                wanted = f"{name}{inspect.signature(function)}"
                yield f"Write the Python function `{wanted}`:\n\n{inspect.getdoc(function)}", f"```python\n{source}```"


def is_right(answer: str, reference: str) -> bool:
    """True if an answer ends with the reference's number, or has a program that Python can read."""
    if "####" in reference:
        numbers = [re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.replace("$", "")) for text in (answer, reference)]
        ours, theirs = (float(found[-1].replace(",", "")) if found else None for found in numbers)
        return ours is not None and ours == theirs
    programs = re.findall(r"```python\n(.*?)```", answer, re.DOTALL)
    try:
        return any(isinstance(node, ast.FunctionDef) for program in programs for node in ast.walk(ast.parse(program)))
    except SyntaxError:
        return False


def make_student(name: str, given: argparse.Namespace) -> Path:
    """Return the folder of a student, which is made if it is missing."""
    folder = Path(given.work / name.replace(" ", "-"))
    if not folder.is_dir():
        run_command([*(word.format(model=given.model) for word in STUDENTS[name][0]), "-o", str(folder)])
    return folder


def teach(student: Path, name: str, arm: str, text: Path, given: argparse.Namespace) -> Record:
    """Let a student learn from a text into the folder `taught`; return what it took."""
    recipe: dict[str, Any] = yaml.safe_load(recipe_path(STUDENTS[name][1]).read_text())
    recipe["data"] = {"dataset": str(text), "samples": SEQUENCES[arm] + HELD, "length": 256, "held_out": HELD}
    recipe |= {"steps": STEPS, "batch": BATCH, "micro_batch": BATCH, "controls": [], "evaluate_every": STEPS}
    file = given.work / "lesson.yaml"
    file.write_text(yaml.safe_dump(recipe))
    shutil.rmtree(given.work / "taught", ignore_errors=True)  # of a run that was cut
    words = ["distill", str(student), str(file), "--teacher", given.model, "-o", str(given.work / "taught")]
    report = run_command(words)
    return {"seconds": report["seconds"]}


def teach_average(student: Path, name: str, texts: dict[str, Path], given: argparse.Namespace) -> Record:
    """Write the mean weights of the students that learn by each of `AVERAGED` to `taught`; return what it took."""
    taught, folders = given.work / "taught", [given.work / f"taught-{arm}" for arm in AVERAGED]
    seconds = 0.0
    for arm, folder in zip(AVERAGED, folders, strict=True):
        seconds += teach(student, name, arm, texts[arm], given)["seconds"]
        shutil.rmtree(folder, ignore_errors=True)
        taught.rename(folder)
    first, second = (load_file(folder / WEIGHTS) for folder in folders)
    mean = {key: ((value.float() + second[key].float()) / 2).to(value.dtype) for key, value in first.items()}
    shutil.copytree(folders[0], taught, ignore=shutil.ignore_patterns(WEIGHTS, "manifest.json"))
    save_file(mean, taught / WEIGHTS, {"format": "pt"})
    for folder in folders:
        shutil.rmtree(folder)
    return {"seconds": seconds}


def score_model(folder: Path, given: argparse.Namespace) -> Record:
    """Return the scores of a folder beside the dense model."""
    text = ["--text", str(given.data / "wikitext2-test.raw"), "--windows", "4", "--length", "512"]
    numbers: Record = {}
    for as_chats in (True, False):
        names = [name for name, (_, chats) in TASKS.items() if chats == as_chats]
        files = ",".join(str(given.data / "tasks" / f"{name}.jsonl") for name in names)
        more = ["--chat-template"] if as_chats else ["--against", given.model]
        scores = run_command(["eval", str(folder), "--tasks", files, "--limit", str(given.limit), *text, *more])
        numbers |= {name: scores["tasks"][name][TASKS[name][0]] for name in names}
    return numbers | {key: scores[key] for key in ("bytes", "perplexity", "kl", "kl_stderr")} | {"items": given.limit}


if __name__ == "__main__":
    main()
