"""Compress a model to a size, and compare what was predicted of its quality with what is measured.

python examples/compress_to_size.py
python examples/compress_to_size.py --model org/model --size 400MB --output small
"""

from __future__ import annotations

import argparse

import llmcompress as lc


def main(arguments: list[str] | None = None) -> None:
    """Choose steps for every layer so that the files take at most `--size`, and write the model to `--output`."""
    parser = argparse.ArgumentParser(description="Compress a model to a size.")
    parser.add_argument("--model", default="smollm2", help="a folder, a Hub id, or smollm2")
    parser.add_argument("--size", default="50MB", help="of all weight files")
    parser.add_argument("--output", default="small", help="a new folder")
    parser.add_argument("--samples", default=66, type=int, help="sequences of calibration, two of them held out")
    given = parser.parse_args(arguments)

    recipe = {
        "version": 1,
        "name": "to-size",
        "calibration": {"dataset": "builtin", "samples": given.samples, "length": 1024, "held_out": 2},
        "token_weights": {"by": "attention"},
        "asymmetric": 0.25,
        "target": {"bytes": given.size},
    }
    result = lc.compress(given.model, recipe, given.output)

    report, plan = result.report, result.allocation or {}
    print(f"{report.dense_bytes / 1e6:.2f} MB -> {report.bytes / 1e6:.2f} MB, {report.bpw:.3f} bits per weight")
    print(f"KL on probing tokens: {plan['predicted_kl']:.3f} predicted, {plan['measured_kl']:.3f} measured")
    for layer in report.layers:
        print(f"{layer.name:45} {layer.bpw:6.3f} bits, {layer.stored}")


if __name__ == "__main__":
    main()
