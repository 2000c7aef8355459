"""Products that `test_gpu_products.py` and `scripts/gpu_check` judge, and their errors under Triton's interpreter:

    TRITON_INTERPRET=1 python -m tests.kernels.gpu.interpreted ANSWERS

Triton decides when it is imported whether its kernels are compiled or interpreted, hence the process of its own. It
writes, as JSON, the error of every case.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.kernels import ops
from llmcompress.kernels.accelerate import plain
from llmcompress.kernels.gpu.layouts import GpuWeight
from llmcompress.kernels.gpu.prepare import multiply_few, multiply_many, prepare
from llmcompress.weight.expression import dense
from llmcompress.weight.layout import pack_weight
from llmcompress.weight.modules import compressed_linears
from llmcompress.weight.nodes import (
    Bitmap,
    Columns,
    Dense,
    LowRank,
    RotatedInputs,
    ScaledInputs,
    Sum,
    Weight,
    Where,
    Zero,
    shape,
)
from llmcompress.weight.trellis import Trellis
from tests.builders import RINGS, TRELLISES, factors, grid, pattern, seeded, streams
from tests.tiny import save_tiny

FLOAT32, HALF, BFLOAT16 = 5e-6, 2e-3, 1.2e-2  # the most that a product may be off, in shares of its norm


@dataclass(frozen=True)
class Case:
    """A weight times some tokens in a dtype."""

    name: str
    weight: Weight
    tokens: int = 1
    dtype: torch.dtype = torch.float32

    def limit(self) -> float:
        """The most that the product may be off."""
        return {torch.float32: FLOAT32, torch.float16: HALF, torch.bfloat16: BFLOAT16}[self.dtype]

    def inputs(self) -> Tensor:
        """Return the inputs `[tokens, in]`."""
        return torch.randn(self.tokens, shape(self.weight)[1], generator=seeded(9)).to(self.dtype)


def on(device: str, case: Case) -> float:
    """Return how far a product on a device is off, in shares of its norm."""
    x = case.inputs()
    expected = x.double() @ dense(case.weight).double().T
    weight = prepare(moved(case.weight, device), case.dtype)
    assert weight is not None, f"{case.name}: no kernel"
    found = multiply_few(weight, x.to(device))
    assert found.dtype == case.dtype and tuple(found.shape) == tuple(expected.shape)
    return relative(found, expected)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the distance of two tensors in shares of the norm of the expected one."""
    return float((found.double().cpu() - expected).norm() / expected.norm())


