"""The refusal of PEFT's own merges of adapters into compressed weights, before anything changes.

It is imported together with PEFT's tuners (`import_hooks.py`). PEFT has no hook for others to forbid a merge, so its
check is replaced by one that knows codes. `lora.fold` is the merge that works.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from llmcompress.errors import InputError
from llmcompress.weight.modules import Compressed


def knowing_codes(allowed: Callable[[BaseTuner], None]) -> Callable[[BaseTuner], None]:
    """Return PEFT's check before a merge, extended to raise InputError for adapters on compressed weights."""

    @wraps(allowed)
    def check(tuner: BaseTuner) -> None:
        for name, module in tuner.model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), Compressed):
                raise InputError(
                    f"PEFT cannot merge an adapter into {name}, which is compressed; make plain LoRA part of the model "
                    "by llmcompress.fold, or save the adapter beside it"
                )
        allowed(tuner)

    return check


BaseTuner._check_merge_allowed = knowing_codes(BaseTuner._check_merge_allowed)  # type: ignore[method-assign]
