"""Decoder blocks of the Llama kind and of Gemma 3 at one token in bfloat16: one call instead of some forty of torch.

Its linears multiply by the kernels that they have anyway, called in sequence with those of `cpu/token_steps`. The cache
is transformers' own; its tensors become the beginnings of longer ones, so that a token is written behind the others
instead of copying all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmcompress.kernels.cpu.calls import address_of, own_values
from llmcompress.kernels.cpu.matmul import NUMBERS
from llmcompress.kernels.cpu.sequence import CallSequence
from llmcompress.kernels.cpu.token_calls import TokenCalls, has_calls, scores_address
from llmcompress.kernels.cpu.token_steps import Attend, AttendArgument, Norm, NormArgument
from llmcompress.kernels.cpu.vectors import Combine, CombineArgument

GATES: dict[str, Literal["silu", "gelu"]] = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu"}
NORMS = [f"{name}_layernorm" for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")]
NORMS += ["q_norm", "k_norm"]
LEAST_ROOM = 64  # tokens that a cache has at least room for, behind those that it holds


@dataclass(eq=False)
class CompiledBlock:
    """The calls of a block, with the arguments that change from token to token.

    `objects`: what kernels were made for, as (attributes, name, value). `tensors`: what they read, with address and
    version, None for one that is read as it is then.
    """

    calls: CallSequence
    objects: list[tuple[dict[str, Any], str, object]]
    tensors: list[tuple[Tensor, int, int | None]]
    entry: Any  # of the norm that reads the block's input
    middle: Any  # of the norm that adds to it
    attend: Attend
    attended: Any
    exit: Any  # of the sum that is the block's output
    heads: int
    width: int

    def is_current(self) -> bool:
        """True if nothing was exchanged or changed since."""
        for attributes, name, value in self.objects:
            if attributes[name] is not value:
                return False
        for tensor, address, version in self.tensors:
            if tensor.data_ptr() != address or (version is not None and tensor._version != version):
                return False
        return True

    def run(self, hidden: Tensor, positions: tuple[Tensor, Tensor], layer: DynamicLayer) -> Tensor:
        """Return the block's output for `hidden [1, 1, width]`; its key and value go into the cache's `layer`."""
        room, output = _room_of(layer), torch.empty_like(hidden)
        count = room.count
        self.entry[NormArgument.HIDDEN] = self.middle[NormArgument.HIDDEN] = hidden.data_ptr()
        self.exit[CombineArgument.RESULT] = output.data_ptr()
        values, scores = self.attended, self.attend.scores_room(count + 1)
        values[AttendArgument.COSINES], values[AttendArgument.SINES] = (part.data_ptr() for part in positions)
        values[AttendArgument.KEYS], values[AttendArgument.VALUES] = room.addresses()
        values[AttendArgument.STRIDE], values[AttendArgument.COUNT] = room.buffers[0].stride(1), count
        values[AttendArgument.SCORES], values[AttendArgument.ROOM] = scores_address(scores * self.heads), scores
        self.calls.run()
        room.grow(layer)
        return output


def compile_block(block: Any, linears: dict[str, Any]) -> CompiledBlock | None:
    """Return a block's calls for this thread; None for one that the kernels do not compute.

    `linears`: the compressed ones by name, with prepared weights.
    """
    attention, mlp = block.self_attn, block.mlp
    weights = {name: linear.fast.weight.prepared for name, linear in linears.items()}
    modes = {linear.fast.mode for linear in linears.values()}
    parameters = _parameters(block)
    if not all(map(has_calls, weights.values())) or len(modes) > 1 or not _is_known(block, parameters):
        return None
    calls = TokenCalls(NUMBERS[modes.pop()])
    size, group = attention.head_dim, attention.num_key_value_groups
    heads, width = attention.k_proj.out_features // size, attention.q_proj.in_features
    shifted = hasattr(block, "pre_feedforward_layernorm")
    x, total = calls.room("x", width), calls.room("sum", width)

    def multiply(name: str, source: int) -> int:
        return calls.multiply(weights[name], source, name)

    def add_norm(norm: Any, source: int, more: int | None, target: int) -> Any:
        values = own_values([source, more or 0, total, address_of(norm.weight), target])
        calls.add(Norm(width, _epsilon(norm), shifted, more is not None), values)
        return values

    def after(name: str, y: int) -> int:
        """Add the norm of what a linear gave, in place, where the family has one."""
        if shifted:
            add_norm(getattr(block, name), y, None, y)
        return y

    first = add_norm(block.input_layernorm, 0, None, x)
    read = [multiply(name, x) for name in ("q_proj", "k_proj", "v_proj")]
    biases = [address_of(linear.bias) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    of_heads = [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None]
    of_norms = [address_of(norm.weight) for norm in of_heads] or [0, 0]
    mixed = calls.room("mixed", heads * group * size)
    epsilon = _epsilon(of_heads[0]) if of_heads else None
    attend = Attend(size, group, attention.scaling, any(biases), epsilon, shifted)
    changing = AttendArgument.MIXED - AttendArgument.COSINES  # from token to token
    attended = own_values([*read, *biases, *of_norms, *[0] * changing, mixed])
    calls.add(attend, attended, heads)
    given = after("post_attention_layernorm", multiply("o_proj", mixed))
    before_mlp = block.pre_feedforward_layernorm if shifted else block.post_attention_layernorm
    second = add_norm(before_mlp, 0, given, x)
    gate, up = multiply("gate_proj", x), multiply("up_proj", x)
    calls.add(Combine(mlp.up_proj.out_features, GATES[type(mlp.act_fn).__name__]), own_values([gate, up, gate]))
    last = own_values([total, after("post_feedforward_layernorm", multiply("down_proj", gate)), 0])
    calls.add(Combine(width, None), last)
    payloads = [linear._parameters["weight"] for linear in linears.values()]
    objects: list[tuple[dict[str, Any], str, object]] = [
        *((vars(linear), "fast", linear.fast) for linear in linears.values()),
        *((linear._parameters, "weight", payload) for linear, payload in zip(linears.values(), payloads, strict=True)),
        *((module._parameters, name, tensor) for module, name, tensor in parameters),
    ]
    tensors: list[tuple[Tensor, int, int | None]] = [
        *((payload, payload.data_ptr(), None if payload.is_inference() else payload._version) for payload in payloads),
        *((tensor, tensor.data_ptr(), None) for _, _, tensor in parameters),
    ]
    return CompiledBlock(calls.sequence, objects, tensors, first, second, attend, attended, last, heads, width)


def _epsilon(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _parameters(block: Any) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the weights of norms and the biases that kernels read, each with its module and its name there."""
    attention = block.self_attn
    norms = [(part, name) for part in (block, attention) for name in NORMS if hasattr(part, name)]
    weights = [getattr(part, name) for part, name in norms]
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [(linear, "bias", linear.bias) for linear in linears if linear.bias is not None]
    return [*((norm, "weight", norm.weight) for norm in weights), *biases]


