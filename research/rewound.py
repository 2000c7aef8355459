"""Give the kept weights of a pruned model their dense values back: rewinding, the control of what distils.

    python research/rewound.py STUDENT -o OUT [--teacher smollm2]

Masks, bytes and everything else stay. What distils from here starts with the mask alone, without what the pruning
method made of the kept weights, as in the lottery ticket hypothesis (arXiv 1803.03635).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress  # noqa: F401 (registers the format)
from llmcompress.distillation.student.low_rank import teacher_weights
from llmcompress.distillation.student.regrow import pruned_linears
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.weight.modules import CompressedLinear, compressed_linears, put
from llmcompress.weight.nodes import Dense, Where, Zero, shape


@torch.no_grad()
def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--teacher", default="smollm2")
    options = parser.parse_args()
    student = AutoModelForCausalLM.from_pretrained(options.student)
    dense = teacher_weights(student, load_model(locate(options.teacher)))
    layers, pruned = compressed_linears(student), pruned_linears(student)
    if not pruned:
        raise SystemExit(f"{options.student} has no matrix of values and zeros")
    for name, (index, values) in pruned.items():
        back = Dense(dense(name).to(values))
        put(student, name, CompressedLinear.of(Where(index, back, Zero(shape(back))), layers[name].bias))
    student.save_pretrained(options.output)
    AutoTokenizer.from_pretrained(options.student).save_pretrained(options.output)
    print(f"{len(pruned)} matrices have their dense values where they are not pruned: {options.output}")


if __name__ == "__main__":
    main()
