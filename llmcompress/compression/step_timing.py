"""Speeds of steps on this machine: timed on parts of random matrices, and stored for the next estimate.

The time of a method has three terms: for each column, depending on the number of rows; for each weight and column of
the width, since a column changes later ones; and for the cube of the width, a factor that layers with one input share.
The first is timed on as many rows and few columns, the others on few rows and more columns.

Trials of many steps take seconds, so their results are stored in a file, beside the speed of products at that moment.
That speed is measured again at each estimate: if products take longer, steps do by the same ratio.

On a busy machine nothing is stored, and products have the speed of the last quiet moment. Trials run there on one
thread and count the processor's time: threads that wait for each other on cores that others take need many times as
long. Without a quiet moment, all threads count as so many times as fast as one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch

from llmcompress.errors import DiskError, InputError, first_line
from llmcompress.methods.layer import Layer, StepConfig, apply
from llmcompress.methods.moments import STATISTICS, Moments
from llmcompress.models.dense.gguf_model import cache_folder
from llmcompress.models.files.store import Store
from llmcompress.runtime.facts import torch_facts, versions
from llmcompress.runtime.load import busy_note
from llmcompress.runtime.progress import count_each
from llmcompress.weight.expression import dense
from llmcompress.weight.layout import pack_weight
from llmcompress.weight.nodes import Dense

COLUMNS, ROWS = 128, 2048  # of a matrix in the trials by rows, at most
FEW, WIDE = 256, 1024  # rows and columns of the trial by width
TRIALS, BRIEF = 5, 0.1  # of a matrix, or of products, as long as they take fewer seconds together
PACKAGE = Path(__file__).parents[1]
FOLDER = "speeds"  # in the cache, with a file for each machine and version
CODE = ("methods", "kernels", "weight")  # rooms whose code decides how fast steps are
LOOK = 30  # seconds for which a look at the load holds

T = TypeVar("T")
Clock = Callable[[], float]
Steps = tuple[StepConfig, ...]


@dataclass(frozen=True)
class Pace:
    """Seconds of some steps: for a column, by rows; for each weight and column of its width; for a width's cube."""

    columns: Mapping[int, float]
    update: float
    cube: float

    def seconds(self, rows: int, width: int) -> float:
        """Return the time of a matrix, without the factor that it may share."""
        known = min(rows, max(self.columns))
        return width * self.columns[known] * rows / known + self.update * rows * width**2

    def times(self, factor: float) -> Pace:
        """Return the pace of a machine that takes so many times as long."""
        columns = {rows: factor * each for rows, each in self.columns.items()}
        return Pace(columns, factor * self.update, factor * self.cube)


@dataclass(frozen=True, eq=False)
class TimedMoments(Moments):
    """Moments that measure the time of computing what layers share."""

    clock: list[float] = field(default_factory=list)
    now: Clock = time.perf_counter

    def memo(self, key: Any, compute: Callable[[], T]) -> T:
        """See `Moments.memo`."""
        if key in self.derived:
            return super().memo(key, compute)
        started, inner = self.now(), sum(self.clock)
        value: Any = super().memo(key, compute)
        self.clock.append(self.now() - started - (sum(self.clock) - inner))
        if isinstance(value, Moments):  # those of another basis
            parts = value.tokens, value.square, value.outer, value.cross, value.derived
            value = TimedMoments(*parts, self.clock, self.now)
            self.derived[key] = value
        return cast("T", value)


class Trial(NamedTuple):
    """Steps, and the size of the matrix, or of some of its rows, that they run on."""

    steps: Steps
    rows: int
    width: int


class Sizes(NamedTuple):
    """Sizes of trials for some matrices: numbers of rows on few columns, and numbers of columns on `few` rows."""

    rows: tuple[int, ...]
    few: int
    narrow: int
    wide: int

    @staticmethod
    def of(shapes: Iterable[tuple[int, int]]) -> Sizes:
        """Return the sizes for matrices of these shapes `(rows, width)`."""
        every = sorted(set(shapes))
        widest, few = max(width for _, width in every), min(FEW, max(rows for rows, _ in every))
        rows = sorted({min(rows, ROWS) for rows, _ in every} | {few})
        return Sizes(tuple(rows), few, min(COLUMNS, widest), min(WIDE, widest))


def paces(shapes: Mapping[Steps, Iterable[tuple[int, int]]], data: bool) -> dict[Steps, Pace]:
    """Return how fast steps are on matrices of some shapes `(rows, width)`; `data`: True with calibration.

    Earlier trials on this machine are read from their file; new ones are added.
    """
    now, store, is_quiet = product_speed(torch.float32), _pace_store(), busy_warning() is None
    stored, new, result = _read(store, "paces"), dict[str, Any](), dict[Steps, Pace]()
    for steps, sizes in count_each([(steps, Sizes.of(each)) for steps, each in shapes.items()], "list of steps timed"):
        key = sha256(repr((steps, sizes, data)).encode()).hexdigest()[:32]
        if (pace := _pace_of(stored.get(key), now)) is None:
            pace = measure_pace(steps, sizes, data)
            new[key] = asdict(pace) | {"speed": now}
            if not is_quiet:
                pace = pace.times(time_products(torch.float32) / now)
        result[steps] = pace
    if new and is_quiet:
        _write(store, "paces", stored | new)
    return result


