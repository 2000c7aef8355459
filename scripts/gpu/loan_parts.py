"""The questions to a borrowed GPU, most valuable first: see `loan.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

import llmcompress as lc
from llmcompress.kernels.accelerate import accelerate, plain
from llmcompress.kernels.column_block import ColumnBlock, Numbers, whole_weights
from llmcompress.methods.moments import Moments, RunningMoments
from llmcompress.methods.solvers.block_search import choose_columns
from llmcompress.methods.solvers.hessian import inverse_factor
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.weight.trellis import Trellis, cuts, table
from scripts.gpu.given import wait
from scripts.gpu.kernels import microseconds, products
from scripts.gpu.loan import Loan, Part

KINDS = (Trellis(2, 1, 12), Trellis(1, 1, 12), Trellis(3, 1, 12), Trellis(4, 1, 12), Trellis(3, 2, 12),
         Trellis(5, 2, 12, "linear"), Trellis(2, 1, 8), Trellis(2, 1, 16))  # fmt: skip
STREAMS = ((768, 1), (768, 132), (768, 264), (256, 264))  # (rows, streams)
GPTQ = [{"method": "gptq", "bits": 4, "group_size": 64, "symmetric": False}]
CODED = {
    "grids of 4 bits": [{"method": "rtn", "bits": 4, "group_size": 128}],
    "trellis-2": [{"method": "rotate"}, {"method": "trellis", "memory": 8, "code": "linear"}],
}
TRELLIS = [{"method": "rotate"}, {"method": "trellis", "bits": 2, "code": "linear"}, {"method": "refine", "passes": 1}]


def floors(loan: Loan) -> None:
    """Ceilings of the card and of its host, beside which the rest is read."""
    count, side = (1 << 12, 64) if loan.small else (1 << 29, 8192)
    loan.say("copy, TB/s", value=8 * count / copying(loan, count) / 1e9)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(side, side, device=loan.device, dtype=dtype)
        loan.say(f"product in {dtype}, TFLOP/s", value=2 * side**3 / loan.milliseconds(partial(torch.mm, x, x)) / 1e9)
    few, count = torch.zeros(64, device=loan.device), 10 if loan.small else 5000
    loan.say("microseconds of a small operation", value=1e3 * loan.milliseconds(lambda: repeat(count, few)) / count)


def copying(loan: Loan, count: int) -> float:
    """Return the milliseconds in which so many numbers are copied."""
    numbers = torch.randn(count, device=loan.device)
    other = torch.empty_like(numbers)
    return loan.milliseconds(lambda: other.copy_(numbers))


def repeat(count: int, x: Tensor) -> None:
    """Ask for so many small operations."""
    for _ in range(count):
        x.add_(1)


def column_block(trellis: Trellis, rows: int, run: int, columns: int, device: torch.device) -> ColumnBlock:
    """Return random columns to choose."""
    random = torch.Generator().manual_seed(0)
    factors = torch.rand(rows, generator=random) + 0.5
    edges = tuple(cuts(rows, run, trellis))
    ends = torch.full((columns + 1, len(edges) - 1), -1, dtype=torch.int32)
    ends[0] = 0
    wanted, shares = torch.randn(columns, rows, generator=random), torch.randn(columns, columns, generator=random) / 20
    tensors = (each.to(device) for each in (wanted, whole_weights(factors.square(), trellis), factors, ends, shares))
    current, weights, factors, ends, shares = tensors
    return ColumnBlock(current, weights, factors, edges, ends, shares)


def search(loan: Loan) -> None:
    """Is the search the CPU's, bit for bit, and how long does a column take by the number of streams?"""
    host, wrong = torch.device("cpu"), list[str]()
    for trellis in KINDS[: 1 if loan.small else None]:
        rows, columns = (96, 2) if loan.small else (2400, 9)
        blocks = [column_block(trellis, rows, 768, columns, device) for device in (host, loan.device)]
        states = [
            choose_columns(block, Numbers.on(device, trellis, table(trellis)))[0]
            for block, device in zip(blocks, (host, loan.device), strict=True)
        ]
        same = torch.equal(states[0], states[1].cpu()) and torch.equal(blocks[0].current, blocks[1].current.cpu())
        loan.say(f"search, {trellis}: as on the CPU", value=same)
        wrong += [] if same else [str(trellis)]
        for run, streams in STREAMS[: 1 if loan.small else None]:
            if trellis.memory > 12 and run * streams > 768:
                continue
            rows, columns = (96, 2) if loan.small else (run * streams, 64)
            numbers = Numbers.on(loan.device, trellis, table(trellis))
            block = column_block(trellis, rows, run, columns, loan.device)
            taken = loan.milliseconds(partial(choose_columns, block, numbers), 3)
            loan.say(f"search, {trellis}, {streams} streams of {run}: ms a column", value=taken / columns)
    if wrong:
        raise ValueError(f"the search finds other codes than on the CPU for {', '.join(wrong)}")


