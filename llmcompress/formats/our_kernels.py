"""Forms of ours that kernels multiply, for models that transformers runs; others are decoded at every call."""

from __future__ import annotations

from llmcompress.kernels.cpu import prepare as cpu
from llmcompress.kernels.gpu import prepare as gpu
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Weight


def kernel_obstacle(device: str, w: Weight) -> str | None:
    """Return the reason why no kernel of a device, cpu or cuda, multiplies by `w`; None if one does."""
    is_able = cpu.is_supported(w) if device == "cpu" else gpu.is_supported(w)
    return None if is_able else f"{describe(w)} has no kernel for {device}, and would be decoded at every call"
