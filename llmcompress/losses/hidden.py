"""Hidden states, relative to the teacher's size (after LAPTOP-Diff, arXiv 2404.11098): |S - T|^2 / |T|^2.

Without the denominator a few layers with huge norms are the whole loss. It is the teacher's alone, so the student
cannot lower the loss by growing; states scaled together give the same loss. Differs from the paper, which divides
whole layers: `per` token by default, because the first token's norm is often a hundred times that of the others.
"""

from typing import Literal

from pydantic import Field

from llmcompress.errors import InputError
from llmcompress.losses.divergence import wide
from llmcompress.losses.loss import Features, LossConfig, SumAndCount, feature_loss


class HiddenStates(LossConfig):
    """Arguments of `hidden`."""

    loss: Literal["hidden"] = "hidden"
    per: Literal["token", "layer"] = Field("token", description="unit over which the teacher's size is taken")
    examples = ({}, {"per": "layer"})

    @property
    def counts_tokens(self) -> bool:
        """True per token; per layer, the count is the teacher's energy."""
        return self.per == "token"

    @property
    def needs_one_width(self) -> bool:
        """See `LossConfig.needs_one_width`."""
        return True


@feature_loss("hidden", HiddenStates)
def relative_error(features: Features, config: HiddenStates) -> SumAndCount:
    """The relative errors of tokens and their number; per layer, the squared error and the teacher's energy.

    A token whose teacher state is zero has no error per token. Raises InputError for different widths.
    """
    student, teacher = wide(features.student), wide(features.teacher.detach())
    if student.shape != teacher.shape:
        raise InputError(
            f"hidden states {tuple(student.shape)} cannot be compared with the teacher's {tuple(teacher.shape)}; "
            "use the loss minilm, which needs no common width"
        )
    if features.keep is not None:
        student, teacher = student[features.keep], teacher[features.keep]
    error, energy = (student - teacher).square().sum(-1).flatten(), teacher.square().sum(-1).flatten()
    if config.per == "layer":
        return error.sum(), energy.sum()
    compared = energy > 0
    return (error / energy.where(compared, 1)).where(compared, 0).sum(), error.new_tensor(len(error))
