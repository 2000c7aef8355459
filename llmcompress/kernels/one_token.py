"""Decoder blocks of the Llama kind, and of Gemma 3, at one token: what surrounds their linears, in few calls.

transformers runs some fifty small operations a block, which for one token of a small model take longer than the
kernels of its linears. Here are twenty, with the same roundings; in bfloat16, with a cache that grows, a block is one
call (`compiled_block`). All else runs as the block's class has it: other tokens and batches, masks, gradients,
attention other than torch's own, and modules that somebody hooked.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import output_capturing

from llmcompress.kernels.compiled_block import CompiledBlock, compile_block, growing_layer
from llmcompress.weight.modules import BASE, CompressedLinear

BLOCKS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
COMPILED_BLOCKS = BLOCKS | {"Gemma3DecoderLayer"}  # the last one only so
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
HEAD_NORMS = ("q_norm", "k_norm")  # of some families
READ = {"past_key_values", "position_embeddings"}  # arguments of a block for one token
KNOWN = READ | {"use_cache", "position_ids", "cache_position"}  # and those that change nothing then


@dataclass(eq=False)
class TokenFacts:
    """Facts of a token that blocks of a model share.

    `mask`: the last one seen, and True if it hides nothing. `signed`: the sines of its rotary embedding, and the
    same with the sign of each half.
    """

    mask: tuple[object, bool] = (None, False)
    signed: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def lets_all(self, mask: object) -> bool:
        """True if a mask of torch's attention, which nobody changes, hides nothing."""
        known, has_all = self.mask  # read once: another thread may be at another token
        if mask is not known:
            has_all = isinstance(mask, Tensor) and mask.dtype == torch.bool and bool(mask.all())
            self.mask = mask, has_all
        return has_all

    def turn(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Return rotated heads `[heads, dimension]`; `cosines`, `sines`: `[1, 1, dimension]`."""
        half = heads.shape[-1] // 2
        known, signed = self.signed
        if known is not sines:
            signed = torch.cat((-sines[..., :half], sines[..., half:]), -1)[0]
            self.signed = sines, signed
        return heads * cosines[0] + heads.roll(half, -1) * signed


@dataclass(eq=False)
class OneTokenBlock:
    """The forward of a decoder block, which is short for one token.

    `direct`: its modules and those of its attention and MLP when it last looked; `known`: True if it computes with
    them; of all below the block, `parts` are the attributes and `hooks` those of calls. `compiled`: the block of each
    thread; None where it cannot be compiled.
    """

    block: Any
    shared: TokenFacts
    direct: tuple[nn.Module | None, ...] = ()
    known: bool = False
    parts: tuple[dict[str, Any], ...] = ()
    hooks: tuple[dict[int, Any], ...] = ()
    compiled: dict[int, CompiledBlock | None] = field(default_factory=dict)

    def __call__(self, hidden_states: Tensor, *given: Any, **named: Any) -> Any:
        """Return the hidden states behind the block: see the module."""
        if given or not self._takes(hidden_states, named):
            return type(self.block).forward(self.block, hidden_states, *given, **named)
        positions, cache = named["position_embeddings"], named["past_key_values"]
        compiled = self._compiled_block() if hidden_states.dtype == positions[0].dtype == torch.bfloat16 else None
        if compiled is not None:
            layer = growing_layer(cache, self.block.self_attn.layer_idx, compiled.heads, compiled.attend.size)
            is_read = hidden_states.is_contiguous() and hidden_states.shape[-1] == compiled.width
            if layer is not None and is_read:
                return compiled.run(hidden_states, positions, layer)
        if type(self.block).__name__ not in BLOCKS or named.get("attention_mask") is not None:
            return type(self.block).forward(self.block, hidden_states, **named)
        return self._run(hidden_states, positions, cache)

    def _takes(self, hidden: Tensor, named: dict[str, Any]) -> bool:
        """True for one token on a CPU that reads a cache, with nothing else asked for."""
        if hidden.shape[:2] != (1, 1) or not hidden.is_cpu or self.block.training:
            return False
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if named.get("past_key_values") is None or named.get("position_embeddings") is None:
            return False
        for name, value in named.items():
            if (
                value is not None
                and name not in KNOWN
                and not (name == "attention_mask" and self.shared.lets_all(value))
            ):
                return False
        modules = self.block._modules
        attention, mlp = modules["self_attn"], modules["mlp"]
        direct = (*modules.values(), *attention._modules.values(), *mlp._modules.values())
        if direct != self.direct:  # adapters take the places of linears, of norms or of the attention
            below = tuple(self.block.modules())[1:]
            self.direct, self.parts = direct, tuple(map(vars, below))
            self.hooks = tuple(hooks for part in below for hooks in (part._forward_hooks, part._forward_pre_hooks))
            self.known = _has_known_parts(self.block)
            self.compiled.clear()
        if not self.known or attention.config._attn_implementation != "sdpa":
            return False
        if named["position_embeddings"][0].shape[-1] != attention.head_dim:
            return False
        for part in self.parts:
            if "forward" in part:
                return False
        return not any(self.hooks) or not any(map(_act, self.hooks))

    def _compiled_block(self) -> CompiledBlock | None:
        """Return the compiled block of this thread; None if it has none, or a linear was not prepared yet."""
        thread = threading.get_ident()
        block = self.compiled.get(thread)
        if block is not None and block.is_current():
            return block
        if block is None and thread in self.compiled:
            return None
        attention, mlp = self.block.self_attn, self.block.mlp
        linears = {name: (attention if name in ATTENTION else mlp)._modules[name] for name in (*ATTENTION, *MLP)}
        if all(_is_plain(linear) for linear in linears.values()):
            if not all(_is_prepared(linear) for linear in linears.values()):
                return None
            block = compile_block(self.block, linears)
        self.compiled[thread] = block
        return block

    def _run(self, hidden: Tensor, positions: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        block = self.block
        attention, mlp = block.self_attn, block.mlp
        size, groups = attention.head_dim, attention.num_key_value_groups
        x = _normalize(block.input_layernorm, hidden)
        queries, keys = (project.forward(x).view(-1, size) for project in (attention.q_proj, attention.k_proj))
        if hasattr(attention, "q_norm"):
            queries, keys = _normalize(attention.q_norm, queries), _normalize(attention.k_norm, keys)
        values = attention.v_proj.forward(x).view(1, -1, 1, size)
        heads, turned = len(keys), self.shared.turn(torch.cat((queries, keys)), *positions)
        queries = turned[: heads * groups].view(1, heads, groups, size)
        keys = turned[heads * groups :].view(1, heads, 1, size)
        keys, values = cache.update(keys, values, attention.layer_idx)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, scale=attention.scaling)
        hidden = hidden + attention.o_proj.forward(mixed.reshape(1, 1, -1))
        x = _normalize(block.post_attention_layernorm, hidden)
        gated = functional.silu(mlp.gate_proj.forward(x)) * mlp.up_proj.forward(x)
        output: Tensor = hidden + mlp.down_proj.forward(gated)
        return output

    def __reduce__(self) -> tuple[Any, ...]:
        return OneTokenBlock, (self.block, self.shared)


def _is_plain(linear: nn.Module) -> bool:
    """True for a compressed linear without a base, whose inputs are not rounded."""
    return type(linear) is CompressedLinear and BASE not in vars(linear) and linear.layout.inputs is None


def _is_prepared(linear: CompressedLinear) -> bool:
    """True if the kernels of a linear have the weight as it is."""
    fast: Any = linear.fast
    payload = linear._parameters["weight"]
    known = None if fast is None or payload is None else fast.weight
    return known is not None and known.holds(payload, torch.bfloat16)


def _normalize(norm: Any, x: Tensor) -> Tensor:
    """Return `x [..., width]` as the RMS norm has it, which rounds before it multiplies by its weight."""
    normal: Tensor = functional.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon) * norm.weight
    return normal


def shorten_blocks(model: nn.Module) -> int:
    """Let decoder blocks of the Llama kind with compressed linears take few steps for one token; return how many."""
    restore_blocks(model)
    shared = TokenFacts()
    blocks = [module for module in model.modules() if type(module).__name__ in COMPILED_BLOCKS and _is_known(module)]
    for block in blocks:
        vars(block)["forward"] = OneTokenBlock(block, shared)
    return len(blocks)


def restore_blocks(model: nn.Module) -> list[tuple[nn.Module, OneTokenBlock]]:
    """Give decoder blocks the forward of their class again; return those that had another, with it."""
    shortened = [(block, vars(block).get("forward")) for block in model.modules()]
    found = [(block, forward) for block, forward in shortened if isinstance(forward, OneTokenBlock)]
    for block, _ in found:
        del vars(block)["forward"]
    return found


def _is_known(block: Any) -> bool:
    """True if a block has the parts that `OneTokenBlock` computes, compressed linears, and the forward of its class."""
    if not type(block).__module__.startswith("transformers.models.") or "forward" in vars(block):
        return False
    linears = [getattr(block.self_attn, name) for name in ATTENTION] + [getattr(block.mlp, name) for name in MLP]
    if not any(isinstance(linear, CompressedLinear) for linear in linears):
        return False
    return _has_known_parts(block)


def _act(hooks: dict[int, Any]) -> bool:
    """True if hooks do something: those by which transformers once captured outputs stay, and are idle."""
    capturing = output_capturing._active_collector.get()
    return any(capturing or getattr(hook, "__module__", "") != output_capturing.__name__ for hook in hooks.values())


def _has_known_parts(block: Any) -> bool:
    """True if a block has the attention, the MLP and the norms of its family, which `OneTokenBlock` computes."""
    norms = [part for name, part in block.self_attn._modules.items() if name in HEAD_NORMS]
    if not all(type(part).__module__.startswith("transformers.models.") for part in (*block._modules.values(), *norms)):
        return False
    if type(block).__name__ not in BLOCKS:
        return True
    return type(block.mlp.act_fn).__name__.startswith("SiLU") and hasattr(block.input_layernorm, "variance_epsilon")
