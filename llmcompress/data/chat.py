"""Chats as the tokenizer's chat template writes them, rendered in a process of its own with limits on time and size."""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmcompress.data.packing import Tokens
from llmcompress.data.text import HALVES, Message
from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.yaml import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 20.0  # for one chat
STARTING = 300.0  # seconds for the process to start, on a busy machine
MOST_CHARACTERS = 10_000_000  # of a rendered chat
ADVICE = "leave such chats out, or use another chat template"


def render_chat(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False, where: str = "a chat"
) -> str:
    """Return a chat as its template writes it; with `prompt`, up to where the next answer begins.

    Raises InputError, naming `where`, for a template that refuses the chat, or needs too much time, memory or text.
    """
    from transformers import PreTrainedTokenizerBase as Base

    if type(tokenizer).apply_chat_template is not Base.apply_chat_template:  # its own code, not a template
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"the tokenizer's chat template cannot be used ({shorten(error, 200)})") from error
    request = {
        "messages": messages,
        "template": template,
        "settings": {**tokenizer.special_tokens_map, "add_generation_prompt": prompt},
        "most": MOST_CHARACTERS,
    }
    answer = _PROCESS.answer(request)
    if "refusal" in answer:
        raise InputError(f"{where}: the chat template refuses it ({shorten(answer['refusal'], 300)}); {ADVICE}")
    text = str(answer["text"])
    if found := HALVES.search(text):
        raise InputError(f"{where}: the chat template writes {found[0]!a}, half of a character; correct the template")
    return text


class _Process:
    """The process that renders, started when it is first needed, and again after it had to be ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.parent = os.getpid()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request; a refusal where none comes."""
        with self.lock:
            process = self.process
            if process is None or self.parent != os.getpid():  # a fork shares no pipe with its parent
                process = self._started()
            return self._asked(process, json.dumps(request), SECONDS)

    def end(self) -> None:
        """End the process, unless another one started it."""
        if self.process is not None and self.parent == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None

    def _started(self) -> subprocess.Popen[str]:
        program = Path(__file__).with_name("template_process.py")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the run, which ends this process
        )
        self.parent = os.getpid()
        if "ready" not in self._asked(process, None, STARTING):
            raise InputError("the process that renders chat templates cannot start; check the installed transformers")
        return process

    def _asked(self, process: subprocess.Popen[str], line: str | None, seconds: float) -> dict[str, Any]:
        """Send a line, and wait for one. A process that stays silent for too long is ended."""
        late = threading.Event()
        timer = threading.Timer(seconds, _stop, (process, late))
        timer.daemon = True
        timer.start()
        try:
            found = _exchanged(process, line)
        finally:
            timer.cancel()
        if not found.endswith("\n"):
            self.end()
            return {"refusal": f"it takes more than {seconds:g} seconds" if late.is_set() else "it ends its process"}
        answer: dict[str, Any] = json.loads(found)
        return answer


def _stop(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    process.kill()


def _exchanged(process: subprocess.Popen[str], line: str | None) -> str:
    """Return the answer to a line; nothing from a process that has ended."""
    given: IO[str] | None = process.stdin
    read: IO[str] | None = process.stdout
    if given is None or read is None:
        return ""
    try:
        if line is not None:
            given.write(f"{line}\n")
            given.flush()
        return read.readline()
    except OSError:  # it has ended
        return ""


_PROCESS = _Process()
atexit.register(_PROCESS.end)
ROLE = "assistant"


def answer_tokens(messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str) -> Tokens:
    """The tokens of a chat as its template renders it; those count that begin within an answer.

    Raises InputError, naming `where`, for a chat that the template refuses, and for a template that writes what
    precedes an answer in another way once the answer is there; RecipeError for a tokenizer that does not tell where its
    tokens begin.
    """
    if not tokenizer.is_fast:
        raise RecipeError("answers_only needs a tokenizer that tells where its tokens begin; set it to false")
    text = render_chat(messages, tokenizer, where=where)
    spans = list(_spans(messages, tokenizer, text, where))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = [begin for begin, _ in found.offset_mapping]
    return found.input_ids, [any(first <= begin < last for first, last in spans) for begin in begins]


def _spans(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, text: str, where: str
) -> Iterator[tuple[int, int]]:
    """The characters `[first, last)` of each answer in `text`, its ending token included. What the assistant says
    before anyone else answers nothing."""
    special = _special_tokens(tokenizer)
    for number, message in enumerate(messages):
        if message["role"] != ROLE or number == 0:
            continue
        before = render_chat(messages[:number], tokenizer, prompt=True, where=where)
        after = render_chat(messages[: number + 1], tokenizer, where=where)
        if not (after.startswith(before) and text.startswith(after)):
            raise InputError(
                f"{where}: the chat template writes the messages before answer {number + 1} in another way once it is "
                f"there, so where it begins cannot be told; set answers_only: false, or use another template"
            )
        yield len(before), len(before) + len(_ended(after[len(before) :], special))


def _ended(answer: str, special: re.Pattern[str]) -> str:
    """An answer without the white space that a template writes behind the token which ends it."""
    ends = [found.end() for found in special.finditer(answer)]
    return answer[: ends[-1]] if ends and not answer[ends[-1] :].strip() else answer


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    words = sorted(added | set(map(str, tokenizer.all_special_tokens)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")
