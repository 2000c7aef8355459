"""The last check of a run: what it wrote loads, before it takes its name."""

from __future__ import annotations

from pathlib import Path

from llmcompress.errors import InputError, first_line
from llmcompress.models.dense.digest import tokenizer_files
from llmcompress.models.dense.remote_code import load_config
from llmcompress.models.dense.skeleton import dense_skeleton
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.integrity import weight_files
from llmcompress.models.transformers.hf_quantizer import LLMCompressConfig, LLMCompressQuantizer


def check_written(folder: Path, trust_remote_code: bool = False) -> None:
    """Raise InputError unless transformers will load the compressed checkpoint in `folder`, with all beside it.

    Every tensor is read and checked as a load does, one at a time, so no model has to fit into memory.
    """
    from transformers import GenerationConfig

    config = load_config(folder, trust_remote_code)
    quantizer = LLMCompressQuantizer(LLMCompressConfig(**config.quantization_config))
    model = dense_skeleton(config, folder, trust_remote_code=trust_remote_code)
    quantizer.preprocess_model(model, checkpoint_files=[str(path) for path in weight_files(folder)])
    if tokenizer_files(folder):
        load_tokenizer(folder, trust_remote_code)
    if (folder / "generation_config.json").is_file():
        try:
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"the model's generation_config.json cannot be read ({first_line(error)}); correct or remove it"
            ) from error
