"""The gates of quality as a report has them: how far a finished model is from its dense one, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

TOKENS = 2048  # that are read, at most: a few percent of what a calibration of 128 sequences reads
WINDOW = 256  # tokens that are read at once, at most; logits of two windows of each model are in memory
PENDING = "the run ended before it was measured"


@dataclass(frozen=True)
class GateReport:
    """The quality of a model beside the limits of its recipe, by name: `kl` in nats per token, `perplexity_ratio` over
    the dense model's perplexity.

    `held`: True if both are within their limits; None where nothing was measured, and `unmeasured` says why. `tokens`:
    the number that was predicted, held out of `text`, 0 where nobody says; `predicted_bytes`: the least size that is
    predicted to keep the limits, where prices are known.
    """

    limits: Mapping[str, float]
    kl: float | None = None
    perplexity_ratio: float | None = None
    tokens: int = 0
    text: str = "calibration"
    held: bool | None = None
    unmeasured: str | None = None
    predicted_bytes: int | None = None

    @staticmethod
    def from_json(entries: Mapping[str, Any]) -> GateReport:
        """Return the inverse of `dataclasses.asdict`. Raises TypeError for entries of another form."""
        return GateReport(**entries)

    @property
    def measured(self) -> dict[str, float]:
        """The numbers that were measured, by name."""
        found = {"kl": self.kl, "perplexity_ratio": self.perplexity_ratio}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def pending(self) -> bool:
        """True if it is still to be measured."""
        return self.unmeasured == PENDING

    def judged(self, limits: Mapping[str, float]) -> GateReport:
        """Return what was measured beside these limits."""
        missed = any(value > limits.get(name, math.inf) for name, value in self.measured.items())
        return replace(
            self, limits=dict(limits), held=not missed if self.measured and limits else None, predicted_bytes=None
        )

    def told(self) -> list[str]:
        """Return a clause for each number that was measured, with its limit."""
        words = {"kl": "KL {:.4g} nats per token", "perplexity_ratio": "perplexity {:.4g} times the dense model's"}
        return [
            words[name].format(value) + (f" (at most {self.limits[name]:g})" if name in self.limits else "")
            for name, value in self.measured.items()
        ]

    def where(self) -> str:
        """Return the words for the text."""
        return f"on {f'{self.tokens:,} tokens' if self.tokens else 'text'} held out of the {self.text}"

    def sentence(self) -> str:
        """Return it for people, in one clause."""
        if self.unmeasured is not None:
            return f"not measured: {self.unmeasured}"
        verdict = "off" if not self.limits else "held" if self.held else "missed"
        return f"{verdict}: {', '.join(self.told())}, {self.where()}"


def pending(limits: Mapping[str, float], unmeasured: str | None = None) -> GateReport | None:
    """Return the report before anything is measured, `unmeasured` being why nothing will be; None without limits."""
    return GateReport(dict(limits), unmeasured=unmeasured or PENDING) if limits else None


def of_numbers(kl: float, gap: float, tokens: int, text: str = "calibration") -> GateReport:
    """Return a report without limits of a KL and of a `gap`, the logarithm of the ratio of perplexities."""
    return GateReport({}, kl, math.exp(min(gap, 700.0)), tokens, text)
