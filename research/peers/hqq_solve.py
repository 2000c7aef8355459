"""HQQ, which takes no data; runs in the peer's environment (see README.md here).

Groups along a row (axis 1), zero points not rounded, the tool's proximal solve: its defaults. Codes, and per group a
scale and a zero point, which its layers keep in float16, the default: 16 bits each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from handover import decoder_linears, grouped_bits, hand_over, loaded, parser, timed

if TYPE_CHECKING:
    from torch import Tensor

ARMS = {
    "4bit-g64": (4, 64),
    "3bit-g64": (3, 64),
    "2bit-g64": (2, 64),
    "2bit-g32": (2, 32),
    "1bit-g64": (1, 64),
    "1bit-g32": (1, 32),
}


def main() -> None:
    """One arm."""
    given = parser(__doc__, ARMS).parse_args()
    import torch
    from hqq.core.quantize import Quantizer

    bits, group = ARMS[given.arm]
    linears = decoder_linears(loaded(given, "float32"))

    def quantized(weight: Tensor) -> Tensor:
        codes, meta = Quantizer.quantize(
            weight, nbits=bits, channel_wise=True, group_size=group, optimize=True, axis=1, device="cpu"
        )
        for name in ("scale", "zero"):
            meta[name] = meta[name].to(torch.float16).float()
        return Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})

    dense, facts = timed(lambda: {name: quantized(part.weight.detach()) for name, part in linears.items()})
    facts["bits"] = grouped_bits(dense.values(), bits, group, 16 + 16)
    hand_over(given, "hqq", ("hqq", "transformers"), dense, facts)


if __name__ == "__main__":
    main()
