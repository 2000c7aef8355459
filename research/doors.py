"""Does every door lead to the same model? Exports a checkpoint and compares the logits of the engine it is for.

    python research/doors.py CHECKPOINT

Prints, per format: engine and version, largest and mean difference of the logits on 512 tokens (float32), and bytes.
llama.cpp tells log-probabilities instead, so there it is those of its 20 likeliest tokens after each of the 512.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from llama_engine import LlamaEngine
from records import require_engines
from torch import nn
from transformers import AutoModelForCausalLM

import llmcompress as lc
from llmcompress.errors import InputError
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.formats.export import FORMATS, export
from llmcompress.models.dense.tokenizer import load_tokenizer


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    options = parser.parse_args()
    require_engines(parser, {"llama.cpp"})
    ours = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    ids = evaluation_windows(load_tokenizer(options.checkpoint), lc.Protocol(windows=1, length=512), ours.config)
    wanted = logits(ours, ids)
    print(
        "| format | engine | largest difference | mean difference | MB before | MB after |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as place:
        for name in FORMATS:
            output = Path(place) / name
            try:
                done = export(options.checkpoint, output, name, allow_dense=True)
            except InputError as error:
                print(f"| {name} | refused: {error} | | | | |")
                continue
            if name == "gguf":
                found = differences(LlamaEngine(output, 1024), ids, wanted)
            else:
                found = (logits(entered(name, output), ids) - wanted).abs()
            package = {"dense": "transformers", "gguf": "xllamacpp"}.get(name, name)
            engine = f"{package} {version(package)}"
            sizes = f"{done.bytes_before / 1e6:.1f} | {done.bytes_after / 1e6:.1f}"
            print(f"| {name} | {engine} | {found.max():.4f} | {found.mean():.5f} | {sizes} |")


def entered(name: str, output: Path) -> nn.Module:
    """The exported model as its engine loads it."""
    if name != "peft":
        plain: nn.Module = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        return plain
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(output / "adapter"))


def differences(engine: LlamaEngine, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of log-probabilities, after every start of `ids [1, length]`; `wanted` are our logits."""
    ours = wanted[0].log_softmax(-1)
    tokens = ids[0].tolist()
    found = [engine.likeliest(tokens[: end + 1], 20) for end in range(len(tokens))]
    pairs = [(ours[end, token], value) for end, row in enumerate(found) for token, value in row.items()]
    return torch.tensor([abs(float(mine) - value) for mine, value in pairs])


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """`[1, length, vocabulary]`."""
    with lc.decoded(model):
        found: torch.Tensor = model(input_ids=ids).logits
    return found


if __name__ == "__main__":
    main()
