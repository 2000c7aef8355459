"""Write a method of your own and use it in a recipe, without touching the package.

`factorize` replaces a matrix by a product of two thin ones, found by an SVD in which loud input channels count more. It
stores LowRank(Dense, Dense); size, file format, loading and `plan` follow from that expression.

    python examples/custom_method.py
"""

from __future__ import annotations

import argparse
from typing import Literal

import torch
from pydantic import Field

import llmcompress as lc
from llmcompress.methods.layer import Layer, StepConfig, base_target, method, with_base
from llmcompress.methods.solvers.hessian import channel_energy
from llmcompress.weight.nodes import Dense, LowRank, Weight, shape


class Factorize(StepConfig):
    """Arguments of `factorize`."""

    method: Literal["factorize"] = "factorize"
    share: float = Field(0.5, gt=0, le=1, description="stored numbers, as a share of the matrix's")

    def rank(self, out: int, width: int) -> int:
        """Return the columns of the left factor: at least one."""
        return max(1, int(self.share * out * width / (out + width)))

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        out, width = shape(approx)
        empty = torch.empty(0, dtype=torch.bfloat16, device="meta")
        rank = self.rank(out, width)
        return LowRank(Dense(empty.new_empty(out, rank)), Dense(empty.new_empty(rank, width)))


@method("factorize", Factorize, needs={"outer"})
def factorize(layer: Layer, config: Factorize) -> Layer:
    """Minimise |(W - L R) diag(s)| over L and R, s being the root mean square of each input channel."""
    target = base_target(layer)  # [out, in]
    sizes = channel_energy(layer.inputs).sqrt().float()  # [in]
    left, values, right = torch.linalg.svd(target * sizes, full_matrices=False)
    rank = config.rank(*target.shape)
    factors = left[:, :rank] * values[:rank], right[:rank] / sizes
    return with_base(layer, LowRank(*(Dense(factor.to(torch.bfloat16)) for factor in factors)))


def main(arguments: list[str] | None = None) -> None:
    """Compress a model with `factorize`, and print what it costs in each layer."""
    parser = argparse.ArgumentParser(description="Compress a model with a method of your own.")
    parser.add_argument("--model", default="smollm2", help="a folder, a Hub id, or smollm2")
    given = parser.parse_args(arguments)
    recipe = {
        "version": 1,
        "name": "factorized",
        "calibration": {"dataset": "builtin", "samples": 10, "length": 512, "held_out": 2},
        "rules": [{"match": "*", "steps": [{"method": "factorize", "share": 0.5}]}],
        "gates": {"kl": None, "perplexity_ratio": None},  # half of the rank alone is far from the dense model
    }
    report = lc.compress(given.model, recipe).report
    print(f"{report.bpw:.3f} bits per weight")
    for layer in report.layers:
        print(f"{layer.name:45} {layer.bpw:6.3f} bits, held-out error {layer.error_heldout:.4f}, {layer.stored}")


if __name__ == "__main__":
    main()
