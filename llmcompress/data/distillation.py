"""The data of a distillation: a `TextSource`, or several domains, become token sequences with their targets.

Beyond calibration data: of chats the answers alone count, documents in one sequence can be kept from seeing each other,
and short documents are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.data.batch import Batch
from llmcompress.data.calibration import (
    CalibrationTokens,
    calibration_tokens,
    check_amount,
    check_length,
    check_tokens,
    document_tokens,
    source_documents,
    source_name,
    special_tokens,
    tokens_of,
)
from llmcompress.data.chat import answer_tokens
from llmcompress.data.packing import Tokens, count_all, first_tokens, pack_documents
from llmcompress.data.schedule import normalize
from llmcompress.data.text import Reading
from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.calibration import Domain, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PATIENCE = 1000  # documents without any target before a source is given up

Load = Callable[[], "PreTrainedModel"]


@dataclass(frozen=True, eq=False)
class Data:
    """The sequences to train on and those held out.

    The parts of several domains lie one behind the other in `sequences`: `names`, `weights` and `sizes` are theirs.
    `report`: plain values; `hash`: SHA-256 of all sequences.
    """

    sequences: Batch
    held_out: tuple[Batch, ...]  # of each domain
    names: tuple[str, ...]
    weights: tuple[float, ...]
    sizes: tuple[int, ...]
    report: dict[str, Any]
    hash: str

    def first(self, count: int) -> Batch:
        """Return about `count` training sequences: the first of each domain, by its weight."""
        each = zip(accumulate(self.sizes), self.sizes, normalize(self.weights))
        places = [torch.arange(end - size, end)[: max(1, round(count * share))] for end, size, share in each]
        return self.sequences[torch.cat(places)]

    @property
    def notes(self) -> list[str]:
        """The notes in the reports on the texts: lines that were cut, rows that were left out."""
        return [
            note for text in self.report.get("domains", {"": self.report}).values() for note in text.get("notes", ())
        ]


def read_data(
    texts: TextSource | Sequence[Domain], tokenizer: PreTrainedTokenizerBase, load: Load, config: PreTrainedConfig
) -> Data:
    """Return the sequences of `texts`; the same every time. `load` opens the dense model for text that it writes.

    Raises InputError for text that cannot serve, RecipeError for a request beyond the tokenizer or the model (of
    `config`).
    """
    domains = () if isinstance(texts, TextSource) else tuple(texts)
    names = tuple(domain.name for domain in domains) or ("text",)
    sources = [texts] if isinstance(texts, TextSource) else domains
    read = [_sequences(source, tokenizer, load, config) for source in sources]
    parts = [sequences for sequences, _, _ in read]
    firsts = [len(sequences) - held_out for sequences, held_out, _ in read]
    reports = {name: report for name, (*_, report) in zip(names, read, strict=True)}
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


def _bytes(values: Tensor) -> bytes:
    return values.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()


def _sequences(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, load: Load, config: PreTrainedConfig
) -> tuple[Batch, int, dict[str, Any]]:
    """Return all sequences of one text, the number of held-out ones at their end, and the report on them."""
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
    bos, eos = special_tokens(tokenizer, source.bos, source.eos)
    reading = Reading()
    documents = _documents(source, tokenizer, eos, reading)
    if source.packing:
        packed = pack_documents(documents, bos, source.length, source.samples, source.boundaries)
    else:
        packed = first_tokens(documents, bos, source.length, source.samples, padded=True)
    if packed.dropped and not len(packed.sequences):
        raise _no_targets(source, packed.read)
    tokens = tokens_of(packed, source, bos, eos, reading)
    check_amount(tokens, source)
    return tokens, packed.sequences


def _documents(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, eos: int | None, reading: Reading
) -> Iterator[Iterator[Tokens]]:
    """Yield every document, piece by piece. Raises InputError once PATIENCE documents had no target."""
    joined, has_targets = source.packing and not source.boundaries, False
    templated = source.chat_template is not False and bool(tokenizer.chat_template)
    for number, document in enumerate(source_documents(source, reading), start=1):
        is_chat = not isinstance(document, str)
        answers_only = (is_chat and templated) if source.answers_only == "auto" else source.answers_only
        if answers_only and not isinstance(document, str):
            answers = answer_tokens(document, tokenizer, f"{source_name(source)}, document {number}")
            has_targets |= any(answers[1])
            yield iter([answers] if eos is None else [answers, ([eos], [False])])
        else:
            tokens = document_tokens(document, tokenizer, source.chat_template, eos, joined, reading.cuts)
            pieces = count_all(tokens)
            has_targets |= not answers_only
            yield ((ids, [False] * len(ids)) for ids, _ in pieces) if answers_only else pieces
        if number == PATIENCE and not has_targets:
            raise _no_targets(source, number)


def _no_targets(source: TextSource, read: int) -> InputError:
    return InputError(
        f"none of {read} documents from {source_name(source)} has an answer of the assistant within {source.length} "
        f"tokens, or two tokens at all; give chats with answers, or set answers_only: false"
    )
