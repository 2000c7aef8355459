"""Random numbers: generators seeded by their purpose."""

from __future__ import annotations

from hashlib import sha256

import torch


def generator(*parts: object) -> torch.Generator:
    """Return a generator seeded by its purpose (a recipe's seed, a layer's name), without global state."""
    digest = sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
