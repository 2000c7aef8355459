"""Block-wise reconstruction while a model is compressed: later blocks read the outputs of the reconstructed ones.

BRECQ (arXiv 2102.05426) and related methods. The targets are the dense block's outputs in the dense model, the inputs
are the outputs of the compressed blocks before it. So a block also learns to undo their errors.

With windows of two, the cross-block dependency of CBQ (arXiv 2312.07950), block b learns together with b - 1, which has
learned with b - 2 before:

    inputs of b - 1, as the compressed model has them -> b - 1, b -> towards the dense model's states after b

So every block learns twice, for itself and for the one after it, and is stored after the second time; the first block
learns by itself at first. Unlike in CBQ, the error is that of `blockwise`, without a divergence of distributions, and
the layers of block b are compressed before it learns, on the outputs of the compressed blocks before it. Memory: one
more block that learns, and its input states, 4 bytes x tokens x width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from llmcompress.calibration.walk import Block
from llmcompress.distillation.blockwise import Activations, recover_block
from llmcompress.distillation.student.model import WEIGHTS, Student, relaxed_student
from llmcompress.errors import InputError
from llmcompress.recipe.reconstruction import Reconstruction
from llmcompress.runtime.ranks import ALONE, Ranks
from llmcompress.weight.modules import Multiplying
from llmcompress.weight.trainable.latents import Form
from llmcompress.weight.trainable.latents.flexround import DividedWeights
from llmcompress.weight.trainable.latents.lora_rounding import Offsets
from llmcompress.weight.trainable.relax import Relaxation


@dataclass(frozen=True, eq=False)
class TunedBlocks:
    """Blocks that learned: their compressed linears and other parameters by name. `report`: their errors."""

    linears: dict[str, Multiplying]
    dense: dict[str, Tensor]
    report: dict[str, Any]


@dataclass(frozen=True)
class BlockTuner:
    """Lets blocks learn after their layers are compressed, in place. `ranks` have sequences of their own."""

    recipe: Reconstruction
    ranks: Ranks = ALONE

    def learn(self, blocks: tuple[Block, ...], weights: Mapping[str, Tensor], held_out: int) -> TunedBlocks:
        """Train blocks that follow each other, on the last one's outputs.

        The recipe's `window` is how many these are in the end. With `between`, one also learns alone after each group
        of its layers with a common input. `weights`: dense, by name; `held_out`: a number of sequences. Raises
        InputError if no sequences are held out.
        """
        recipe, block, runs = self.recipe, blocks[-1], [each.run for each in blocks if each.run is not None]
        if len(runs) < len(blocks) or block.wanted is None:
            raise ValueError("the walk must carry the dense model's hidden states; ask it for outputs")
        if not held_out:
            raise InputError("reconstruct: the calibration text is too short to hold any of it out; give more text")
        part = relaxed_student(
            block.model,
            recipe.rates,
            None if recipe.latents == "codes" else weights.__getitem__,
            tuple(f"{each.path}." for each in blocks),
            # a block's loss turns the codes that should turn
            relaxation=Relaxation(frozenset(), recipe.estimator, form=_form(recipe), outside="edge"),
        )
        _leave_dense(part, weights)
        counted = torch.ones(block.hidden.shape[:2], dtype=torch.bool, device=block.hidden.device)
        own = len(self.ranks.share(torch.arange(held_out)))
        data, first = Activations(blocks[0].hidden, block.wanted, counted), len(block.hidden) - own

        def window(hidden: Tensor) -> Tensor:
            return reduce(lambda states, run: run(states), runs, hidden)

        errors = recover_block(window, part, data[:first], data[first:], recipe, block.path, self.ranks)
        beside = {name: value for name, value in part.dense().items() if name.removesuffix(".weight") not in weights}
        report = errors.to_json() | {"window": [each.path for each in blocks]}
        return TunedBlocks(part.freeze_into_model(), beside, report)


def _form(recipe: Reconstruction) -> Form | None:
    """Return the form of latents; None if each is a number of its own."""
    if recipe.offsets is not None:
        return partial(Offsets, rank=recipe.offsets.rank)
    return DividedWeights if recipe.latents == "divided" else None


def _leave_dense(part: Student, weights: Mapping[str, Tensor]) -> None:
    """Keep layers that are never compressed from learning, since the recipe leaves their weights as they are."""
    trained = part.trained.get(WEIGHTS, {})
    for name in [name for name in trained if name.removesuffix(".weight") not in weights]:
        trained.pop(name).requires_grad_(False)
