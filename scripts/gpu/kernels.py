"""The kernels for GPUs, on a GPU: agreement with decoded weights, then times beside torch's bfloat16 products.

Every form is first multiplied as in the tests. Then each is timed on shapes of models of 8 billion parameters, for so
many copies of a weight that none stays in the cache, as replays of a CUDA graph; `bound` is the time in which the
GPU reads the bytes of the weight, by its measured bandwidth. On the CPU Triton's interpreter multiplies a few cases.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from itertools import product as combinations
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels.gpu.layouts import Branch, GpuWeight, GridRows, StreamRows, Tensors
from llmcompress.kernels.gpu.prepare import prepare, product, runs_on
from llmcompress.weight.nodes import (
    Bitmap,
    Columns,
    Dense,
    Grid,
    LowRank,
    RotatedInputs,
    Sum,
    TrellisCodes,
    Weight,
    Where,
)
from llmcompress.weight.trellis import Trellis
from scripts.gpu.given import Given

DEVICE = torch.device("cuda")
SHAPES = {  # (out, in)
    "o": (4096, 4096),
    "q/k/v": (6144, 4096),
    "gate/up": (28672, 4096),
    "down": (4096, 14336),
}
TARGET = 0.6  # of the bandwidth bound, one token
ROUNDS, MOST_COPIES = 20, 128
FEW = 3  # cases that the interpreter is asked for
Call = Callable[[], Tensor]


# --- weights --------------------------------------------------------------------------------------------------------


def grid(size: tuple[int, int], levels: int, group: int) -> Grid:
    """Return a symmetric grid of random codes."""
    codes = torch.randint(levels, size, dtype=torch.uint8, device=DEVICE)
    scale = (torch.rand(size[0], -(-size[1] // group), device=DEVICE) + 0.1).half()
    return Grid(codes, scale, None, levels, group)


def coded(size: tuple[int, int], trellis: Trellis) -> TrellisCodes:
    """Return random streams of a trellis."""
    steps = size[0] * size[1] // trellis.values
    codes = torch.randint(1 << trellis.bits, (steps,), dtype=torch.uint8, device=DEVICE)
    return TrellisCodes(codes, (torch.rand(size[0], 1, device=DEVICE) + 0.1).half(), trellis, 768)


def low_rank(size: tuple[int, int], rank: int) -> LowRank:
    """Return random factors."""
    left, right = (torch.randn(each, device=DEVICE).bfloat16() for each in ((size[0], rank), (rank, size[1])))
    return LowRank(Dense(left), Dense(right))


def rotated(w: Weight, width: int) -> RotatedInputs:
    """Return a weight in a random basis."""
    return RotatedInputs(w, torch.rand(width, device=DEVICE) < 0.5, width & -width)


def packed(w: Weight) -> GpuWeight:
    """Return a weight for products. Raises TypeError for one that has no kernel."""
    found = prepare(w)
    if found is None:
        raise TypeError(f"no kernel for {type(w).__name__}")
    return found


FORMS: dict[str, Callable[[tuple[int, int]], GpuWeight]] = {
    "grid 8 bits, row": lambda size: packed(grid(size, 256, size[1])),
    "grid 4 bits, g128": lambda size: packed(grid(size, 16, 128)),
    "grid 3 bits, g128": lambda size: packed(grid(size, 8, 128)),
    "grid 2 bits, g64": lambda size: packed(grid(size, 4, 64)),
    "signs, g128": lambda size: packed(grid(size, 2, 128)),
    "signs and 10 % of columns": lambda size: packed(
        Where(Columns(torch.rand(size[1], device=DEVICE) < 0.1), grid(size, 256, size[1]), grid(size, 2, 128))
    ),
    "signs and 10 % of elements": lambda size: packed(
        Where(Bitmap(torch.rand(size, device=DEVICE) < 0.1), grid(size, 256, size[1]), grid(size, 2, 128))
    ),
    "trellis 2 bits, table": lambda size: packed(coded(size, Trellis(2, 1, 12))),
    "trellis 2 bits, linear": lambda size: packed(coded(size, Trellis(2, 1, 12, "linear"))),
    "trellis 3 bits, table": lambda size: packed(coded(size, Trellis(3, 1, 12))),
    "rotated trellis 2 bits, rank 32": lambda size: packed(
        rotated(Sum((coded(size, Trellis(2, 1, 12)), low_rank(size, 32))), size[1])
    ),
}


def copied(value: Any) -> Any:
    """Return a layout with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Tensors):
        return replace(value, **{each.name: copied(getattr(value, each.name)) for each in fields(value)})
    return tuple(copied(each) for each in value) if isinstance(value, tuple) else value


# --- times ----------------------------------------------------------------------------------------------------------


