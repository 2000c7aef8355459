"""The model and the text that a choice of blocks to drop reads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llmcompress.data.calibration import calibration_tokens, context_length
from llmcompress.errors import RecipeError
from llmcompress.models.dense.locate import Place, locate
from llmcompress.models.dense.model import load_model, open_source
from llmcompress.recipe.calibration import Calibration
from llmcompress.surgery.depth.drop import blocks_of


def opened_text(
    model: str | Path,
    count: int,
    text: str,
    samples: int,
    length: int,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[Place, Tensor, str]:
    """Return the place of a model of which `count` blocks can go, tokens `[samples, at most length]`, and their source.

    Raises what `alike_blocks` raises.
    """
    place = locate(model, revision, trust_remote_code)
    source = open_source(place)
    if not 0 < count < len(blocks_of(source)):
        raise RecipeError(
            f"{count} of the {len(blocks_of(source))} blocks of {source.name} cannot go; choose at least one, not all"
        )
    length = min(length, context_length(source.config) or length)
    calibration = Calibration(dataset=text, samples=samples, length=length, held_out=0)
    tokens = calibration_tokens(calibration, source.tokenizer(), lambda: load_model(place), source.config)
    return place, tokens.sequences, tokens.source
