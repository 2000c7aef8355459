"""Compress Hugging Face language models: prune, partially binarize, compensate, score, publish.

    import llmcompress as lc
    result = lc.compress("smollm2", "recipe.yaml")
    result.save("out")

Make a model smaller: `plan`, `compress`, `drop_blocks` (and `least_damage`, `alike_blocks`), `narrow`, `distill`,
`shrink`; of a mixture's experts: `prune_experts`, `merge_experts`, `condense_experts`, `replace_experts`.
Look at the result: `read` its report, `verify` its files, `score` it, `compare` it, measure its `drift` block by
block, `bench` its speed, and measure by `passport` the effect of the dense model's adapters on it.
Run it: transformers loads it after this import; `accelerate`, `decoded` and `cache` trade memory for speed.
Train on top of it: `plain_head`, `fold`.
Hand it on: `export`, `push`.

Importing the package only teaches transformers to load its checkpoints; each name is loaded at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmcompress.models.transformers import import_hooks

if TYPE_CHECKING:  # for type checkers; tests/rules/test_import.py holds it against _HOMES
    from llmcompress.benchmark.measure import bench as bench
    from llmcompress.benchmark.protocol import SpeedProtocol as SpeedProtocol
    from llmcompress.compression.result import Result as Result
    from llmcompress.distillation.run import distill as distill
    from llmcompress.errors import LLMCompressError as LLMCompressError
    from llmcompress.evaluation.adapter_transfer import passport as passport
    from llmcompress.evaluation.drift import drift as drift
    from llmcompress.evaluation.protocol import Protocol as Protocol
    from llmcompress.evaluation.score import compare as compare
    from llmcompress.evaluation.score import score as score
    from llmcompress.evaluation.verify import verify as verify
    from llmcompress.formats.export import export as export
    from llmcompress.formats.hub import push as push
    from llmcompress.kernels.accelerate import accelerate as accelerate
    from llmcompress.models.transformers.kv_cache import cache as cache
    from llmcompress.models.transformers.lora import fold as fold
    from llmcompress.models.transformers.lora import plain_head as plain_head
    from llmcompress.pipeline.compress import compress as compress
    from llmcompress.pipeline.compress import plan as plan
    from llmcompress.recipe.calibration import Calibration as Calibration
    from llmcompress.recipe.compression import Recipe as Recipe
    from llmcompress.recipe.rules import Rule as Rule
    from llmcompress.reporting.report import Report as Report
    from llmcompress.reporting.report import read as read
    from llmcompress.surgery.block_choice import alike_blocks as alike_blocks
    from llmcompress.surgery.block_choice import least_damage as least_damage
    from llmcompress.surgery.drop import drop_blocks as drop_blocks
    from llmcompress.surgery.experts.condense import condense_experts as condense_experts
    from llmcompress.surgery.experts.merge import merge_experts as merge_experts
    from llmcompress.surgery.experts.prune import prune_experts as prune_experts
    from llmcompress.surgery.experts.replace import replace_experts as replace_experts
    from llmcompress.surgery.narrow import narrow as narrow
    from llmcompress.surgery.shrink import shrink as shrink
    from llmcompress.weight.modules import decoded as decoded

__version__ = "0.1.0"

_HOMES = {
    "Calibration": "recipe.calibration",
    "LLMCompressError": "errors",
    "Protocol": "evaluation.protocol",
    "Recipe": "recipe.compression",
    "Report": "reporting.report",
    "Result": "compression.result",
    "Rule": "recipe.rules",
    "SpeedProtocol": "benchmark.protocol",
    "accelerate": "kernels.accelerate",
    "alike_blocks": "surgery.block_choice",
    "bench": "benchmark.measure",
    "cache": "models.transformers.kv_cache",
    "compare": "evaluation.score",
    "compress": "pipeline.compress",
    "condense_experts": "surgery.experts.condense",
    "decoded": "weight.modules",
    "distill": "distillation.run",
    "drift": "evaluation.drift",
    "drop_blocks": "surgery.drop",
    "export": "formats.export",
    "fold": "models.transformers.lora",
    "least_damage": "surgery.block_choice",
    "merge_experts": "surgery.experts.merge",
    "narrow": "surgery.narrow",
    "passport": "evaluation.adapter_transfer",
    "plain_head": "models.transformers.lora",
    "plan": "pipeline.compress",
    "prune_experts": "surgery.experts.prune",
    "push": "formats.hub",
    "read": "reporting.report",
    "replace_experts": "surgery.experts.replace",
    "score": "evaluation.score",
    "shrink": "surgery.shrink",
    "verify": "evaluation.verify",
}
__all__ = sorted(_HOMES)

import_hooks.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
