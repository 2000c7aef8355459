"""The section `calibration:` of a recipe: the text that statistics come from, and the weights of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from llmcompress.recipe.user_file import is_regular

FILE_KINDS = (".txt", ".jsonl", ".parquet")


def is_file(dataset: str) -> bool:
    """True when `dataset` names a local file rather than a data set."""
    return Path(dataset).suffix.lower() in FILE_KINDS or is_regular(dataset)


OFFLINE = ("builtin", "stdlib", "self")  # what needs neither a file nor the Hub
Switch = Literal["auto"] | bool


class Calibration(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """The text that calibration runs on. Every field that says "auto" is resolved and reported."""

    dataset: str = Field(default="stdlib", min_length=1)
    """A name for `datasets`, a local .txt/.jsonl/.parquet file, "builtin" (text of many kinds that comes with this
    package, and documentation), "stdlib" (documentation that Python ships), or "self" (the dense model writes it)."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Of a local file's content: another content is refused. Recipes in outputs have it, and the file's name without
    its folder."""
    subset: str | None = None
    """The configuration of a data set that has several ("wikitext-2-raw-v1")."""
    revision: str | None = None
    """Commit, tag or branch of a data set."""
    split: str | None = None
    """"train" when not given."""
    column: str | None = None
    """The column with text or messages; not given: `messages`, else `text`, else the only column of strings."""
    streaming: bool = True
    """Fetch only the rows that are needed; false downloads the data set first, and uses its cache when offline."""
    samples: int = Field(default=128, ge=1, le=1_000_000)
    """Sequences, the held-out ones included."""
    length: int = Field(default=1024, ge=2, le=1_048_576)
    """Tokens per sequence."""
    packing: bool = True
    """True: documents are joined and cut into sequences. False: one document per sequence, short ones are dropped."""
    bos: Switch = "auto"
    """Every sequence starts with the BOS token; auto: when the tokenizer itself puts it."""
    eos: Switch = "auto"
    """Every document ends with the EOS token; auto: when the tokenizer itself puts it. Without it, a blank line
    stands between packed texts."""
    chat_template: Switch = "auto"
    """Messages are rendered with the tokenizer's chat template; auto: when it has one. With "self": the model answers
    prompts; auto: in every other sequence when it has a template, the rest is free text."""
    held_out: float = Field(default=0.125, ge=0, allow_inf_nan=False)
    """Below 1: the share of the sequences that is held out (at least one when there are two). From 1: their number."""
    shuffle: bool = True
    """Documents in random order."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order of documents, and of the text that "self" writes."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Of the text that "self" writes."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of the text that "self" writes."""

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
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
        return self


class TokenWeights(BaseModel, extra="forbid", frozen=True):
    """The weight of each calibration token: of a block's inputs or, by gradient, of each linear's.

    By attention and norm they go from `minimum` to 1, linear over each sequence. Where sinks receive a hundred times as
    much as others, these count about alike, and the sinks 1. By gradient they go from `minimum` to about 30, and are
    about 1 on average.
    """

    by: Literal["attention", "norm", "gradient"] = Field(
        description="the attention a token receives, its hidden state's norm, or the squared gradient that the model's "
        "predictions have by the outputs of a linear there, from one backward pass of the dense model"
    )
    minimum: float = Field(default=0.01, gt=0, le=1, description="what the least token of a sequence counts")
    rows: bool = Field(
        default=False,
        description="by gradient: rows count by theirs too, where a method chooses for a whole column",
    )

    @model_validator(mode="after")
    def _consistent(self) -> TokenWeights:
        if self.rows and self.by != "gradient":
            raise ValueError(f"rows: they count by their gradient, and by is {self.by!r}; set by: gradient")
        return self