def measure_pace(steps: Steps, sizes: Sizes, data: bool) -> Pace:
    """Measure how fast steps are, with calibration or without."""
    few, narrow, wide = sizes.few, sizes.narrow, sizes.wide
    time_steps(steps, few, narrow, data)  # compiles what it needs
    columns = {rows: time_steps(steps, rows, narrow, data)[0] / narrow for rows in sizes.rows}
    if wide == narrow:
        return Pace(columns, 0.0, 0.0)
    own, shared = time_steps(steps, few, wide, data)
    update = max(own / wide - columns[few], 0.0) / (few * (wide - narrow))
    columns = {rows: max(each - update * rows * narrow, 0.0) for rows, each in columns.items()}
    return Pace(columns, update, shared / wide**3)


def time_steps(steps: Steps, rows: int, width: int, data: bool) -> tuple[float, float]:
    """Run steps on a random matrix, several times if they are fast.

    Returns the fewest seconds of its own, and of what layers with one input share.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    inputs = Moments.of(torch.randn(2 * width, width, generator=generator), STATISTICS) if data else Moments(0.0)
    with _trial_clock() as now:
        first, times = now(), list[tuple[float, float]]()
        while not times or (len(times) < TRIALS and now() - first < BRIEF):
            moments = TimedMoments(inputs.tokens, inputs.square, inputs.outer, now=now)
            started = now()
            layer = Layer("trial", weight, Dense(weight.to(torch.bfloat16)), moments, "0")
            done = apply(layer, steps).expression()
            pack_weight(done)
            for _ in range(2):  # for its error, and when the next block reads its outputs
                dense(done)
            shared = sum(moments.clock)
            times.append((now() - started - shared, shared))
    return min(own for own, _ in times), min(shared for _, shared in times)


def product_speed(dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a product on this machine when it is quiet.

    On a busy machine it is the speed of the last quiet moment, if that is stored, or else that of one thread by their
    number.
    """
    store, name = _machine_store(), str(dtype)
    stored = _read(store, "products")
    if busy_warning() is not None:
        last = stored.get(name)
        return torch.get_num_threads() * time_products(dtype) if last is None else float(last["speed"])
    now, today = time_products(dtype), date.today().isoformat()
    if name not in stored or stored[name]["date"] != today:
        _write(store, "products", stored | {name: {"speed": now, "date": today}})
    return now


def time_products(dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a product at this moment, the best of a few times.

    On a busy machine it is that of one thread.
    """
    a = torch.ones(1024, 1024, dtype=dtype)
    with _trial_clock() as now:
        a @ a
        first, times = now(), list[float]()
        while not times or (len(times) < TRIALS and now() - first < BRIEF):
            started = now()
            for _ in range(4):
                a @ a
            times.append(now() - started)
    return 4 * 2 * 1024**3 / min(times)


@contextmanager
def _trial_clock() -> Iterator[Clock]:
    """Yield the clock of trials: on a busy machine the processor's, with one thread while the context lasts."""
    threads = torch.get_num_threads()
    if busy_warning() is None:
        yield time.perf_counter
        return
    torch.set_num_threads(1)
    try:
        yield time.process_time
    finally:
        torch.set_num_threads(threads)


def busy_warning() -> str | None:
    """Return a warning about times that are estimated on a busy machine; None on a quiet one."""
    note = _load_note(int(time.monotonic() / LOOK))
    if note is None:
        return None
    days = [entry["date"] for entry in _read(_machine_store(), "products").values()]
    if not days:
        return f"{note}, and how fast it is when quiet is not known yet: times are judged by one thread's speed"
    return f"{note}: times are for a quiet one, as measured on {max(days)}"


@lru_cache(maxsize=1)
def _load_note(_moment: int) -> str | None:
    return busy_note()


def _machine() -> dict[str, Any]:
    facts = torch_facts()
    return {"cpu": facts.cpu, "threads": facts.threads, "torch": torch.__version__}


def _machine_store() -> Store:
    """Return the store of the speed of products on this machine, which has one record."""
    return Store(cache_folder() / FOLDER, _machine())


def _pace_store() -> Store:
    """Return the store of the paces on this machine with this code, which has one record."""
    code = sha256()
    for path in sorted(path for room in CODE for path in (PACKAGE / room).rglob("*.py")):
        code.update(path.read_bytes())
    return Store(cache_folder() / FOLDER, _machine() | {"versions": versions(), "code": code.hexdigest()})


def _record_name(store: Store) -> str:
    return sha256(repr(sorted(store.identity.items())).encode()).hexdigest()[:16]


def _read(store: Store, what: str) -> dict[str, Any]:
    """Return earlier trials; nothing if the file is missing or damaged, since trials can be repeated."""
    try:
        record = store.get(_record_name(store))
    except InputError:
        return {}
    stored = None if record is None else record.entry.get(what)
    return stored if isinstance(stored, dict) else {}


def _write(store: Store, what: str, entry: Mapping[str, Any]) -> None:
    """Store trials; warn if that is impossible."""
    try:
        store.put(_record_name(store), {what: entry})
    except DiskError as error:
        warnings.warn(
            f"{store.folder}: speeds of this machine cannot be kept there ({first_line(error)}), so every plan tries "
            f"steps again; set LLMCOMPRESS_CACHE to a folder that can be written",
            stacklevel=2,
        )


def _pace_of(entry: Any, now: float) -> Pace | None:
    """Return a stored pace at the speed that products have `now`; None if it cannot be read."""
    try:
        columns = {int(rows): float(each) for rows, each in entry["columns"].items()}
        pace = Pace(columns, float(entry["update"]), float(entry["cube"]))
        return pace.times(float(entry["speed"]) / now)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
