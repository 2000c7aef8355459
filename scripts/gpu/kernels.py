"""The kernels for GPUs, on a GPU: agreement with decoded weights, then times beside torch's bfloat16 products.

Every form is first multiplied as in the tests. Then each is timed on shapes of models of 8 billion parameters, as
replays of a CUDA graph over enough copies of a weight to exceed the cache; `bound` is the time in which the GPU reads
the bytes of the weight, by its measured bandwidth. On the CPU Triton's interpreter multiplies a few cases.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from itertools import product as combinations
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels.gpu.layouts import Branch, GpuWeight, GridRows, StreamRows, Tensors
from llmcompress.kernels.gpu.prepare import multiply, prepare, runs_on
from llmcompress.weight.expression import dense
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
from scripts.gpu.loan import Loan

SHAPES = {  # (out, in)
    "o": (4096, 4096),
    "q/k/v": (6144, 4096),
    "gate/up": (28672, 4096),
    "down": (4096, 14336),
}
TARGET = 0.6  # of the bandwidth bound, one token
ROUNDS, MOST_COPIES = 20, 128
FEW = 3  # cases of the tests for Triton's interpreter
Size = tuple[int, int]
Call = Callable[[], Tensor]


# --- weights, on torch's default device -----------------------------------------------------------------------------


def grid(size: Size, levels: int, group: int) -> Grid:
    """Return a symmetric grid of random codes."""
    codes = torch.randint(levels, size, dtype=torch.uint8)
    return Grid(codes, (torch.rand(size[0], -(-size[1] // group)) + 0.1).half(), None, levels, group)


def coded(size: Size, trellis: Trellis) -> TrellisCodes:
    """Return random streams of a trellis."""
    steps = size[0] * size[1] // trellis.values
    codes = torch.randint(1 << trellis.bits, (steps,), dtype=torch.uint8)
    return TrellisCodes(codes, (torch.rand(size[0], 1) + 0.1).half(), trellis, 768)


def signs(size: Size) -> Grid:
    """Return signs with a scale for 128 columns."""
    return grid(size, 2, 128)


def rotated_trellis(size: Size, rank: int) -> RotatedInputs:
    """Return a trellis and a low-rank term in a random basis."""
    left, right = torch.randn(size[0], rank).bfloat16(), torch.randn(rank, size[1]).bfloat16()
    term = LowRank(Dense(left), Dense(right))
    total = Sum((coded(size, Trellis(2, 1, 12)), term))
    return RotatedInputs(total, torch.rand(size[1]) < 0.5, size[1] & -size[1])


FORMS: dict[str, Callable[[Size], Weight]] = {
    "grid 8 bits, row": lambda size: grid(size, 256, size[1]),
    "grid 4 bits, g128": lambda size: grid(size, 16, 128),
    "grid 3 bits, g128": lambda size: grid(size, 8, 128),
    "grid 2 bits, g64": lambda size: grid(size, 4, 64),
    "signs, g128": signs,
    "signs and 10 % of columns": lambda size: Where(
        Columns(torch.rand(size[1]) < 0.1), grid(size, 256, size[1]), signs(size)
    ),
    "signs and 10 % of elements": lambda size: Where(
        Bitmap(torch.rand(size) < 0.1), grid(size, 256, size[1]), signs(size)
    ),
    "trellis 2 bits, table": lambda size: coded(size, Trellis(2, 1, 12)),
    "trellis 2 bits, linear": lambda size: coded(size, Trellis(2, 1, 12, "linear")),
    "trellis 3 bits, table": lambda size: coded(size, Trellis(3, 1, 12)),
    "rotated trellis 2 bits, rank 32": lambda size: rotated_trellis(size, 32),
}
VALUABLE = ("trellis 2 bits, table", "trellis 2 bits, linear", "grid 4 bits, g128")  # forms that a loan times


def packed(form: str, size: Size, device: torch.device) -> GpuWeight:
    """Return a random weight of a form for products."""
    with device:
        return prepared(FORMS[form](size))


def prepared(w: Weight) -> GpuWeight:
    """Return a weight for products. Raises TypeError for one without a kernel."""
    weight = prepare(w)
    if weight is None:
        raise TypeError(f"no kernel for {type(w).__name__}")
    return weight


def copy_layout(value: Any) -> Any:
    """Return a layout with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Tensors):
        return replace(value, **{each.name: copy_layout(getattr(value, each.name)) for each in fields(value)})
    return tuple(copy_layout(each) for each in value) if isinstance(value, tuple) else value


