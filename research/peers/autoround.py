"""AutoRound's weights of 2 to 4 bits; runs in the peer's environment (see README.md here).

Asymmetric groups; the tool's defaults are 200 iterations and batches of 8 (of 128 sequences of 2048 tokens of a data
set on the Hub, in whose place it is given our tokens). Codes, and per group a float16 scale and a zero point as wide
as a code. Where groups do not divide a width, as 128 columns do not divide 576, the last one is shorter: the tool pads
it with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from handover import decoder_linears, grouped_bits, hand_over, loaded, parser, sequences, timed


@dataclass(frozen=True)
class Arm:
    """Columns in a group, and how long a block is trained."""

    group: int
    iterations: int = 200
    batch_size: int = 8
    bits: int = 2


ARMS = {
    "w2g32": Arm(32),
    "w2g64": Arm(64),
    "w2g128": Arm(128),
    "w2g32-200x1": Arm(32, 200, 1),
    "w2g64-200x1": Arm(64, 200, 1),
    "w2g128-200x1": Arm(128, 200, 1),
    "w2g32-40x1": Arm(32, 40, 1),
    "w2g64-40x1": Arm(64, 40, 1),
    "w2g128-40x1": Arm(128, 40, 1),
    "w3g64-40x1": Arm(64, 40, 1, bits=3),
    "w4g64-40x1": Arm(64, 40, 1, bits=4),
}


def main() -> None:
    """One arm."""
    given = parser(__doc__, ARMS).parse_args()
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    arm, ids = ARMS[given.arm], sequences(given)
    model, tokenizer = loaded(given, "float32"), AutoTokenizer.from_pretrained(given.model)

    def work() -> Any:
        tool = AutoRound(
            model,
            tokenizer=tokenizer,
            scheme=f"W{arm.bits}A16",
            bits=arm.bits,
            group_size=arm.group,
            sym=False,
            dataset=list(ids.split(1)),
            nsamples=len(ids),
            seqlen=ids.shape[1],
            iters=arm.iterations,
            batch_size=arm.batch_size,
            device_map="cpu",
            enable_torch_compile=False,
        )
        return tool.quantize()[0]

    quantized, facts = timed(work)
    dense = {name: part.weight for name, part in decoder_linears(quantized).items()}
    facts["bits"] = grouped_bits(dense.values(), arm.bits, arm.group, 16 + arm.bits)
    hand_over(given, "auto-round", ("auto-round", "transformers"), dense, facts)


if __name__ == "__main__":
    main()
