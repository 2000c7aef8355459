"""Data that the teacher writes: its own answers to given prompts, as chats (self-data distillation, arXiv 2410.09982).

A student that learns from its teacher's answers stays close to the teacher; answers of others pull it away.
As in the paper, the teacher sees the data's own answer and writes it anew (`rewrite`); by default it sees the prompt
alone. An answer that fails a check (`Answerer.judge` in `generate.py`) is left out, or the reference takes its place.

The file is written a batch at a time into `<output>.partial`, beside a record of the batches, so an interrupted run
resumes after its last batch and ends with the same bytes.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from llmcompress.data.columns import Document, Message
from llmcompress.data.files import LONGEST_TEXT
from llmcompress.data.generate import Answer, Answerer, AnswerSampling
from llmcompress.data.text import Reading, read_documents
from llmcompress.errors import DiskError, InputError, RecipeError, Termination
from llmcompress.models.dense.companions import GENERATION
from llmcompress.models.dense.config import MODEL, read_entries
from llmcompress.models.dense.load import check_fits, load_model
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.sizes import is_dense
from llmcompress.models.dense.skeleton import check_causal
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.identity import content_digest, teacher_digest, tokenizer_digest
from llmcompress.models.files.output import check_name, lock_output, sync
from llmcompress.models.files.store import Store
from llmcompress.runtime.devices import device_of
from llmcompress.runtime.facts import versions
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.runtime.precision import product_dtype
from llmcompress.runtime.signals import stop_requests

Progress = Callable[[int], None]  # prompts done
REWRITE = """Here is a request and a good answer to it.

Request:
{prompt}

Answer:
{reference}

Answer the request in your own words. Say what the answer above says, and nothing else."""


@dataclass(frozen=True)
class Answering:
    """The prompts to answer, and how. `dataset`, `subset`, `revision`, `split`, `column`: as in `Calibration`; rows are
    chats, whose last answer is the reference, or texts, each of them a prompt. `prompts`: the number, by default all.
    `rewrite`: True if the model sees the reference and writes it anew.
    """

    dataset: str
    subset: str | None = None
    revision: str | None = None
    split: str | None = None
    column: str | None = None
    prompts: int | None = None
    sampling: AnswerSampling = field(default_factory=AnswerSampling)
    batch: int = 8
    keep_reference: bool = False
    rewrite: bool = False

    def __post_init__(self) -> None:
        sampling = self.sampling
        if not 0 <= sampling.temperature <= 10 or not 0 < sampling.top_p <= 1:
            raise RecipeError(
                f"temperature {sampling.temperature:g} and top_p {sampling.top_p:g} cannot be; the first is from 0 to "
                "10, the second above 0 and at most 1"
            )
        for name, value in (("prompts", self.prompts), ("batch", self.batch), ("longest", sampling.longest)):
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class AnswerCounts(JsonRecord):
    """The count of written lines. `answers`: lines by the teacher; `references`: lines with the reference in its place;
    `faults`: the number of failed answers, by reason; `dropped`: prompts without a line."""

    output: str
    model: str
    prompts: int
    answers: int
    references: int
    dropped: int
    faults: dict[str, int]
    generation: dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A chat without its last answer, and that answer if the data have it."""

    number: int
    messages: list[Message]
    reference: str | None


