"""One arm of llm-compressor on one dense model; runs inside the peer's own environment (see README.md here).

Writes {linear's module path + ".weight": what the peer's matrix is worth once dequantized, in the loaded dtype} as
safetensors and prints one JSON line: arm, dtype, threads, seconds and cpu_seconds (oneshot alone, on a loaded model),
peak_rss_bytes (up to the end of oneshot; the output is written after it).
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DECODER_LINEARS = r"re:.*(q|k|v|o|gate|up|down)_proj$"


def sparsegpt(mask_structure: str) -> Any:
    """SparseGPT at 50 %; everything not named here is the peer's default."""
    from llmcompressor.modifiers.pruning import (
        SparseGPTModifier,
    )

    return SparseGPTModifier(sparsity=0.5, mask_structure=mask_structure, targets=[DECODER_LINEARS])


def wanda(mask_structure: str) -> Any:
    """Wanda at 50 %; everything not named here is the peer's default."""
    from llmcompressor.modifiers.pruning import (
        WandaPruningModifier,
    )

    return WandaPruningModifier(sparsity=0.5, mask_structure=mask_structure, targets=[DECODER_LINEARS])


def gptq(bits: int, observer: str | None) -> Any:
    """Asymmetric GPTQ in groups of 64; observer None leaves the peer's default (min-max)."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
    )
    from llmcompressor.modifiers.gptq import GPTQModifier

    chosen = {} if observer is None else {"observer": observer}
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=64, **chosen)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"linears": scheme}, ignore=["lm_head"])


ARMS: dict[str, Callable[[], Any]] = {
    "wanda50": lambda: wanda("0:0"),
    "sparsegpt50": lambda: sparsegpt("0:0"),
    "sparsegpt24": lambda: sparsegpt("2:4"),
    "gptq3g64": lambda: gptq(3, observer=None),
    "gptq3g64mse": lambda: gptq(3, observer="memoryless_mse"),
}


def peak_rss_bytes() -> int:
    """Largest resident size so far. VmHWM starts afresh at exec; ru_maxrss, the fallback, keeps the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(model_folder: Path, tokens: Path, arm: str, out: Path, dtype: str, threads: int) -> dict[str, Any]:
    """Compress, write the weights to `out`, return the report. The tokens are `sequences` [n, length] int64."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    sequences = load_file(tokens)["sequences"]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    rows = sequences.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    modifier = ARMS[arm]()
    names = [name for name, _ in model.named_parameters() if name.endswith("_proj.weight")]

    begun, cpu_begun = time.monotonic(), time.process_time()
    oneshot(
        model=model,
        dataset=data,
        recipe=modifier,
        num_calibration_samples=len(rows),
        max_seq_length=sequences.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds, cpu_seconds = time.monotonic() - begun, time.process_time() - cpu_begun
    peak = peak_rss_bytes()
    save_file({name: model.get_parameter(name).detach().contiguous() for name in names}, out)
    return {
        "tool": "llm-compressor",
        "arm": arm,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_rss_bytes": peak,
    }


def main() -> None:
    """Parse, run, print the JSON line (the last line of standard output; the peer logs above it)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="dense Hugging Face folder")
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors with `sequences` [n, length] int64")
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="safetensors to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the model is loaded in")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    report = run(given.model, given.tokens, given.arm, given.out, given.dtype, given.threads)
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
