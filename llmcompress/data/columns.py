"""Rows of columns into documents: the columns that hold text or a chat, known by their names, in the usual forms.

A document is a string, or a chat: a list of `{"role": ..., "content": ...}` messages. Nothing here reads files.
"""

import json
import re
from collections import Counter
from typing import Any

from llmcompress.errors import InputError
from llmcompress.recipe.yaml import shorten

HALVES = re.compile("[\ud800-\udfff]")  # surrogates, which JSON can spell and UTF-8 cannot
Message = dict[str, str]
Document = str | list[Message]
CHAT_COLUMNS = ("messages", "conversation", "conversations")
PROMPT_COLUMNS = ("instruction", "prompt", "question", "query", "input")
ANSWER_COLUMNS = ("output", "completion", "response", "answer", "chosen")
MORE_COLUMNS = ("input", "context")  # what an instruction is about
SYSTEM_COLUMNS = ("system", "system_prompt")
COLUMNS = {*CHAT_COLUMNS, *PROMPT_COLUMNS, *ANSWER_COLUMNS, "text"}
SPEAKERS = {  # of any message
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    "system": "system",
}
ROLES = {  # of messages with `from` and `value`
    **SPEAKERS,
    "function_call": "assistant",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
CALLS = ("tool_calls", "function_call")  # beside a message's content, or in its place
UNREAD = (*CALLS, "reasoning_content", "reasoning", "thinking")  # beside a message's content


def read_row(row: Any, column: str | tuple[str, str] | None, where: str) -> tuple[Document | None, tuple[str, ...]]:
    """Return the document of one row, None if it has no column for it, and the names of the columns that are read.

    `row`: a string, or a dictionary of columns; `column`: the one with text or messages, or two, with prompts and with
    answers. Raises InputError, which begins with `where`, for a row that cannot be understood.
    """
    if isinstance(row, str):
        return _check_characters(row, where), ()
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type(row).__name__}, not an object with a text or messages column")
    names = _find_columns(row, where) if column is None else (column,) if isinstance(column, str) else column
    if not names or any(name not in row for name in names):
        return None, ()
    if len(names) == 2:
        return _read_pair(row, *names, where)
    value = row[names[0]]
    if names[0] in CHAT_COLUMNS and isinstance(value, str) and value.lstrip()[:1] == "[":
        value = _parse_chat(value, f"{where}, column {names[0]!r}")
    if value is None or isinstance(value, str):
        return _check_characters(value or "", where), names
    if not _is_chat(value):
        raise InputError(
            f"{where}: column {names[0]!r} holds neither text nor messages with a role and a content, or from and value"
        )
    chat = _read_chat(value, where)
    return (chat, names) if all(map(_is_plain, value)) else _put_system_first(row, chat, names, where)


def describe_absence(row: dict[Any, Any], column: str | tuple[str, str] | None, where: str) -> str:
    """Return the sentence on a row without the column of a text."""
    has = shorten(sorted(map(str, row)), 200)
    if column is None and (name := next((name for name, value in row.items() if _holds_rows(value)), None)):
        return f"{where} holds rows in {shorten(name)!r}; write these alone, as a list or one per line"
    if column is None:
        return f"{where} has the columns {has}; name the one with the text as `column`"
    names = (column,) if isinstance(column, str) else column
    return f"{where} has no column {next(name for name in names if name not in row)!r}; it has {has}"


def count_unread(row: Any, columns: tuple[str, ...]) -> Counter[str]:
    """Return the number of messages in these columns by what they have beside content and documents leave out."""
    turns = [turn for name in columns if isinstance(row[name], list) for turn in row[name]]
    return Counter(name for turn in turns for name in UNREAD if turn.get(name))


def _find_columns(row: dict[Any, Any], where: str) -> tuple[str, ...]:
    """Return the columns of a document: one, or those of a prompt and its answer; none if no column holds text."""
    known = [name for name in (*CHAT_COLUMNS, "text") if row.get(name) is not None]
    prompt, answer = (next((n for n in names if n in row), None) for names in (PROMPT_COLUMNS, ANSWER_COLUMNS))
    if not known and prompt and answer and _is_part(row[prompt]) and _is_part(row[answer]):
        return prompt, answer
    texts = [name for name, value in row.items() if isinstance(value, str)]
    is_only = not any(isinstance(value, list | dict) and value for value in row.values())  # which may hold the text
    known += ["chosen"] if row.get("chosen") is not None and _is_part(row["chosen"]) else []
    known += ["content"] if "content" in texts else []
    known += [name for name in (*CHAT_COLUMNS, "text") if name in row]  # holds nothing in this row
    names = known[:1] or texts
    if len(names) > 1 or (not known and texts and not is_only):
        raise InputError(describe_absence(row, None, where))
    return tuple(names)


