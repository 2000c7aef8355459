"""Packages that are called like the function of their name: `lc.distill(...)` beside `llmcompress.distill.run`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package with a function of its own name, which answers for it: when called, in `help`, and for its signature.

    The function's file is imported when one of these is asked for.
    """

    function_home: str  # the file, such as "run" for llmcompress.distill.run.distill

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function()(*args, **kwargs)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self._function().__doc__

    @property
    def __signature__(self) -> Signature:
        return signature(self._function())

    def _function(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(
            import_module(f"{self.__name__}.{self.function_home}"), self.__name__.rpartition(".")[2]
        )
        return found


def make_callable(package: str, home: str) -> None:
    """Let the imported `package` be called like the function of its name, which is in its file `home`."""
    module = sys.modules[package]
    module.__class__ = CallablePackage
    module.function_home = home  # type: ignore[attr-defined]
