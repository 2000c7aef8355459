"""Dense checkpoints whose blocks have widths of their own, for which the entries of a config have no place.

Their sizes are in the `quantization_config` that lets llmcompress help transformers to load them; it names no
compressed matrix, so they count as dense models everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def own_sizes(entries: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the `[out, in]` by linear that the entries of such a model's config.json tell; empty for any other model.

    Raises InputError for entries that are damaged.
    """
    packing = entries.get("quantization_config")
    if not isinstance(packing, dict) or packing.get("layers") or not packing.get("sizes"):
        return {}
    from llmcompress.models.transformers.hf_quantizer import NAME, LLMCompressConfig

    return LLMCompressConfig(**packing).sizes if packing.get("quant_method") == NAME else {}


def is_dense(entries: Mapping[str, Any]) -> bool:
    """True if the entries of a config.json tell of a model without a compressed matrix."""
    return not entries.get("quantization_config") or bool(own_sizes(entries))


def with_sizes(model: PreTrainedModel, sizes: Mapping[str, list[int]]) -> PreTrainedModel:
    """Return a model on meta with its linears resized. Raises InputError for sizes that do not fit each other."""
    if sizes:
        from llmcompress.models.transformers.hf_quantizer import resize

        resize(model, sizes)
    return model
