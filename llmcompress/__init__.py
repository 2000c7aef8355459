"""Compress Hugging Face language models: prune, partially binarize, compensate, score, publish.

    import llmcompress as lc
    result = lc.compress("smollm2", "recipe.yaml")
    result.save("out")

Importing the package teaches transformers to load what it writes, and does nothing else; what it offers is loaded
when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmcompress.models import import_hooks

if TYPE_CHECKING:
    from llmcompress.driver import Result
    from llmcompress.errors import LLMCompressError
    from llmcompress.evaluate.compare import compare
    from llmcompress.evaluate.protocol import Protocol
    from llmcompress.evaluate.report import Report, read
    from llmcompress.evaluate.score import score
    from llmcompress.models.lora import fold, plain_head
    from llmcompress.recipe.calibration import Calibration
    from llmcompress.recipe.compression import Recipe, Rule
    from llmcompress.recover import compress, plan
    from llmcompress.surgery import alike_blocks, drop_blocks
    from llmcompress.weight.modules import decoded

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "LLMCompressError",
    "Protocol",
    "Recipe",
    "Report",
    "Result",
    "Rule",
    "alike_blocks",
    "compare",
    "compress",
    "decoded",
    "drop_blocks",
    "fold",
    "plain_head",
    "plan",
    "read",
    "score",
]

_HOMES = {
    "Calibration": "tokens",
    "LLMCompressError": "errors",
    "Protocol": "protocol",
    "Recipe": "recipe",
    "Report": "report",
    "Result": "driver",
    "Rule": "recipe",
    "alike_blocks": "surgery",
    "compare": "comparison",
    "compress": "recover",
    "decoded": "modules",
    "drop_blocks": "surgery",
    "fold": "adapters",
    "plain_head": "adapters",
    "plan": "recover",
    "read": "report",
    "score": "scoring",
}

import_hooks.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
