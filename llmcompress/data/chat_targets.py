"""The tokens of a chat that the assistant wrote: its answers with the token that ends each, without the template.

Templates can mark answers themselves, but most do not, and then the mask that transformers makes is all zeros. Here the
chat is rendered up to each answer and up to its end: the difference is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmcompress.data.chat_template import rendered
from llmcompress.data.packing import Tokens
from llmcompress.data.text import Message
from llmcompress.errors import InputError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLE = "assistant"


def answered(messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str) -> Tokens:
    """The tokens of a chat as its template renders it; those count that begin within an answer.

    Raises InputError, naming `where`, for a chat that the template refuses, and for a template that writes what
    precedes an answer in another way once the answer is there; RecipeError for a tokenizer that does not tell where its
    tokens begin.
    """
    if not tokenizer.is_fast:
        raise RecipeError("answers_only needs a tokenizer that tells where its tokens begin; set it to false")
    text = rendered(messages, tokenizer, where=where)
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
        before = rendered(messages[:number], tokenizer, prompt=True, where=where)
        after = rendered(messages[: number + 1], tokenizer, where=where)
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
