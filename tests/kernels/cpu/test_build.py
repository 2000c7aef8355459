"""The cache of compiled kernels: what is kept, who reads it again, and what is never run."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from llmcompress.kernels.cpu import build, instruction_sets
from llmcompress.kernels.cpu.calls import Argument, KernelFunction, LoadedKernel
from llmcompress.kernels.cpu.emit import I64
from llmcompress.kernels.cpu.formats import IntegerPlanes, Streams
from llmcompress.kernels.cpu.instruction_sets import TIERS, host_tier
from llmcompress.kernels.cpu.product import Decoding, Product
from llmcompress.kernels.cpu.quantize_inputs import Inputs
from llmcompress.weight.trellis import linear_code

KEPT = build.cache_folder()  # with the kernels of all other tests

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot fork here")


@dataclass(frozen=True)
class Writes:
    """A kernel that writes a number to `Y`."""

    number: int

    def write(self, f: KernelFunction) -> None:
        f.store(f.constant(I64, self.number), f.pointer(Argument.Y))


def load(kernel: build.Kernel) -> LoadedKernel:
    """Load a kernel as a new process does."""
    return build.load_kernel.__wrapped__(kernel)


def result(kernel: Writes) -> int:
    y = ctypes.c_int64(-1)
    values = (ctypes.c_int64 * len(Argument))()
    values[Argument.Y] = ctypes.addressof(y)
    load(kernel).serial(ctypes.addressof(values), 0, 1)
    return y.value


def place(kernel: build.Kernel) -> Path:
    return build.cache_folder() / f"{build._key(kernel, host_tier())}.o"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", str(tmp_path / "kernels"))
    build._warn_once.cache_clear()
    yield tmp_path / "kernels"
    build._warn_once.cache_clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[build.Kernel]:
    """Every kernel that was compiled."""
    found, compiled = [], build.compile_kernel
    monkeypatch.setattr(build, "compile_kernel", lambda kernel, tier: found.append(kernel) or compiled(kernel, tier))
    return found


def test_a_kernel_is_compiled_once(folder: Path, compilations: list[build.Kernel]) -> None:
    assert [result(Writes(7)), result(Writes(7)), result(Writes(8))] == [7, 7, 8]
    assert compilations == [Writes(7), Writes(8)]
    assert sorted(folder.iterdir()) == sorted([place(Writes(7)), place(Writes(8))])


@pytest.mark.parametrize("size", ["nothing", "digest", "half", "all but one"])
def test_a_truncated_file_is_made_again(size: str, compilations: list[build.Kernel]) -> None:
    result(Writes(7))
    whole = place(Writes(7)).read_bytes()
    left = {"nothing": 0, "digest": build.DIGEST, "half": len(whole) // 2, "all but one": len(whole) - 1}[size]
    place(Writes(7)).write_bytes(whole[:left])
    assert result(Writes(7)) == 7 and len(compilations) == 2
    assert build.read_cached(place(Writes(7))) is not None


def test_a_damaged_file_is_made_again(compilations: list[build.Kernel]) -> None:
    result(Writes(7))
    whole = place(Writes(7)).read_bytes()
    for at in (0, build.DIGEST - 1, build.DIGEST, len(whole) // 2, len(whole) - 1):
        place(Writes(7)).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert build.read_cached(place(Writes(7))) is None, at
    assert result(Writes(7)) == 7 and len(compilations) == 2


def test_the_file_of_another_kernel_is_not_run(compilations: list[build.Kernel]) -> None:
    """It is whole, and code of ours, but would write other numbers to other places."""
    result(Writes(7))
    result(Writes(8))
    place(Writes(8)).replace(place(Writes(7)))
    assert result(Writes(7)) == 7 and len(compilations) == 3


def test_a_foreign_file_in_the_cache_is_not_run(compilations: list[build.Kernel]) -> None:
    place(Writes(7)).parent.mkdir()
    place(Writes(7)).write_bytes(Path(sys.executable).read_bytes()[:10_000])
    assert result(Writes(7)) == 7 and result(Writes(7)) == 7 and len(compilations) == 1


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")
def test_the_file_of_another_user_is_not_run(monkeypatch: pytest.MonkeyPatch, compilations: list[build.Kernel]) -> None:
    result(Writes(7))
    assert build.read_cached(place(Writes(7))) is not None
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert build.read_cached(place(Writes(7))) is None
    assert result(Writes(7)) == 7 and len(compilations) == 2


def test_cached_files_without_owners_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    result(Writes(7))
    monkeypatch.delattr(os, "getuid", raising=False)
    assert build.read_cached(place(Writes(7))) is not None


def test_a_folder_in_place_of_a_cached_file_warns(folder: Path) -> None:
    place(Writes(7)).mkdir(parents=True)
    with pytest.warns(UserWarning, match="compiled kernels cannot be kept there"):
        assert result(Writes(7)) == 7
    assert list(folder.iterdir()) == [place(Writes(7))], "nothing half done is left"


def test_an_unwritable_cache_folder_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[build.Kernel]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", str(tmp_path / "file" / "kernels"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [result(Writes(number)) for number in (7, 8, 7)] == [7, 8, 7]
    [warning] = said
    assert str(tmp_path / "file" / "kernels") in str(warning.message) and "LLMCOMPRESS_KERNELS" in str(warning.message)
    assert compilations == [Writes(7), Writes(8), Writes(7)]


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert build.cache_folder() == tmp_path / "kernels", "named by itself"
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "~/here")
    assert build.cache_folder() == tmp_path / "home" / "here"
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "")
    assert build.cache_folder() == tmp_path / "caches" / "llmcompress" / "kernels"
    result(Writes(7))
    assert len(list((tmp_path / "caches" / "llmcompress" / "kernels").iterdir())) == 1
    monkeypatch.delenv("LLMCOMPRESS_KERNELS")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == tmp_path / "home" / ".cache" / "llmcompress" / "kernels"


def test_the_key_of_a_kernel_changes_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = (
        IntegerPlanes(4, 64, False, 7.5),
        IntegerPlanes(4, 64, True, 7.5),
        IntegerPlanes(4, 32, False, 7.5),
        IntegerPlanes(3, 64, False, 3.5),
    )
    kernels = [Product(form, tokens, numbers) for form in forms for tokens in (1, 2) for numbers in (0, 1, 2)]
    kernels += [Product(forms[0], 1, 2, True), *(Decoding(form, short) for form in forms for short in (False, True))]
    kernels += [Inputs(width, 64, 1, False, 2, False) for width in (64, 128)] + [Inputs(64, 64, 1, True, 2, False)]
    names = [build._key(kernel, tier) for kernel in kernels for tier in TIERS]
    first = names[TIERS.index(host_tier())]

    def changed() -> str:
        return build._key(kernels[0], host_tier())

    with monkeypatch.context() as other:
        other.setattr(build.llvm, "get_host_cpu_name", lambda: "another")
        names.append(changed())
    with monkeypatch.context() as other:
        features = build.llvm.FeatureMap(dict.fromkeys((*host_tier().needs, "another"), True))
        other.setattr(build.llvm, "get_host_cpu_features", lambda: features)
        names.append(build._key(kernels[0], TIERS[-1]))
        other.setattr(build, "host_tier", lambda: TIERS[-1])
        names.append(build._key(kernels[0], TIERS[-1]))
    with monkeypatch.context() as other:
        other.setattr(build.llvmlite, "__version__", "0.0")
        names.append(changed())
    assert changed() == first, "nothing changed"
    for path in Path(build.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with monkeypatch.context() as other:
        other.setattr(build, "__file__", str(tmp_path / "build.py"))
        build._sources.cache_clear()
        assert changed() == first, "the same text elsewhere"
        (tmp_path / "formats.py").write_text((tmp_path / "formats.py").read_text() + "\n")
        build._sources.cache_clear()
        names.append(changed())
    build._sources.cache_clear()
    assert changed() == first
    repeated = {name for name in names if names.count(name) > 1}
    assert repeated == {build._key(kernels[0], TIERS[-1])}, "features of a host do not matter to what runs everywhere"


@pytest.mark.parametrize(
    ("triple", "flags", "tier"),
    [
        ("aarch64-unknown-linux-gnu", "fp asimd asimdhp asimddp", "neon"),
        ("aarch64-unknown-linux-gnu", "fp asimd", "portable"),
        ("arm64-apple-darwin24", None, "neon"),
    ],
)
def test_processors_of_arm_have_their_tier(
    triple: str, flags: str | None, tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLVM names no products of small integers there, and on a Mac nothing at all."""
    told = build.llvm.FeatureMap({} if flags is None else {"neon": True, "lse": True})
    monkeypatch.setattr(build.llvm, "get_default_triple", lambda: triple)
    monkeypatch.setattr(build.llvm, "get_host_cpu_features", lambda: told)
    monkeypatch.setattr(instruction_sets, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        instruction_sets.CPUINFO.write_text(f"processor\t: 0\nFeatures\t: {flags}\n")
    assert host_tier().name == tier
    assert build.triple(host_tier()) == triple
    assert tier != "neon" or "+dotprod" in instruction_sets.host_features().flatten().split(",")


def started(work: Callable[[], int]) -> BaseProcess:
    """Start another process, which ends with the number that `work` returns."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(work()))
    process.start()
    return process


def write_often(path: Path) -> int:
    for number in range(100):
        build.write_cached(path, bytes([number]) * 500_000)
    return 0


@needs_fork
def test_processes_that_write_at_once_leave_a_whole_file(folder: Path) -> None:
    path = folder / "one.o"
    build.write_cached(path, b"first" * 1000)
    writers = [started(lambda: write_often(path)) for _ in range(2)]
    seen = set()
    while any(writer.is_alive() for writer in writers):
        code = build.read_cached(path)
        assert code is not None, "half a file was seen"
        seen.add((len(code), len(set(code))))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert (500_000, 1) in seen and seen <= {(5000, 5), (500_000, 1)}
    assert build.read_cached(path) == bytes([99]) * 500_000
    assert list(folder.iterdir()) == [path]


@needs_fork
def test_the_next_process_compiles_nothing(compilations: list[build.Kernel]) -> None:
    def compile_one() -> int:
        return len(compilations) if result(Writes(7)) == 7 else 100

    first = started(compile_one)
    first.join()
    second = started(compile_one)
    second.join()
    assert (first.exitcode, second.exitcode) == (1, 0)
    assert result(Writes(7)) == 7 and not compilations, "nor does this one"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid", "trellis"])
def test_kernels_of_a_model_are_cached(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Print how long it takes to compile all kernels of a model of one form, and to load them again."""
    code = linear_code(2, 1, 12)
    numbers = tuple(tuple(part.tolist()) for part in code.numbers)
    form = IntegerPlanes(4, 64, False, 7.5) if name == "grid" else Streams(2, 1, 12, code.masks, numbers)
    kernels = [Product(form, 1, 2, True), Product(form, 2, 2), Decoding(form, True)]
    kernels += [Inputs(width, 64, 64, True, 2, True) for width in (576, 1536)]
    for word in ("compiled", "loaded again"):
        start = time.perf_counter()
        for kernel in kernels:
            assert load(kernel).parallel
        with capsys.disabled():
            print(f"\n{name}: {len(kernels)} kernels {word} in {time.perf_counter() - start:.2f} s", end="")


FAR_APART = """
import ctypes
from tests.kernels.cpu.test_products import FORMS, check

system = ctypes.CDLL(None)
system.mmap.restype = ctypes.c_void_p
system.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
system.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PRIVATE, ANONYMOUS, NO_RESERVE, GIGABYTES = 0x02, 0x20, 0x4000, 4 << 30
highest, *_ = [system.mmap(None, GIGABYTES, 0, PRIVATE | ANONYMOUS | NO_RESERVE, -1, 0) for _ in range(4)]
for hole in range(2, 2000):
    system.munmap(highest + GIGABYTES - (hole << 16), 4096)
for w in FORMS:
    check(w)
"""


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
def test_kernels_load_where_free_memory_lies_far_apart() -> None:
    """A page here and the rest gigabytes below: parts of one kernel must not be put into both."""
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "LLMCOMPRESS_KERNELS": str(KEPT)}
    done = subprocess.run([sys.executable, "-c", FAR_APART], env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
