"""Compare models on the tokens where a student drifts from its teacher, and where the teacher hesitates.

python research/drifted.py TEACHER STUDENT MODEL... [--text FILE] [--windows 8]

Drifted tokens are the quarter with the largest KL of the teacher's predictions to the STUDENT's, before it learns;
tokens of hesitation, the quarter with the largest entropy of the teacher's. Prints for the STUDENT and every MODEL the
mean KL in nats on all tokens, on either quarter, and on the tokens outside of the first, each with its standard error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.evaluation.distance import kl_divergence
from llmcompress.evaluation.perplexity import evaluation_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.losses.divergence import entropy
from llmcompress.models.dense.load import load_model
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.runtime.precision import fast_float32


@torch.no_grad()
def log_probabilities(model: str, windows: Tensor) -> list[Tensor]:
    """Return the predictions of a model for each of `windows [count, length]`, `[length - 1, vocabulary]`."""
    loaded = load_model(locate(model), dtype=torch.float32)
    return [loaded(window[None]).logits[0, :-1].log_softmax(-1) for window in windows]


def mean(values: Tensor) -> str:
    """Return the mean of some values and its standard error."""
    return f"{float(values.mean()):.4f} ± {float(values.std() / len(values) ** 0.5):.4f}"


@fast_float32()
def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("models", nargs="*")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    asked = parser.parse_args()
    tokenizer = load_tokenizer(locate(asked.teacher).folder)
    windows = evaluation_windows(tokenizer, Protocol(asked.text, windows=asked.windows))
    wanted = log_probabilities(asked.teacher, windows)
    entropies = torch.cat([entropy(p) for p in wanted])
    hesitant, drifted = entropies >= entropies.quantile(0.75), torch.empty(0)
    for model in (asked.student, *asked.models):
        given = log_probabilities(model, windows)
        kl = torch.cat([kl_divergence(p, q) for p, q in zip(wanted, given, strict=True)]).double()
        if model == asked.student:
            drifted = kl >= kl.quantile(0.75)
        parts = {"all": kl, "drifted": kl[drifted], "others": kl[~drifted], "hesitant": kl[hesitant]}
        print(f"{model} · " + " · ".join(f"{name} {mean(part)}" for name, part in parts.items()), flush=True)


if __name__ == "__main__":
    main()
