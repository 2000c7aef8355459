"""Does peak memory follow one block? Compresses two random models of one width, 8 and 32 layers deep.

python research/memory.py [--width 512]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

DEPTHS = (8, 32)
RUN = """
import json, sys
import llmcompress as lc
recipe = {"version": 1, "rules": [{"match": "*", "steps": [{"method": "gptq", "bits": 3}]}],
          "calibration": {"dataset": sys.argv[2], "samples": 18, "length": 512, "held_out": 2}}
print(json.dumps(lc.compress(sys.argv[1], recipe).report.peak_memory_bytes))
"""


def main() -> None:
    """Prints the peak of each and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(f"Line {i} says {i * i} things about {i % 7} geese.\n" for i in range(4000)))
        for depth in DEPTHS:
            model = Path(folder) / str(depth)
            make(model, options.width, depth)
            command = [sys.executable, "-c", RUN, str(model), str(text)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peaks[depth] = json.loads(done.stdout.splitlines()[-1])
            size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
            print(f"{depth} layers, {size / 1e6:.0f} MB of weights: peak {peaks[depth] / 1e6:.0f} MB")
    print(f"ratio {peaks[DEPTHS[1]] / peaks[DEPTHS[0]]:.3f}")


def make(folder: Path, width: int, depth: int) -> None:
    """Writes a random Llama in bfloat16 with a byte-level tokenizer, in a process of its own."""
    subprocess.run([sys.executable, "-c", MAKE, str(folder), str(width), str(depth)], check=True)


MAKE = """
import sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
folder, width, depth = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth, vocab_size=257,
                     num_attention_heads=width // 64, num_key_value_heads=width // 64)
torch.manual_seed(0)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
"""


if __name__ == "__main__":
    main()
