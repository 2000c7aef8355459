"""The section `fuse:` of a recipe: changes to the dense model before it is compressed.

fuse: {rotation: true, untie: true, awq: true}
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Fuse(BaseModel):
    """At least one of `rotation` and `awq`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rotation: bool = Field(False, description="turn the residual stream into a random basis (QuaRot)")
    untie: bool = Field(False, description="for rotation: give a head that is the token table a matrix of its own")
    awq: bool = Field(False, description="scale input channels before they are rounded (AWQ)")

    @model_validator(mode="after")
    def _some(self) -> Fuse:
        if not (self.rotation or self.awq):
            raise ValueError("it says nothing to fuse; set rotation: true or awq: true, or leave fuse: out")
        if self.untie and not self.rotation:
            raise ValueError("untie: only rotation: true needs a head of its own; leave untie: out")
        return self
