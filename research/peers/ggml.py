"""llama.cpp's types below 3 bits with an importance matrix, by the package xllamacpp; runs in our own environment.

These types are in blocks of 256 columns, which do not divide a width of 576. The arms of the plain names do what
`llama-quantize` does then. An arm `-joined` is what the tool does not offer: the pure type everywhere, four rows of 576
being joined to one of 2304 columns, as if the type had a block that fits.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from handover import decoder_linears, hand_over, loaded, parser, sequences, timed
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from llama_quantizer import choose_type, measure_importance, quantize

from llmcompress.methods.grids.gguf import fitting

KINDS = ("iq1_s", "iq2_xxs", "iq3_xxs", "q2_k", "q3_k", "q4_0", "q4_k", "tq1_0", "tq2_0")
ARMS = (*KINDS, *(f"{kind}-joined" for kind in KINDS))


def main() -> None:
    """One arm."""
    arguments = parser(__doc__, ARMS)
    arguments.add_argument("--importance", type=Path, required=True, help="safetensors; made where it is not there")
    given = arguments.parse_args()
    model = loaded(given, "float32")
    if not given.importance.is_file():
        save_file(measure_importance(model, sequences(given)), given.importance)
    columns, linears = load_file(given.importance), decoder_linears(model)
    kind, _, joined = given.arm.upper().partition("-")
    blocks, heads = model.config.num_hidden_layers, model.config.num_attention_heads // model.config.num_key_value_heads

    def work() -> tuple[dict[str, Tensor], list[str], int]:
        dense, types, size = {}, [], 0
        for name, part in linears.items():
            block, leaf = int(name.split(".")[2]), name.rpartition(".")[2]
            mixed = fitting(choose_type(kind, leaf, block, blocks, heads), part.in_features)  # type: ignore[arg-type]
            types.append(kind if joined else mixed)
            dense[name], written = join_and_quantize(part.weight.detach(), columns[name], types[-1])
            size += written
        return dense, types, size

    (dense, types, size), facts = timed(work)
    facts |= {"bits": 8 * size, "types": Counter(types)}
    hand_over(given, "llama.cpp", ("xllamacpp", "gguf", "transformers"), dense, facts)


def join_and_quantize(weight: Tensor, importance: Tensor, kind: str) -> tuple[Tensor, int]:
    """Return `weight [out, in]` as it is rounded, and its bytes. Rows that no blocks fill are joined four by four."""
    joined = 4 if fitting(kind, weight.shape[1]) != kind else 1  # type: ignore[arg-type]
    rows = weight.reshape(weight.shape[0] // joined, -1)
    _, size, values = quantize(rows, kind, importance.repeat(joined))
    return values.reshape(weight.shape), size


if __name__ == "__main__":
    main()
