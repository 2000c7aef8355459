"""Registers our checkpoints with transformers at the moment transformers' quantizers are imported, not before.

transformers looks for third-party quantizers nowhere, and importing its registry takes seconds; so `import
llmcompress` leaves a finder that waits for that one module and adds ours behind it.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
PLUGIN = "llmcompress.hf"  # registers itself when it is imported


class _Then(Loader):
    """Loads a module with its own loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import_module(PLUGIN)


class _Waiting(MetaPathFinder):
    """Finds the registry once, for `_Then`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


def install() -> None:
    """Registers now if transformers' registry is loaded, else when it will be; safe to call again."""
    if REGISTRY in sys.modules:
        import_module(PLUGIN)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
