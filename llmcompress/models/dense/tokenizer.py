"""The tokenizer of a model folder, tried when it is loaded, and the check that models have one vocabulary.

Numbers of two models can be compared only if a token has the same id in both. Tokenizers are compared by their results,
not by their files, which transformers writes in several ways. The tokens that end or pad a text may differ, as between
a model and its chat model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.errors import InputError
from llmcompress.models.dense.config import MODEL, load_config, needs_code, tokenizer_code, valid_config
from llmcompress.models.dense.locate import Place
from llmcompress.models.files.identity import check_tokenizer, tokenizer_digest, tokenizer_files
from llmcompress.models.files.reading import TokenizerReading, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIAL = "A word.\n"
PROCESSOR_TEMPLATE = "chat_template.json"  # models of images have their one template here, which tokenizers do not read


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder.

    Raises InputError for one that transformers cannot read, that the weights were not written with, or in code that is
    not trusted.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    trusted = tokenizer_code(folder, trust_remote_code)
    own = trust_remote_code and needs_code(folder, MODEL)  # else transformers looks up what it needs of the config
    options = {"config": load_config(folder, trust_remote_code)} if own else {}
    with TokenizerReading(folder):
        if all(path.name.startswith("chat_template") for path in tokenizer_files(folder)):
            raise TypeError("there are no files of one")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted, **options
        )
        if not tokenizer.chat_template and (folder / PROCESSOR_TEMPLATE).is_file():
            tokenizer.chat_template = read_json(folder / PROCESSOR_TEMPLATE).get("chat_template")
        _check(tokenizer)
        return tokenizer


def _check(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TypeError unless a text becomes numbers, and the chat template and the special tokens are text."""
    if not all(isinstance(token, int) for token in tokenizer(TRIAL).input_ids):
        raise TypeError("its tokens are no numbers")
    templates = tokenizer.chat_template
    named = templates.values() if isinstance(templates, dict) else [templates]
    if not all(isinstance(template, str | None) for template in named):
        raise TypeError("its chat template is no text")
    tokenizer.get_vocab()
    if not all(isinstance(token, str | list) for token in tokenizer.special_tokens_map.values()):
        raise TypeError("one of its special tokens is no text")


TRIALS = (  # what tokenizers split, merge and normalize in different ways
    "The miller couldn't count every sack of corn",
    "that forty farms by the river had brought since 1987.",
    "  HELLO, Hello  hello ",
    "def area(radius):\n    return 3.14159 * radius**2",
    "\n\n\tprint(f'{10_000:,.2f}')\r\n",
    "naïve café, ﬁnal m², A\u030a",
    "東京 привет 🙂",
    "see a_b/c.html?d=e%20f#G",
)


def check_vocabularies(places: Sequence[Place], predictions: bool = True) -> None:
    """Raise InputError unless all models have the vocabulary of the first.

    `predictions`: true where these are compared, for which there must be as many of them: tables of tokens are padded.
    """
    first = places[0]
    for place in places[1:]:
        difference = next(_differences(first, place, predictions), None)
        if difference is not None:
            raise InputError(
                f"{first.name} and {place.name} have different vocabularies: {difference}; take two models of which "
                f"one was made from the other"
            )


def _differences(first: Place, second: Place, predictions: bool) -> Iterator[str]:
    if tokenizer_digest(first.folder) != tokenizer_digest(second.folder):
        own, other = (load_tokenizer(place.folder, place.trust_remote_code) for place in (first, second))
        yield from _token_differences(own, other, first.name, second.name)
        yield from _reading_differences(own, other, first.name, second.name)
    if predictions:
        rows, others = _rows(first), _rows(second)
        if rows != others:
            yield f"the table of tokens has {rows} rows in {first.name} and {others} in {second.name}"


def _token_differences(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, name: str, other: str
) -> Iterator[str]:
    """Yield the first id that is another token in each, or in only one of them."""
    known, others = first.get_vocab(), second.get_vocab()
    if known != others:
        number = min(number for _, number in known.items() ^ others.items())
        token, instead = (_token(number, vocabulary) for vocabulary in (known, others))
        yield f"token {number} is {token} in {name} and {instead} in {other}"


def _token(number: int, vocabulary: Mapping[str, int]) -> str:
    return " or ".join(repr(token) for token in sorted(vocabulary) if vocabulary[token] == number) or "missing"


def _reading_differences(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, name: str, other: str
) -> Iterator[str]:
    """Yield a text that becomes other ids in each: one of TRIALS, or a token that only one of them does not split."""
    whole = {**first.get_added_vocab(), **second.get_added_vocab()}
    for text in (*TRIALS, *whole):
        ids, others = (list(each(text, verbose=False).input_ids) for each in (first, second))
        if ids != others:
            at = next(at for at in count() if ids[at : at + 1] != others[at : at + 1])
            yield f"{text!r} is read as {_from(ids, at)} in {name} and as {_from(others, at)} in {other}"


def _from(ids: Sequence[int], at: int) -> str:
    """Return the first ids from where two readings part, for a sentence."""
    shown = [*map(str, ids[at : at + 3]), *(["..."] if len(ids) > at + 3 else [])]
    return " ".join((["..."] if at else []) + shown) or "nothing"


def _rows(place: Place) -> int | None:
    """Return the number of tokens that a model predicts, by its config."""
    return getattr(valid_config(place.folder, place.trust_remote_code).get_text_config(), "vocab_size", None)
