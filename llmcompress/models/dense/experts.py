"""Mixtures of experts with one linear for each matrix, in the place of transformers' parameters that hold all experts.

transformers keeps the experts of a block in two parameters, `[experts, 2 * width, hidden]` and `[experts, hidden,
width]`. Steps, reports and byte budgets are about matrices, so `unfuse` replaces such a module by `Experts` with
linears `<experts>.<number>.gate_proj`, `.up_proj` and `.down_proj`, as in most checkpoints on the Hub. Outputs are
equal up to the order of sums. Routers stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.runtime.precision import ONE_BUILDER

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST = 2**16  # experts of a whole model
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
FUSED_PAIR = "gate_up_proj"  # transformers' name of the parameter that holds gates and ups


@dataclass(frozen=True)
class Form:
    """The form in which transformers stores the matrices of a fused experts module.

    gated: True with a gate beside each up. interleaved: True if their rows alternate, else all gates come first.
    transposed: True for matrices `[in, out]`. biased: True with biases. sorted: True if it is called on the tokens of
    all experts one after the other (Llama 4), not with their indices.
    """

    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False
    sorted: bool = False

    def rows(self, leaf: str, width: int) -> slice | None:
        """Return the rows of an expert's linear `leaf` in the fused matrix `[out, in]`, None for all of them.

        width: of the expert between its linears.
        """
        if not self.gated or leaf == DOWN:
            return None
        first = 0 if leaf == GATE else 1
        return slice(first, None, 2) if self.interleaved else slice(first * width, (first + 1) * width)


class Expert(nn.Module):
    """One expert: `down_proj(activation(gate_proj(x), up_proj(x)))`; without a gate the activation gets the up alone.

    `activation` belongs to the fused module that it came from.
    """

    def __init__(self, hidden: int, width: int, form: Form, activation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__["activation"] = activation
        self.gate_proj = nn.Linear(hidden, width, form.biased) if form.gated else None
        self.up_proj = nn.Linear(hidden, width, form.biased)
        self.down_proj = nn.Linear(width, hidden, form.biased)

    def inner(self, x: Tensor) -> Tensor:
        """Return the inputs `[tokens, width]` of `down_proj` for `x [tokens, hidden]`."""
        activation: Callable[..., Tensor] = self.__dict__["activation"]
        up = self.up_proj(x)
        return activation(up) if self.gate_proj is None else activation(self.gate_proj(x), up)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs `[tokens, hidden]` for `x [tokens, hidden]`."""
        output: Tensor = self.down_proj(self.inner(x))
        return output


class Experts(nn.ModuleList):
    """The experts of one block. tokens: while an expert runs, the indices of its tokens in the call."""

    def __init__(self, experts: list[Expert], form: Form) -> None:
        super().__init__(experts)
        self.form = form
        self.num_experts = len(experts)
        self.tokens: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum of each token's experts, `[tokens, hidden]`.

        `top_k_index [tokens, k]`: the experts of each token, `top_k_weights`: their weights. Without them
        `hidden_states [experts * tokens, hidden]` are the tokens of each expert in turn, zeros for others' tokens.
        """
        if top_k_index is None or top_k_weights is None:
            return self._run_sorted(hidden_states)
        final = torch.zeros_like(hidden_states)
        if hidden_states.is_meta:  # without values for indices
            for expert in self:
                final = final + expert(hidden_states)
            return final
        weights = top_k_weights.reshape(-1, 1)
        wide = top_k_weights.numel() // len(hidden_states)
        order = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=self.num_experts)[: self.num_experts].tolist()
        start = 0
        for number, count in enumerate(counts):
            chosen, start = order[start : start + count], start + count
            if count:
                tokens = chosen // wide
                output = self._run(number, hidden_states[tokens], tokens) * weights[chosen]
                final.index_add_(0, tokens, output.to(final.dtype))
        return final

    def _run_sorted(self, hidden_states: Tensor) -> Tensor:
        parts = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        if hidden_states.is_meta:
            return torch.cat([expert(part) for expert, part in zip(self, parts, strict=True)])
        outputs = torch.zeros_like(parts)
        for number, part in enumerate(parts):
            tokens = part.any(-1).nonzero()[:, 0]  # an expert has nothing to add to a token of zeros
            if len(tokens):
                outputs[number, tokens] = self._run(number, part[tokens], tokens).to(outputs.dtype)
        return outputs.view_as(hidden_states)

    def _run(self, number: int, x: Tensor, tokens: Tensor) -> Tensor:
        try:
            self.tokens = tokens
            output: Tensor = self[number](x)
            return output
        finally:
            self.tokens = None


def _fused_modules(model: nn.Module) -> dict[str, tuple[nn.Module, Form]]:
    """Return the modules with all experts of a block in one parameter, by module path, with their form.

    Raises InputError for experts of an unknown form.
    """
    fuse_experts = {}
    for name, module in model.named_modules():
        if isinstance(module, (Experts, Expert)) or "experts" not in f"{name} {type(module).__name__}".lower():
            continue
        stacked = [value for value in module.parameters(recurse=False) if value.dim() == 3]
        form = _form(module)
        if form is not None and stacked:
            fuse_experts[name] = module, form
        elif stacked or (isinstance(module, nn.ModuleList) and len(module) > 1):
            raise InputError(
                f"{name or 'the model'} holds its experts as {type(module).__name__}, which cannot be compressed yet; "
                f"choose a model with another kind of experts"
            )
    return fuse_experts


def unfuse(model: nn.Module) -> None:
    """Put `Experts` in the place of every fused module of a model, without a copy; weights may be on meta.

    Raises InputError for experts of an unknown form, and for more of them than any model has.
    """
    from transformers.initialization import no_init_weights

    found = _fused_modules(model)
    count = sum(int(module.get_parameter(DOWN).shape[0]) for module, _ in found.values())
    if count > MOST:
        raise InputError(f"config.json describes {count} experts, which no model has; correct it")
    with ONE_BUILDER, no_init_weights():
        for name, (module, form) in found.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _unfuse_module(module, form))


def fuse_experts(experts: Experts, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return the parameters of the fused module in place of `experts`, by leaf name; `read`: a tensor by name."""
    form, numbers = experts.form, range(experts.num_experts)
    stored = {}
    for leaf, parts in ((FUSED_PAIR if form.gated else UP, [GATE, UP] if form.gated else [UP]), (DOWN, [DOWN])):
        for kind in ("weight", "bias") if form.biased else ("weight",):
            values = [_join([read(f"{number}.{part}.{kind}") for part in parts], form) for number in numbers]
            stacked = torch.stack([value.T if form.transposed and kind == "weight" else value for value in values])
            stored[leaf if kind == "weight" else f"{leaf}_bias"] = stacked.contiguous()
    return stored


