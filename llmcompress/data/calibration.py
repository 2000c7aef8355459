"""Calibration data: a `Calibration` becomes token sequences of one length, the last of them held out.

Statistics never see held-out sequences; errors are reported on them. Special tokens are put in here, not by the
tokenizer, so that the report knows them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.data import chat
from llmcompress.data.builtin import stdlib_source
from llmcompress.data.columns import Document
from llmcompress.data.generate import TextSampling, teacher_sequences
from llmcompress.data.packing import PackedText, count_all, first_tokens, pack_documents
from llmcompress.data.text import TURN, Reading, read_documents, shuffle
from llmcompress.errors import InputError, RecipeError
from llmcompress.models.dense.config import context_length
from llmcompress.recipe.calibration import OFFLINE, RANDOM, Calibration, Switch
from llmcompress.recipe.text_files import files_sha256, hide_folder, is_file, list_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PIECE = 200_000  # characters of one document tokenized at a time; up to twice as many where no line ends
LONG_LINE = f"a line of more than {PIECE:,} characters was tokenized in pieces of that length, between words"
SHORTFALL = 0.1  # the share of the asked-for sequences that may be missing
Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """Token sequences and their origin.

    sequences: int64 [n, length], the last `held_out` of them held out; requested: the number in the recipe; documents:
    the number read for them; dropped: those left out as too short; published: `source` without folders of this machine;
    read_as: the columns that the text is in.
    """

    sequences: Tensor
    held_out: int
    source: str
    requested: int
    bos: bool = False
    eos: bool = False
    packing: bool = True
    documents: int = 0
    dropped: int = 0
    notes: tuple[str, ...] = ()  # for the report
    published: str | None = None
    read_as: str | None = None

    def held_out_windows(self, length: int) -> Tensor:
        """Return the held-out sequences cut into windows, int64 [sequences, parts, at most `length`].

        Where a sequence begins with BOS, every window does: some models read nothing without it.
        """
        sequences = self.sequences[self.obtained - self.held_out :]
        length = min(length, self.length)
        begins = sequences[:, :1] if self.bos else sequences[:, :0]
        text = sequences[:, begins.shape[1] :]
        size = length - begins.shape[1]
        parts = text[:, : text.shape[1] // size * size].unfold(1, size, size)
        return torch.cat([begins[:, None].expand(-1, parts.shape[1], -1), parts], 2)

    @property
    def obtained(self) -> int:
        """Number of sequences."""
        return self.sequences.shape[0]

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.sequences.shape[1]

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences, the held-out ones included."""
        return self.sequences.numel()

    @property
    def hash(self) -> str:
        """SHA-256 of the tokens as little-endian 64-bit integers, row by row."""
        return hashlib.sha256(self.sequences.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def report(self) -> dict[str, Any]:
        """Return the report's entry on calibration: plain values only."""
        return {
            "source": self.published or self.source,
            "tokens": self.tokens,
            "hash": self.hash,
            "sequences": self.obtained,
            "requested": self.requested,
            "held_out": self.held_out,
            "length": self.length,
            "bos": self.bos,
            "eos": self.eos,
            "packing": self.packing,
            "documents": self.documents,
            "dropped": self.dropped,
        } | {name: value for name, value in (("read_as", self.read_as), ("notes", list(self.notes))) if value}


def calibration_tokens(
    config: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | Callable[[], PreTrainedModel] | None = None,
    model_config: PreTrainedConfig | None = None,
    progress: Progress | None = None,
) -> CalibrationTokens:
    """Return the token sequences of `config`; the same ones every time.

    Only dataset "self" needs `model`, or a function that loads it. Tokens are checked against the vocabulary and the
    context of `model_config`.

    Raises InputError for text that cannot be read, is too short, repeats one token or leaves the vocabulary, and
    RecipeError for an impossible request to the tokenizer.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        model_config = model.config
    check_length(config.length, model_config)
    if config.dataset == "self":
        tokens = _teacher_tokens(config, tokenizer, model, progress)
    elif config.dataset == RANDOM:
        tokens = _random_tokens(config, tokenizer, model_config)
    else:
        tokens = _read(config, tokenizer)
    check_amount(tokens, config)
    check_tokens(tokens.sequences, tokens.source, model_config)
    return tokens


def held_out_count(held_out: float, sequences: int) -> int:
    """Return the number of held-out sequences: a share below 1 (at least one of two or more) or a number, never all."""
    if held_out >= 1:
        return min(int(held_out), sequences - 1)
    return min(max(1, round(held_out * sequences)), sequences - 1) if held_out > 0 else 0


def check_tokens(sequences: Tensor, source: str, model_config: PreTrainedConfig | None = None) -> None:
    """Raise InputError unless the tokens [n, length] vary and lie in the vocabulary of `model_config`."""
    lowest, highest = int(sequences.min()), int(sequences.max())
    if lowest == highest:
        raise InputError(f"text from {source} is one token ({lowest}) repeated; use ordinary text")
    size = getattr(model_config.get_text_config(), "vocab_size", None) if model_config is not None else None
    if lowest < 0 or (size is not None and highest >= size):
        wrong = lowest if lowest < 0 else highest
        raise InputError(
            f"text from {source} has token {wrong}, outside the model's vocabulary of {size}; use the model's own "
            "tokenizer"
        )


def check_length(length: int, model_config: PreTrainedConfig | None) -> None:
    """Raise RecipeError for sequences longer than the model's context."""
    context = context_length(model_config)
    if context is not None and length > context:
        raise RecipeError(
            f"calibration length {length} is more than the model's context of {context}; use at most that"
        )


def check_amount(tokens: CalibrationTokens, config: Calibration) -> None:
    """Raise InputError for text that gives no sequence, or far fewer than `config.samples`."""
    if tokens.documents == 0:
        raise InputError(f"text from {tokens.source} is empty; give a file or data set with text")
    if tokens.obtained < config.samples * (1 - SHORTFALL):
        more = f"; {tokens.dropped} more were too short or had nothing to predict" if tokens.dropped else ""
        raise InputError(
            f"text from {tokens.source} gives {tokens.obtained} of {config.samples} sequences of {config.length} "
            f"tokens{more}; give more text, or lower samples or length"
        )


def _read(config: Calibration, tokenizer: PreTrainedTokenizerBase) -> CalibrationTokens:
    bos, eos = special_tokens(tokenizer, config.bos, config.eos)
    reading = Reading()
    documents = (
        count_all(document_tokens(document, tokenizer, config.chat_template, eos, config.packing, reading.cuts))
        for document in source_documents(config, reading)
    )
    if config.packing:
        packed = pack_documents(documents, bos, config.length, config.samples)
    else:
        packed = first_tokens(documents, bos, config.length, config.samples)
    return tokens_of(packed, config, bos, eos, reading)


def source_documents(config: Calibration, reading: Reading) -> Iterable[Document]:
    """Yield the documents of a text, in the order of its seed; `reading` counts its rows.

    Raises InputError for files that are not those whose digest the recipe has, and as `read_documents` does.
    """
    files = list_files(config.dataset) if config.sha256 is not None else []
    if files and all(path.is_file() for path in files) and files_sha256(files) != config.sha256:
        raise InputError(
            f"{config.dataset} is not the text of the recipe, whose sha256 differs; give that file, or leave sha256 out"
        )
    documents = read_documents(
        config.dataset,
        subset=config.subset,
        revision=config.revision,
        split=config.split,
        column=config.column,
        streaming=config.streaming,
        in_turn=TURN if config.shuffle else 0,
        reading=reading,
    )
    return shuffle(documents, config.seed) if config.shuffle else documents


def tokens_of(
    packed: PackedText, config: Calibration, bos: int | None, eos: int | None, reading: Reading
) -> CalibrationTokens:
    """Return packed text with its entries for the report; `reading`: what was understood of it."""
    published = source_name(config.model_copy(update={"dataset": hide_folder(config.dataset)}))
    return CalibrationTokens(
        sequences=packed.sequences.ids,
        held_out=held_out_count(config.held_out, len(packed.sequences)),
        source=source_name(config),
        requested=config.samples,
        bos=bos is not None,
        eos=eos is not None,
        packing=config.packing,
        documents=packed.read,
        dropped=packed.dropped,
        notes=tuple(reading.notes(published)),
        published=published,
        read_as=next(iter(reading.kinds), None) if config.dataset not in OFFLINE else None,
    )


def source_name(config: Calibration) -> str:
    """Return the origin of a text for reports and errors."""
    if config.dataset == "builtin":
        return f"builtin (texts of llmcompress, and {stdlib_source()})"
    if config.dataset == "stdlib":
        return f"{stdlib_source()}, split {config.split or 'train'}"
    if is_file(config.dataset):
        return config.dataset
    subset = f", subset {config.subset}" if config.subset else ""
    return f"{config.dataset}@{config.revision or 'main'}{subset}, split {config.split or 'train'}"


def bos_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS token if the tokenizer puts it before every text, else None."""
    return special_tokens(tokenizer, "auto", False)[0]


def special_tokens(tokenizer: PreTrainedTokenizerBase, bos: Switch, eos: Switch) -> tuple[int | None, int | None]:
    """Return the BOS and EOS tokens to put in, None for none; "auto" does as the tokenizer does by itself."""
    full = tokenizer("a").input_ids
    if bos == "auto":
        bos = tokenizer.bos_token_id is not None and full[0] == tokenizer.bos_token_id
    if eos == "auto":
        eos = tokenizer.eos_token_id is not None and full[-1] == tokenizer.eos_token_id
    for name, wanted, token in (("bos", bos, tokenizer.bos_token_id), ("eos", eos, tokenizer.eos_token_id)):
        if wanted and token is None:
            raise RecipeError(
                f"calibration.{name} is true, but the tokenizer has no {name.upper()} token; set it to false"
            )
    return (tokenizer.bos_token_id if bos else None), (tokenizer.eos_token_id if eos else None)


def document_tokens(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: Switch,
    eos: int | None,
    joined: bool,
    cuts: set[str],
) -> Iterator[list[int]]:
    """Yield the tokens of one document piece by piece, its end included; `cuts` receives a note for a line that is cut.

    `joined`: True if another document follows in the same sequence.
    """
    templated = not isinstance(document, str) and chat_template is not False and bool(tokenizer.chat_template)
    if chat_template is True and not tokenizer.chat_template:
        raise RecipeError("calibration.chat_template is true, but the tokenizer has no chat template; set it to false")
    if isinstance(document, str):
        text = document
    elif templated:
        text = chat.render_chat(document, tokenizer)
    else:
        text = "\n\n".join(message["content"] for message in document)
    done = 0
    for piece in pieces(text):
        done += len(piece)
        if done < len(text) and not piece.endswith("\n"):
            cuts.add(LONG_LINE)
        yield tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
    if eos is not None:
        yield [eos]
    elif joined and not templated:  # a chat template ends its turns itself
        yield tokenizer("\n\n", add_special_tokens=False).input_ids


def pieces(text: str) -> Iterator[str]:
    """Yield a long text cut at ends of lines, so that a large file is tokenized only as far as it is needed.

    A line that goes on for another PIECE is cut in front of a space, or anywhere if it has none.
    """
    start = 0
    while start < len(text):
        soon, late = start + PIECE, start + 2 * PIECE
        end = text.find("\n", soon, late) + 1
        if not end:
            end = len(text) if late >= len(text) else max(text.rfind(" ", soon, late), 0) or late
        yield text[start:end]
        start = end


def _random_tokens(
    config: Calibration, tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig | None
) -> CalibrationTokens:
    """Return tokens drawn alike from all that stand for text, in place of any text."""
    bos, _ = special_tokens(tokenizer, config.bos, config.eos)
    size = len(tokenizer) if model_config is None else min(len(tokenizer), model_config.get_text_config().vocab_size)
    ordinary = torch.tensor(sorted(set(range(size)) - chat.special_tokens(tokenizer).keys()))
    generator = torch.Generator().manual_seed(config.seed)
    sequences = ordinary[torch.randint(len(ordinary), (config.samples, config.length), generator=generator)]
    if bos is not None:
        sequences[:, 0] = bos
    source = f"{RANDOM} tokens (seed {config.seed})"
    return CalibrationTokens(sequences, 0, source, config.samples, bos=bos is not None, documents=config.samples)


def _teacher_tokens(
    config: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | Callable[[], PreTrainedModel] | None,
    progress: Progress | None,
) -> CalibrationTokens:
    """Return text that the dense model writes."""
    if model is None:
        raise RecipeError("calibration.dataset 'self' needs the dense model to write text; pass it as `model`")
    from transformers import PreTrainedModel

    teacher = model if isinstance(model, PreTrainedModel) else model()
    sampling = TextSampling(config.samples, config.length, config.seed, config.temperature, config.top_p)
    wrote = teacher_sequences(teacher, tokenizer, sampling, config.chat_template, progress)
    return CalibrationTokens(
        sequences=wrote.sequences,
        held_out=held_out_count(config.held_out, config.samples),
        source=f"self ({wrote.kind}, temperature {config.temperature:g}, top_p {config.top_p:g}, seed {config.seed})",
        requested=config.samples,
        bos=wrote.bos,
        eos=wrote.eos,
        documents=wrote.documents,
    )
