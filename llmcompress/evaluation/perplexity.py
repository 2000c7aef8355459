"""Perplexity: the exponential of the mean negative log-probability of the next token. And its calibration error.

The text is tokenized once, without special tokens, and cut into non-overlapping windows. Where the tokenizer puts BOS
before a text, every window begins with it. Each is read on its own; its first token is not predicted, so `windows *
(length - 1)` tokens count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.data.builtin import stdlib_text
from llmcompress.data.calibration import bos_token, document_tokens
from llmcompress.data.files import read_text
from llmcompress.data.packing import count_all, pack_documents
from llmcompress.data.text import TURN, Reading, read_documents
from llmcompress.errors import InputError, NumericsError, RecipeError
from llmcompress.evaluation.logits import Counting, Readable, window_logits
from llmcompress.evaluation.processes import ALONE, Processes
from llmcompress.evaluation.protocol import Protocol
from llmcompress.evaluation.uncertainty import mean, stderr
from llmcompress.models.dense.config import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

AT_ONCE = 1 << 20  # characters that are tokenized at once: the standard text in one piece
BINS = 15  # of equal width, for the calibration error
EVALUATED = "the evaluation text"
POSITIONS = 32  # with log-probabilities in memory at once: 32 * 49152 * 4 bytes = 6 MB, which caches hold


@dataclass(frozen=True)
class Perplexity:
    """value = exp(nll); nll in nats per token, the mean over `tokens` predicted tokens, and over `windows`."""

    value: float
    stderr: float | None  # of `value`, windows being independent; None for one window
    tokens: int
    nll: float
    windows: tuple[float, ...]  # the mean of each
    calibration_error: float  # of the same predictions

    @staticmethod
    def of(windows: Sequence[float], bins: Sequence[Tensor], tokens: int) -> Perplexity:
        """Return the perplexity from the mean negative log-probability of each window, and predictions in `bins`.

        Raises NumericsError if one is NaN or infinite.
        """
        if not all(map(math.isfinite, windows)):
            raise NumericsError("the model's log-probabilities on the evaluation text are NaN or infinite")
        nll, error = mean(windows), stderr(windows)
        value = math.exp(nll) if nll < 700 else math.inf
        spread = None if error is None else value * error
        return Perplexity(value, spread, tokens, nll, tuple(windows), calibration_error(bins))


def evaluation_windows(tokenizer: PreTrainedTokenizerBase, protocol: Protocol, *readers: PreTrainedConfig) -> Tensor:
    """Return the windows [n, length] of the protocol's text for models of these configs, see `text_windows`."""
    match protocol.text:
        case None:
            text = stdlib_text("test")
        case Path() if protocol.has_documents:
            return _document_windows(tokenizer, str(protocol.text), protocol.windows, protocol.length, *readers)
        case Path():
            text = read_text(protocol.text)
        case _:
            text = protocol.text
    source = str(protocol.text) if isinstance(protocol.text, Path) else EVALUATED
    return text_windows(tokenizer, text, protocol.windows, protocol.length, *readers, source=source)


