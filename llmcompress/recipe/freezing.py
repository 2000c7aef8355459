"""The section `freezing:` of a distillation: codes that oscillate."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Freezing(BaseModel):
    """The frequency above which codes that oscillate are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    momentum: float = Field(default=0.01, gt=0, lt=1, description="of the moving averages: what the last step counts")
    threshold: float = Field(default=0.04, gt=0, le=1, description="frequency above which a code is frozen, at first")
    final_threshold: float = Field(default=0.011, gt=0, le=1, description="and at the last step, after half a cosine")

    @model_validator(mode="after")
    def _consistent(self) -> Freezing:
        if self.final_threshold > self.threshold:
            raise ValueError(
                f"final_threshold {self.final_threshold:g} is above threshold {self.threshold:g}, which falls to it; "
                f"lower it"
            )
        return self

    def threshold_at(self, done: float) -> float:
        """Return the threshold when a share `done` of the steps, 0 to 1, is done."""
        return self.final_threshold + (self.threshold - self.final_threshold) * (1 + math.cos(math.pi * done)) / 2
