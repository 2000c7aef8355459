"""The plug-in's entry point, which vLLM finds through the group `vllm.general_plugins` and calls in every process.

Unproven in vLLM's engine, which needs a GPU. Config parsing, loading and products are tested against a stand-in for the
interfaces that are used, and, where vLLM 0.33 is installed, in its own Llama model on the CPU, attention aside.
"""

from llmcompress.models.transformers.hf_quantizer import NAME


def register() -> None:
    """Teach vLLM the quantization method of compressed checkpoints; may be called more than once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from llmcompress.formats.vllm.layers import PayloadConfig

    if NAME not in QUANTIZATION_METHODS:  # older releases refuse a second time
        register_quantization_config(NAME)(PayloadConfig)
