"""Constant tables, computed once as real tensors, also while a program is traced."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import TypeVar, TypeVarTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

Words = TypeVarTuple("Words")
T = TypeVar("T")


def constant(make: Callable[[*Words], T]) -> Callable[[*Words], T]:
    """Return `make`, a function of numbers and words to tensors, with cached results.

    Otherwise `torch.compile` would trace it into every program, and `torch.export` leave placeholders in the cache.
    """

    @lru_cache(maxsize=16)
    def make_once(*words: Hashable) -> T:
        with _disable_current_modes(), torch.device("cpu"):
            return make(*words)  # type: ignore[arg-type]  # as they came

    @wraps(make)
    def table(*words: *Words) -> T:
        return make_once(*words)

    # What torch.compiler.assume_constant_result does, which imports the compiler, a second of every start.
    table._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return table
