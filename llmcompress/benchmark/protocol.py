"""The protocol of a measurement of speed: stored with the numbers, since they hold for nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llmcompress.errors import RecipeError

DTYPES = ("bfloat16", "float16", "float32")
SEED = 0  # of the prompt's tokens
WARM_UP = 2  # tokens of the turn that nobody counts


@dataclass(frozen=True)
class SpeedProtocol:
    """Work of one turn, and how often each model has one. Raises RecipeError for numbers that cannot be."""

    threads: tuple[int, ...]
    prompt: int = 512  # tokens that are read at once
    tokens: int = 32  # that are generated after the first one
    rounds: int = 5
    dtype: str = "bfloat16"  # of dense models
    plain: bool = False  # true: without the kernels that compressed models run by

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
        return asdict(self) | {"threads": list(self.threads), "batch_size": 1, "seed": SEED}


def parse_threads(text: str | None, cores: int) -> tuple[int, ...]:
    """Return the numbers in "1,2", each once; without a text, one thread and all `cores`. Raises RecipeError."""
    if text is None:
        return (1,) if cores == 1 else (1, cores)
    try:
        found = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError as error:
        raise RecipeError(f"threads {text!r} are not whole numbers; give them as in 1,2") from error
    if min(found) < 1:
        raise RecipeError(f"threads {text!r} cannot be measured; give 1 or more, as in 1,2")
    return found
