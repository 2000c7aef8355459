"""The roles of a block's linears, by the last parts of their module paths: those that a rule of a recipe may name.

A fused linear has the roles of all its parts. A linear that is named here in no way has none: a layer of a state space
model, a router, an adapter.
"""

from __future__ import annotations

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
