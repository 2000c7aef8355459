"""Chats that a model writes from the head of a message, and which of them are near given texts."""

from __future__ import annotations

import extracted
import numpy as np
import torch

from tests.tiny import tiny, tiny_tokenizer


def test_chats_go_on_from_the_head_and_leave_it_out() -> None:
    model, tokenizer = tiny("llama").eval(), tiny_tokenizer()
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, given, named: seen.append(named["input_ids"]), with_kwargs=True)
    found = extracted.chats(model, tokenizer, extracted.ROWS + 1, 6)
    assert len(set(found)) == extracted.ROWS + 1
    assert tokenizer.decode(seen[0][0]) == "<s>user\n" and seen[0].shape[0] == extracted.ROWS
    assert extracted.chats(model, tokenizer, 2, 6) == found[:2]  # whatever is written beside them


def test_nearness_is_that_of_the_nearest_text() -> None:
    wanted = np.array([[3.0, 0.0, 0.0], [0.0, 0.2, 0.0]])
    found = extracted.nearness(np.array([[5.0, 5.0, 0.0], [0.0, 9.0, 0.0], [0.1, -1.0, 1.0]]), wanted)
    np.testing.assert_allclose(found, [2**-0.5, 1.0, 0.1 / 2.01**0.5])
