"""Work in a process that dies before a call of the system, without any cleaning up."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

CALLS = {"mkdir", "open", "write", "close", "fsync", "rename", "replace", "unlink", "remove", "rmdir", "serialize_file"}


def die_before(call: int, work: Callable[[], Any]) -> bool:
    """Do the work in a process that dies before its call of the system with this number; return whether it died."""
    child = os.fork()
    if child == 0:
        left = call

        def watch(frame: FrameType, event: str, called: Any) -> None:
            nonlocal left
            if event == "c_call" and called.__name__ in CALLS:
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.setprofile(watch)
        work()
        sys.setprofile(None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
