"""optimum-quanto's qint2, which takes no data; runs in the peer's environment (see README.md here).

The tool chooses the group: 128 columns, less in steps of 32 until they divide the width (96 for 576). It keeps codes,
and per group a scale and a shift in the dtype of the model, which is bfloat16 here: 16 bits each.
"""

from __future__ import annotations

from typing import Any

from handover import decoder_linears, grouped_bits, hand_over, loaded, parser, timed

ARMS = ("qint2",)


def main() -> None:
    """One arm."""
    given = parser(__doc__, ARMS).parse_args()
    from optimum.quanto import freeze, qint2, quantize

    model = loaded(given, "bfloat16")

    def work() -> None:
        quantize(model, weights=qint2, exclude=["lm_head"])
        freeze(model)

    _, facts = timed(work)
    linears = decoder_linears(model)
    facts["bits"] = sum(grouped_bits([part.weight], 2, part.weight_group_size, 32) for part in linears.values())
    facts["group_sizes"] = sorted({part.weight_group_size for part in linears.values()})
    dense: dict[str, Any] = {name: part.weight.dequantize() for name, part in linears.items()}
    hand_over(given, "optimum-quanto", ("optimum-quanto", "transformers"), dense, facts)


if __name__ == "__main__":
    main()
