"""A second device called `standin`, built from `stand_in.cpp`, for machines without a GPU. For a process of its own:
torch then takes this machine for one with an accelerator."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

NAME = "standin"


def build(compiler: str, folder: Path) -> Path:
    """Compiles the library into `folder`. Raises CalledProcessError, with what the compiler says, where it cannot."""
    torch_folder, library = Path(torch.__file__).parent, folder / "stand_in.so"
    includes = [f"-I{torch_folder / part}" for part in ("include", "include/torch/csrc/api/include")]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-w"]
    source = Path(__file__).with_name("stand_in.cpp")
    subprocess.run([compiler, *flags, *includes, str(source), "-o", str(library), *libraries], check=True)
    return library


def register(library: Path) -> None:
    """Makes the device known to torch in this process."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(library)
    calls = torch.ops.standin
    module: Any = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        device=lambda device: nullcontext(),
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        manual_seed=calls.seed,
        manual_seed_all=calls.seed,
        get_rng_state=lambda device=None: calls.state(),
        set_rng_state=lambda state, device=None: calls.set_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
