"""GPTQ (arXiv 2210.17323) onto the types of llama.cpp's GGUF files, so that the export keeps every value.

Minimises tr(E H E^T) greedily, as `gptq` does, but the grid of a group is one that a GGUF type has: integers that reach
one further on one side, scales that are small multiples of a number of their superblock, offsets beside them, or the 16
numbers of the IQ4 types. llama.cpp's own quantizer rounds each weight for itself.

Stores a Grid; Q4_1, Q5_1, Q2_K, Q4_K and Q5_K a low-rank term before it, whose right factor says which columns are in
which group: the offsets. Scales are stored as float16 numbers and the numbers of IQ4 types as integers of 8 bits, so a
checkpoint can be larger than the GGUF file it becomes. The K types and IQ4_XS have superblocks of 256 columns; where
these do not fill a matrix, the type is used that llama.cpp's quantizer takes instead; the export counts the types.
"""

from typing import Literal

from pydantic import Field

from llmcompress.methods.layer import Layer, StepConfig, base_and_term, base_target, join, method, with_base
from llmcompress.methods.solvers.block_formats import SUPERBLOCK, BlockForm, InBlocks, in_blocks_sketch
from llmcompress.methods.solvers.feedback import feedback
from llmcompress.methods.solvers.hessian import channel_energy, feedback_factor
from llmcompress.weight.nodes import Weight, shape

Type = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FORMS: dict[Type, BlockForm] = {
    "Q4_0": BlockForm(tuple(range(-8, 8)), 32),
    "Q4_1": BlockForm(tuple(range(16)), 32, offsets=0),
    "Q5_0": BlockForm(tuple(range(-16, 16)), 32),
    "Q5_1": BlockForm(tuple(range(32)), 32, offsets=0),
    "Q8_0": BlockForm(tuple(range(-128, 128)), 32),
    "IQ4_NL": BlockForm(IQ4, 32),
    "Q2_K": BlockForm(tuple(range(4)), 16, 15, 15),
    "Q3_K": BlockForm(tuple(range(-4, 4)), 16, 31),
    "Q4_K": BlockForm(tuple(range(16)), 32, 63, 63),
    "Q5_K": BlockForm(tuple(range(32)), 32, 63, 63),
    "Q6_K": BlockForm(tuple(range(-32, 32)), 16, 127),
    "IQ4_XS": BlockForm(IQ4, 32, 31),
}
INSTEAD: dict[Type, Type] = {  # of a type with superblocks, in matrices that these do not fill
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}


class GGUF(StepConfig):
    """Arguments of `gguf`."""

    method: Literal["gguf"] = "gguf"
    type: Type = Field("Q4_0", description="a tensor type of GGUF")
    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")
    examples = ({}, {"type": "Q4_1"}, {"type": "IQ4_NL"}, {"type": "Q8_0"}, {"type": "Q5_K"})

    @property
    def rowwise(self) -> bool:
        """See `StepConfig.rowwise`."""
        return FORMS[self.type].offsets is None  # a low-rank term has a factor of the whole matrix

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        base, term = base_and_term(approx)
        return join(in_blocks_sketch(shape(base), FORMS[fitting(self.type, shape(base)[1])]), term)


def fitting(kind: Type, width: int) -> Type:
    """Return the type, or the one that stands for it in matrices of that width."""
    return INSTEAD[kind] if kind in INSTEAD and width % SUPERBLOCK else kind


@method("gguf", GGUF, needs={"outer"}, data_free=True)
def gguf(layer: Layer, config: GGUF) -> Layer:
    """Quantizes the base with error feedback; without calibration, each group for itself."""
    target = base_target(layer)
    form = FORMS[fitting(config.type, target.shape[1])]
    factor, notes = feedback_factor(layer.inputs, config.damping)
    importance = None if factor is None else channel_energy(layer.inputs).float()
    return with_base(layer, feedback(target, factor, InBlocks(form, importance)), notes)
