"""Model families as data: the place of the decoder blocks, their linears, and the linears that share an input.

A family is one row of `FAMILIES`. A model type without a row is recognized by its structure (one list with as many
blocks as the config says, each linear an input group of its own), or refused with a reason. The walk checks that a
block can run on its own, when it records the blocks' arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from llmcompress.errors import InputError, list_names
from llmcompress.models.dense.experts import GATE, UP, Experts, experts_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

T = TypeVar("T")
Groups = tuple[tuple[T, ...], ...]
LLAMA: Groups[str] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LLAMA_PRODUCERS = ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj")
FUSED: Groups[str] = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
OPT: Groups[str] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)
NEOX: Groups[str] = (
    ("attention.query_key_value",),
    ("attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
)
GPT2: Groups[str] = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))


@dataclass(frozen=True)
class Family:
    """One row: the module path of the block list, and each block's linears. Linears of one group read the same tensor.

    producers: for each group, the module that its inputs are proportional to, channel by channel: an RMSNorm of the
    residual stream with a weight, or a linear whose rows are the channels (for values, those of a few query heads).
    Empty for blocks of another structure. norm: the norm before the output head. Linears that no norm feeds write to
    the residual stream.
    """

    model_type: str
    blocks: str = "model.layers"
    groups: Groups[str] = LLAMA
    producers: tuple[str, ...] = ()
    norm: str = "model.norm"


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", producers=LLAMA_PRODUCERS),  # and SmolLM, SmolLM2
        Family("mistral", producers=LLAMA_PRODUCERS),
        Family("smollm3", producers=LLAMA_PRODUCERS),
        Family("qwen2", producers=LLAMA_PRODUCERS),
        Family("qwen3", producers=LLAMA_PRODUCERS),
        Family("gemma2"),
        Family("gemma3_text"),
        Family("phi3", groups=FUSED),
        Family("opt", blocks="model.decoder.layers", groups=OPT),
        Family("gpt_neox", blocks="gpt_neox.layers", groups=NEOX),
        Family("gpt2", blocks="transformer.h", groups=GPT2),
    )
}


@dataclass(frozen=True)
class Linear:
    """A linear: module path and shape `(out, in)`. `transposed`: its weight is `[in, out]` (transformers' Conv1D)."""

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    bias: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the linear in its block: several for a fused one, none for an unknown one."""
        return roles_of(self.name)


STACKED = (  # what vLLM multiplies at once: single roles, or last names of other linears
    ("query", "key", "value", "g_proj"),
    ("query", "key", "value"),
    ("gate", "up"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)


@dataclass(frozen=True)
class BlockLayout:
    """One decoder block: its module path, and its linears grouped by the tensor they read."""

    path: str
    groups: Groups[Linear]

    def having(self, *roles: str) -> tuple[Linear, ...]:
        """Return the linears that have any of the roles, in the order of the groups."""
        return tuple(linear for group in self.groups for linear in group if set(linear.roles) & set(roles))

    def siblings(self) -> tuple[tuple[str, ...], ...]:
        """Return the names of linears of one module that vLLM multiplies as one matrix, q, k and v for one."""
        modules: dict[str, dict[str, str]] = {}
        for linear in (linear for group in self.groups for linear in group):
            module, _, leaf = linear.name.rpartition(".")
            modules.setdefault(module, {})[linear.roles[0] if len(linear.roles) == 1 else leaf] = linear.name
        return tuple(
            tuple(names.pop(part) for part in parts)
            for names in modules.values()
            for parts in STACKED
            if names.keys() >= set(parts)
        )


@dataclass(frozen=True)
class Architecture:
    """The structure of a model. family: None if it was discovered.

    outside: linears of no block (the output head), left dense. other: further weights of two or more dimensions inside
    blocks, and routers, left dense too. embedding, head: module paths of the token table and of the linear that
    computes the logits. tied: True if the head is the table. casts_to_head: True if the model casts what the head reads
    to the dtype of the head's weight, so that it stays dense.
    """

    model_type: str
    family: Family | None
    stack: str
    blocks: tuple[BlockLayout, ...]
    outside: tuple[Linear, ...]
    other: tuple[str, ...]
    embedding: str
    head: str
    tied: bool
    casts_to_head: bool = False

    @property
    def only_looked_up(self) -> str | None:
        """The module path of a token table that nothing is multiplied by; None for one that is the head, too."""
        return None if self.tied else self.embedding

    def linears(self) -> dict[str, Linear]:
        """Return every linear of every block by module path, in depth order; not to be changed."""
        return self._by_name

    @cached_property
    def _by_name(self) -> dict[str, Linear]:
        """The linears: a mixture has thousands, and loops over them ask for one at a time."""
        return {linear.name: linear for block in self.blocks for group in block.groups for linear in group}


def architecture(config: PreTrainedConfig, model: PreTrainedModel) -> Architecture:
    """Return the structure of a language model; its weights may be on meta.

    Raises InputError for blocks that cannot be told from the rest of the model, or that differ from their family's row.
    """
    family = FAMILIES.get(config.model_type)
    stack = block_stack(config, model)
    blocks = tuple(
        _layout(family, f"{stack}.{index}", block) for index, block in enumerate(model.get_submodule(stack).children())
    )
    inside = tuple(f"{block.path}." for block in blocks)
    everywhere = _linears(model)
    grouped = {linear.name for block in blocks for group in block.groups for linear in group}
    return Architecture(
        model_type=config.model_type,
        family=family,
        stack=stack,
        blocks=blocks,
        outside=tuple(linear for name, linear in everywhere.items() if not name.startswith(inside)),
        other=tuple(
            name
            for name, parameter in model.named_parameters()
            if name.startswith(inside) and parameter.dim() >= 2 and name.rpartition(".")[0] not in grouped
        ),
        embedding=name_of(model, model.get_input_embeddings()),
        head=name_of(model, model.get_output_embeddings()),
        tied=bool(model.all_tied_weights_keys),
    )


def block_stack(config: PreTrainedConfig, model: PreTrainedModel) -> str:
    """Return the module path of the list of decoder blocks. Raises InputError if it is ambiguous."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return _discover_stack(config, model)
    return family.blocks if model.base_model is not model else family.blocks.partition(".")[2]


def block_paths(model: PreTrainedModel) -> list[str]:
    """Return the module paths of the decoder blocks. Raises as `block_stack`."""
    stack = block_stack(model.config, model)
    return [f"{stack}.{number}" for number, _ in enumerate(model.get_submodule(stack).children())]


def name_of(model: nn.Module, module: nn.Module | None) -> str:
    """Return the module path of `module`; empty if there is none."""
    return next((name for name, child in model.named_modules() if child is module), "")


def _layout(family: Family | None, path: str, block: nn.Module) -> BlockLayout:
    linears = _linears(block, path)
    if family is None:
        if not linears:
            raise InputError(f"{path} holds no linear layer, so there is nothing to compress in it; name another model")
        return BlockLayout(path, _discover_groups(block, path, linears))
    rows = tuple(tuple(f"{path}.{name}" for name in group) for group in family.groups)
    expected = {name for group in rows for name in group}
    if expected != set(linears):
        more, fewer = sorted(set(linears) - expected), sorted(expected - set(linears))
        raise InputError(
            f"{path} is not the block that model type {family.model_type!r} is known to have "
            f"(unexpected: {list_names(more)}, absent: {list_names(fewer)}); a table row for this variant is needed"
        )
    return BlockLayout(path, tuple(tuple(linears[name] for name in group) for group in rows))


def _discover_groups(block: nn.Module, path: str, linears: dict[str, Linear]) -> Groups[Linear]:
    """Return the input groups of a block of no known family: each linear alone, but for the gate and up of an expert.

    Routers, which choose experts by a few numbers, are in none.
    """
    experts = {f"{path}.{inside}": found for inside, found in experts_of(block).items()}
    groups: dict[str, list[Linear]] = {}
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        is_expert = parent.rpartition(".")[0] in experts
        if not is_expert and _routes(parent, linear, experts):
            continue
        groups.setdefault(f"{parent}.{UP}" if is_expert and leaf == GATE else name, []).append(linear)
    return tuple(map(tuple, groups.values()))


def _routes(parent: str, linear: Linear, experts: Mapping[str, Experts]) -> bool:
    """True if a linear beside experts gives a number for each of them, or one for the shared expert."""
    beside = [found for place, found in experts.items() if f"{parent}.".startswith(f"{place.rpartition('.')[0]}.")]
    return any(linear.shape[0] in (1, found.num_experts) for found in beside)


def _linears(module: nn.Module, path: str = "") -> dict[str, Linear]:
    """Return the linears below `module` by module path, in the order of the model."""
    from transformers.pytorch_utils import Conv1D

    linears = {}
    for name, child in module.named_modules(prefix=path):
        if isinstance(child, (nn.Linear, Conv1D)):
            rows, columns = child.weight.shape
            transposed = isinstance(child, Conv1D)
            shape = (columns, rows) if transposed else (rows, columns)
            linears[name] = Linear(name, shape, transposed, child.bias is not None)
    return linears


def _discover_stack(config: PreTrainedConfig, model: PreTrainedModel) -> str:
    """Return the path of the only list of `num_hidden_layers` modules of the decoder that is not inside another one."""
    text = config.get_text_config(decoder=True)
    count = getattr(text, "num_hidden_layers", None)
    unknown = f"model type {config.model_type!r} is not in the table of families and its structure was not understood"
    if not isinstance(count, int) or count < 1:
        raise InputError(f"{unknown}: the config gives no num_hidden_layers; choose a model of a known family")
    tower = "" if text is config else f"{name_of(model, model.get_decoder())}."  # others may be as deep
    lists = ((name, child) for name, child in model.named_modules() if isinstance(child, nn.ModuleList))
    stacks = [name for name, child in lists if len(child) == count and name.startswith(tower)]
    outermost = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(outermost) != 1:
        raise InputError(
            f"{unknown}: {len(outermost)} lists have the {count} modules that num_hidden_layers announces "
            f"({list_names(sorted(set(outermost)))}), exactly one was expected; choose a model of a known family"
        )
    return outermost[0]


_PLACES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("query",): ("q_proj", "q_lin", "query", "query_proj", "q_a_proj", "q_b_proj", "attn.q", "mlstm_layer.q"),
    ("key",): ("k_proj", "k_lin", "key", "key_proj", "attn.k", "mlstm_layer.k"),
    ("value",): ("v_proj", "v_lin", "value", "value_proj", "attn.v", "mlstm_layer.v"),
    ("query", "key", "value"): ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "in_proj_qkv", "in_proj_qkvz"),
    ("key", "value"): ("kv_a_proj_with_mqa", "kv_b_proj"),
    ("output",): (
        *("o_proj", "self_attn.out_proj", "attn.out_proj", "attention.out_proj", "linear_attn.out_proj", "out_lin"),
        *("mlstm_layer.out_proj", "attn.c_proj", "attn.Wo", "attn.o", "attention.dense", "self_attention.dense"),
        *("self_attn.dense", "attention.output.dense"),
    ),
    ("gate",): ("gate_proj", "feed_forward.w1", "proj_up_gate"),
    ("up",): (
        *("up_proj", "feed_forward.w3", "proj_up", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "ffn.lin1"),
        "intermediate.dense",
    ),
    ("gate", "up"): ("gate_up_proj", "mlp.Wi", "shared_mlp.input_linear"),
    ("down",): (
        *("down_proj", "feed_forward.w2", "proj_down", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h", "ffn.lin2"),
        *("mlp.Wo", "shared_mlp.output_linear", "output.dense"),
    ),
}
_ROLES = {place: roles for roles, places in _PLACES.items() for place in places}


def roles_of(name: str) -> tuple[str, ...]:
    """Return the roles of the linear at a module path; the longest known ending of the path decides."""
    parts = name.split(".")
    endings = (".".join(parts[-count:]) for count in (3, 2, 1))
    return next((_ROLES[ending] for ending in endings if ending in _ROLES), ())