def moved(value: Any, device: str) -> Any:
    """Return an expression with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Trellis):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: moved(getattr(value, each.name), device) for each in fields(value)})
    return tuple(moved(each, device) for each in value) if isinstance(value, tuple) else value


# --- cases ----------------------------------------------------------------------------------------------------------


def cases(on_a_gpu: bool = False) -> Iterator[Case]:
    """Yield every form, with sizes that fill no tile and groups that are cut short.

    The interpreter multiplies matrices of bfloat16 wrongly, so these are for GPUs.
    """
    for levels in (2, 3, 4, 8, 16, 32, 64, 100, 256):
        for symmetric in (True, False):
            name = f"{levels} levels{'' if symmetric else ' asymmetric'}"
            yield Case(name, grid((19, 150), levels, 64, levels, symmetric))
    for tokens in (2, 16, 17):
        yield Case(f"3 bits, {tokens} tokens", grid((37, 150), 8, 64, 1, False), tokens)
    yield Case("4 bits, half", grid((19, 256), 16, 128, 1, False), 3, torch.float16)
    if on_a_gpu:
        yield Case("8 bits, bfloat16", grid((19, 256), 256, 128, 1, True), 3, torch.bfloat16)
        yield Case("trellis, bfloat16", streams(Trellis(2, 1, 12), 70, 260, 768), 16, torch.bfloat16)
    yield Case("8 bits, one token, bfloat16", grid((19, 256), 256, 128, 1, True), 1, torch.bfloat16)
    yield Case("one scale a row", grid((33, 100), 16, 100, 1, True))
    yield Case("one scale a row, tokens", grid((33, 100), 16, 100, 1, False), 5)
    yield Case("shared scales", grid((5, 70), 8, 7, 0, True, one_row=True))
    yield Case("one element", grid((1, 1), 4, 1, 0, False))
    yield Case("long rows", grid((3, 2100), 16, 32, 0, True))
    for trellis in (*TRELLISES, *RINGS, Trellis(2, 1, 12), Trellis(2, 1, 12, "linear"), Trellis(1, 1, 16)):
        steps = 70
        for tokens in (1, 3):
            w = streams(trellis, steps, 21, 40 * trellis.values)
            yield Case(f"{trellis}, {tokens} tokens", w, tokens)
    yield Case("trellis of one step", streams(Trellis(2, 1, 10), 1, 9, 1))
    yield Case("trellis, wide", streams(Trellis(2, 1, 10), 33, 300, 768))
    yield from salient_cases()
    yield from composite_cases()


def salient_cases() -> Iterator[Case]:
    """Yield grids with single weights in their place."""
    size = (21, 96)
    some = torch.rand(size, generator=seeded(1)) < 0.1
    none, every = torch.zeros(size, dtype=torch.bool), torch.ones(size, dtype=torch.bool)
    for index in (Columns(some[0]), Bitmap(some), pattern(size, 1, 8, 1), Bitmap(none), Bitmap(every)):
        kind = f"{type(index).__name__} {float(index.inside.float().mean()):.2f}"
        signs = grid(size, 2, 96, 2, True)
        yield Case(f"{kind}, 8 bits", Where(index, grid(size, 256, 96, 3, True), signs))
        yield Case(f"{kind}, groups", Where(index, grid(size, 16, 32, 3, True), grid(size, 2, 40, 2, False)))
        yield Case(f"{kind}, floats", Where(index, Dense(torch.randn(size, generator=seeded(4))), signs), 3)
        yield Case(f"{kind}, asymmetric", Where(index, grid(size, 16, 32, 3, False), grid(size, 4, 40, 2, True)), 2)


def composite_cases() -> Iterator[Case]:
    """Yield sums, rotations, column factors and low-rank terms."""
    random = seeded(7)

    def factored(out: int, width: int, rank: int) -> LowRank:
        left, right = (torch.randn(size, generator=random).half() * 0.3 for size in ((out, rank), (rank, width)))
        return LowRank(Dense(left), Dense(right))

    for width, block in ((96, 32), (64, 64), (40, 8), (24, 1), (20, 2)):
        signs = torch.rand(width, generator=random) < 0.5
        inner = Sum((grid((20, width), 8, 16, 1, True), factored(20, width, 3)))
        yield Case(f"rotated by {block}", RotatedInputs(inner, signs, block), 2)
        tall = Sum((grid((35, width), 4, 16, 35, False), factored(35, width, 1)))
        yield Case(f"35 rows rotated by {block}", RotatedInputs(tall, signs, block), 3)
    columns = factors(48, 1)
    yield Case("column factors", ScaledInputs(grid((9, 48), 2, 16, 1, True), columns))
    signs = torch.rand(48, generator=random) < 0.5
    yield Case(
        "factors and rotation",
        ScaledInputs(RotatedInputs(ScaledInputs(grid((9, 48), 2, 16, 1, True), columns), signs, 16), columns),
    )
    planes = tuple(grid((9, 48), 2, 16, seed, True) for seed in range(3))
    yield Case("planes", Sum((*planes, Zero((9, 48)), factored(9, 48, 4))), 2)
    yield Case("planes in half", Sum(planes), 1, torch.float16)
    trellis = Trellis(3, 2, 9)
    kinds = tuple(streams(trellis, steps, 24, 22) for steps in (40, 3, 11))
    for number, kind in enumerate(kinds):
        yield Case(f"trellis of two values {number}", kind, 4)
    yield Case("trellis and low rank", Sum((kinds[0], factored(80, 24, 5))), 2)


def answers(device: str) -> dict[str, tuple[float, float]]:
    """Return, by name, how far each product is off, and how far it may be."""
    found = {case.name: (on(device, case), case.limit()) for case in cases(device == "cuda")}
    found |= {f"{name}, decoded": off for name, off in decoded_on(device).items()}
    found["compiled by torch"] = (compiled_on(device), 2 * FLOAT32)
    for tokens in (1, 5, 40):
        found[f"a model, {tokens} tokens"] = (model_on(device, tokens), 1e-4)
    return found


def decoded_on(device: str) -> dict[str, tuple[float, float]]:
    """Return, by name, how far products by decoded matrices are off, and how far they may be."""
    found = {}
    for case in cases(device == "cuda"):
        weight = prepare(moved(case.weight, device), case.dtype)
        if weight is not None:
            x = case.inputs()
            expected = x.double() @ dense(case.weight).double().T
            found[case.name] = (relative(multiply_many(weight, x.to(device)), expected), 2 * case.limit())
    return found


def model_on(device: str, tokens: int) -> float:
    """Return how far the logits of a model whose linears multiply by these kernels are from those without kernels."""
    rules = [
        {"match": "*.q_proj", "steps": [{"method": "rotate"}, {"method": "trellis", "memory": 8, "code": "linear"}]},
        {"match": "*.k_proj", "steps": [{"method": "pb_llm", "salient": 0.1}]},
        {"match": "*.up_proj", "steps": [{"method": "rtn", "bits": 3, "group_size": 32}, {"method": "svd", "rank": 2}]},
        {"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 32}]},
    ]
    with tempfile.TemporaryDirectory() as folder:
        place = save_tiny("llama", Path(folder) / "dense", hidden_size=64, intermediate_size=96)
        text = Path(folder) / "text.txt"
        text.write_text("".join(f"Line {number} says {number**2}.\n" for number in range(200)))
        calibration = {"dataset": str(text), "samples": 4, "length": 24, "held_out": 1}
        recipe = {"version": 1, "calibration": calibration, "rules": rules, "gates": {}}
        out = lc.compress(place, recipe, Path(folder) / "out").folder
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)
    ids = (torch.arange(tokens, device=device)[None] * 37 + 11) % 256
    with torch.no_grad(), mock.patch.object(ops, "prepare", lambda w: prepare(w, torch.float32)):
        fast = model(ids).logits
        kept = [layer.fast.weight for layer in compressed_linears(model).values()]
        assert all(each is not None and isinstance(each.prepared, GpuWeight) for each in kept), "no kernel of a GPU"
        with plain(model):
            return relative(fast, model(ids).logits.double().cpu())


def compiled_on(device: str) -> float:
    """Return how far the products of a compiled function, by the operator, are from the decoded weights'."""
    size = (20, 96)
    inside = Bitmap(torch.rand(size, generator=seeded(1)) < 0.1)
    signs = torch.rand(96, generator=seeded(2)) < 0.5
    partial = Where(inside, grid(size, 256, 96, 1, True), grid(size, 2, 32, 2, True))
    term = LowRank(Dense(torch.randn(20, 2, generator=seeded(3))), Dense(torch.randn(2, 96, generator=seeded(4))))
    weights = [
        RotatedInputs(Sum((base, term)), signs, 32) for base in (partial, streams(Trellis(2, 1, 10), 20, 96, 768))
    ]
    held = [(layout, payload.to(device)) for layout, payload in map(pack_weight, weights)]
    assert all(layout.text for layout, _ in held), "known before a compiler asks, as `accelerate` does"

    def function(x: Tensor) -> Tensor:
        return torch.cat([ops.call_operator(x + 1, payload, layout, "exact") for layout, payload in held], -1)

    off = 0.0
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with mock.patch.object(ops, "prepare", lambda w: prepare(w, torch.float32)):
        for tokens in (1, 3, 40):
            x = torch.randn(2, tokens, 96, generator=seeded(tokens))
            expected = torch.cat([(x + 1).double() @ dense(w).double().T for w in weights], -1)
            off = max(off, relative(compiled(x.to(device)), expected))
    return off


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(answers("cpu"), indent=1))