# --- times ----------------------------------------------------------------------------------------------------------


def microseconds(calls: Sequence[Call], device: torch.device) -> float:
    """Return the time of one of some calls, which follow each other in a CUDA graph: the median of its replays."""
    if device.type == "cpu":
        started = time.perf_counter()
        for call in calls:
            call()
        return 1e6 * (time.perf_counter() - started) / len(calls)
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


def bandwidth(device: torch.device) -> float:
    """Return the bytes a second that the device reads, or reads and writes, whichever is more."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 1 << 20
    numbers = torch.randn(min(1 << 29, free // 16), device=device)
    other = torch.empty_like(numbers)
    size = numbers.numel() * numbers.element_size()
    read, copy = microseconds([numbers.sum], device), microseconds([lambda: other.copy_(numbers)], device)
    return max(size / read, 2 * size / copy) * 1e6


def copies(size: int, device: torch.device) -> int:
    """Return the number of copies of so many bytes that exceed the cache four times."""
    if device.type == "cpu":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
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


def time_products(
    device: torch.device, forms: Sequence[str], tokens: Sequence[int], shapes: dict[str, Size] = SHAPES
) -> Iterator[Timed]:
    """Yield the times of forms by every shape."""
    rate = bandwidth(device)
    for matrix, size in shapes.items():
        count = copies(2 * size[0] * size[1], device)
        weights = [torch.randn(size, device=device).bfloat16() for _ in range(count)]
        inputs = {count: torch.randn(count, size[1], device=device).bfloat16() for count in tokens}
        plain = {
            count: microseconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights], device)  # type: ignore[misc]
            for count, x in inputs.items()
        }
        del weights
        for form in forms:
            first = packed(form, size, device)
            read = first.bytes()
            several = [first, *(copy_layout(first) for _ in range(copies(read, device) - 1))]
            for count, x in inputs.items():
                taken = microseconds([lambda w=w, x=x: multiply(w, x) for w in several], device)  # type: ignore[misc]
                yield Timed(form, matrix, count, read, taken, plain[count], read / rate * 1e6)


def products(loan: Loan) -> None:
    """Microseconds of products of an 8B model's shapes beside dense bfloat16, and their error by the decoded weight."""
    shapes = {"small": (64, 128)} if loan.small else {name: SHAPES[name] for name in ("o", "down")}
    for row in time_products(loan.device, VALUABLE, (1,) if loan.small else (1, 16, 512), shapes):
        loan.say(f"{row.form}, {row.matrix}, {row.tokens} tokens: us", value=row.time, **asdict(row))
    size = next(iter(shapes.values()))
    for form in VALUABLE:
        with loan.device:
            w, x = FORMS[form](size), torch.randn(1, size[1]).bfloat16()
        expected = x.double() @ dense(w).double().T
        off = multiply(prepared(w), x).double() - expected
        loan.say(f"{form}: relative error", value=float(off.norm() / expected.norm()))


