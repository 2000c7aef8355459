"""A rehearsal of the walk, before any weight is read: every kind of block runs once on a few tokens of zeros.

Weights are zeros without memory, linears give zeros without a product. So it takes a moment for a model of any size,
and `plan` does not promise what `compress` cannot do.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.calibration.block_calls import recorded
from llmcompress.calibration.blocks import BlockForward, RowBatch
from llmcompress.errors import InputError, NumericsError
from llmcompress.models.dense.blocks import body
from llmcompress.models.dense.config import config_errors, reason
from llmcompress.models.dense.experts import experts_of, holder
from llmcompress.models.dense.families import Architecture, Linear
from llmcompress.models.dense.model import DenseModel
from llmcompress.weight.modules import put

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 4


class _Zeros(nn.Linear):
    """A linear that counts its calls, those for something else than the tokens apart, and gives zeros."""

    def __init__(self, shape: tuple[int, int], weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight
        self.out_features, self.in_features = shape
        self.calls, self.others = 0, 0
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """`input [..., in]` to zeros `[..., out]`."""
        self.calls += 1
        self.others += input.shape[:-1].numel() != TOKENS  # such as DeBERTa's relative positions
        return input.new_zeros(*input.shape[:-1], self.out_features)


@torch.no_grad()
def rehearsed(source: DenseModel, arch: Architecture, calibrated: bool) -> Architecture:
    """Return the architecture without linears that their block does not call once, for its tokens; those join its
    `other` weights.

    Raises InputError for a model whose blocks cannot be run one by one, if it is to be `calibrated`.
    """
    model, linears = _hollow(source, arch), arch.linears()
    try:
        _rehearse(model, arch)
    except InputError:
        if calibrated:
            raise
        with suppress(*config_errors()):  # without data nothing depends on it
            body(model)(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    experts = experts_of(model)
    calls = {name: _calls(model, name) for name in linears if holder(name, experts) is None}
    ran = any(count for count, _ in calls.values())
    odd = {name for name, counts in calls.items() if counts != (1, 0)} if ran else set()
    blocks = tuple(
        replace(block, groups=tuple(kept for group in block.groups if (kept := _without(group, odd))))
        for block in arch.blocks
    )
    return replace(arch, blocks=blocks, other=(*arch.other, *(f"{name}.weight" for name in linears if name in odd)))


def _hollow(source: DenseModel, arch: Architecture) -> PreTrainedModel:
    """Return the model with weights that take no memory, and linears of its blocks that do not multiply."""
    model = source.skeleton()
    for name, linear in arch.linears().items():
        dense = model.get_submodule(name)
        bias = dense._parameters.get("bias")
        put(model, name, _Zeros(linear.shape, dense.get_parameter("weight"), bias))
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            nothing = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, leaf, nn.Parameter(nothing, requires_grad=False))
    return model


def _rehearse(model: PreTrainedModel, arch: Architecture) -> None:
    """Run what the walk runs. Raises InputError as it does."""
    tokens, cpu = torch.zeros(1, TOKENS, dtype=torch.long), torch.device("cpu")
    hidden, calls, _ = recorded(model, arch.stack, tokens, [RowBatch(slice(0, 1), False)], cpu)
    for index, layout in enumerate(arch.blocks):
        run = BlockForward(model.get_submodule(layout.path), layout.path, calls, index)
        try:
            run(hidden, slice(0, 1))
        except NumericsError:
            continue  # zeros can be divided by; what it calls has been counted
        except config_errors() as error:
            raise InputError(
                f"{layout.path} cannot be run on its own ({reason(error)}); choose a model of a known family"
            ) from error


def _calls(model: nn.Module, name: str) -> tuple[int, int]:
    """Return how often a linear was called, and how often for something else than the tokens."""
    linear = model.get_submodule(name)
    return (linear.calls, linear.others) if isinstance(linear, _Zeros) else (0, 0)


def _without(group: tuple[Linear, ...], odd: set[str]) -> tuple[Linear, ...]:
    return tuple(linear for linear in group if linear.name not in odd)
