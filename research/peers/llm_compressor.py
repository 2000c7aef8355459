"""One arm of llm-compressor on one dense model; runs inside the peer's own environment (see README.md here).

Hands over a folder (see handover.py); seconds, cpu_seconds and peak_rss_bytes are of oneshot alone, on a loaded model.
An arm of `FOLDERS` rounds inputs too, which no dense model tells: its folder is the one that the peer writes for vLLM.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from handover import copy_texts, decoder_linears, grouped_bits, hand_over, loaded, parser, sequences, timed

if TYPE_CHECKING:
    from torch import Tensor

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


def grouped(bits: int, **chosen: str) -> dict[str, Any]:
    """Asymmetric integers in groups of 64 for every linear but the head."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
    )

    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=64, **chosen)
    return {
        "config_groups": {"linears": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }


def gptq(bits: int, observer: str | None) -> Any:
    """Asymmetric GPTQ in groups of 64; observer None leaves the peer's default (min-max)."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return GPTQModifier(**grouped(bits, **({} if observer is None else {"observer": observer})))


def awq() -> Any:
    """AWQ at 4 bits as the peer's example has it, but in groups of 64; the peer says what is scaled in which family."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_: None  # pinned for an accelerator; without one that is an error
    return [AWQModifier(duo_scaling="both"), QuantizationModifier(**grouped(4))]


def floats() -> Any:
    """FP8 for weights, a scale a row, and for inputs, a scale a token."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])


def integers() -> Any:
    """8-bit integers for weights, by GPTQ with a scale a row, and for inputs, a scale a token."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])


def smoothed() -> Any:
    """The same behind SmoothQuant, as the peer's example has it."""
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    return [SmoothQuantModifier(smoothing_strength=0.8), integers()]


FOLDERS: dict[str, Callable[[], Any]] = {"fp8-dynamic": floats, "w8a8": integers, "w8a8-smooth": smoothed}
ARMS: dict[str, Callable[[], Any]] = {
    **FOLDERS,
    "wanda50": lambda: wanda("0:0"),
    "sparsegpt50": lambda: sparsegpt("0:0"),
    "sparsegpt24": lambda: sparsegpt("2:4"),
    "awq4g64": awq,
    "gptq2g64": lambda: gptq(2, observer=None),
    "gptq2g64mse": lambda: gptq(2, observer="memoryless_mse"),
    "gptq3g64": lambda: gptq(3, observer=None),
    "gptq3g64mse": lambda: gptq(3, observer="memoryless_mse"),
    "gptq4g64mse": lambda: gptq(4, observer="memoryless_mse"),
}


def run(given: argparse.Namespace) -> None:
    """Compress and hand over."""
    from datasets import Dataset
    from llmcompressor import oneshot

    model, rows, modifier = loaded(given, given.dtype), sequences(given).tolist(), ARMS[given.arm]()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})

    def work() -> None:
        oneshot(
            model=model,
            dataset=data,
            recipe=modifier,
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]),
            shuffle_calibration_samples=False,
        )

    _, facts = timed(work)
    if given.arm in FOLDERS:
        copy_texts(given)
        model.save_pretrained(given.out, save_compressed=True)
        return
    dense = {name: round_weight(part) for name, part in decoder_linears(model).items()}
    scaled = isinstance(modifier, list)  # AWQ, which divides norms by its scales
    vectors = {name: part for name, part in model.named_parameters() if scaled and part.ndim == 1}
    facts |= {"bits": bits(modifier, dense), "dtype": given.dtype}
    packages = ("llmcompressor", "compressed-tensors", "transformers")
    hand_over(given, "llm-compressor", packages, dense, facts, vectors)


def round_weight(linear: Any) -> Tensor:
    """Return the weight that a linear works with. AWQ's are rounded only then; what is rounded already stays so."""
    from compressed_tensors.quantization import forward_quantize

    scheme, weight = getattr(linear, "quantization_scheme", None), linear.weight.detach()
    return weight if scheme is None else forward_quantize(linear, weight, "weight", scheme.weights)


def bits(modifier: Any, dense: dict[str, Tensor]) -> int:
    """Count the bits that a file would have to hold.

    Pruned: a 1-bit map and 16 bits for a kept weight. Quantized: codes, and per group 16 bits of scale and a zero point
    as wide as a code.
    """
    modifier = modifier[-1] if isinstance(modifier, list) else modifier
    if not hasattr(modifier, "config_groups"):
        return sum(weight.numel() + 16 * int(weight.count_nonzero()) for weight in dense.values())
    scheme = modifier.config_groups["linears"].weights
    return grouped_bits(dense.values(), scheme.num_bits, scheme.group_size, 16 + scheme.num_bits)


def main() -> None:
    """Parse and run; the peer logs above the JSON line."""
    arguments = parser(__doc__, ARMS)
    arguments.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the model is loaded in"
    )
    run(arguments.parse_args())


if __name__ == "__main__":
    main()
