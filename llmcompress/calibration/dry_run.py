"""A dry run of the walk before any weight is read, so that `plan` does not promise what `compress` cannot do.

Every block runs once on a few tokens. Weights are zeros without memory, linears return zeros without a product, so it
takes a moment for a model of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.calibration.block_calls import record_calls
from llmcompress.calibration.blocks import BlockForward, RowBatch
from llmcompress.errors import InputError, NumericsError
from llmcompress.models.dense.blocks import body
from llmcompress.models.dense.config import config_errors
from llmcompress.models.dense.experts import experts_of, holder
from llmcompress.models.dense.families import Architecture, Linear
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.files.reading import error_text
from llmcompress.weight.modules import put

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 4
PROBED = torch.float64  # of no weight here: inputs in it were cast to the dtype of a linear's weight


class _Zeros(nn.Linear):
    """A linear that returns zeros and counts its calls. `others`: calls on something else than the tokens, or on inputs
    in PROBED."""

    def __init__(self, shape: tuple[int, int], weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight
        self.out_features, self.in_features = shape
        self.calls, self.others = 0, 0
        self.weight, self.dtype = weight, weight.dtype
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return zeros `[..., out]` for `input [..., in]`."""
        self.calls += 1
        self.others += input.shape[:-1].numel() != TOKENS  # such as DeBERTa's relative positions
        self.others += input.dtype == PROBED
        return input.new_zeros(*input.shape[:-1], self.out_features, dtype=self.dtype)


@torch.no_grad()
def probe_architecture(source: DenseModel, arch: Architecture, calibrated: bool) -> Architecture:
    """Return the architecture without linears that their block does not call exactly once, on its tokens.

    Nor are there linears whose inputs it casts to the dtype of their weight, which a compressed one has not; of a head
    that is treated so, the architecture says so. All these join its `other` weights.

    Raises InputError if the model is to be `calibrated` and its blocks cannot be run one by one.
    """
    model, linears = _weightless_model(source, arch), arch.linears()
    try:
        _run_blocks(model, arch)
    except InputError:
        if calibrated:
            raise
        with suppress(*config_errors()):  # without calibration nothing depends on it
            body(model)(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    experts = experts_of(model)
    modules = [(name, model.get_submodule(name)) for name in linears if holder(name, experts) is None]
    calls = {name: (it.calls, it.others) if isinstance(it, _Zeros) else (0, 0) for name, it in modules}
    ran = any(count for count, _ in calls.values())
    odd = {name for name, counts in calls.items() if counts != (1, 0)} if ran else set()
    cast = _find_casts(model, arch, [name for name, it in modules if isinstance(it, _Zeros) and name not in odd])
    odd |= cast & linears.keys()
    blocks = tuple(
        replace(block, groups=tuple(filter(None, (_without(group, odd) for group in block.groups))))
        for block in arch.blocks
    )
    other = (*arch.other, *(f"{name}.weight" for name in linears if name in odd))
    return replace(arch, blocks=blocks, other=other, casts_to_head=arch.head in cast)


def _find_casts(model: PreTrainedModel, arch: Architecture, names: Sequence[str]) -> set[str]:
    """Return those of the linears `names`, and of the head, whose inputs the model casts to their weight's dtype."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        size = head.out_features, head.in_features
        put(model, arch.head, _Zeros(size, head.get_parameter("weight"), head._parameters.get("bias")))
    probed = {name: model.get_submodule(name) for name in (*names, arch.head) if name}
    zeros = {name: module for name, module in probed.items() if isinstance(module, _Zeros)}
    for module in zeros.values():
        module.weight = nn.Parameter(torch.zeros((), dtype=PROBED).expand(module.weight.shape), requires_grad=False)
        module.others = 0
    with suppress(NumericsError, *config_errors()):  # a weight may be read by itself, too
        model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    return {name for name, module in zeros.items() if module.others}


def _weightless_model(source: DenseModel, arch: Architecture) -> PreTrainedModel:
    """Return the model with weights that take no memory, and linears in its blocks that do not multiply."""
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


def _run_blocks(model: PreTrainedModel, arch: Architecture) -> None:
    """Run what the walk runs. Raises InputError as it does."""
    tokens, cpu = torch.zeros(1, TOKENS, dtype=torch.long), torch.device("cpu")
    hidden, calls, _ = record_calls(model, arch.stack, tokens, [RowBatch(slice(0, 1), False)], cpu)
    for index, layout in enumerate(arch.blocks):
        run = BlockForward(model.get_submodule(layout.path), layout.path, calls, index)
        try:
            run(hidden, slice(0, 1))
        except NumericsError:
            continue  # a division by zero; its calls were counted
        except config_errors() as error:
            raise InputError(
                f"{layout.path} cannot be run on its own ({error_text(error)}); choose a model of a known family"
            ) from error


def _without(group: tuple[Linear, ...], odd: set[str]) -> tuple[Linear, ...]:
    return tuple(linear for linear in group if linear.name not in odd)
