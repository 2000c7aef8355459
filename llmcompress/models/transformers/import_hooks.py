"""Register compressed checkpoints with transformers and PEFT when those are imported, not before.

Neither looks for plug-ins by itself, and importing them takes seconds. So `import llmcompress` installs a finder that
waits for their modules, and after each imports ours or calls a function of it.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

PATCHES = "llmcompress.models.transformers.patches"
AWAITED = {  # their module -> ours, which registers itself on import, or module:function
    "transformers.modeling_utils": f"{PATCHES}:mend_models",
    "transformers.trainer": f"{PATCHES}:mend_trainer",
    "peft.peft_model": f"{PATCHES}:mend_peft_models",
    "transformers.quantizers.auto": "llmcompress.models.transformers.hf_quantizer",
    "peft.tuners.tuners_utils": f"{PATCHES}:mend_peft_tuners",
}


class _Then(Loader):
    """Load a module with its own loader, then do ours."""

    def __init__(self, loader: Loader, ours: str) -> None:
        self.loader = loader
        self.ours = ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _apply(self.ours)


class _Waiting(MetaPathFinder):
    """Find one module once, for `_Then`."""

    def __init__(self, theirs: str) -> None:
        self.theirs = theirs

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, AWAITED[fullname])
        return spec


_APPLIED: set[str] = set()


def _apply(ours: str) -> None:
    """Import a module of ours and call the function that is named after the colon, once in a process."""
    if ours in _APPLIED:
        return
    _APPLIED.add(ours)
    name, _, function = ours.partition(":")
    module = import_module(name)
    if function:
        getattr(module, function)()


def install() -> None:
    """Import our modules now if theirs are loaded, otherwise after them. Safe to call again."""
    waiting = {finder.theirs for finder in sys.meta_path if isinstance(finder, _Waiting)}
    for theirs, ours in AWAITED.items():
        if theirs in sys.modules:
            _apply(ours)
        elif theirs not in waiting:
            sys.meta_path.insert(0, _Waiting(theirs))
