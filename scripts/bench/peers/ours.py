"""One arm of llmcompress on the same model and the same calibration tokens; the sibling of llm_compressor.py.

Same output file and JSON line; the tokens come from the text as in ordinary use, and their hash shows that they are
the peer's. `seconds` is the whole of `llmcompress.compress`: reading the model, tokenizing the text and writing the
checkpoint count on our side and not on the peer's.
"""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_compressor import peak_rss_bytes

if TYPE_CHECKING:
    from torch import Tensor


def compressed(
    model_folder: Path, recipe_file: Path, text: Path, sequences: int, length: int
) -> tuple["dict[str, Tensor]", dict[str, Any]]:
    """The one call into llmcompress: ({linear's module path: dense float32 [out, in]}, facts for the JSON line)."""
    from llmcompress.driver import compress
    from llmcompress.modules import CompressedLinear
    from llmcompress.recipe import read_recipe
    from llmcompress.source import resolve
    from llmcompress.weight import dense

    chosen = {"dataset": text, "samples": sequences, "length": length, "held_out": 0}
    same_tokens = {"packing": "true", "bos": "false", "eos": "false", "shuffle": "false"}
    settings = [f"calibration.{key}={value}" for key, value in (chosen | same_tokens).items()]
    recipe = read_recipe(recipe_file, settings)
    resolve(str(model_folder)).skeleton()  # the model's code is imported, as the peer's is when it has loaded the model
    begun, cpu_begun = time.monotonic(), time.process_time()
    result = compress(model_folder, recipe)
    facts = {
        "seconds": time.monotonic() - begun,
        "cpu_seconds": time.process_time() - cpu_begun,
        "peak_rss_bytes": peak_rss_bytes(),
        "bpw": result.report.bpw,
        "tokens_sha256": (result.report.calibration or {}).get("hash"),
    }
    parts = result.model.named_modules()
    return {name: dense(part.expression()) for name, part in parts if isinstance(part, CompressedLinear)}, facts


def main() -> None:
    """Parse, run, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face folder")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="the text whose first windows calibrate")
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--arm", required=True, help="what to call this run")
    parser.add_argument("--out", type=Path, required=True, help="safetensors to write")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()

    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(given.threads)
    weights, facts = compressed(given.model, given.recipe, given.text, given.sequences, given.length)
    save_file({f"{name}.weight": weight.contiguous() for name, weight in weights.items()}, given.out)
    report = {"tool": "llmcompress", "arm": given.arm, "threads": torch.get_num_threads()}
    print(json.dumps(report | facts), flush=True)


if __name__ == "__main__":
    main()
