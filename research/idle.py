"""The source code of IDLE, which no text to calibrate or to learn from has: modules 10 to 29 by name."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def idle_source() -> str:
    """Return the modules' text, blank lines between them."""
    modules = sorted(Path(sysconfig.get_path("stdlib"), "idlelib").glob("*.py"))[10:30]
    return "\n\n".join(module.read_text(encoding="utf-8") for module in modules)
