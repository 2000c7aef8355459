"""Recovery on references and on what the teacher makes of them: self-data distillation (arXiv 2410.09982).

    python research/self_data.py STUDENT... --text TEST --tasks PAIRS --out OUT [--chats 352] [--seeds 0 1]

The references are questions on Python's library, each with its docstring as the answer. The teacher rewrites them
(`llmcompress answer --rewrite --keep-reference`). Every student then learns from either by cross-entropy on answers
alone, as many sequences, steps and seeds. Prints KL and perplexity on documentation and on TEST, and the accuracy on
PAIRS, a file of minimal pairs.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import llmcompress as lc
from llmcompress.data.self_data import Answering, answer
from llmcompress.distillation.run import distill

TEACHER = "smollm2"
MODULES = """
argparse array ast base64 bisect calendar cmath collections colorsys configparser contextlib copy csv datetime
decimal difflib email.message enum fileinput fnmatch fractions functools glob gzip hashlib heapq html
http.client inspect io ipaddress itertools json linecache locale logging mailbox math mimetypes netrc operator
os os.path pathlib pickle platform plistlib pprint queue random re sched secrets shelve shlex shutil smtplib
socket sqlite3 statistics string struct subprocess tarfile tempfile textwrap threading time timeit tokenize
traceback types typing unicodedata unittest urllib.parse uuid warnings wave weakref xml.dom.minidom zipfile
zlib
"""
LENGTH = 160  # of a chat
WORDS = range(15, 90)  # of a docstring that serves as an answer
BATCH = 8
ARMS = {"references": "references", "self-data": "rewritten"}  # and the file that each reads


def chat(question: str, text: str) -> dict[str, Any]:
    """Return a question and its reference answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}


def references(count: int) -> list[dict[str, Any]]:
    """Return `count` chats: a question on a member of a module, and its docstring, in an order drawn once."""
    found = {text: name for module in MODULES.split() for name, text in _documented(module)}
    chats = [chat(f"What is `{name}` of Python's library for?", text) for text, name in found.items()]
    Random(0).shuffle(chats)
    return chats[:count]


def _documented(module: str) -> Iterator[tuple[str, str]]:
    """Yield members of a module that are not inherited, and their docstrings, if they are of a fitting length."""
    there = importlib.import_module(module)
    for name, value in vars(there).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module:
            continue
        members = {name: value} | (
            {f"{name}.{key}": each for key, each in vars(value).items()} if inspect.isclass(value) else {}
        )
        for path, member in members.items():
            text = inspect.cleandoc(getattr(member, "__doc__", None) or "")
            if "._" not in path and text and len(text.split()) in WORDS:
                yield f"{module}.{path}", text


def lesson(chats: Path, count: int, steps: int, seed: int, rates: dict[str, float]) -> dict[str, Any]:
    """Return the distillation that reads a file of `count` chats, an eleventh of which is held out."""
    return {
        "version": 1,
        "seed": seed,
        "data": {
            "dataset": str(chats),
            "packing": False,
            "samples": count,
            "length": LENGTH,
            "held_out": count // 11,
        },
        "losses": [{"of": {"loss": "cross_entropy"}}],
        "rates": rates,
        "batch": BATCH,
        "micro_batch": 4,
        "steps": steps,
        "evaluate_every": steps,
    }


def scores(model: str | Path, text: str, tasks: Path) -> list[float]:
    """Return KL and perplexity on documentation and on `text`, and the accuracy on the pairs."""
    docs, other = lc.Protocol(windows=8, length=512, tasks=(str(tasks),)), lc.Protocol(text, windows=8, length=512)
    first, second = lc.score(model, docs, against=TEACHER), lc.score(model, other, against=TEACHER)
    [task] = first["tasks"].values()
    return [first["kl"], first["perplexity"], second["kl"], second["perplexity"], task["acc"]]


def main() -> None:
    """Print a row for every student before it learns, and for every arm and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where chats and students are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--chats", type=int, default=352)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    given, anew = options.out / "references.jsonl", options.out / "rewritten.jsonl"
    given.write_text("".join(f"{json.dumps(chat)}\n" for chat in references(options.chats)))
    if not anew.exists():
        done = answer(TEACHER, Answering(str(given), rewrite=True, keep_reference=True), anew)
        print(f"rewritten {done.answers}, references kept {done.references}, {done.faults}", flush=True)
    text = options.text.read_text()
    heads = ("student", "arm", "seed", "KL, docs", "perplexity, docs", "KL, text", "perplexity, text", "pairs")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    rows = [(TEACHER, "dense", 0, Path(TEACHER))]
    for student in options.students:
        rows.append((student.name, "before", 0, student))
        for arm in ARMS:
            for seed in options.seeds:
                folder = options.out / f"{student.name}-{arm}-{seed}"
                if not folder.is_dir():
                    chats, rates = options.out / f"{ARMS[arm]}.jsonl", {"weights": 1e-3, "norms": 1e-3}
                    distill(student, TEACHER, lesson(chats, options.chats, options.steps, seed, rates), folder)
                rows.append((student.name, arm, seed, folder))
    for name, arm, seed, folder in rows:
        cells = " | ".join(f"{value:.4f}" for value in scores(folder, text, options.tasks))
        print(f"| {name} | {arm} | {seed} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
