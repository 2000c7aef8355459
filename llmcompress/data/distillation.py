"""The data of a distillation: `TextSource` names the text, or several domains of it, `read_data` makes them token
sequences with their targets.

Beyond what calibration reads: of chats the answers alone count, documents in one sequence can be kept from seeing each
other, and short documents are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.data.batch import Batch
from llmcompress.data.calibration import (
    SHORTFALL,
    CalibrationTokens,
    calibration_tokens,
    check_digest,
    check_length,
    check_tokens,
    document_tokens,
    held_out_count,
    public_source,
    source_name,
    source_notes,
    special_tokens,
)
from llmcompress.data.chat import answer_tokens
from llmcompress.data.packing import PackedText, Tokens, pack_documents, pad_documents
from llmcompress.data.text import Document, read_documents, shuffle
from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.data import Domain, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PATIENCE = 1000  # documents without any target before a source is given up

Load = Callable[[], "PreTrainedModel"]


@dataclass(frozen=True, eq=False)
class Data:
    """The sequences to train on and those held out.

    Of several domains: `names`, their `weights`, and the `sizes` of their parts of `sequences`, which lie one behind
    the other. `report`: plain values; `hash`: SHA-256 of all of it.
    """

    sequences: Batch
    held_out: tuple[Batch, ...]  # of each domain
    names: tuple[str, ...]
    weights: tuple[float, ...]
    sizes: tuple[int, ...]
    report: dict[str, Any]
    hash: str


def read_data(
    texts: TextSource | Sequence[Domain], tokenizer: PreTrainedTokenizerBase, load: Load, config: PreTrainedConfig
) -> Data:
    """Return the sequences that `texts` ask for; the same every time.

    `load` opens the dense model where it has to write a text itself.

    Raises InputError for text that cannot serve, RecipeError for what the tokenizer or the model (of `config`) cannot.
    """
    domains = () if isinstance(texts, TextSource) else tuple(texts)
    names = tuple(domain.name for domain in domains) or ("text",)
    sources = [texts] if isinstance(texts, TextSource) else domains
    found = [_sequences(source, tokenizer, load, config) for source in sources]
    parts = [sequences for sequences, _, _ in found]
    firsts = [len(sequences) - held_out for sequences, held_out, _ in found]
    reports = {name: report for name, (*_, report) in zip(names, found, strict=True)}
    content = (_bytes(values) for part in parts for values in (part.ids, part.counted, part.document_numbers()))
    return Data(
        sequences=Batch.join([part[:first] for part, first in zip(parts, firsts, strict=True)]),
        held_out=tuple(part[first:] for part, first in zip(parts, firsts, strict=True)),
        names=names,
        weights=tuple(domain.weight for domain in domains) or (1.0,),
        sizes=tuple(firsts),
        report={"domains": reports} if domains else reports["text"],
        hash=sha256(b"".join(content)).hexdigest(),
    )


def _sequences(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, load: Load, config: PreTrainedConfig
) -> tuple[Batch, int, dict[str, Any]]:
    """All sequences of one text, how many of them, the last, are held out, and what a report says of them."""
    check_length(source.length, config)
    if source.dataset == "self":
        tokens = calibration_tokens(source, tokenizer, load, config)
        sequences = Batch.of(tokens.sequences)
    else:
        tokens, sequences = _read(source, tokenizer)
        check_tokens(tokens.sequences, tokens.source, config)
    report = tokens.report() | {"targets": sequences.targets, "boundaries": source.boundaries}
    return sequences, tokens.held_out, report


def _read(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> tuple[CalibrationTokens, Batch]:
    if source.answers_only is True and not tokenizer.chat_template:
        raise RecipeError("answers_only is true, but the tokenizer has no chat template; set it to false")
    check_digest(source)
    bos, eos = special_tokens(tokenizer, source.bos, source.eos)
    cuts: set[str] = set()
    documents = _documents(source, tokenizer, eos, cuts)
    if source.packing:
        found = pack_documents(documents, bos, source.length, source.samples, source.boundaries)
    else:
        found = pad_documents(documents, bos, source.length, source.samples)
    _check_amount(found, source)
    return replace(_counted(found, source, bos, eos), notes=source_notes(source, cuts)), found.sequences


def _documents(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, eos: int | None, cuts: set[str]
) -> Iterator[Iterator[Tokens]]:
    """Every document, piece by piece. Raises InputError once many were read of which nothing counts."""
    texts = read_documents(
        source.dataset,
        subset=source.subset,
        revision=source.revision,
        split=source.split,
        column=source.column,
        streaming=source.streaming,
    )
    targets = False
    for number, document in enumerate(shuffle(texts, source.seed) if source.shuffle else texts, start=1):
        if source.answers_only is True or (source.answers_only == "auto" and _is_chat(document, source, tokenizer)):
            pieces = list(_answers(document, source, tokenizer, eos, f"{source_name(source)}, document {number}"))
            targets |= any(any(counted) for _, counted in pieces)
            yield iter(pieces)
        else:
            targets = True
            joined = source.packing and not source.boundaries
            yield _all(document_tokens(document, tokenizer, source.chat_template, eos, joined, cuts))
        if number == PATIENCE and not targets:
            raise _nothing_counts(source, number)


def _is_chat(document: Document, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> bool:
    return not isinstance(document, str) and source.chat_template is not False and bool(tokenizer.chat_template)


def _all(pieces: Iterator[list[int]]) -> Iterator[Tokens]:
    return ((ids, [True] * len(ids)) for ids in pieces)


def _answers(
    document: Document, source: TextSource, tokenizer: PreTrainedTokenizerBase, eos: int | None, where: str
) -> Iterator[Tokens]:
    if isinstance(document, str):
        joined = source.packing and not source.boundaries
        pieces = document_tokens(document, tokenizer, source.chat_template, eos, joined)
        return ((ids, [False] * len(ids)) for ids in pieces)
    ended: list[Tokens] = [] if eos is None else [([eos], [False])]
    return chain([answer_tokens(document, tokenizer, where)], ended)


def _check_amount(found: PackedText, source: TextSource) -> None:
    got, wanted = len(found.sequences), source.samples
    if found.read == 0:
        raise InputError(f"text from {source_name(source)} is empty; give a file or data set with text")
    if found.dropped and not got:
        raise _nothing_counts(source, found.read)
    if got < wanted * (1 - SHORTFALL):
        more = f", and {found.dropped} more in which nothing counts" if found.dropped else ""
        raise InputError(
            f"text from {source_name(source)} gives {got} of {wanted} sequences of {source.length} tokens{more}; "
            "give more text, or lower samples or length"
        )


def _nothing_counts(source: TextSource, read: int) -> InputError:
    return InputError(
        f"none of {read} documents from {source_name(source)} has an answer of the assistant within {source.length} "
        f"tokens, or two tokens at all; give chats with answers, or set answers_only: false"
    )


def _counted(found: PackedText, source: TextSource, bos: int | None, eos: int | None) -> CalibrationTokens:
    return CalibrationTokens(
        sequences=found.sequences.ids,
        held_out=held_out_count(source.held_out, len(found.sequences)),
        source=source_name(source),
        requested=source.samples,
        bos=bos is not None,
        eos=eos is not None,
        packing=source.packing,
        documents=found.read,
        dropped=found.dropped,
        published=public_source(source),
    )


def _bytes(values: Tensor) -> bytes:
    return values.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
