"""Machine code of kernels: compiled by LLVM at first use, and cached on disk for the next process."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from llmcompress.kernels.cpu.calls import KernelFunction, LoadedKernel, write_parallel
from llmcompress.kernels.cpu.instruction_sets import Instructions, Tier, host_features, host_kind, host_tier
from llmcompress.runtime.progress import count_steps

DIGEST = 32  # bytes of SHA-256 before the object in a cached file


class Kernel(Protocol):
    """The description of a kernel, with a repr of its own."""

    def __hash__(self) -> int: ...

    def write(self, f: KernelFunction) -> None:
        """Write the body of the function."""


@lru_cache(maxsize=256)
def load_kernel(kernel: Kernel, tier: Tier | None = None) -> LoadedKernel:
    """Return a kernel for this machine, or for a lower tier of it."""
    tier = host_tier() if tier is None else tier
    path = cache_folder() / f"{_key(kernel, tier)}.o"
    code = read_cached(path)
    if code is None:
        step = count_steps("kernel compiled", 1)
        code = compile_kernel(kernel, tier)
        step()
        write_cached(path, code)
    # JITLink puts a kernel into one piece of memory. MCJIT maps its sections one by one: in fragmented memory they lie
    # too far apart for a jump, and the process ends.
    linker = llvm.create_lljit_compiler(target_machine(tier), use_jit_link=True)
    library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    linked = library.export_symbol("kernel").export_symbol("parallel").link(linker, "kernel")
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    serial: Any = kind(linked["kernel"])
    serial.owner = linked  # keeps the code while it runs
    return LoadedKernel(serial, linked["parallel"], linked)


def write_intermediate(kernel: Kernel, tier: Tier) -> str:
    """Return LLVM's intermediate code of a kernel."""
    module = ir.Module("kernel")
    module.triple = triple(tier)
    f = KernelFunction(module, Instructions(tier))
    kernel.write(f)
    f.finish()
    write_parallel(module)
    return str(module)


def compile_kernel(kernel: Kernel, tier: Tier) -> bytes:
    """Return the object code of a kernel."""
    machine = target_machine(tier)
    module = llvm.parse_assembly(write_intermediate(kernel, tier))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    llvm.create_pass_builder(machine, options).getModulePassManager().run(
        module, llvm.create_pass_builder(machine, options)
    )
    code: bytes = machine.emit_object(module)
    return code


def triple(tier: Tier) -> str:
    """Return the LLVM triple of a tier: this machine's own if it is of that kind."""
    host: str = llvm.get_default_triple()
    return host if host_kind().startswith(tier.triple) else f"{tier.triple}-unknown-linux-gnu"


def target_machine(tier: Tier) -> Any:
    """Return LLVM's description of the processors of a tier."""
    _initialize()
    name, features = tier.cpu, ",".join(f"+{need}" for need in tier.needs)
    if tier == host_tier() and tier.needs:
        name, features = llvm.get_host_cpu_name(), host_features().flatten()
    wide = tier.name.startswith("avx512")
    features += ",-prefer-256-bit" if wide else ""
    target = llvm.Target.from_triple(triple(tier))
    return target.create_target_machine(cpu=name, features=features, opt=3, reloc="pic", codemodel="small")


@lru_cache(maxsize=1)
def _initialize() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


# --- on disk --------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of compiled kernels, `LLMCOMPRESS_KERNELS` or one below the user's cache."""
    folder = os.environ.get("LLMCOMPRESS_KERNELS")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(folder or Path(base) / "llmcompress" / "kernels"))


def read_cached(path: Path) -> bytes | None:
    """Return the object code in a file; None if it is missing, damaged, another kernel's, or another user's."""
    try:
        with path.open("rb") as file:
            if hasattr(os, "getuid") and os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            data = file.read()
    except OSError:
        return None
    digest, code = data[:DIGEST], data[DIGEST:]
    return code if _digest(path, code) == digest else None


def write_cached(path: Path, code: bytes) -> None:
    """Write object code to the cache; warn, once in a process, if that is impossible."""
    staged: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            staged = Path(file.name)
            file.write(_digest(path, code) + code)
        staged.replace(path)  # whole or not at all; the digest detects what a crash leaves
    except OSError as error:
        if staged is not None:
            staged.unlink(missing_ok=True)
        _warn_once(str(path.parent), error.strerror or str(error))


def _digest(path: Path, code: bytes) -> bytes:
    """Return the first bytes of a file: a digest of name and code, since another kernel's code is as harmful."""
    return hashlib.sha256(path.name.encode() + code).digest()


@lru_cache(maxsize=8)
def _warn_once(folder: str, reason: str) -> None:
    warnings.warn(
        f"{folder}: compiled kernels cannot be kept there ({reason}), so every process compiles them again; "
        f"set LLMCOMPRESS_KERNELS to a folder that can be written",
        stacklevel=2,
    )


def _key(kernel: Kernel, tier: Tier) -> str:
    """Return the name of a cached kernel: a digest of all that decides its code."""
    features = host_features().flatten() if tier == host_tier() else ""
    parts = (repr(kernel), repr(tier), _sources(), llvmlite.__version__, llvm.get_host_cpu_name(), features)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@lru_cache(maxsize=1)
def _sources() -> str:
    """Return a digest of the files that write kernels."""
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"\n".join(texts)).hexdigest()
