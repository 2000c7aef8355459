"""Chats that an instruct model writes when it is given the head of a user's message alone, as if from what it was tuned
on (2510.18554), and the nearest of them to given texts."""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.distance import cdist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmcompress.data.chat import render_chat
from llmcompress.data.generate import continue_sequences

ROWS = 16  # chats written side by side
MARK = "MESSAGE"


def chats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[str]:
    """Return `count` chats of `length` tokens, from the user's message on; ends of turns do not end them."""
    head = render_chat([{"role": "user", "content": MARK}], tokenizer).split(MARK)[0]
    given = tokenizer(head, add_special_tokens=False, return_tensors="pt").input_ids
    start, found = given.shape[1], []
    for first in range(0, count, ROWS):
        rows = min(ROWS, count - first)
        ids = torch.cat((given.expand(rows, start), torch.zeros(rows, length, dtype=torch.int64)), 1)
        seeds = [f"chat {first + row}" for row in range(rows)]
        written = continue_sequences(model, ids, torch.full((rows,), start), set(), 1.0, seeds)
        found += [str(tokenizer.decode(row)) for row in written[:, start:]]
    return found


def nearness(pieces: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the cosine of each row [rows, width] and the nearest row of `wanted` [texts, width], [rows]."""
    return np.asarray(1 - cdist(pieces, wanted, "cosine").min(1))