def sweep(device: torch.device, forms: Sequence[str], tokens: Sequence[int]) -> Iterator[tuple[str, int, str, float]]:
    """Yield the time of every share of a program: (form, tokens, share, microseconds)."""
    from llmcompress.kernels.gpu.grid_triton import launch_grid
    from llmcompress.kernels.gpu.trellis_triton import launch_streams

    size = SHAPES["q/k/v"]
    for form in forms:
        first = packed(form, size, device)
        several = [first, *(copy_layout(first) for _ in range(copies(first.bytes(), device) - 1))]
        branches = [weight.branches[0] for weight in several]
        for count in tokens:
            x = torch.randn(count, size[1], device=device).bfloat16()
            for warps, amount, height in combinations((1, 2, 4, 8), (32, 64, 128, 256, 512), (4, 8, 16, 32, 64)):
                streams = isinstance(first.branches[0].rows, StreamRows)
                if (streams and height > 4) or amount * height > 16384 or (count > 1 and not streams and height < 16):
                    continue
                shares = ({"COLUMNS": amount} if streams else {"ROWS": height, "WORDS": amount}) | {"num_warps": warps}

                def call(branch: Branch, x: Tensor = x, shares: dict[str, int] = shares) -> Tensor:
                    if isinstance(branch.rows, GridRows):
                        return launch_grid(x, branch.rows, branch.salient, None, None, x.dtype, shares)
                    return launch_streams(x, branch.rows, None, None, x.dtype, shares)

                taken = microseconds([lambda branch=branch: call(branch) for branch in branches], device)  # type: ignore[misc]
                yield form, count, str(shares), taken


# --- agreement ------------------------------------------------------------------------------------------------------


def find_errors(given: Given) -> dict[str, str]:
    """Return the wrong products, by name, and graphs that give other ones.

    Products are written before the rest is tried.
    """
    from tests.kernels.gpu.interpreted import answers

    device, measured = torch.device(given.device), answers("cuda")
    errors = {name: f"off by {off:.1e}, not {limit:.1e}" for name, (off, limit) in measured.items() if not off <= limit}
    given.found("products", {"wrong": len(errors), "of": len(measured)}, errors=errors)
    for form in FORMS:
        weight, x = packed(form, (1024, 1024), device), torch.randn(3, 1024, device=device).bfloat16()
        expected = multiply(weight, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = multiply(weight, x)
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(replayed, expected):
            errors[f"{form}, replayed"] = "a CUDA graph gives other numbers"
    return errors


def kernels(given: Given) -> None:
    """Multiply, and write the times as they come."""
    if given.device == "cpu":
        errors = _interpret_cases(given)
    elif runs_on(device := torch.device(given.device)):
        errors = find_errors(given)
        given.found("agreement", {"wrong": len(errors)}, errors=errors)
        rows = []
        for row in time_products(device, forms_with(given.forms), [int(count) for count in given.tokens.split(",")]):
            rows.append(row)
            given.found(f"{row.form}, {row.matrix}, {row.tokens} tokens", asdict(row) | {"share": row.share})
            given.check_time(f"{len(rows)} times of kernels")
        single = [row for row in rows if row.tokens == 1]
        reached, slower = sum(row.share >= TARGET for row in single), sum(row.dense < row.time for row in rows)
        counts = {"of_one_token": len(single), "reach_the_target": reached, "slower_than_dense": slower}
        given.found("all products", counts | {"of": len(rows), "target": TARGET})
    else:
        raise SystemExit(
            f"{given.device} is no NVIDIA GPU of compute capability 8.0 or later, or triton is not installed; the "
            f"kernels need both"
        )
    if errors:
        raise SystemExit(f"{len(errors)} products are wrong, the first {next(iter(errors.items()))}")


def forms_with(part: str) -> list[str]:
    """Return the forms whose names have a part."""
    return [name for name in FORMS if part in name]


def _interpret_cases(given: Given) -> dict[str, str]:
    """Multiply some cases of the tests by Triton's interpreter; return the wrong ones."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from tests.kernels.gpu.interpreted import cases, on

    errors = {}
    for case in islice(cases(), FEW):
        if (off := on("cpu", case)) > case.limit():
            errors[case.name] = f"off by {off:.1e}, not {case.limit():.1e}"
    given.found("agreement, interpreted", {"wrong": len(errors), "of": FEW}, errors=errors)
    return errors
