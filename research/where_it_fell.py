"""Chats of each kind in equal numbers, beside more chats of the kind where compression hurt most.

    python research/where_it_fell.py STUDENT --data DATA --out OUT [--chats 120] [--steps 24] [--seeds 0 1]

Kinds are questions on Python's library, articles and functions, each with a reference that the teacher rewrites
(self-data distillation, arXiv 2410.09982). The STUDENT is scored on text of each kind first; the second arm has shares
by DDK's rule (arXiv 2407.16154) from the perplexities found there. Scales and norms then learn from as many chats in
either arm, by cross-entropy on answers. DATA holds `wikitext2-valid.txt` for the articles and `wikitext2-test.raw` for
the score; functions are scored on the source code of IDLE. Prints the KL on each kind, and the worst of the three.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import textwrap
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from idle import idle_source
from self_data import MODULES, TEACHER, WORDS, chat, lesson, references

import llmcompress as lc
from llmcompress.data.schedule import reweight
from llmcompress.data.self_data import Answering, answer
from llmcompress.distillation.run import distill

Chat = dict[str, Any]
RATES = {"scales": 1e-3, "norms": 1e-3}


def articles(text: str) -> list[Chat]:
    """Return paragraphs of articles, asked for by article and section."""
    found, title, section = [], "", ""
    for line in map(str.strip, text.splitlines()):
        heading = re.fullmatch(r"(=(?: =)*) (.+?) \1", line)
        if heading and heading[1] == "=":
            title, section = heading[2], "the introduction"
        elif heading:
            section = heading[2]
        elif title and "<unk>" not in line and len(line.split()) in WORDS:
            found.append(chat(f"Write a paragraph of an encyclopedia on {title}: {section}.", line))
    return found


def functions() -> list[Chat]:
    """Return functions of Python's library, asked for by what their docstrings say first."""
    found = []
    for module in MODULES.split():
        path = str(getattr(import_module(module), "__file__", ""))
        lines = Path(path).read_text(encoding="utf-8").splitlines() if path.endswith(".py") else []
        for node in ast.walk(ast.parse("\n".join(lines))):
            said = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if not said or not isinstance(node, ast.FunctionDef):
                continue
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if len(text.split()) in WORDS:
                asked = f"{node.name}({ast.unparse(node.args)})"
                found.append(chat(f"Write the Python function `{asked}`: {said.splitlines()[0]}", text))
    return found


def rewritten(kind: str, chats: list[Chat], out: Path) -> list[str]:
    """Return the lines of chats as the teacher rewrites them; they are kept in `out`."""
    given, anew = out / f"{kind}.jsonl", out / f"{kind}-rewritten.jsonl"
    if not anew.exists():
        given.write_text("".join(f"{json.dumps(one)}\n" for one in chats))
        done = answer(TEACHER, Answering(str(given), rewrite=True, keep_reference=True), anew)
        print(f"{kind}: rewritten {done.answers}, references kept {done.references}, {done.faults}", flush=True)
    return anew.read_text().splitlines()


def scores(model: str | Path, texts: dict[str, str | None], against: str | None = TEACHER) -> dict[str, dict[str, Any]]:
    """Return what `lc.score` says of a model on each kind of text."""
    return {
        kind: lc.score(model, lc.Protocol(text, windows=8, length=512), against=against) for kind, text in texts.items()
    }


def main() -> None:
    """Print a row for the student before it learns, and for every arm and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="where chats and students are kept")
    parser.add_argument("--chats", type=int, default=120)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str | None] = {
        "library": None,  # Python's documentation
        "articles": (options.data / "wikitext2-test.raw").read_text(encoding="utf-8"),
        "functions": idle_source(),
    }
    dense = [found["perplexity"] for found in scores(TEACHER, texts, None).values()]
    before = scores(options.student, texts)
    fallen = reweight([1 / 3] * 3, [found["perplexity"] for found in before.values()], dense)
    counts = {
        arm: shared_out(shares, options.chats) for arm, shares in {"equal": [1 / 3] * 3, "fallen": fallen}.items()
    }
    print(f"kinds: {', '.join(texts)}; chats: {counts}", flush=True)
    known = {
        "library": references(100_000),
        "articles": articles((options.data / "wikitext2-valid.txt").read_text(encoding="utf-8")),
        "functions": functions(),
    }
    lines = {}
    for kind, most in zip(known, map(max, zip(*counts.values()))):
        Random(0).shuffle(known[kind])
        lines[kind] = rewritten(kind, known[kind][:most], options.out)
    print(f"| arm | seed | {' | '.join(f'KL, {kind}' for kind in texts)} | worst |\n{'|---' * 6}|")
    rows = [("before", 0, before)]
    for arm, parts in counts.items():
        data = options.out / f"{arm}.jsonl"
        data.write_text("".join(f"{line}\n" for kind, n in zip(lines, parts) for line in lines[kind][:n]))
        for seed in options.seeds:
            folder = options.out / f"{arm}-{seed}"
            if not folder.is_dir():
                distill(options.student, TEACHER, lesson(data, sum(parts), options.steps, seed, RATES), folder)
            rows.append((arm, seed, scores(folder, texts)))
    for arm, seed, found in rows:
        kls = [one["kl"] for one in found.values()]
        print(f"| {arm} | {seed} | {' | '.join(f'{kl:.4f}' for kl in kls)} | {max(kls):.4f} |", flush=True)


def shared_out(shares: list[float], count: int) -> list[int]:
    """Return whole numbers in these shares; the last takes what is left."""
    found = [round(count * share) for share in shares[:-1]]
    return [*found, count - sum(found)]


if __name__ == "__main__":
    main()
