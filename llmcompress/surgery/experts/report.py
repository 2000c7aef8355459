"""The fate of every expert, and what it costs: before anything is written, and beside what was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from torch import Tensor

from llmcompress.compression.damage import judged_calibration
from llmcompress.data.calibration import CalibrationTokens, calibration_tokens
from llmcompress.errors import NumericsError, list_names
from llmcompress.recipe.calibration import Calibration
from llmcompress.runtime.json_values import JsonRecord
from llmcompress.surgery.experts.mixture import ExpertMixture
from llmcompress.surgery.experts.usage import Usage

Way = Literal["prune", "merge", "condense", "replace"]
Fate = Literal["kept", "dropped", "merged", "folded", "replaced"]
SAMPLES, HELD_OUT = 20, 4  # of text: 8192 tokens to count, 2048 to judge


@dataclass(frozen=True)
class ExpertFate:
    """One expert. `tokens`: calibration tokens routed to it; `router_weight`: the mean of the router's weights on
    them; `score`: what it was judged by, None where it was not; `becomes`: its number in the new model, None for one
    that has none; `weight`: the constant that a folded one is multiplied by; `rank`: of the factors that replace it."""

    number: int
    fate: Fate
    tokens: int
    router_weight: float
    score: float | None = None
    becomes: int | None = None
    weight: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class BlockFate:
    """The experts of one block.

    `damage`: the predicted change of the block's outputs on held-out text, the mean over tokens of its squared size
    relative to the output's; `shared_weights`: constants of shared experts that were folded; `considered`: the damage
    that condensing it would have done, None where that was not asked.
    """

    block: int
    path: str
    damage: float
    experts: tuple[ExpertFate, ...]
    shared_weights: tuple[float, ...] = ()
    considered: float | None = None


@dataclass(frozen=True)
class ExpertsReport(JsonRecord):
    """The fates of a mixture's experts. `output` is None where nothing was written; bytes count the weights."""

    model: str
    output: str | None
    way: Way
    settings: dict[str, Any]
    experts_before: int
    experts_after: int
    bytes_before: int
    bytes_after: int
    calibration: dict[str, Any]
    blocks: tuple[BlockFate, ...]
    warnings: tuple[str, ...]


def calibration_for(mixture: ExpertMixture, text: str, samples: int) -> Calibration:
    """Return what is read to judge experts, some of it held out. Raises RecipeError for too few samples."""
    return judged_calibration(mixture.source, text, samples, SAMPLES // HELD_OUT)


def text_for(mixture: ExpertMixture, asked: Calibration) -> CalibrationTokens:
    """Return the tokens of a text. Raises InputError for one that cannot serve."""
    source = mixture.source
    return calibration_tokens(asked, source.tokenizer(), source.load, source.config)


def fates(
    used: Usage, fate_of: Mapping[int, Fate], scores: Tensor | None = None, **more: Mapping[int, Any]
) -> tuple[ExpertFate, ...]:
    """Return the rows of a block's experts; `more`: further fields, each by the expert's number."""
    rows = []
    for number, count in enumerate(used.counts.tolist()):
        weight = float(used.weights[number]) / count if count else 0.0
        score = None if scores is None else float(scores[number])
        own = {name: values[number] for name, values in more.items() if number in values}
        rows.append(ExpertFate(number, fate_of[number], count, weight, score, **own))
    return tuple(rows)


def unused(blocks: Sequence[BlockFate]) -> tuple[str, ...]:
    """Return a sentence if the text has reached some experts with no token. Raises NumericsError for a damage that is
    no number."""
    odd = next((block for block in blocks if not isfinite(block.damage)), None)
    if odd is not None:
        raise NumericsError(f"{odd.path}: its outputs became NaN or Inf; use an undamaged checkpoint")
    names = [f"{block.path}.{row.number}" for block in blocks for row in block.experts if not row.tokens]
    total = sum(len(block.experts) for block in blocks)
    if not names:
        return ()
    return (
        f"{len(names)} of {total} experts got no token of the text ({list_names(names)}), so nothing is known of them; "
        f"more text helps",
    )
