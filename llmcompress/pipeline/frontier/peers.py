"""Results of other tools on the same model, as somebody measured them: points to draw beside a sweep's own.

    {"peers": [{"name": "AutoRound g64", "bpw": 2.281, "bytes": 86300000, "perplexity": 91.36, "kl": 1.3,
                "tasks": {"blimp": 0.638}}]}

Nothing here is measured again: the numbers must be of the protocol that the sweep is scored by.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from llmcompress.errors import InputError, RecipeError
from llmcompress.recipe.validation import validate


class Peer(BaseModel):
    """One point. `tasks`: the score in each."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1)
    bpw: float | None = Field(None, gt=0, le=64, description="stored bits per weight of the decoder's linears")
    bytes: int | None = Field(None, gt=0, description="of all weight files")
    perplexity: float = Field(gt=0, allow_inf_nan=False)
    kl: float | None = Field(None, ge=0, allow_inf_nan=False, description="to the dense model, in nats per token")
    tasks: dict[str, float] = Field(default_factory=dict)


class Peers(BaseModel):
    """The contents of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    peers: tuple[Peer, ...]


def read_peers(path: Path, axis: str) -> tuple[Peer, ...]:
    """Read the peers in a JSON file; each must have the `axis` of the sweep's sizes, "bpw" or "bytes".

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
        found = validate(Peers, values, {})
    except RecipeError as error:
        raise InputError(f"{path}: {error}") from error
    for peer in found.peers:
        if getattr(peer, axis) is None:
            raise InputError(f"{path}: the peer {peer.name!r} has no {axis}, the unit of this sweep's sizes; add it")
    return found.peers
