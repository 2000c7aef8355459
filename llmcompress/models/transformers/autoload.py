"""Let transformers find an installed llmcompress without `import llmcompress`: `llmcompress.pth` imports this file.

transformers has no entry point for quantizers, and its message on an unknown one advises to delete
`quantization_config`. Code runs before it only at the start of Python, which reads every `.pth` file of an environment.
So this file is small: it imports `sys` alone and adds one finder to `sys.meta_path`, which is gone once transformers
lists its quantizers and one name is added to that list. The library itself is imported for the first checkpoint with
`quant_method: llmcompress`. Python's start takes less than 1 ms more.

pip installs and removes it with the package. Where `.pth` files are not read (`python -S`, a clone on PYTHONPATH
alone), import llmcompress first. The wheel has it as `_llmcompress_autoload`, beside the package, so that a clone in
the working folder still wins over an installed package.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing costs more than all the rest
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

QUANTIZERS = "transformers.quantizers.auto"
OURS = "llmcompress"  # again: the wheel has this file outside of the package


class _Later:
    """Holds the place of our config in the list of transformers, until the first checkpoint with one."""

    @classmethod
    def from_dict(cls, entries: dict[str, Any], **more: Any) -> Any:
        """Import llmcompress, which puts its own class into this place, and return what that returns."""
        import llmcompress.models.transformers.hf_quantizer  # noqa: F401  (registers itself)

        return sys.modules[QUANTIZERS].AUTO_QUANTIZATION_CONFIG_MAPPING[OURS].from_dict(entries, **more)


class _Then:
    """Load the list with its own loader, then add the name."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        known = getattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
        if isinstance(known, dict):
            known.setdefault(OURS, _Later)


class _Waiting:
    """Find the list once, for `_Then`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != QUANTIZERS:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)  # type: ignore[assignment]  # a loader in all but its base class
        return spec


def wait() -> None:
    """Wait for the list of quantizers, unless it is there already."""
    if QUANTIZERS not in sys.modules:
        sys.meta_path.insert(0, _Waiting())


wait()
