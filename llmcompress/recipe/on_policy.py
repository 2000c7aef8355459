"""The section `on_policy:` of a distillation: sequences that the student goes on with itself."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class OnPolicy(BaseModel):
    """Sequences that the student goes on with itself, for the teacher to judge word by word."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    share: float = Field(default=0.5, gt=0, le=1, description="of the sequences of a step; the others are read as data")
    prompt: int = Field(
        default=32,
        ge=1,
        description="tokens of the data that it starts from; in chats, up to the answer if that is more",
    )
    every: int = Field(default=8, ge=1, description="steps between times of writing, for the sequences of all of them")
    temperature: float = Field(default=1.0, gt=0, le=10, description="that it samples with")

    def rows(self, batch: int) -> list[int]:
        """Return the places in a batch of the sequences that the student writes, spread evenly."""
        ends = [int((row + 1) * self.share + 1e-9) for row in range(batch)]
        return [row for row, (before, end) in enumerate(zip([0, *ends], ends)) if end > before]