def _is_known(block: Any, parameters: list[tuple[nn.Module, str, Tensor]]) -> bool:
    """True if a block has an activation, biases, sizes and dtypes that the kernels take."""
    attention, mlp = block.self_attn, block.mlp
    biased = sum(name == "bias" for _, name, _ in parameters)
    others = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if (
        type(mlp.act_fn).__name__ not in GATES
        or biased not in (0, 3)
        or any(linear.bias is not None for linear in others)
        or attention.head_dim % 2
    ):
        return False
    typed = all(x.dtype == torch.bfloat16 and x.is_contiguous() for _, _, x in parameters)
    return typed and _fits(block, parameters)


def _fits(block: Any, parameters: list[tuple[nn.Module, str, Tensor]]) -> bool:
    """True if all parts have the sizes that calls read and write; torch would broadcast a size of 1."""
    attention, mlp = block.self_attn, block.mlp
    size, width, inner = attention.head_dim, attention.q_proj.in_features, mlp.up_proj.out_features
    keys = attention.k_proj.out_features // size * size
    queries = keys * attention.num_key_value_groups
    sizes = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, queries)}
    sizes |= {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    linears = {name: linear for part in (attention, mlp) for name, linear in part.named_children() if name in sizes}
    lengths = {linear: linear.out_features for linear in linears.values()}
    lengths |= {norm: size for name, norm in attention.named_children() if name in NORMS}
    return all((linear.out_features, linear.in_features) == sizes[name] for name, linear in linears.items()) and all(
        x.numel() == lengths.get(module, width) for module, _, x in parameters
    )


@dataclass(eq=False)
class _CacheRoom:
    """The keys and values of a cache's layer, `[1, heads, length, size]` each, with room behind them.

    `shown`: the tensors that the layer holds, `count` tokens of `buffers` from `start` on. If it holds others, they
    were replaced. `window`: the most tokens that it holds; None for all.
    """

    buffers: tuple[Tensor, Tensor]
    shown: tuple[Tensor, Tensor]
    start: int
    count: int
    window: int | None

    @staticmethod
    def of(layer: Any) -> _CacheRoom:
        """Return room for a quarter more tokens than a layer holds, those among them."""
        keys, values = layer.keys, layer.values
        count = keys.shape[-2]
        length = count + max(count // 4, LEAST_ROOM)
        buffers = tuple(x.new_empty(*x.shape[:2], length, x.shape[3]) for x in (keys, values))
        for buffer, x in zip(buffers, (keys, values), strict=True):
            buffer[:, :, :count] = x
        window = layer.sliding_window - 1 if layer.is_sliding else None
        return _CacheRoom((buffers[0], buffers[1]), (keys, values), 0, count, window)

    def addresses(self) -> list[int]:
        """Return the addresses of the first key and the first value."""
        return [x.data_ptr() + 2 * self.start * x.shape[3] for x in self.buffers]

    def grow(self, layer: Any) -> None:
        """Let a layer hold one more token, which was written, and no more than its window."""
        self.count += 1
        if self.window is not None:
            layer.cumulative_length += 1
            dropped = max(0, self.count - self.window)
            self.start, self.count = self.start + dropped, self.count - dropped
        keys, values = self.buffers
        start, count = self.start, self.count
        self.shown = layer.keys, layer.values = keys.narrow(2, start, count), values.narrow(2, start, count)


_ROOMS: WeakKeyDictionary[DynamicLayer, _CacheRoom] = WeakKeyDictionary()


def _room_of(layer: DynamicLayer) -> _CacheRoom:
    """Return a layer's keys and values with room for one more token."""
    room = _ROOMS.get(layer)
    is_current = room is not None and room.shown[0] is layer.keys and room.shown[1] is layer.values
    if room is None or not is_current or room.start + room.count == room.buffers[0].shape[2]:
        room = _ROOMS[layer] = _CacheRoom.of(layer)
    return room


def growing_layer(cache: Any, number: int, heads: int, size: int) -> DynamicLayer | None:
    """Return a cache's layer of one sequence in bfloat16 that grows token by token; None if it is of another kind."""
    if type(cache) is not DynamicCache or cache.offloading or number >= len(cache.layers):
        return None
    layer: Any = cache.layers[number]
    is_window = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > 1 and not layer.record_past
    if not (is_window or type(layer) is DynamicLayer) or not layer.is_initialized:
        return None
    keys, values = layer.keys, layer.values
    if keys is None or values is None or keys.shape != values.shape or keys.shape[:2] != (1, heads):
        return None
    growing: DynamicLayer = layer
    return growing if keys.dtype == values.dtype == torch.bfloat16 and keys.shape[3] == size else None