def describe_protocol(tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> dict[str, Any]:
    """Return the entries of a protocol, and `bos` where every window begins with BOS."""
    return protocol.to_json() | ({} if bos_token(tokenizer) is None else {"bos": True})


def windows_by_text(
    tokenizer: PreTrainedTokenizerBase, protocol: Protocol, *readers: PreTrainedConfig
) -> dict[str | None, Tensor]:
    """Return the windows of every kind of text by its name, and first, under None, those of the protocol's text."""
    windows: dict[str | None, Tensor] = {None: evaluation_windows(tokenizer, protocol, *readers)}
    for name, domain in protocol.by_domain().items():
        windows[name] = evaluation_windows(tokenizer, domain, *readers)
    return windows


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    windows: int,
    length: int,
    *readers: PreTrainedConfig,
    source: str = EVALUATED,
) -> Tensor:
    """Return the first `windows` windows of `text`, int64 [at most windows, length], for models of configs `readers`.

    Each begins with BOS if the tokenizer puts it there. source: the name of the text in errors.
    Raises InputError when the text is too short for one window, RecipeError for a length that a model cannot read.
    """
    _check_windows(windows, length, readers)
    begin = [] if (bos := bos_token(tokenizer)) is None else [bos]
    size = length - len(begin)
    ids: list[int] = []
    for start in range(0, len(text), AT_ONCE):
        ids += tokenizer(text[start : start + AT_ONCE], add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= windows * size:
            break
    count = min(windows, len(ids) // size)
    if count == 0:
        raise InputError(
            f"{source} has {len(ids)} tokens, less than one window of {length}; give more text or a lower length"
        )
    rows = torch.tensor(ids[: count * size], dtype=torch.int64).reshape(count, size)
    return torch.cat([torch.tensor([begin], dtype=torch.int64).expand(count, -1), rows], 1)


def _document_windows(
    tokenizer: PreTrainedTokenizerBase, dataset: str, windows: int, length: int, *readers: PreTrainedConfig
) -> Tensor:
    """Do as `text_windows` for files of documents, which are joined as in calibration, without EOS."""
    _check_windows(windows, length, readers)
    reading, bos = Reading(), bos_token(tokenizer)
    documents = read_documents(dataset, in_turn=TURN, reading=reading)
    pieces = (document_tokens(each, tokenizer, "auto", None, True, reading.cuts) for each in documents)
    tokens = (count_all(_strip_bos(each, bos)) for each in pieces)
    rows = pack_documents(tokens, bos, length, windows).sequences.ids
    reading.log_notes(dataset)
    if not len(rows):
        raise InputError(f"{dataset} has less than one window of {length} tokens; give more text or a lower length")
    return rows


def _strip_bos(pieces: Iterable[list[int]], bos: int | None) -> Iterator[list[int]]:
    """Yield the pieces of a document without the BOS that a chat template writes first: it is no text to predict."""
    for number, ids in enumerate(pieces):
        yield ids[1:] if number == 0 and ids[:1] == [bos] else ids


def _check_windows(windows: int, length: int, readers: Sequence[PreTrainedConfig]) -> None:
    """Raise RecipeError for windows that hold no prediction, or that a model cannot read."""
    if windows < 1 or length < 2:
        raise RecipeError(f"perplexity needs at least one window of two tokens, not windows {windows}, length {length}")
    for context in map(context_length, readers):
        if context is not None and length > context:
            raise RecipeError(
                f"evaluation length {length} is more than the model's context of {context}; use at most that"
            )


def perplexity(
    model: Readable,
    ids: Tensor,
    batch_size: int = 1,
    processes: Processes = ALONE,
    progress: Counting | None = None,
    blocks: Counting | None = None,
) -> Perplexity:
    """Return the perplexity of `model`, in the dtype it has, on windows `ids` [n, length].

    Holds logits of `batch_size` windows. `progress` receives (windows read, windows) of this process's share; before,
    `blocks` receives (blocks, blocks in all) of a model that is read block by block.
    """
    scores: list[tuple[float, Tensor]] = []
    share = processes.share(ids)
    for batch, parts in window_logits(model, share, batch_size, blocks):
        sums = [(0.0, torch.zeros(3, BINS, dtype=torch.float64)) for _ in batch]
        for row, log_p, targets in chunks_of_parts(parts, batch):
            total, binned = sums[row]
            sums[row] = total + negative_log_likelihood(log_p, targets), binned + reliability(log_p, targets).cpu()
        scores += [(total / (batch.shape[1] - 1), binned) for total, binned in sums]
        if progress is not None:
            progress(len(scores), len(share))
    losses, bins = zip(*processes.gather_items(scores))
    return Perplexity.of(losses, bins, predicted_tokens(ids))


def predicted_tokens(ids: Tensor) -> int:
    """Return the number of tokens predicted in windows [n, length]."""
    return ids.shape[0] * (ids.shape[1] - 1)


def chunks_of_parts(parts: Iterable[Tensor], windows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (window, log-probabilities, next tokens) in chunks, from logits as `window_logits` yields them."""
    following = windows[:, 1:]
    for part in parts:
        targets, following = following[:, : part.shape[1]], following[:, part.shape[1] :]
        yield from _chunks_of_part(part, targets)
        del part  # before the next one is computed


def _chunks_of_part(part: Tensor, targets: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for number, (logits, following) in enumerate(zip(part, targets)):
        for chunk, wanted in zip(logits[: len(following)].split(POSITIONS), following.split(POSITIONS)):
            yield number, chunk.float().log_softmax(-1), wanted


def log_probability_chunks(logits: Tensor, window: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (log-probabilities, float32 [positions, vocabulary], next tokens [positions]) of a window, in chunks."""
    return ((chunk, targets) for _, chunk, targets in chunks_of_parts([logits[None]], window[None]))


def negative_log_likelihood(log_probabilities: Tensor, targets: Tensor) -> float:
    """Return the sum over positions in nats, added up in float64: [positions, vocabulary] float32, [positions]."""
    return -float(log_probabilities.gather(-1, targets[:, None]).double().sum())


def reliability(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Return predictions in bins of confidence, float64 [3, BINS]: tokens, hits, and the sum of their confidence.

    `log_probabilities`: float32 [positions, vocabulary]; `targets`: the next tokens, int64 [positions].
    """
    largest, likeliest = log_probabilities.max(-1)
    confidence = largest.double().exp().clamp(max=1)
    rows = torch.stack((torch.ones_like(confidence), (likeliest == targets).double(), confidence))
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # with its upper end, as in the paper
    return rows.new_zeros(3, BINS).index_add_(1, bins, rows)


def calibration_error(bins: Sequence[Tensor]) -> float:
    """Return the expected calibration error of binned predictions, of one token or more, between 0 and 1.

    Confidence is the probability of the likeliest next token. In each bin, its mean differs from the share of hits by
    some amount; the error is the mean of these amounts over all tokens (arXiv 1706.04599). It is zero if 70 % come true
    where the model says 70 %. Compression that leaves perplexity alone can still change it.
    """
    tokens, hits, confidence = torch.stack([each.cpu() for each in bins]).sum(0)
    return float((hits - confidence).abs().sum() / tokens.sum())
