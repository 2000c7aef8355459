"""The versions that made a result."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("llmcompress", "torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """The versions that made a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
