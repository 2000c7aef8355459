"""Cases of the conformance tests: every example of every registered method, and what each result must satisfy."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, methods, sketch, step
from llmcompress.weight.encoding import decode, encode
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Weight, shape
from tests.builders import correlated, payload_bits
from tests.tiers import first_of_each, tiered

Step = dict[str, Any]

SIZE = (48, 64)
ROTATE: Step = {"method": "rotate"}
POLISHES = {"refine", "pv"}  # that need a compressed base before them; see ../oracles/test_refine.py, test_moves.py
WIDE = {"exl3"}  # for sides of 128 alone; see tests/methods/oracles/test_exl3.py
STEPS: list[Step] = [
    {"method": m.name, **example}
    for m in methods().values()
    for example in m.config.examples
    if m.name not in POLISHES | WIDE
]


def spelled(arguments: Step) -> str:
    """A step in a test's name."""
    return ",".join(str(v["method"]) if isinstance(v, dict) else f"{v}" for v in arguments.values())


def refusal(size: tuple[int, int], *steps: Step) -> str | None:
    """Return the error by which `sketch` refuses these steps, or None."""
    try:
        sketch("block.0.linear", size, [step(arguments) for arguments in steps])
    except RecipeError as error:
        return str(error)
    return None


leads = first_of_each(STEPS, lambda arguments: arguments["method"])  # every method's first example, which is fast
every_step = pytest.mark.parametrize("arguments", tiered(STEPS, leads, spelled))


@lru_cache(maxsize=16)
def calibration(width: int) -> Tensor:
    """Sixteen correlated tokens a channel; not to be written to."""
    return correlated(max(64, 16 * width), width, seed=1)


def sketched(size: tuple[int, int], *steps: Step) -> Weight:
    """The expression the plan expects."""
    return sketch("block.0.linear", size, [step(arguments) for arguments in steps])


def assert_sound(done: Layer, size: tuple[int, int], *steps: Step) -> None:
    """Right shape, finite, readable back, and as large as counted and as planned."""
    w = done.expression()
    assert shape(w) == size and bool(dense(w).isfinite().all())
    header, tensors = encode(w)
    assert torch.equal(dense(decode(header, tensors)), dense(w))
    assert 0 <= payload_bits(tensors) - bits(w) <= 7 * len(tensors)
    planned = bits(sketched(size, *steps))
    assert planned == bits(w), f"the plan says {planned} bits, the layer stores {bits(w)}"
