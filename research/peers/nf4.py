"""Writes a model as bitsandbytes quantizes it (NF4 in blocks of 64, scales quantized again), for `llmcompress compare`.

python research/peers/nf4.py DENSE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main() -> None:
    """Needs the package bitsandbytes; works on a CPU."""
    dense, out = map(Path, sys.argv[1:])
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=asked, dtype=torch.bfloat16)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(dense).save_pretrained(out)


if __name__ == "__main__":
    main()
