"""A tiny model of an architecture that transformers does not have, with the Python files that a checkpoint brings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import VOCABULARY
from tests.zoo import merging_tokenizer

MARKER = "OWN_CODE_MARKER"  # names a file in the environment; whoever runs the code leaves a line there
MARK = f"""
import os
if "{MARKER}" in os.environ:
    with open(os.environ["{MARKER}"], "a") as file:
        file.write(__name__ + "\\n")
"""
FILES = {
    "configuration_own.py": MARK
    + """
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=64, **more):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**more)
""",
    "norm_own.py": MARK
    + """
import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
""",
    "modeling_own.py": MARK
    + """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_own import OwnConfig
from .norm_own import Norm


class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.first, self.second = Norm(width), Norm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.gate = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, hidden, mask=None):
        shape = (*hidden.shape[:2], self.heads, -1)
        query, key, value = (x.view(shape).transpose(1, 2) for x in self.mix(self.first(hidden)).chunk(3, -1))
        found = scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(found.transpose(1, 2).reshape(hidden.shape))
        inside = self.second(hidden)
        return hidden + self.down(silu(self.gate(inside)) * self.up(inside))


class OwnPreTrained(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"


class OwnModel(OwnPreTrained):
    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(OwnBlock(config) for _ in range(config.num_hidden_layers))
        self.last = Norm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def set_input_embeddings(self, value):
        self.tokens = value

    def forward(self, input_ids=None, attention_mask=None, use_cache=False, **more):
        hidden = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            hidden = block(hidden)
        return BaseModelOutput(last_hidden_state=self.last(hidden))


class OwnForCausalLM(OwnPreTrained, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.body = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **more):
        logits = self.lm_head(self.body(input_ids).last_hidden_state)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
""",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def save_own(folder: Path, **changes: Any) -> Path:
    """Write a random model of the architecture, its code and a tokenizer to `folder`, and return that.

    `changes` go to config.json after the weights are written.
    """
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    entries = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP, "dtype": "float32"}
    entries |= {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(entries | {"max_position_embeddings": 64}))
    marker = os.environ.pop(MARKER, None)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    model.save_pretrained(folder)
    if marker is not None:
        os.environ[MARKER] = marker
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | changes))
    merging_tokenizer().save_pretrained(folder)
    return folder
