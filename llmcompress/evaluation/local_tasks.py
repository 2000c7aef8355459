"""Tasks in .jsonl files: the keys of the first line tell the kind, so the published files of five benchmarks are tasks.

| keys | kind | scores |
|---|---|---|
| sentence_good, sentence_bad | minimal pairs, as BLiMP's (1912.00582) | accuracy |
| goal, sol1, sol2, label | PIQA (1911.11641) | accuracy, also by the answers' length |
| question, answer | GSM8K (2110.14168) | bits a byte of the answer; exact match of written answers |
| prompt, canonical_solution, test, entry_point | HumanEval (2107.03374) | bits a byte of the solution; pass@1 |
| text | LAMBADA (1606.06031) | accuracy and perplexity of the last word |

Bits a byte are those of an item's right answer after its prompt, divided by the answer's bytes of UTF-8; their mean
over items is the score. They tell models apart that write no right answer yet.

Programs that a model wrote run in processes with limits, which are no sandbox: they can read files and the network.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.data.files import parse_line, read_text
from llmcompress.errors import InputError
from llmcompress.evaluation.protocol import Protocol

PAIRS = "llmcompress_pairs"
PAIRS_FILE = Path(__file__).with_name("minimal_pairs.jsonl")
Item = Mapping[str, Any]
Config = dict[str, Any]  # of lm-eval
BLANKS = " \t\r\n"  # between words
SECONDS = 10  # of a program, on the clock and of the processor
MEMORY = 1 << 30  # bytes of address space
OUTPUT = 1 << 20  # bytes of any file that a program writes
_LIMITED = """\
import resource, runpy, sys
for name, value in dict(CPU={seconds}, AS={memory}, FSIZE={output}, CORE=0).items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
runpy.run_path(sys.argv[1], run_name="__main__")
print({token!r}, end="")
"""


@dataclass(frozen=True)
class Kind:
    """A kind of task. keys: of every line. config: what lm-eval is told."""

    name: str
    keys: tuple[str, ...]
    config: Callable[[Protocol], Config]


def local_task(paths: Sequence[Path], protocol: Protocol, name: str) -> Config:
    """Return lm-eval's config of one task over the lines of .jsonl files, all of one kind.

    Raises InputError for files of no kind or of several, and for a line without what its kind needs.
    """
    kind, items = _read_items(paths)

    def dataset(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list(items)}

    return {
        "task": name,
        "custom_dataset": dataset,  # in memory: lm-eval's own loader would write a cache
        "test_split": "test",
        "fewshot_split": "test",  # lm-eval leaves out the item itself
        "metadata": {"version": 1.0},
        **kind.config(protocol),
    }


def _read_items(paths: Sequence[Path]) -> tuple[Kind, list[dict[str, Any]]]:
    """Return the kind of the files and their lines, each cut to the keys of the kind."""
    items: list[dict[str, Any]] = []
    kind: Kind | None = None
    lines = [(path, *line) for path in paths for line in enumerate(read_text(path).split("\n"), start=1)]
    for path, number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_line(line, where)
        if not isinstance(row, dict):
            raise InputError(f"{where} is no JSON object; write one item in each line")
        kind = kind or next((kind for kind in KINDS if row.keys() >= set(kind.keys)), None)
        if kind is None:
            raise InputError(f"{where} is of no kind of task; its keys have to be {_all_keys()}")
        items.append(_checked_item(row, kind, where))
    if kind is None:
        raise InputError(f"{paths[0]} has no items; write one JSON object in each line, with the keys {_all_keys()}")
    return kind, items


def _checked_item(row: Mapping[str, Any], kind: Kind, where: str) -> dict[str, Any]:
    missing = [key for key in kind.keys if key not in row]
    if missing:
        raise InputError(f"{where} has no {missing[0]}, but the lines before it are {kind.name}; keep kinds apart")
    item = {key: row[key] for key in kind.keys}
    for key, value in item.items():
        if key == "label":
            if value not in (0, 1) or isinstance(value, bool):
                raise InputError(f"{where} has the label {value!r}; it has to be 0 for sol1 or 1 for sol2")
        elif not isinstance(value, str) or not value.strip():
            raise InputError(f"{where} has no text under {key}")
    if kind is PAIR and len(set(item.values())) == 1:
        raise InputError(f"{where} has one sentence twice, which counts as right whatever a model says; leave it out")
    if kind is LAST_WORD and not _cut_last_word(item)[0]:
        raise InputError(f"{where} has a text of one word; the last word is asked for after the others")
    return item


def _all_keys() -> str:
    return "; or ".join(", ".join(kind.keys) for kind in KINDS)


def _mean_of(*metrics: str, higher_is_better: bool = True) -> list[Config]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": higher_is_better} for metric in metrics]


def _pairs(protocol: Protocol) -> Config:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "target_delimiter": "",  # the default, a space, would be glued to the front of both sentences
        "num_fewshot": 0,
        "metric_list": _mean_of("acc"),
    }


def _two_solutions(protocol: Protocol) -> Config:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "doc_to_target": "label",
        "metric_list": _mean_of("acc", "acc_norm"),
    }


def _last_word(protocol: Protocol) -> Config:
    return {
        "output_type": "loglikelihood",
        "doc_to_text": lambda item: _cut_last_word(item)[0],
        "doc_to_target": lambda item: _cut_last_word(item)[1],
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            *_mean_of("acc"),
        ],
    }


def _cut_last_word(item: Item) -> tuple[str, str]:
    """Return what comes before the last word of a text, and that word with the white space before it."""
    text = item["text"].rstrip(BLANKS)
    start = 1 + max(text.rfind(blank) for blank in BLANKS)
    before = text[:start].rstrip(BLANKS)
    return before, text[len(before) :]


def _worked_answers(protocol: Protocol) -> Config:
    prompt, gap = ("{{question}}", "") if protocol.chat_template else ("Question: {{question}}\nAnswer:", " ")
    if not protocol.generate:
        return {"doc_to_text": prompt, **_bits_of(lambda item: gap + item["answer"])}
    number = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
    last_number = {"function": "regex", "regex_pattern": number, "group_select": -1}
    return {
        "doc_to_text": prompt,
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 256},
        "filter_list": [{"name": "none", "filter": [last_number, {"function": "take_first"}]}],
        "metric_list": [{**_mean_of("exact_match")[0], "regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"]}],
    }


def _programs(protocol: Protocol) -> Config:
    prompt = "{{prompt}}" if protocol.generate else "{{prompt.rstrip()}}"
    config: Config = {"doc_to_text": prompt}
    if protocol.chat_template:
        config["doc_to_text"] = "Complete this function, and repeat all of it:\n```python\n{{prompt}}\n```\n"
        config["gen_prefix"] = f"```python\n{prompt}"
    if not protocol.generate:
        return config | _bits_of(_solution)
    ends = ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"]
    return config | {
        "doc_to_target": "{{canonical_solution}}",
        "target_delimiter": "",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ends, "do_sample": False, "max_gen_toks": 512},
        "process_results": _run_tests,
        "metric_list": _mean_of("pass@1"),
    }


def _solution(item: Item) -> str:
    """Return a solution with the white space before it: lm-eval scores the end of a prompt with the answer."""
    return str(item["prompt"][len(item["prompt"].rstrip()) :] + item["canonical_solution"])


def _run_tests(item: Item, written: Sequence[str]) -> dict[str, float]:
    program = f"{item['prompt']}{written[0]}\n\n{item['test']}\ncheck({item['entry_point']})\n"
    return {"pass@1": float(run_program(program))}


def _bits_of(answer: Callable[[Item], str]) -> Config:
    """Return the config of a task that scores an item's right answer after its prompt."""

    def score(item: Item, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        return {"bits_per_byte": -results[0][0] / math.log(2) / len(answer(item).encode())}

    return {
        "output_type": "loglikelihood",
        "doc_to_target": answer,
        "target_delimiter": "",
        "process_results": score,
        "metric_list": _mean_of("bits_per_byte", higher_is_better=False),
    }


LAST_WORD = Kind("passages whose last word is asked for", ("text",), _last_word)
PAIR = Kind("minimal pairs", ("sentence_good", "sentence_bad"), _pairs)
KINDS = (
    PAIR,
    Kind("goals with two solutions", ("goal", "sol1", "sol2", "label"), _two_solutions),
    Kind("questions with answers", ("question", "answer"), _worked_answers),
    Kind("problems for programs", ("prompt", "canonical_solution", "test", "entry_point"), _programs),
    LAST_WORD,
)


def run_program(program: str, seconds: float = SECONDS) -> bool:
    """Run Python source in a process of its own, in an empty folder; True if it came to its end without an error.

    A program that ends the process, or prints what the end prints, did not come to its end.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="llmcompress-") as folder:
        source, printed = Path(folder, "program.py"), Path(folder, "printed")
        source.write_text(program, encoding="utf-8", errors="replace")
        runner = _LIMITED.format(seconds=round(seconds), memory=MEMORY, output=OUTPUT, token=token)
        with printed.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", runner, str(source)],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                ended = process.wait(seconds) == 0
            except subprocess.TimeoutExpired:
                ended = False
            finally:
                _end_group(process)
        return ended and printed.read_bytes().endswith(token.encode())


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, which stay in its group."""
    with contextlib.suppress(ProcessLookupError):  # all of them ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
