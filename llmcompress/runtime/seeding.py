"""Random numbers: generators seeded by what they are for."""

from __future__ import annotations

from hashlib import sha256

import torch


def generator(*parts: object) -> torch.Generator:
    """A generator seeded by what it is for (a recipe's seed, a layer's name): no global state, no salted hash."""
    digest = sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
