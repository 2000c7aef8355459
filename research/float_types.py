"""Are floats that GPUs multiply better filled by ours than by compressed-tensors' own quantizer, at equal bytes?

    python research/float_types.py --data DATA [--windows 4 --length 512] [FORMAT ...]

All linears of SmolLM2 become one format: FP8 with a scale a row, MXFP4 or NVFP4. Three arms of the same tensors:
compressed-tensors with scales from the least and largest weights, as its library derives and rounds them; ours to the
nearest (`mxfp`); ours with error feedback (`gptq`). All are read by that library's decompressor and run as float32 in
transformers. Feedback is calibrated on the inputs that the dense model has on the first `--sequences` windows of
`--length` tokens of WikiText-2 validation. Scored on the first `--windows` of its test split: the relative output error
of a linear, as a mean over all linears, and the KL from the dense model in nats per token, both with a standard error.

The input channels of the linears are scaled first, as in `gguf_types.py`, since the package's SmolLM2 lies on a grid.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from gguf_types import scale_channels
from llama_quantizer import linears, read_inputs
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from llmcompress.evaluation.distance import distance
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.formats.compressed_tensors import pack_matrix
from llmcompress.methods.layer import Layer, apply, relative_error, step
from llmcompress.methods.moments import Moments
from llmcompress.models.dense.locate import locate
from llmcompress.weight.nodes import Dense

PRESETS = {"fp8": "FP8_DYNAMIC", "mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}
COMPRESSORS = {"fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
ARMS = ("theirs", "rounded", "fed back")
Filled = tuple[Tensor, int]  # a matrix as the library decompresses it, float32, and the bytes that it lies in
Statistics = dict[str, Moments]  # of the inputs of each linear


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", help=f"among {', '.join(PRESETS)} (default: all)")
    parser.add_argument("--data", type=Path, required=True, help="folder with the two WikiText-2 files")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    formats = options.formats or list(PRESETS)
    if unknown := set(formats) - PRESETS.keys():
        parser.error(f"{', '.join(sorted(unknown))} cannot be filled; choose among {', '.join(PRESETS)}")
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    print(f"| format | arm | bytes | output error | KL | seconds |\n|{'---|' * 6}")
    for name in formats:
        for arm in ARMS:
            print(bench.row(name, arm), flush=True)


class Bench:
    """The dense model, and the inputs of its linears on both texts."""

    def __init__(self, options: argparse.Namespace) -> None:
        source = locate("smollm2").folder
        self.dense: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        scale_channels(self.dense)
        tokenizer = AutoTokenizer.from_pretrained(source)
        protocol = lc.Protocol(options.data / "wikitext2-test.raw", options.windows, options.length)
        self.windows = evaluation_windows(tokenizer, protocol, self.dense.config)
        words = (options.data / "wikitext2-valid.txt").read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"])
        ids = ids[: options.sequences * options.length].reshape(options.sequences, options.length)
        self.calibration, self.unseen = moments(self.dense, ids), moments(self.dense, self.windows)
        self.student = copy.deepcopy(self.dense)

    @torch.no_grad()
    def row(self, name: str, arm: str) -> str:
        """One line of the table. Raises RuntimeError where an arm takes other bytes than the library."""
        fill = {"theirs": theirs, "rounded": self.rounded, "fed back": self.fed_back}[arm]
        weights = {linear: child.weight.data for linear, child in linears(self.dense).items()}
        started = time.monotonic()
        filled = {linear: fill(name, linear, weight) for linear, weight in weights.items()}
        seconds, size = time.monotonic() - started, sum(count for _, count in filled.values())
        if size != (wanted := sum(theirs(name, linear, weight)[1] for linear, weight in weights.items())):
            raise RuntimeError(f"{arm} takes {size} bytes of {name}, and the library {wanted}")
        errors = [relative_error(weights[linear], value, self.unseen[linear]) for linear, (value, _) in filled.items()]
        for linear, child in linears(self.student).items():
            child.weight.data.copy_(filled[linear][0])
        found = distance(self.dense, self.student, self.windows)
        kl = f"{found.kl:.5f} ± {found.kl_stderr or 0.0:.5f}"
        cells = (name, arm, f"{size:,}", spread(errors), kl, f"{seconds:.0f}")
        return f"| {' | '.join(cells)} |"

    def rounded(self, name: str, linear: str, weight: Tensor) -> Filled:
        """A matrix in the nearest floats."""
        return self.ours(name, linear, weight, {"method": "mxfp", "format": name})

    def fed_back(self, name: str, linear: str, weight: Tensor) -> Filled:
        """A matrix by error feedback."""
        return self.ours(name, linear, weight, {"method": "gptq", "format": name})

    def ours(self, name: str, linear: str, weight: Tensor, arguments: dict[str, Any]) -> Filled:
        """A matrix after one step, as the library reads what is exported of it."""
        layer = Layer(linear, weight, Dense(weight.bfloat16()), self.calibration[linear])
        scheme, tensors = pack_matrix(apply(layer, [step(arguments)]).approx)
        return decompressed(tensors, scheme.format, QuantizationScheme(targets=["Linear"], weights=scheme.to_json()))


def theirs(name: str, _: str, weight: Tensor) -> Filled:
    """A matrix as compressed-tensors rounds it, with scales that reach from its least to its largest weights."""
    scheme = preset_name_to_scheme(PRESETS[name], ["Linear"])
    size = scheme.weights.group_size or weight.shape[1]
    groups = weight.unflatten(1, (-1, size))
    low, high = groups.amin(2), groups.amax(2)
    factor = generate_gparam(low.min(), high.max()) if name == "nvfp4" else None
    scale, _zero = calculate_qparams(low, high, scheme.weights, global_scale=factor)
    state = {"weight": weight, "weight_scale": scale.bfloat16() if name == "fp8" else scale}
    state |= {} if factor is None else {"weight_global_scale": factor}
    stored = BaseCompressor.get_value_from_registry(COMPRESSORS[name]).compress(state, scheme)
    return decompressed(stored, COMPRESSORS[name], scheme)


def decompressed(tensors: dict[str, Tensor], compressor: str, scheme: QuantizationScheme) -> Filled:
    """Return the values that the library reads, and the bytes of the tensors."""
    found = BaseCompressor.get_value_from_registry(compressor).decompress(tensors, scheme)["weight"]
    return found.float(), sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def moments(model: Any, windows: Tensor) -> Statistics:
    """The second moments of the inputs of each linear."""
    found: Statistics = {}

    def add(name: str, x: Tensor) -> None:
        here = Moments.of(x, frozenset({"outer"}))
        found[name] = found[name] + here if name in found else here

    read_inputs(model, windows, add)
    return found


def spread(values: list[float]) -> str:
    """The mean and its standard error."""
    return f"{statistics.fmean(values):.5f} ± {statistics.stdev(values) / len(values) ** 0.5:.5f}"


if __name__ == "__main__":
    main()
