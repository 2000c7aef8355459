"""The inputs of a sweep: its budgets, and measurements of other tools to draw beside its own points.

Budgets are all of one kind: bits per weight of the decoder's linears, or bytes of all weight files. Peers come from a
JSON file and are not measured again, so their numbers must be of the sweep's protocol:

    {"peers": [{"name": "AutoRound g64", "bpw": 2.281, "bytes": 86300000, "perplexity": 91.36, "kl": 1.3,
                "tasks": {"blimp": 0.638}}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, Field

from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.target import Target, parse_size
from llmcompress.recipe.validation import validate

MOST_BPW = 16.0


@dataclass(frozen=True)
class Budget:
    """One size. `name`: the folder of its checkpoint, "bpw-1.25" or "size-30MB"."""

    name: str
    target: Target


def budgets(bpw: str | None, sizes: str | None) -> tuple[Budget, ...]:
    """Return the budgets of "1.25,1.6,2" bits per weight or of "30MB,40MB", smallest first.

    Raises RecipeError for both or neither, for anything that is not a size, and for a size given twice.
    """
    if (bpw is None) == (sizes is None):
        raise RecipeError("give the budgets either as --bpw 1.25,1.6,2 or as --sizes 30MB,40MB")
    result = _parse(bpw, _of_bits) if bpw is not None else _parse(sizes or "", _of_bytes)
    for before, after in pairwise(result):
        if before.name == after.name:
            raise RecipeError(f"the budget {before.name} is given twice; give each budget once")
    return result


def _parse(text: str, read: Callable[[str], tuple[float, Budget]]) -> tuple[Budget, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise RecipeError("there are no budgets; give some, such as --bpw 1.25,1.6,2 or --sizes 30MB,40MB")
    return tuple(budget for _, budget in sorted(map(read, words), key=lambda pair: pair[0]))


def _of_bits(word: str) -> tuple[float, Budget]:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST_BPW:
        raise RecipeError(f"--bpw: {word!r} is not a number of bits per weight, above 0 and at most {MOST_BPW:g}")
    return value, Budget(f"bpw-{_plain(value)}", Target(bpw=value))


def _of_bytes(word: str) -> tuple[float, Budget]:
    try:
        count = int(parse_size(word))
    except ValueError as error:
        raise RecipeError(f"--sizes: {error}") from error
    if count < 1:
        raise RecipeError(f"--sizes: {word!r} is not the size of a model; give more than 0 bytes")
    return count, Budget(f"size-{_plain(count / 1e6)}MB", Target(bytes=count))


def _plain(value: float) -> str:
    """Return a number without an exponent or trailing zeros, to a millionth (one byte of a megabyte)."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


class Peer(BaseModel, extra="forbid", frozen=True):
    """One point. `tasks`: the score in each."""

    name: str = Field(min_length=1)
    bpw: float | None = Field(None, gt=0, le=64, description="stored bits per weight of the decoder's linears")
    bytes: int | None = Field(None, gt=0, description="of all weight files")
    perplexity: float = Field(gt=0, allow_inf_nan=False)
    kl: float | None = Field(None, ge=0, allow_inf_nan=False, description="to the dense model, in nats per token")
    tasks: dict[str, float] = Field(default_factory=dict)


class Peers(BaseModel, extra="forbid", frozen=True):
    """The contents of the file."""

    peers: tuple[Peer, ...]


def read_peers(path: Path, axis: str) -> tuple[Peer, ...]:
    """Read the peers in a JSON file; each must have the `axis` of the sweep's budgets, "bpw" or "bytes".

    Raises InputError for a file that is not such a list.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the peers in {path} cannot be read ({error}); give a JSON file") from error
    if not isinstance(values, dict):
        raise InputError(
            f'{path} holds no peers; write {{"peers": [{{"name": ..., "{axis}": ..., "perplexity": ...}}]}}'
        )
    try:
        peers = validate(Peers, values, {}).peers
    except RecipeError as error:
        raise InputError(f"{path}: {error}") from error
    for peer in peers:
        if getattr(peer, axis) is None:
            raise InputError(f"{path}: the peer {peer.name!r} has no {axis}, the unit of this sweep's sizes; add it")
    return peers
