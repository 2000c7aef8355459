"""The model's own names of stored tensors, where a checkpoint has others: by the table that transformers loads with.

The rows of several may be stored in one tensor (`attn.Wqkv`), or those of one in several. An expert's matrix may be a
tensor of its own (`block_sparse_moe.experts.3.w1.weight`) or a piece of a tensor of all experts of a block
(`mlp.experts.gate_up_proj`); see `experts` for the names that it has here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.models.dense.experts import DOWN, FUSED_PAIR, GATE, UP, Experts, experts_of, fuse_experts
from llmcompress.models.dense.headers import Header, Piece

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NUMBER = re.compile(r"\.(\d+)\.[^.]+\.(?:weight|bias)$")  # of an expert, in the name of its own tensor
LEAVES = {FUSED_PAIR: (GATE, UP), UP: (UP,), DOWN: (DOWN,)}  # of a fused parameter


def rename_headers(skeleton: PreTrainedModel, stored: Mapping[str, Header], folder: Path) -> dict[str, Header]:
    """Return the headers by the names that `skeleton` has for them, pieces of tensors of all experts among them.

    Raises InputError for more experts than the config announces, and for experts stored in a way that is not known.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    transforms = get_model_conversion_mapping(skeleton)
    renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    rows = [each for each in converters if _is_rows(each, "Concatenate")]
    chunks = [each for each in converters if _is_rows(each, "Chunk")]
    experts = experts_of(skeleton)
    headers: dict[str, Header] = {}
    parts: dict[str, dict[int, Header]] = {}  # of tensors that are stored in several
    for key, header in stored.items():
        name = key
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        if experts:
            inside = _of_experts(name, header, converters, experts, f"{skeleton.base_model_prefix}.", folder)
            headers |= inside
            if inside:
                continue
        if inside := _chunks(name, header, chunks):
            headers |= inside
            continue
        target, number, operations = _convert_name(name, rows)
        if operations:
            parts.setdefault(target, {})[number] = header
        else:
            headers[name] = header
    return headers | {name: _join([each[number] for number in sorted(each)]) for name, each in parts.items()}


def _is_rows(converter: Any, kind: str) -> bool:
    """True if transformers puts the rows of a fixed number of tensors into one (`Concatenate`), or the other way round
    (`Chunk`), and does nothing else to them."""
    operation = converter.operations[0]
    alone = len(converter.operations) == 1 and type(operation).__name__ == kind
    return alone and operation.dim == 0 and operation.num_shards_attribute is None


def _chunks(name: str, header: Header, converters: list[Any]) -> dict[str, Header]:
    """Return the headers of the model's tensors whose rows are stored in one, as q, k and v; nothing for any other."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is None:
            continue
        names = [target.replace(converter.target_patterns[0], one) for one in converter.target_patterns]
        each = -(-header.shape[0] // len(names))
        places = [slice(start, min(start + each, header.shape[0])) for start in range(0, header.shape[0], each)]
        pieces = [Piece(None, place) for place in places]
        return {
            one: replace(header, shape=piece.shape(header.shape), piece=piece)
            for one, piece in zip(names, pieces, strict=True)
        }
    return {}


def _join(parts: list[Header]) -> Header:
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return replace(parts[0], shape=shape, parts=tuple(parts))


def hub_names(
    plain: PreTrainedModel, experts: Mapping[str, Experts], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors by the names that checkpoints of the model have on the Hub; the inverse of `rename_headers`.

    `plain`: the model as transformers has it; `experts`: of the unfused one, by module path. All matrices of a block's
    experts, or none, are among the `tensors`.
    """
    from transformers.core_model_loading import revert_weight_conversion

    whole = dict(tensors)
    for path, unfused in experts.items():
        inside = {name.removeprefix(f"{path}."): whole.pop(name) for name in tensors if name.startswith(f"{path}.")}
        if inside:
            whole |= {f"{path}.{leaf}": value for leaf, value in fuse_experts(unfused, inside.__getitem__).items()}
    found: dict[str, Tensor] = dict(revert_weight_conversion(plain, whole))
    return {name: value.contiguous() for name, value in found.items()}


