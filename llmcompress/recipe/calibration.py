"""The sections on text: `calibration:`, and of a distillation `data:` and `mixture:`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, model_validator

from llmcompress.recipe.text_files import is_file, join_names

RANDOM = "random"
OFFLINE = ("builtin", "stdlib", "self", RANDOM)  # need neither a file nor the Hub
Switch = Literal["auto"] | bool
TRIAL = {"samples": 5, "length": 256, "held_out": 1}  # most of a text that is read to see that all works


def shorten_text(text: Any, samples: int = TRIAL["samples"]) -> Any:
    """Return a text as a trial reads it, from a map or a section; what is neither comes back as it is.

    `samples`: the most sequences.
    """
    if isinstance(text, Calibration):
        return text.model_copy(
            update=shorten_text({"dataset": text.dataset, "samples": text.samples, "length": text.length})
        )
    if isinstance(text, list | tuple):
        return [shorten_text(each, samples) for each in text]
    if not isinstance(text, dict):
        return text
    given = {key: text[key] for key in ("samples", "length") if key in text}
    trial = TRIAL | {"samples": samples} | ({"held_out": 0} if text.get("dataset") == RANDOM else {})
    return text | trial | {key: min(n, trial[key]) if isinstance(n, int) else n for key, n in given.items()}


class Calibration(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """The text that calibration runs on. Values that are "auto" are resolved, and reports say to what."""

    dataset: Annotated[str, BeforeValidator(join_names, json_schema_input_type=str | list[str])] = Field(
        default="builtin", min_length=1
    )
    """Files of text (.txt, .jsonl, .json, .csv, .tsv, .parquet, .arrow; packed as .gz or .zst): one, a pattern such as
    data/*.jsonl, or a list; a data set of the Hub, or its folder; or one of four names. builtin: text of many kinds
    that comes with llmcompress, and documentation; stdlib: Python's documentation; self: text by the dense model;
    random: tokens drawn from the vocabulary, which steps are fitted to and nothing is judged by."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the content of files, one behind the other; files with another content are refused. Recipes in outputs
    have it, with the files' names but not their folders."""
    subset: str | None = None
    """Configuration of a data set that has several, such as wikitext-2-raw-v1."""
    revision: str | None = None
    """Commit, tag or branch of a data set."""
    split: str | None = None
    """Split of a data set; null: train."""
    column: str | tuple[str, str] | None = None
    """Column with text or messages, or two, with prompts and with answers; null: known by its name, or the only column
    of strings."""
    streaming: bool = True
    """Fetch only the rows that are needed. False: download the data set first, and use its cache when offline."""
    samples: int = Field(default=128, ge=1, le=1_000_000)
    """Number of sequences, including those held out."""
    length: int = Field(default=1024, ge=2, le=1_048_576)
    """Tokens in a sequence."""
    packing: bool = True
    """True: join documents and cut them into sequences. False: one document per sequence; short ones are dropped."""
    bos: Switch = "auto"
    """Start every sequence with the BOS token; auto: if the tokenizer does."""
    eos: Switch = "auto"
    """End every document with the EOS token; auto: if the tokenizer does. Without it, packed documents are separated by
    a blank line."""
    chat_template: Switch = "auto"
    """Render messages with the tokenizer's chat template; auto: if it has one. For dataset self: the model answers
    prompts; auto: in every other sequence if it has a template, and the rest is free text."""
    held_out: float = Field(default=0.125, ge=0, allow_inf_nan=False)
    """Sequences to hold out: a number, or a share below 1 (at least one if there are two)."""
    shuffle: bool = True
    """Read documents in random order, those of several files in turn. 4,096 documents are in memory to draw from, so a
    long file is read from its start."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Random seed for the order of documents, for the text of dataset self, and for the tokens of dataset random."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Sampling temperature for the text of dataset self."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Mass of the likeliest tokens to sample from, for the text of dataset self."""

    @model_validator(mode="after")
    def _check_source(self) -> Calibration:
        if self.held_out >= 1 and self.held_out != int(self.held_out):
            raise ValueError(f"held_out {self.held_out} is neither a share below 1 nor a whole number of sequences")
        if self.held_out >= self.samples and self.held_out >= 1:
            raise ValueError(f"held_out {int(self.held_out)} leaves none of the {self.samples} samples to fit on")
        local = self.dataset in OFFLINE or is_file(self.dataset)
        given = [name for name in ("subset", "revision") if local and getattr(self, name) is not None]
        if self.split is not None and local and self.dataset != "stdlib":
            given.append("split")
        if self.column is not None and self.dataset in OFFLINE:
            given.append("column")
        if self.sha256 is not None and not is_file(self.dataset):
            given.append("sha256")
        if given:
            raise ValueError(f"{' and '.join(given)} cannot be chosen for dataset {self.dataset!r}; leave it out")
        if self.dataset == "self" and not self.packing:
            raise ValueError("the text of dataset 'self' is always packed; leave packing true")
        if self.dataset == RANDOM and self.held_out:
            raise ValueError("nothing can be judged by random tokens; set held_out: 0, or choose another dataset")
        return self


class TokenWeights(BaseModel, extra="forbid", frozen=True):
    """The weight of each calibration token, for the inputs of a block or, by gradient, of each linear layer.

    By attention and norm, weights go from `minimum` to 1, linear over each sequence. Where attention sinks receive a
    hundred times as much as other tokens, they count 1, and the others about alike. By gradient, weights go from
    `minimum` to about 30, and are about 1 on average.
    """

    by: Literal["attention", "norm", "gradient"] = Field(
        description="what decides: the attention that a token receives, the norm of its hidden state, or the squared "
        "gradient of the predictions by the outputs of a linear layer, from one backward pass of the dense model"
    )
    minimum: float = Field(default=0.01, gt=0, le=1, description="weight of the least token of a sequence")
    rows: bool = Field(
        default=False,
        description="weight rows by their gradient, where a method decides for a whole column: that of all tokens with "
        "by: gradient, of 8 x 512 tokens without",
    )


class TextSource(Calibration):
    """A text that a distillation reads as calibration does, and which of its tokens count."""

    packing: bool = True
    """True: join documents and cut them into sequences. False: one document per sequence, cut or padded to `length`."""
    boundaries: bool = False
    """Keep packed documents apart: positions start again with each, attention stays inside it, and its first token is
    no target."""
    answers_only: Switch = "auto"
    """In chats, count only the assistant's answers, with the token that ends them; auto: where a chat template renders
    chats. True: text that is not a chat does not count at all."""

    @model_validator(mode="after")
    def _check_training_text(self) -> TextSource:
        if self.held_out == 0:
            raise ValueError("held_out is 0, so nothing can tell whether training helps; hold some sequences out")
        if self.samples < 2:
            raise ValueError("samples is 1, so none is left to hold out; use two or more")
        if self.dataset == "self" and (self.boundaries or self.answers_only is True):
            raise ValueError("dataset 'self' is read as one text; leave boundaries and answers_only out")
        if self.answers_only is True and self.chat_template is False:
            raise ValueError("answers_only needs the chat template to know answers; leave chat_template out")
        if self.boundaries and not self.packing:
            raise ValueError("boundaries: without packing, every sequence is one document; leave one of them out")
        return self


class Domain(TextSource):
    """One of several texts."""

    name: str = Field(min_length=1, max_length=100)
    """Name of the text in reports."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Share of this text in all that is read, relative to the other texts."""


def _read_texts(value: Any) -> Any:
    """Return one source from a map, or domains from a list of maps. Raises ValueError (pydantic's error is one)."""
    if isinstance(value, dict):
        if keys := sorted({"name", "weight"} & value.keys()):
            raise ValueError(f"data is one text, which needs no {keys[0]}; write it as a list, or leave that out")
        return TextSource.model_validate(value)
    if isinstance(value, list | tuple):
        if not value or not all(isinstance(each, dict | Domain) for each in value):
            raise ValueError("data is a map, or a list of domains such as {name: code, dataset: code.jsonl}")
        domains = TypeAdapter(tuple[Domain, ...]).validate_python(value)
        names = [domain.name for domain in domains]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data has the domain {twice[0]!r} twice; give each a name of its own")
        return domains
    return value


Texts = Annotated[tuple[Domain, ...] | TextSource, BeforeValidator(_read_texts)]


class Mixture(BaseModel, extra="forbid", frozen=True):
    """The shares of several texts in the steps of a distillation. A blockwise phase reads all of every text."""

    reweight: Literal["none", "ddk"] = Field(
        default="none",
        description="none: shares are the weights in data; ddk: they follow the student's gap to its teacher",
    )
    every: int = Field(default=50, ge=1, description="steps between new shares")
    sequences: int = Field(default=8, ge=1, description="held-out sequences of each text on which the gap is measured")

    def due(self, step: int) -> bool:
        """True if shares are computed again before `step` (from 0)."""
        return self.reweight == "ddk" and step % self.every == 0