def compression(loan: Loan) -> None:
    """Seconds of one block in the shape of an 8B model, all in; the first run compiles and does not count."""
    model, text = loan.model(4096, 1), loan.calibration()
    arms: dict[str, dict[str, Any]] = {
        "warm-up, rtn 4 bits": {"rules": [{"match": "*", "steps": [{"method": "rtn", "bits": 4}]}]},
        "trellis-2": {"rules": [{"match": "*", "steps": TRELLIS}]},
        "gptq-4-g64": {"rules": [{"match": "*", "steps": GPTQ}]},
    }
    for arm, more in arms.items():
        started = wait(loan.device)
        lc.compress(model, {"version": 1, "calibration": text, **more}, loan.work / arm, device=str(loan.device))
        loan.say(f"a block of width 4096, {arm}: seconds", value=wait(loan.device) - started)


def generation(loan: Loan) -> None:
    """Tokens a second of a random model in bfloat16: dense, by kernels and decoded at every call."""
    model = loan.model(4096, 4)
    places = {"dense": str(model)}
    for arm, steps in CODED.items():
        recipe = {"version": 1, "calibration": None, "rules": [{"match": "*", "steps": steps}]}
        places[arm] = str(lc.compress(model, recipe, loan.work / f"fast {arm}", device=str(loan.device)).folder)
    for arm, place in places.items():
        found = load_model(locate(place), str(loan.device), torch.bfloat16).eval()
        accelerate(found)
        for tokens in (1, 16) if loan.small else (1, 16, 512):
            forward(loan, arm, found, torch.arange(tokens, device=loan.device)[None] % 256)
        if loan.device.type == "cuda":
            loan.say(f"{arm}, a token by a CUDA graph: ms", value=by_graph(loan, found))


@torch.no_grad()
def forward(loan: Loan, arm: str, model: Any, ids: Tensor) -> None:
    """Time a pass of some tokens, and of a compressed model one without kernels."""
    taken = loan.milliseconds(lambda: model(ids))
    if arm == "dense":
        loan.say(f"{arm}, {ids.numel()} tokens: ms", value=taken)
        return
    fast = model(ids).logits.float().log_softmax(-1)
    with plain(model):
        slow = model(ids).logits.float().log_softmax(-1)
        decoded = loan.milliseconds(lambda: model(ids))
    loan.say(f"{arm}, {ids.numel()} tokens: ms", value=taken, decoded=decoded, kl=kl(slow, fast))


def kl(reference: Tensor, other: Tensor) -> float:
    """Return the KL between logarithms of probabilities, nats a token."""
    return float((reference.exp() * (reference - other)).sum(-1).mean())


@torch.no_grad()
def by_graph(loan: Loan, model: Any) -> float:
    """Return the milliseconds of a token behind 64 others in a static cache, replayed from a CUDA graph."""
    cache = StaticCache(config=model.config, max_cache_len=128)
    device = loan.device
    prompt = torch.arange(64, device=device)[None]
    model(prompt, past_key_values=cache, cache_position=torch.arange(64, device=device), use_cache=True)
    ids, place = torch.tensor([[65]], device=device), torch.tensor([64], device=device)

    def step() -> Tensor:
        found: Tensor = model(
            ids, past_key_values=cache, cache_position=place, position_ids=place[None], use_cache=True
        ).logits
        return found

    return microseconds([step], device) / 1000


def around(loan: Loan) -> None:
    """Sums over tokens, factors and loading, of the widest matrix of an 8B model."""
    width, tokens = (64, 128) if loan.small else (14336, 16384)
    x = torch.randn(tokens, width, device=loan.device, dtype=torch.bfloat16)
    sums = RunningMoments(frozenset({"outer"}))
    loan.say("X^T X, ms", value=loan.milliseconds(lambda: sums.add(x), 3))
    outer = x.float().T @ x.float() / tokens
    loan.say("factor of H, ms", value=loan.milliseconds(lambda: inverse_factor(Moments(1.0, outer=outer), 0.1), 2))
    if loan.device.type == "cuda":
        host = torch.randn(width, 4096).bfloat16().pin_memory()
        loan.say("load 117 MB, ms", value=loan.milliseconds(lambda: host.to(loan.device, torch.float32), 3))


def tiles(loan: Loan) -> None:
    """Thousands of tiles of ExLlamaV3's a second."""
    from llmcompress.methods.trellises.exl3 import nearest_tiles

    for bits in (2, 3):
        wanted = torch.randn(2 if loan.small else 256, 256, device=loan.device)
        taken = loan.milliseconds(partial(nearest_tiles, wanted, bits), 3)
        loan.say(f"exl3 tiles of {bits} bits: thousands a second", value=len(wanted) / taken)


def to_a_size(loan: Loan) -> None:
    """Seconds of `--bpw 2.05` on two blocks of width 2048, prices and all."""
    from llmcompress.cli.compress import build_recipe, target_change

    calibration = str(loan.calibration()).replace("'", '"')
    target = target_change(3.5 if loan.small else 2.05, None, None, None)
    recipe = build_recipe(None, [f"calibration={calibration}"], None, target, False)
    started = wait(loan.device)
    lc.compress(loan.model(2048, 2), recipe, loan.work / "to a size", device=str(loan.device))
    loan.say("two blocks of width 2048 to a size: seconds", value=wait(loan.device) - started)


PARTS = (
    Part("floors", 20, floors),
    Part("search", 90, search),
    Part("compression", 120, compression),
    Part("products", 60, products),
    Part("generation", 120, generation),
    Part("around", 30, around),
    Part("tiles", 30, tiles),
    Part("to_a_size", 150, to_a_size),
)