def _read_pair(row: dict[Any, Any], prompt: str, answer: str, where: str) -> tuple[Document | None, tuple[str, ...]]:
    """Return the chat of a prompt and its answer: texts, or messages. An answer may hold the prompt as well."""
    more = next((name for name in MORE_COLUMNS if prompt == "instruction" and isinstance(row.get(name), str)), None)
    asks = _read_part(row[prompt], "user", f"{where}, column {prompt!r}")
    if more is not None and asks:
        about = _read_part(row[more], "user", f"{where}, column {more!r}")
        asks[-1]["content"] = "\n\n".join(turn["content"] for turn in (asks[-1], *about))
    answers = _read_part(row[answer], "assistant", f"{where}, column {answer!r}")
    if any(turn["role"] == "user" for turn in answers):
        asks = []
    elif not asks:
        answers = []  # an answer to nothing
    names = (prompt, answer) if more is None else (prompt, more, answer)
    return _put_system_first(row, asks + answers, names, where)


def _put_system_first(
    row: dict[Any, Any], chat: list[Message], names: tuple[str, ...], where: str
) -> tuple[Document, tuple[str, ...]]:
    """Return a chat that begins with the text of a system column, if the row has one and the chat no system message."""
    system = next((name for name in SYSTEM_COLUMNS if isinstance(row.get(name), str)), None)
    if system is None or not chat or chat[0]["role"] == "system":
        return chat, names
    return _read_part(row[system], "system", f"{where}, column {system!r}") + chat, (system, *names)


def _is_plain(turn: dict[str, Any]) -> bool:
    """True for a message with role and content, or a call in its place, False for one with from and value."""
    is_other = {"from", "value"} <= turn.keys()
    has_content = "content" in turn or any(turn.get(name) for name in CALLS)
    return "role" in turn and has_content and (turn["role"] is not None or not is_other)


def _is_chat(value: Any) -> bool:
    """True for a list of messages."""
    return isinstance(value, list) and all(
        isinstance(turn, dict) and (_is_plain(turn) or {"from", "value"} <= turn.keys()) for turn in value
    )


def _holds_rows(value: Any) -> bool:
    """True for a row, or a list of them, in the place of a text."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and not _is_chat(value) and not COLUMNS.isdisjoint(first)


def _is_part(value: Any) -> bool:
    """True for what a prompt or an answer can be."""
    return value is None or isinstance(value, str) or _is_chat(value)


def _parse_chat(text: str, where: str) -> Any:
    """Return the messages that a text holds as JSON, as tables of chats have them; a text that is no list as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not re.match(r"\s*\[\s*{", text):
            return text
        raise InputError(f"{where} holds a list that is not JSON ({error}); write its messages as JSON") from error
    return value if _is_chat(value) else text


def _read_part(value: Any, role: str, where: str) -> list[Message]:
    """Return a prompt or an answer as messages; none for nothing and for white space."""
    if not _is_part(value):
        raise InputError(f"{where} holds {type(value).__name__}, neither text nor messages; name another `column`")
    if isinstance(value, str):
        return [{"role": role, "content": _check_characters(value, where)}] if value.strip() else []
    return _read_chat(value or [], where)


def _read_chat(value: list[dict[str, Any]], where: str) -> list[Message]:
    chat = []
    for number, turn in enumerate(value, start=1):
        sender, content = ("role", "content") if _is_plain(turn) else ("from", "value")
        role = _read_content(turn[sender], f"{where}, role {number}")
        known = ROLES if sender == "from" else SPEAKERS
        if sender == "from" and role.lower() not in ROLES:
            raise InputError(f"{where}, message {number} is from {shorten(role)!r}; write one of {', '.join(ROLES)}")
        chat.append(
            {
                "role": known.get(role.lower(), role),
                "content": _read_content(turn.get(content), f"{where}, message {number}"),
            }
        )
    return chat


def _read_content(value: Any, where: str) -> str:
    """Return the text of a message: a string, nothing, or a list of parts of text, which are joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _check_characters(value, where)
    if isinstance(value, list):
        return "".join(_read_content_part(part, where) for part in value)
    raise InputError(f"{where} holds {type(value).__name__}, not text; write a string, or a list of parts of text")


def _read_content_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
        raise InputError(f"{where} has a part that is no text ({shorten(kind)}); leave such chats out")
    return _check_characters(text, where)


def _check_characters(text: str, where: str) -> str:
    """Return the text. Raises InputError for half a character, which no tokenizer reads."""
    if not text.isascii() and (found := HALVES.search(text)):
        raise InputError(f"{where} has {found[0]!a}, half of a character, at {found.start()}; correct the text")
    return text
