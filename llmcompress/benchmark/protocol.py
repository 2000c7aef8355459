"""The protocol of a measurement of speed, which is stored with its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmcompress.errors import RecipeError
from llmcompress.runtime.json_values import JsonRecord

DTYPES = ("bfloat16", "float16", "float32")
SEED = 0  # of the prompt's tokens
WARM_UP = 2  # tokens of the turn that does not count


@dataclass(frozen=True)
class SpeedProtocol(JsonRecord):
    """Work of one turn, and the number of turns. Raises RecipeError for numbers that cannot be measured."""

    threads: tuple[int, ...]
    prompt: int = 512  # tokens read at once
    tokens: int = 32  # generated after the first one
    rounds: int = 5
    dtype: str = "bfloat16"  # of dense models
    plain: bool = False  # True: compressed models run without kernels

    def __post_init__(self) -> None:
        if not self.threads or min(self.threads) < 1:
            raise RecipeError(
                f"threads {','.join(map(str, self.threads)) or 'none'} cannot be measured; give 1 or more, as in 1,2"
            )
        for name, least in (("prompt", 1), ("tokens", 1), ("rounds", 1)):
            if (given := getattr(self, name)) < least:
                raise RecipeError(f"a measurement needs {name} of {least} at least, not {given}; give more")
        if self.dtype not in DTYPES:
            raise RecipeError(f"dense models cannot be loaded in {self.dtype!r}; choose one of {', '.join(DTYPES)}")

    @property
    def context(self) -> int:
        """Positions that a turn takes."""
        return self.prompt + self.tokens + 1

    def to_json(self) -> dict[str, Any]:
        """Return plain values, keys as in the fields."""
        return super().to_json() | {"threads": list(self.threads), "batch_size": 1, "seed": SEED}


def parse_threads(text: str | None, cores: int) -> tuple[int, ...]:
    """Return the numbers in "1,2", each once; for None, one thread and all `cores`. Raises RecipeError."""
    if text is None:
        return (1,) if cores == 1 else (1, cores)
    try:
        counts = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError as error:
        raise RecipeError(f"threads {text!r} are not whole numbers; give them as in 1,2") from error
    if min(counts) < 1:
        raise RecipeError(f"threads {text!r} cannot be measured; give 1 or more, as in 1,2")
    return counts
