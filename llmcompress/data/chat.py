"""Chats as a tokenizer's chat template writes them, and the tokens of the assistant's answers in them.

Templates come with models, so they are rendered in a process of its own with limits on time, memory and size. Most
templates do not mark answers, so a chat is rendered up to each answer and up to its end: the difference is the answer.
"""

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
from typing import TYPE_CHECKING, Any

from llmcompress.data.columns import HALVES, Message
from llmcompress.data.packing import Tokens
from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.yaml import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 20.0  # for one chat
STARTING = 300.0  # seconds for the process to start, on a busy machine
MOST_CHARACTERS = 10_000_000  # of a rendered chat
ADVICE = "leave such chats out, or use another chat template"
ROLE = "assistant"


def render_chat(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, prompt: bool = False, where: str = ""
) -> str:
    """Return a chat as its template writes it; with `prompt`, up to where the next answer begins.

    Raises InputError, naming `where` or the beginning of the chat, for a template that refuses it, or needs too much
    time, memory or text.
    """
    from transformers import PreTrainedTokenizerBase as Base

    where = where or f"the chat that begins {shorten(messages[0]['content'])!r}"
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
    answer = _RENDERER.answer(request)
    if "refusal" in answer:
        raise InputError(f"{where}: the chat template refuses it ({shorten(answer['refusal'], 300)}); {ADVICE}")
    text = str(answer["text"])
    if half := HALVES.search(text):
        raise InputError(f"{where}: the chat template writes {half[0]!a}, half of a character; correct the template")
    return text


class _Renderer:
    """The process that renders: started when it is first needed, and again after it had to be ended."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.parent = os.getpid()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request; a refusal if none comes."""
        with self.lock:
            process = self.process
            if process is None or self.parent != os.getpid():  # a fork shares no pipe with its parent
                process = self._start()
            return self._exchange(process, json.dumps(request), SECONDS)

    def end(self) -> None:
        """End the process, unless another one started it."""
        if self.process is not None and self.parent == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None

    def _start(self) -> subprocess.Popen[str]:
        program = Path(__file__).with_name("template_process.py")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | threads | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for the run, which ends this process
        )
        self.parent = os.getpid()
        if "ready" not in self._exchange(process, "", STARTING):
            raise InputError("the process that renders chat templates cannot start; check the installed transformers")
        return process

    def _exchange(self, process: subprocess.Popen[str], line: str, seconds: float) -> dict[str, Any]:
        """Send a line, if there is one, and return the answer; end a process that stays silent for too long."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            received = _talk(process, line)
        finally:
            timer.cancel()
        if not received.endswith("\n"):
            self.end()
            return {"refusal": f"it takes more than {seconds:g} seconds" if late.is_set() else "it ends its process"}
        answer: dict[str, Any] = json.loads(received)
        return answer


def _talk(process: subprocess.Popen[str], line: str) -> str:
    """Return the next line of a process; nothing from one that has ended."""
    if process.stdin is None or process.stdout is None:
        return ""
    try:
        if line:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        return process.stdout.readline()
    except OSError:  # it has ended
        return ""


_RENDERER = _Renderer()
atexit.register(_RENDERER.end)


def answer_tokens(messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str) -> Tokens:
    """Return the tokens of a chat; those count that begin within an answer.

    Raises InputError, naming `where`, for a chat that the template refuses, and for a template that writes the messages
    before an answer in another way once the answer follows; RecipeError for a tokenizer without the places of tokens.
    """
    if not tokenizer.is_fast:
        raise RecipeError("answers_only needs a tokenizer that tells where its tokens begin; set it to false")
    text = render_chat(messages, tokenizer, where=where)
    spans = list(_answer_spans(messages, tokenizer, text, where))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins = [begin for begin, _ in encoded.offset_mapping]
    return encoded.input_ids, [any(first <= begin < last for first, last in spans) for begin in begins]


def _answer_spans(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, text: str, where: str
) -> Iterator[tuple[int, int]]:
    """Yield the characters `[first, last)` of each answer, up to the token that ends it.

    White space that the template writes behind that token is left out, and an assistant's first message in a chat.
    """
    words = sorted(set(special_tokens(tokenizer).values()), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, words)) or r"(?!)")
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
        answer = after[len(before) :]
        ends = [match.end() for match in special.finditer(answer)]
        is_ended = bool(ends) and not answer[ends[-1] :].strip()
        yield len(before), len(before) + (ends[-1] if is_ended else len(answer))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that stand for no text, by id: those with a name such as EOS, and others of templates."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
