"""The sections `data:` and `mixture:` of a distillation: its texts, and how they share its steps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from llmcompress.recipe.calibration import Calibration, Switch


class TextSource(Calibration):
    """A text that a distillation reads as calibration does, and which of its tokens count.

    With `shuffle`, the `samples` sequences are a random part of the data.
    """

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


class Mixture(BaseModel):
    """The shares of several texts in the steps of a distillation. A blockwise phase reads all of every text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reweight: Literal["none", "ddk"] = Field(
        default="none",
        description="none: shares are the weights in data; ddk: they follow the student's gap to its teacher",
    )
    every: int = Field(default=50, ge=1, description="steps between new shares")
    sequences: int = Field(default=8, ge=1, description="held-out sequences of each text on which the gap is measured")

    def due(self, step: int) -> bool:
        """True if shares are computed again before `step` (from 0)."""
        return self.reweight == "ddk" and step % self.every == 0
