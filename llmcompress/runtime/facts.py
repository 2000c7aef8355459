"""Facts of this machine and this environment, as plain values: versions, and all that `doctor` judges."""

from __future__ import annotations

import functools
import os
import platform
import re
import resource
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
from packaging import requirements

from llmcompress.errors import first_line
from llmcompress.runtime.load import usable_cores
from llmcompress.runtime.memory import total_memory

NVIDIA, AMD, SHM = Path("/proc/driver/nvidia/version"), Path("/dev/kfd"), Path("/dev/shm")
PRODUCTS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512_f", "avx2", "sve", "bf16", "neon")
RESULT_PACKAGES = ("llmcompress", "torch", "transformers", "safetensors")  # whose versions make a result
VARIABLES = (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "OMP_NUM_THREADS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass(frozen=True)
class Requirement:
    """A package that llmcompress uses in some `versions`, always or for one of its extras."""

    package: str
    versions: str  # such as >=2.10,!=2.12.0
    extra: str | None = None


@dataclass(frozen=True)
class GpuFacts:
    """One GPU as torch sees it; `capability` is major and minor."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class TorchFacts:
    """The build of torch and the devices it finds. With an `error`, it cannot be imported and nothing else holds."""

    error: str | None = None
    gpu_build: str | None = None  # CUDA or ROCm with its version; None: for CPUs alone
    blas: str = "unknown"
    onednn: bool = False
    capability: str = "unknown"  # of its kernels
    cpu: str = ""
    flags: tuple[str, ...] = ()  # those of PRODUCTS that the CPU has
    precise: bool = True  # float32 products are not rounded
    threads: int = 1
    architectures: tuple[str, ...] = ()  # GPUs that it has kernels for: sm_80, compute_90
    gpus: tuple[GpuFacts, ...] = ()
    complaint: str | None = None  # its warning while it looked for GPUs


@dataclass(frozen=True)
class FolderFacts:
    """A folder, existing or to be made: whether it can be written, and the free bytes of its disk."""

    path: str
    writable: bool
    free: int


@dataclass(frozen=True)
class MachineFacts:
    """The facts of a process. Sizes are in bytes; `packages` has None for missing ones."""

    python: tuple[int, int, int]
    system: str
    cores: int  # usable ones, by affinity and control group
    physical_cores: int
    memory: int  # usable bytes
    available: int
    torch: TorchFacts
    cache: FolderFacts
    hub_cache: FolderFacts
    current: FolderFacts
    driver: str | None = None  # of NVIDIA's or AMD's GPUs; None: there is none
    packages: Mapping[str, str | None] = field(default_factory=dict)
    requirements: tuple[Requirement, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    open_files: int = 1024
    shared_memory: int | None = None  # bytes free in /dev/shm; None: there is no such folder


def gather(cache: Path, hub_cache: Path, others: tuple[str, ...] = ()) -> MachineFacts:
    """Return the facts of this process.

    Args:
        cache: folder of the embedded model.
        hub_cache: folder of downloads.
        others: packages to look for, beside those that llmcompress requires.
    """
    cores, total, required = usable_cores(), total_memory(), list_requirements()
    names = {requirement.package for requirement in required} | set(others)
    return MachineFacts(
        python=sys.version_info[:3],
        system=platform.platform(),
        cores=cores,
        physical_cores=psutil.cpu_count(logical=False) or cores,
        memory=total,
        available=min(total, int(psutil.virtual_memory().available)),
        torch=torch_facts(),
        cache=folder_facts(cache),
        hub_cache=folder_facts(hub_cache),
        current=folder_facts(Path.cwd()),
        driver=_driver(),
        packages={name: package_version(name) for name in sorted(names)},
        requirements=required,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shared_memory=shutil.disk_usage(SHM).free if SHM.is_dir() else None,
    )


def list_requirements() -> tuple[Requirement, ...]:
    """Return the requirements in the metadata of llmcompress; none if it is not installed."""
    try:
        lines = metadata.requires("llmcompress") or []
    except metadata.PackageNotFoundError:
        return ()
    required = []
    for line in map(requirements.Requirement, lines):
        extra = re.search(r'extra == "([\w-]+)"', str(line.marker))
        if extra is None or extra[1] != "dev":
            required.append(Requirement(line.name.lower(), str(line.specifier), extra and extra[1]))
    return tuple(required)


def torch_facts() -> TorchFacts:
    """Return how torch was built, and its abilities here."""
    try:
        import torch

        from llmcompress.runtime.precision import PRECISE, cpu_features, product_error
    except (ImportError, OSError) as error:  # OSError: a library of torch is missing
        return TorchFacts(error=first_line(error))
    known = cpu_features()
    builds = (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip))
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gpus = _gpus()
    return TorchFacts(
        gpu_build=next((f"{kind} {version}" for kind, version in builds if version), None),
        blas=blas[1] if blas else "unknown",
        onednn=torch.backends.mkldnn.is_available(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cpu=str(known.get("cpu_name", platform.processor())),
        flags=tuple(name for name in PRODUCTS if known.get(name)),
        precise=product_error() < PRECISE,
        threads=torch.get_num_threads(),
        architectures=tuple(torch.cuda.get_arch_list()),
        gpus=gpus,
        complaint=str(said[0].message) if said else None,
    )


def _gpus() -> tuple[GpuFacts, ...]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = map(torch.cuda.get_device_properties, range(count))
    return tuple(GpuFacts(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)) for gpu in gpus)


def folder_facts(folder: Path) -> FolderFacts:
    """Return the facts of a folder, or of the nearest existing one around it."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return FolderFacts(str(folder), writable, shutil.disk_usage(nearest).free)


def _driver() -> str | None:
    """Return the GPU driver that the kernel has loaded, by its maker and version."""
    if NVIDIA.exists():
        version = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", NVIDIA.read_text())
        return f"NVIDIA {version[0]}" if version else "NVIDIA"
    return "AMD" if AMD.exists() else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that make a result."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    """Return `versions`, read once: a process runs the packages that it started with."""
    return {"python": platform.python_version()} | {
        package: package_version(package) or "not installed as a package" for package in RESULT_PACKAGES
    }


def package_version(package: str) -> str | None:
    """Return the version of an installed package; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
