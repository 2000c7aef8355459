"""The section `data:` of a distillation: its texts, and how they share its steps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from llmcompress.recipe.calibration import Calibration, Switch


class TextSource(Calibration):
    """One text that a distillation reads, as calibration reads it, and what of it counts.

    With `shuffle`, `samples` sequences are a random part of the data: the control for any cleverer choice.
    """

    packing: bool = True
    """True: documents are joined and cut into sequences. False: one document each, cut or padded to `length`."""
    boundaries: bool = False
    """Packed documents do not see each other: positions start again with each, and its first token is no target."""
    answers_only: Switch = "auto"
    """Of chats, only what the assistant says counts, with the token that ends it; auto: where a chat template renders
    them. True: text that is no chat does not count at all."""

    @model_validator(mode="after")
    def _countable(self) -> TextSource:
        if self.held_out == 0:
            raise ValueError("held_out is 0, so nothing could tell whether it helps; hold some sequences out")
        if self.samples < 2:
            raise ValueError("samples is 1, so none is left to hold out; ask for two or more")
        if self.dataset == "self" and (self.boundaries or self.answers_only is True):
            raise ValueError("dataset 'self' is read as one text; leave boundaries and answers_only out")
        if self.answers_only is True and self.chat_template is False:
            raise ValueError("answers_only needs the chat template to know answers; leave chat_template out")
        if self.boundaries and not self.packing:
            raise ValueError("boundaries: a sequence is one document anyway without packing; leave one of them out")
        return self


class Domain(TextSource):
    """One of several texts, by name."""

    name: str = Field(min_length=1, max_length=100)
    """Of the text, in reports."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Its share of what is read, relative to those of the others."""


def _texts(value: Any) -> Any:
    """One source, or domains, from a map or a list of maps. Raises ValueError (pydantic's kind is one)."""
    if isinstance(value, dict):
        if one := sorted({"name", "weight"} & value.keys()):
            raise ValueError(f"data is one text, which needs no {one[0]}; write it as a list, or leave that out")
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


Texts = Annotated[tuple[Domain, ...] | TextSource, BeforeValidator(_texts)]


class Mixture(BaseModel):
    """The shares of the domains in the steps of a distillation. A blockwise phase reads all of each domain."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    reweight: Literal["none", "ddk"] = Field(
        default="none", description="shares stay the domains' weights, or follow the student's gap to its teacher"
    )
    every: int = Field(default=50, ge=1, description="steps between new shares")
    sequences: int = Field(default=8, ge=1, description="of each domain's held-out ones, those that tell the gap")

    def due(self, step: int) -> bool:
        """True if shares are computed again before `step` (from 0)."""
        return self.reweight == "ddk" and step % self.every == 0
