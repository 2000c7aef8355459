"""Block-wise reconstruction while a model is compressed: the blocks after it see what a block became by it.

BRECQ (arXiv 2102.05426) and its kin. The aim is what the dense block gives in the dense model, for the inputs that the
compressed blocks before it leave: so a block also learns to undo what those lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmcompress.calibrate import Block
from llmcompress.distill.blockwise.block import Activations, recover_block
from llmcompress.distill.blockwise.reconstruction import Reconstruction
from llmcompress.distill.student.model import WEIGHTS, Student, relaxed_student
from llmcompress.driver import Tune, Tuned
from llmcompress.errors import InputError


def tuner(recipe: Reconstruction) -> Tune:
    """What the driver calls when layers of a block are set. Raises InputError where nothing is held out to judge by."""

    def tune(block: Block, weights: Mapping[str, Tensor], held_out: int) -> Tuned:
        return _tuned(block, weights, recipe, held_out)

    return Tune(tune, between="weights" in recipe.rates, batch_size=recipe.micro_batch)


def _tuned(block: Block, weights: Mapping[str, Tensor], recipe: Reconstruction, held_out: int) -> Tuned:
    if block.run is None or block.wanted is None:
        raise ValueError("the walk must carry the dense model's hidden states; ask it for outputs")
    if not held_out:
        raise InputError("reconstruct: the calibration text is too short to hold any of it out; give more text")
    target = weights.__getitem__ if recipe.latents == "weights" else None
    part = relaxed_student(block.model, recipe.rates, recipe.estimator, target, f"{block.path}.")
    _leave_dense(part, weights)
    counted = torch.ones(block.hidden.shape[:2], dtype=torch.bool, device=block.hidden.device)
    data, first = Activations(block.hidden, block.wanted, counted), len(block.hidden) - held_out
    found = recover_block(block.run, part, data[:first], data[first:], recipe, block.path)
    beside = {name: value for name, value in part.dense().items() if name.removesuffix(".weight") not in weights}
    return Tuned(part.settle(), beside, found.to_json())


def _leave_dense(part: Student, weights: Mapping[str, Tensor]) -> None:
    """Layers that are never compressed do not learn, since nobody asked for other weights there."""
    trained = part.trained.get(WEIGHTS, {})
    for name in [name for name in trained if name.removesuffix(".weight") not in weights]:
        trained.pop(name).requires_grad_(False)