def microseconds(calls: Sequence[Call]) -> float:
    """Return the time of one of some calls, which follow each other in a CUDA graph: the median of its replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def bandwidth() -> float:
    """Return the bytes a second that the GPU reads, or reads and writes, whichever is more."""
    free = torch.cuda.mem_get_info()[0]
    numbers = torch.randn(min(1 << 29, free // 16), device=DEVICE)
    other = torch.empty_like(numbers)
    size = numbers.numel() * numbers.element_size()
    read, copy = microseconds([numbers.sum]), microseconds([lambda: other.copy_(numbers)])
    return max(size / read, 2 * size / copy) * 1e6


def copies(size: int) -> int:
    """Return how many copies of so many bytes are more than the cache holds, four times over."""
    cache: int = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(2, min(MOST_COPIES, -(-4 * cache // size)))


@dataclass(frozen=True)
class Timed:
    """A product of a form with some tokens, and that of the dense weight in bfloat16; times in microseconds."""

    form: str
    matrix: str
    tokens: int
    bytes: int
    time: float
    dense: float
    bound: float

    @property
    def share(self) -> float:
        """The share of the bandwidth bound that is reached."""
        return self.bound / self.time


def timed(forms: Sequence[str], tokens: Sequence[int], rate: float) -> Iterator[Timed]:
    """Yield the times of forms by every shape."""
    for matrix, size in SHAPES.items():
        weights = [torch.randn(size, device=DEVICE).bfloat16() for _ in range(copies(2 * size[0] * size[1]))]
        inputs = {count: torch.randn(count, size[1], device=DEVICE).bfloat16() for count in tokens}
        dense = {
            count: microseconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights])  # type: ignore[misc]
            for count, x in inputs.items()
        }
        del weights
        for form in forms:
            first = FORMS[form](size)
            read = first.bytes()
            several = [first, *(copied(first) for _ in range(copies(read) - 1))]
            for count, x in inputs.items():
                time = microseconds([lambda w=w, x=x: product(w, x) for w in several])  # type: ignore[misc]
                yield Timed(form, matrix, count, read, time, dense[count], read / rate * 1e6)


def swept(forms: Sequence[str], tokens: Sequence[int]) -> Iterator[tuple[str, int, str, float]]:
    """Yield the time of every share of a program: (form, tokens, share, microseconds)."""
    from llmcompress.kernels.gpu.launches import Shares, launch_grid, launch_streams

    size = SHAPES["q/k/v"]
    for form in forms:
        first = FORMS[form](size)
        several = [first, *(copied(first) for _ in range(copies(first.bytes()) - 1))]
        branches = [weight.branches[0] for weight in several]
        for count in tokens:
            x = torch.randn(count, size[1], device=DEVICE).bfloat16()
            for warps, amount, height in combinations((1, 2, 4, 8), (32, 64, 128, 256, 512), (4, 8, 16, 32, 64)):
                streams = isinstance(first.branches[0].rows, StreamRows)
                if (streams and height > 4) or amount * height > 16384 or (count > 1 and not streams and height < 16):
                    continue
                shares = Shares(height, amount, amount, warps)

                def call(branch: Branch, x: Tensor = x, shares: Shares = shares) -> Tensor:
                    if isinstance(branch.rows, GridRows):
                        return launch_grid(x, branch.rows, branch.salient, None, None, x.dtype, shares)
                    return launch_streams(x, branch.rows, None, None, x.dtype, shares)

                time = microseconds([lambda branch=branch: call(branch) for branch in branches])  # type: ignore[misc]
                yield form, count, str(asdict(shares)), time


# --- agreement ------------------------------------------------------------------------------------------------------


def wrong(given: Given) -> dict[str, str]:
    """Return what is wrong, by name: products, and graphs that give other ones.

    Products are found before the rest is tried.
    """
    from tests.kernels.gpu.interpreted import answers

    measured = answers("cuda")
    found = {name: f"off by {off:.1e}, not {limit:.1e}" for name, (off, limit) in measured.items() if not off <= limit}
    given.found("products", {"wrong": len(found), "of": len(measured)}, errors=found)
    size = (1024, 1024)
    for form, make in FORMS.items():
        weight, x = make(size), torch.randn(3, size[1], device=DEVICE).bfloat16()
        expected = product(weight, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = product(weight, x)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(replayed, expected):
            found[f"{form}, replayed"] = "a CUDA graph gives other numbers"
    return found


def kernels(given: Given) -> None:
    """Multiply, and write the times as they come."""
    if given.device == "cpu":
        _interpreted(given)
        return
    if not runs_on(torch.device(given.device)):
        raise SystemExit(
            f"{given.device} is no NVIDIA GPU of compute capability 8.0 or later, or triton is not installed; the "
            f"kernels need both"
        )
    forms, tokens = chosen(given.forms), [int(count) for count in given.tokens.split(",")]
    errors, rate = wrong(given), bandwidth()
    given.found("agreement", {"wrong": len(errors), "bytes_per_second": rate}, errors=errors)
    rows = []
    for row in timed(forms, tokens, rate):
        rows.append(row)
        given.found(f"{row.form}, {row.matrix}, {row.tokens} tokens", asdict(row) | {"share": row.share})
        given.check_time(f"{len(rows)} times of kernels")
    single = [row for row in rows if row.tokens == 1]
    reached, slower = sum(row.share >= TARGET for row in single), sum(row.dense < row.time for row in rows)
    summed = {"of_one_token": len(single), "reach_the_target": reached, "slower_than_dense": slower, "of": len(rows)}
    given.found("all products", summed | {"target": TARGET})
    if errors:
        raise SystemExit(f"{len(errors)} products are wrong, the first {next(iter(errors.items()))}")


def chosen(part: str) -> list[str]:
    """Return the forms whose names have a part."""
    return [name for name in FORMS if part in name]


def _interpreted(given: Given) -> None:
    """Multiply some cases of the tests by Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from tests.kernels.gpu.interpreted import cases, on

    errors = {}
    for case in islice(cases(), FEW):
        if (off := on("cpu", case)) > case.limit():
            errors[case.name] = f"off by {off:.1e}, not {case.limit():.1e}"
    given.found("agreement, interpreted", {"wrong": len(errors), "of": FEW}, errors=errors)
    if errors:
        raise SystemExit(f"{len(errors)} products are wrong, the first {next(iter(errors.items()))}")
