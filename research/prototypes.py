"""Pieces of a text by how near they are to their kind: for data sets that are pruned before anything learns from them.

After the self-supervised metric of Sorscher et al. (2206.14486): pieces are embedded, here as the mean of the states
behind a model's last block, and grouped by k-means. The distance to its group's middle says how odd a piece is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.models.dense.blocks import body

GROUPS = 8


def pieces_of(text: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[str]:
    """Return the first `count` pieces of `length` tokens of a text."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: count * length]
    return [str(tokenizer.decode(ids[start : start + length])) for start in range(0, len(ids), length)]


def oddness(pieces: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return how far each piece is from the middle of its group, as a cosine distance, float64 [pieces]."""
    return distances(embeddings(pieces, model, tokenizer), GROUPS)


@torch.no_grad()
def embeddings(pieces: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the mean of each piece's states behind the last block, float64 [pieces, width]."""
    rows = []
    for piece in pieces:
        ids = torch.tensor([tokenizer(piece, add_special_tokens=False).input_ids], device=model.device)
        states = body(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        rows.append(states.double().mean(0).cpu().numpy())
    return np.stack(rows)


def distances(rows: np.ndarray, groups: int) -> np.ndarray:
    """Return the cosine distance of each row [rows, width] from the middle of its group of `groups`, [rows]."""
    whole = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    middles, member = kmeans2(whole, groups, minit="++", seed=0)
    own = middles[member]
    return 1 - (whole * own).sum(1) / np.linalg.norm(own, axis=1)
