"""The plug-in's entry point, which vLLM finds through the group `vllm.general_plugins` and calls in every process.

Unproven on a GPU. Config parsing, loading and products are tested against a stand-in for the interfaces that are used,
and, where vLLM is installed, in its engine for CPUs and in its own Llama model, attention aside. A version that was not
tried is a warning.
"""

import logging

from llmcompress.models.transformers.hf_quantizer import NAME
from llmcompress.runtime.engines import untried_version

LOG = logging.getLogger("llmcompress")


def register() -> None:
    """Teach vLLM the quantization method of compressed checkpoints; may be called more than once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from llmcompress.formats.vllm.layers import PayloadConfig

    if NAME not in QUANTIZATION_METHODS:  # older releases refuse a second time
        if (note := untried_version("vllm")) is not None:
            LOG.warning(note)
        register_quantization_config(NAME)(PayloadConfig)