def _join(parts: list[Tensor], form: Form) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts, 1).flatten(0, 1) if form.interleaved else torch.cat(parts)


def _form(module: nn.Module) -> Form | None:
    """Return the form of a fused module, None for an unknown one."""
    if type(module).__name__ == "Llama4TextExperts":
        return Form(transposed=True, sorted=True)
    held = vars(module)
    if "is_transposed" not in held or held.get("has_post_expert_norm"):
        return None
    return Form(held["has_gate"], not held["is_concatenated"], held["is_transposed"], held["has_bias"])


def _unfuse_module(module: nn.Module, form: Form) -> Experts:
    down = module.get_parameter(DOWN)
    width, hidden = down.shape[1:] if form.transposed else reversed(down.shape[1:])
    activation = _activation(module, form)
    experts = []
    for number in range(len(down)):
        with torch.device("meta"):
            expert = Expert(int(hidden), int(width), form, activation)
        for leaf in (GATE, UP, DOWN) if form.gated else (UP, DOWN):
            held = FUSED_PAIR if form.gated and leaf != DOWN else leaf
            linear = expert.get_submodule(leaf)
            for kind, name in {"weight": held, **({"bias": f"{held}_bias"} if form.biased else {})}.items():
                value = module.get_parameter(name)[number]
                turned = value.T if form.transposed and kind == "weight" else value
                rows = form.rows(leaf, int(width))
                piece = (turned if rows is None else turned[rows]).detach()
                setattr(linear, kind, nn.Parameter(piece, requires_grad=module.get_parameter(name).requires_grad))
        experts.append(expert.train(module.training))
    return Experts(experts, form)


def _activation(module: nn.Module, form: Form) -> Callable[..., Tensor]:
    """Return the activation between the linears of an expert, as the fused module computes it."""
    shell: Any = copy.copy(module)
    shell.__dict__["_parameters"] = {}
    if not form.gated:
        alone: Callable[..., Tensor] = shell.act_fn
        return alone
    if form.sorted:
        return _Product(shell)
    return _Gate(shell, form)


@dataclass(frozen=True, eq=False)
class _Product:
    """Llama 4's activation."""

    shell: Any

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        output: Tensor = up * self.shell.act_fn(gate)
        return output


@dataclass(frozen=True, eq=False)
class _Gate:
    """The activation of a fused module, which reads gates and ups in one tensor."""

    shell: Any
    form: Form

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        together = torch.stack([gate, up], -1).flatten(-2) if self.form.interleaved else torch.cat([gate, up], -1)
        output: Tensor = self.shell._apply_gate(together)
        return output


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """Return the experts of a model, or of a block, by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def expert_share(config: PreTrainedConfig, experts: int) -> float:
    """Return the share of a block's experts that a token is given; 1 where the config does not say."""
    settings = config.get_text_config(decoder=True)
    chosen = next((value for key in PER_TOKEN if isinstance(value := getattr(settings, key, None), int)), experts)
    return min(1.0, chosen / experts)


def holder(name: str, experts: Mapping[str, Experts]) -> str | None:
    """Return the path of the experts with the linear `name`, None for one outside."""
    path = name.rsplit(".", 2)[0]
    return path if path in experts else None