def answer(
    model: str,
    settings: Answering,
    output: Path,
    *,
    revision: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> AnswerCounts:
    """Write the answers of `model` to the prompts as the JSON lines `{id, messages, source, checked, generation}`.

    Equal arguments give equal bytes on one machine and library version. An interrupted run resumes.
    Raises an LLMCompressError for any fault.
    """
    check_name(output)
    _check_new(output)
    if not os.access(output.absolute().parent, os.W_OK):
        raise DiskError(f"{output.absolute().parent} is no folder that can be written to; choose another output file")
    place = locate(model, revision, trust_remote_code)
    next(prompts(settings))  # data that cannot be read, before the model is loaded
    dtype = product_dtype("auto", device_of(device))
    whole = [place] if is_dense(read_entries(place.folder / MODEL, place.folder)) else []
    check_fits(device, "answering", whole, [] if whole else [place], dtype)
    made = {"model": place.name, "revision": place.revision, "dtype": str(dtype).removeprefix("torch.")}
    generation = made | asdict(settings.sampling) | {"versions": versions()}
    with lock_output(output, "file"):
        _check_new(output)  # once more, since another process may have ended
        loaded, tokenizer = load_model(place, device, dtype), load_tokenizer(place.folder, trust_remote_code)
        check_causal(loaded.config, "answering prompts")
        answerer = Answerer(loaded, tokenizer, settings.sampling)
        try:
            store = _store(settings, place, output, generation)
            counts = _write(answerer, settings, output, generation, store, progress)
        except OSError as error:
            raise DiskError(f"{output} cannot be written ({error}); free some space and start again") from error
    lines = counts["answers"] + counts["references"]
    faults = {name.removeprefix("fault: "): count for name, count in sorted(counts.items()) if name.startswith("fault")}
    return AnswerCounts(
        output=str(output),
        model=place.name,
        prompts=counts["prompts"],
        answers=counts["answers"],
        references=counts["references"],
        dropped=counts["prompts"] - lines,
        faults=faults,
        generation=generation,
    )


def _check_new(output: Path) -> None:
    if output.exists():
        raise DiskError(f"{output} exists already; remove it or choose another file")


def prompts(settings: Answering) -> Iterator[Prompt]:
    """Yield the prompts in the order of the data, without chats that no user speaks in.

    Raises InputError for data without a prompt, or that cannot be read.
    """
    reading = Reading()
    documents = read_documents(
        settings.dataset,
        subset=settings.subset,
        revision=settings.revision,
        split=settings.split,
        column=settings.column,
        in_turn=LONGEST_TEXT,
        reading=reading,
    )
    every = (_prompt(number, document) for number, document in enumerate(documents))
    wanted = islice((prompt for prompt in every if prompt is not None), settings.prompts)
    first = next(wanted, None)
    if first is None:
        raise InputError(f"{settings.dataset} has no prompt; give chats with a user's message, or texts")
    yield first
    yield from wanted
    reading.log_notes(settings.dataset)


def _prompt(number: int, document: Document) -> Prompt | None:
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    reference = None
    if messages[-1]["role"] == "assistant":
        messages, reference = messages[:-1], messages[-1]["content"]
    return Prompt(number, messages, reference) if messages and messages[-1]["role"] == "user" else None


def _store(settings: Answering, place: Place, output: Path, generation: dict[str, Any]) -> Store:
    """Return the store beside `output`: a partial file of one run continues another of the same identity."""
    ends = [path for path in [place.folder / GENERATION] if path.is_file()]
    digests = teacher_digest(place.folder, place.adapter), tokenizer_digest(place.folder), content_digest(ends)
    model = [*digests, *(generation[key] for key in ("model", "revision", "dtype"))]
    identity = {"model": model, "settings": asdict(settings), "versions": generation["versions"]}
    record = output.with_name(f"{output.name}.partial.json")
    return Store(output.parent, identity, place=record, advice="or choose another output")


def _write(
    answerer: Answerer,
    settings: Answering,
    output: Path,
    generation: dict[str, Any],
    store: Store,
    progress: Progress | None,
) -> Counter[str]:
    """Write all lines, and then give the file its name; return the counts."""
    staged, record = output.with_name(f"{output.name}.partial"), f"{output.name}.partial"
    source, read = prompts(settings), sha256()
    if not staged.is_file():
        store.remove(record)  # of a run that was cut behind its end
    counts, size = _resume(store, record, source, read)
    with stop_requests() as stopping, staged.open("r+b" if size else "wb") as file:
        file.seek(size)
        file.truncate()  # what an interrupted run wrote after its last record
        while batch := list(islice(source, settings.batch)):
            _digest(read, batch)
            lines = _lines(answerer, settings, batch, generation, counts)
            file.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
            store.put(record, {"read": read.hexdigest(), "bytes": file.tell(), "counts": counts})
            if progress is not None:
                progress(counts["prompts"])
            if stopping:
                kept = f"the answers to {counts['prompts']} prompts are kept in {staged}, from where the same command"
                raise (KeyboardInterrupt if signal.SIGINT in stopping else Termination)(f"{kept} resumes")
    _check_new(output)
    staged.rename(output)
    sync(output.parent)
    store.remove(record)
    return counts


def _resume(store: Store, record: str, source: Iterator[Prompt], read: Any) -> tuple[Counter[str], int]:
    """Return the counts of an interrupted run, and its bytes; leave its prompts out of `source`.

    Raises InputError for another run's record, or changed data.
    """
    found = store.get(record)
    if found is None:
        return Counter(), 0
    try:
        counts, size = Counter(found.entry["counts"]), int(found.entry["bytes"])
        _digest(read, list(islice(source, counts["prompts"])))
        same = found.entry["read"] == read.hexdigest()
    except (ValueError, KeyError, TypeError) as error:
        raise store.damage(error) from error
    if not same:
        raise store.refusal(["prompts"])
    return counts, size


def _digest(read: Any, batch: list[Prompt]) -> None:
    for prompt in batch:
        read.update(json.dumps(asdict(prompt)).encode())


def _lines(
    answerer: Answerer, settings: Answering, batch: list[Prompt], generation: dict[str, Any], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the lines of a batch, and count them in `counts`."""
    shown = [(prompt.number, _prompt_messages(prompt, settings.rewrite)) for prompt in batch]
    wrote = iter(answerer.answers([(number, messages) for number, messages in shown if messages is not None]))
    for prompt, (_, messages) in zip(batch, shown, strict=True):
        found = Answer("", "no reference") if messages is None else next(wrote)
        counts["prompts"] += 1
        text, source, made = found.content, "teacher", generation
        if found.fault is not None:
            counts[f"fault: {found.fault}"] += 1
            if not settings.keep_reference or prompt.reference is None:
                continue
            text, source, made = prompt.reference, "reference", {}
        counts["answers" if source == "teacher" else "references"] += 1
        yield {
            "id": prompt.number,
            "messages": [*prompt.messages, {"role": "assistant", "content": text}],
            "source": source,
            "checked": source == "teacher",
            "generation": made or None,
        }


def _prompt_messages(prompt: Prompt, rewrite: bool) -> list[Message] | None:
    """Return the messages that the model reads; to `rewrite`, the last one holds the reference, None without one."""
    if not rewrite:
        return prompt.messages
    if prompt.reference is None:
        return None
    *before, last = prompt.messages
    content = REWRITE.format(prompt=last["content"], reference=prompt.reference)
    return [*before, {"role": "user", "content": content}]
