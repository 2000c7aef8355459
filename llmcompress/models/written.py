"""The last check of a run: what it wrote loads, before it takes its name."""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import InputError, first_line
from llmcompress.models.digest import tokenizer_files
from llmcompress.models.hf_quantizer import LLMCompressConfig, LLMCompressQuantizer
from llmcompress.models.integrity import weight_files
from llmcompress.models.skeleton import dense_skeleton
from llmcompress.models.tokenizer import load_tokenizer


def check_written(folder: Path) -> None:
    """Raise InputError unless transformers will load the compressed checkpoint in `folder`, with all beside it.

    Every tensor is read and checked as a load does, one at a time, so no model has to fit into memory.
    """
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quantizer = LLMCompressQuantizer(LLMCompressConfig(**config.quantization_config))
    model = dense_skeleton(config, folder)
    quantizer.preprocess_model(model, checkpoint_files=[str(path) for path in weight_files(folder)])
    if tokenizer_files(folder):
        load_tokenizer(folder)
    if (folder / "generation_config.json").is_file():
        try:
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"the model's generation_config.json cannot be read ({first_line(error)}); correct or remove it"
            ) from error
