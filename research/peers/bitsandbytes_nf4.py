"""bitsandbytes' 4-bit floats, which take no data; needs the package bitsandbytes and works on a CPU.

NF4 in blocks of 64 along the flattened matrix, scales quantized again: what transformers' `load_in_4bit` does with
double quantization. Codes of 4 bits, a scale of 8 a block, 32 bits for 256 scales, and a 32-bit offset for a matrix.
The two tables of values are the tool's own, alike for every model, and are not counted. With `--stored` the folder is
what transformers writes of the whole model, for `llmcompress compare`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from handover import copy_texts, decoder_linears, hand_over, loaded, parser, timed

if TYPE_CHECKING:
    from torch import Tensor

ARMS = {"nf4-b64": 64}


def main() -> None:
    """One arm."""
    command_line = parser(__doc__, ARMS)
    command_line.add_argument("--stored", action="store_true", help="write what transformers stores")
    given = command_line.parse_args()
    if given.stored:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(given.model, quantization_config=asked, dtype=torch.bfloat16)
        copy_texts(given)
        model.save_pretrained(given.out)
        return
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    block = ARMS[given.arm]
    linears = decoder_linears(loaded(given, "float32"))

    def quantized(weight: Tensor) -> Tensor:
        codes, state = quantize_4bit(weight, blocksize=block, compress_statistics=True, quant_type="nf4")
        return dequantize_4bit(codes, state)

    dense, facts = timed(lambda: {name: quantized(part.weight.detach()) for name, part in linears.items()})
    facts["bits"] = sum(bits(weight.numel(), block) for weight in dense.values())
    hand_over(given, "bitsandbytes", ("bitsandbytes", "transformers"), dense, facts)


def bits(count: int, block: int) -> int:
    """Bits of a matrix of so many weights."""
    scales = math.ceil(count / block)
    return 4 * count + 8 * scales + 32 * math.ceil(scales / 256) + 32


if __name__ == "__main__":
    main()