def hub_paths(plain: PreTrainedModel, experts: Mapping[str, Experts], paths: Iterable[str]) -> dict[str, str]:
    """Return the path on the Hub of each module with a weight, the matrices of experts apart.

    See `hub_names`. Raises InputError for a family that stores the experts of a block as one tensor.
    """
    import torch

    order = list(paths)
    marks = {f"{path}.weight": torch.full((1, 1), float(number)) for number, path in enumerate(order)}
    found = {int(mark): name for name, mark in hub_names(plain, experts, marks).items() if mark.numel() == 1}
    if len(found) < len(order):
        raise InputError(
            f"{plain.config.model_type} stores its experts as one tensor, and other engines read each by its name; "
            f"export to dense"
        )
    return {path: found[number].removesuffix(".weight") for number, path in enumerate(order)}


def _of_experts(
    name: str, header: Header, converters: list[Any], experts: Mapping[str, Experts], prefix: str, folder: Path
) -> dict[str, Header]:
    """Return the headers of the experts' matrices in a stored tensor; nothing for any other tensor."""
    target, part, operations = _convert_name(name, converters)
    path, _, leaf = target.rpartition(".")
    path = next((each for each in (path, prefix + path, path.removeprefix(prefix)) if each in experts), "")
    if not path:
        return _named_matrix(name, header, experts, prefix, folder)
    kind = "bias" if leaf.endswith("_bias") else "weight"
    leaves = LEAVES.get(leaf.removesuffix("_bias"), ())
    number = NUMBER.search(name)
    if "MergeModulelist" in operations and number is not None and part < len(leaves):
        _check_number(int(number[1]), header, experts[path], folder)
        return {f"{path}.{number[1]}.{leaves[part]}.{kind}": header}
    if operations.keys() - {"Transpose"} or not leaves or len(header.shape) != (3 if kind == "weight" else 2):
        raise InputError(
            f"{header.key} in {header.file} holds experts in a way that is not known; choose another model"
        )
    if header.shape[0] != experts[path].num_experts:
        raise _count_error(header.shape[0], experts[path], folder)
    return _pieces(path, leaves, kind, header, experts[path], operations.get("Transpose"))


def _convert_name(name: str, converters: list[Any]) -> tuple[str, int, dict[str, Any]]:
    """Return the tensor that a stored one becomes or is a part of, which part, and transformers' operations by name."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            operations = {type(operation).__name__: operation for operation in converter.operations}
            return target, converter.source_patterns.index(pattern), operations
    return name, 0, {}


def _named_matrix(
    name: str, header: Header, experts: Mapping[str, Experts], prefix: str, folder: Path
) -> dict[str, Header]:
    """Return the header of a matrix that has its own name already, after a check of its number."""
    match = re.fullmatch(r"(.*)\.(\d+)\.(?:gate_proj|up_proj|down_proj)\.(?:weight|bias)", name)
    path = next((path for path in (match[1], prefix + match[1]) if path in experts), "") if match else ""
    if match is None or not path:
        return {}
    _check_number(int(match[2]), header, experts[path], folder)
    return {f"{path}{name.removeprefix(match[1])}": header}


def _pieces(
    path: str, leaves: tuple[str, ...], kind: str, header: Header, experts: Experts, turn: Any
) -> dict[str, Header]:
    """Return the matrices, or the biases, in a tensor of all experts; `turn`: transformers' operation that turns it."""
    pieces: dict[str, Header] = {}
    turned = experts.form.transposed and kind == "weight"
    if turn is not None and not (turn.check_dims and header.shape[1:] == _own_shape(leaves, experts)):
        turned = not turned
    out = header.shape[2 if turned else 1]
    for number in range(experts.num_experts):
        for leaf in leaves:
            piece = Piece(number, experts.form.rows(leaf, out // len(leaves)), turned)
            shape = piece.shape(header.shape)
            pieces[f"{path}.{number}.{leaf}.{kind}"] = replace(header, shape=shape, piece=piece)
    return pieces


def _own_shape(leaves: tuple[str, ...], experts: Experts) -> tuple[int, int]:
    """Return the shape that transformers' parameter has for one expert."""
    out, columns = experts[0].get_submodule(leaves[0]).get_parameter("weight").shape
    out *= len(leaves)
    return (columns, out) if experts.form.transposed else (out, columns)


def _check_number(number: int, header: Header, experts: Experts, folder: Path) -> None:
    if number >= experts.num_experts:
        raise _count_error(number + 1, experts, folder)


def _count_error(count: int, experts: Experts, folder: Path) -> InputError:
    return InputError(
        f"{folder} holds {count} experts or more in a block, where config.json announces {experts.num_experts}; "
        f"correct config.json or download the model again"
    )
