"""One arm of llmcompress on the same model and the same calibration tokens; the sibling of llm_compressor.py.

Hands over such a folder and prints such a JSON line; the tokens come from the text as in ordinary use, and their hash
shows that they are the peer's. `seconds` is the whole of `llmcompress.compress`: reading the model, tokenizing the text
and writing the checkpoint count on our side and not on the peer's.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handover import hand_over, timed

if TYPE_CHECKING:
    from torch import Tensor


def compressed(
    model_folder: Path, recipe_file: Path, text: Path, sequences: int, length: int
) -> tuple["dict[str, Tensor]", dict[str, Any]]:
    """The one call into llmcompress: ({linear's module path: dense float32 [out, in]}, facts for the JSON line)."""
    from llmcompress.models.dense.model import resolve
    from llmcompress.pipeline.compress import compress
    from llmcompress.recipe.read import read_recipe
    from llmcompress.weight.expression import dense
    from llmcompress.weight.modules import CompressedLinear

    chosen = {"dataset": text, "samples": sequences, "length": length, "held_out": 0}
    same_tokens = {"packing": "true", "bos": "false", "eos": "false", "shuffle": "false"}
    settings = [f"calibration.{key}={value}" for key, value in (chosen | same_tokens).items()]
    recipe = read_recipe(recipe_file, settings)
    resolve(str(model_folder)).skeleton()  # the model's code is imported, as the peer's is when it has loaded the model
    result, facts = timed(lambda: compress(model_folder, recipe))
    parts = result.model.named_modules()
    weights = {name: dense(part.expression()) for name, part in parts if isinstance(part, CompressedLinear)}
    facts["bits"] = round(result.report.bpw * sum(weight.numel() for weight in weights.values()))
    facts["tokens_sha256"] = (result.report.calibration or {}).get("hash")
    return weights, facts


def main() -> None:
    """Parse, run, hand over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face folder")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="the text whose first windows calibrate")
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--arm", required=True, help="what to call this run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()

    import torch

    torch.set_num_threads(given.threads)
    weights, facts = compressed(given.model, given.recipe, given.text, given.sequences, given.length)
    hand_over(given, "llmcompress", ("transformers",), weights, facts)


if __name__ == "__main__":
    main()
