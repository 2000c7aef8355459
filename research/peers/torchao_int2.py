"""torchao's weight-only int2, which takes no data; runs in the peer's environment (see README.md here).

Codes, and per group of 64 columns a scale in the model's dtype, bfloat16, and a zero point as wide as a code. On a CPU
the tool holds codes and zero points as int8; they are counted as a file could hold them.
"""

from __future__ import annotations

from handover import decoder_linears, grouped_bits, hand_over, loaded, parser, timed

ARMS = {"int2-g64": 64, "int2-g32": 32}


def main() -> None:
    """One arm."""
    given = parser(__doc__, ARMS).parse_args()
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    model, group = loaded(given, "bfloat16"), ARMS[given.arm]
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int2,  # type: ignore[attr-defined]  # made as torch is imported
        granularity=PerGroup(group),
        mapping_type=MappingType.ASYMMETRIC,
    )
    _, facts = timed(lambda: quantize_(model, config, filter_fn=lambda _, name: name.endswith("_proj")))
    dense = {name: part.weight.dequantize() for name, part in decoder_linears(model).items()}
    facts["bits"] = grouped_bits(dense.values(), 2, group, 16 + 2)
    hand_over(given, "torchao", ("torchao", "transformers"), dense, facts)


if __name__ == "__main__":
    main()
