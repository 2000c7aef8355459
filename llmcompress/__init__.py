"""Compress Hugging Face language models: prune, partially binarize, compensate, score, publish.

    import llmcompress as lc
    result = lc.compress("smollm2", "recipe.yaml")
    result.save("out")

Make a model smaller: `plan`, `compress`, `drop_blocks` (and `least_damage`, `alike_blocks`), `narrow`, `distill`,
`shrink`; of a mixture's experts: `prune_experts`, `merge_experts`, `condense_experts`, `replace_experts`.
Look at the result: `read` its report, `verify` its files, `score` it, `compare` it, see its `drift`
block by block, `bench` its speed, and tell by a `passport` what the dense model's adapters are worth on it.
Run it: transformers loads it after this import; `accelerate`, `decoded` and `cache` trade memory for speed.
Train on top of it: `plain_head`, `fold`.
Hand it on: `export`, `push`.

Importing the package teaches transformers to load what it writes, and does nothing else; what it offers is loaded
when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmcompress.models import import_hooks

if TYPE_CHECKING:  # for type checkers; tests/rules/test_import.py holds it against _HOMES
    from llmcompress.compression.depth.damage import least_damage as least_damage
    from llmcompress.compression.depth.drop import drop_blocks as drop_blocks
    from llmcompress.compression.depth.similarity import alike_blocks as alike_blocks
    from llmcompress.compression.experts.condense import condense_experts as condense_experts
    from llmcompress.compression.experts.merge import merge_experts as merge_experts
    from llmcompress.compression.experts.prune import prune_experts as prune_experts
    from llmcompress.compression.experts.replace import replace_experts as replace_experts
    from llmcompress.compression.pipeline import compress as compress
    from llmcompress.compression.pipeline import plan as plan
    from llmcompress.compression.result import Result as Result
    from llmcompress.compression.shrink import shrink as shrink
    from llmcompress.compression.width.narrow import narrow as narrow
    from llmcompress.distill.run import distill as distill
    from llmcompress.errors import LLMCompressError as LLMCompressError
    from llmcompress.evaluate.compare import compare as compare
    from llmcompress.evaluate.drift import drift as drift
    from llmcompress.evaluate.passport import passport as passport
    from llmcompress.evaluate.protocol import Protocol as Protocol
    from llmcompress.evaluate.report import Report as Report
    from llmcompress.evaluate.report import read as read
    from llmcompress.evaluate.score import score as score
    from llmcompress.evaluate.speed.measure import bench as bench
    from llmcompress.evaluate.speed.protocol import SpeedProtocol as SpeedProtocol
    from llmcompress.evaluate.verify import verify as verify
    from llmcompress.export.formats import export as export
    from llmcompress.export.hub import push as push
    from llmcompress.kernels.accelerate import accelerate as accelerate
    from llmcompress.models.kv_cache import cache as cache
    from llmcompress.models.lora import fold as fold
    from llmcompress.models.lora import plain_head as plain_head
    from llmcompress.recipe.calibration import Calibration as Calibration
    from llmcompress.recipe.compression import Recipe as Recipe
    from llmcompress.recipe.compression import Rule as Rule
    from llmcompress.weight.modules import decoded as decoded

__version__ = "0.1.0"

_HOMES = {
    "Calibration": "recipe.calibration",
    "LLMCompressError": "errors",
    "Protocol": "evaluate.protocol",
    "Recipe": "recipe.compression",
    "Report": "evaluate.report",
    "Result": "compression.result",
    "Rule": "recipe.compression",
    "SpeedProtocol": "evaluate.speed.protocol",
    "accelerate": "kernels.accelerate",
    "alike_blocks": "compression.depth.similarity",
    "bench": "evaluate.speed.measure",
    "cache": "models.kv_cache",
    "compare": "evaluate.compare",
    "compress": "compression.pipeline",
    "condense_experts": "compression.experts.condense",
    "decoded": "weight.modules",
    "distill": "distill.run",
    "drift": "evaluate.drift",
    "drop_blocks": "compression.depth.drop",
    "export": "export.formats",
    "fold": "models.lora",
    "least_damage": "compression.depth.damage",
    "merge_experts": "compression.experts.merge",
    "narrow": "compression.width.narrow",
    "passport": "evaluate.passport",
    "plain_head": "models.lora",
    "plan": "compression.pipeline",
    "prune_experts": "compression.experts.prune",
    "push": "export.hub",
    "read": "evaluate.report",
    "replace_experts": "compression.experts.replace",
    "score": "evaluate.score",
    "shrink": "compression.shrink",
    "verify": "evaluate.verify",
}
__all__ = sorted(_HOMES)

import_hooks.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return globals().get(name, found)  # `distill` and `export` are packages too, which can be called


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
