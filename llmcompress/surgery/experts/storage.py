"""Blocks of a mixture that have a dense layer instead of experts, as its config says it.

Two ways to say it are known: a list of blocks (`mlp_only_layers` of Qwen's mixtures), and the number of dense blocks
that come first (`first_k_dense_replace` of DeepSeek's kind). All dense layers of a model have one width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from llmcompress.errors import InputError, RecipeError, list_names
from llmcompress.models.dense.experts import GATE, Experts, Form
from llmcompress.surgery.experts.mixture import ExpertMixture

LISTED, FIRST = "mlp_only_layers", "first_k_dense_replace"
WIDTH = "intermediate_size"
SHARED = ("shared_expert", "shared_experts")
ROUTERS = ("gate", "router", "shared_expert_gate")


def check_storable(mixture: ExpertMixture) -> None:
    """Raise InputError for a type of model that has no dense blocks, or other experts than dense layers have."""
    settings, kind = mixture.settings, mixture.source.config.model_type
    if not isinstance(getattr(settings, LISTED, None), list) and not isinstance(getattr(settings, FIRST, None), int):
        raise InputError(
            f"a config of model type {kind!r} cannot say that some of its blocks have no experts, so a condensed "
            f"model would not load; prune or replace its experts instead"
        )
    skeleton = mixture.source.skeleton()
    for path in mixture.layers.values():
        parent = skeleton.get_submodule(path.rpartition(".")[0])
        experts = skeleton.get_submodule(path)
        form = experts.form if isinstance(experts, Experts) else Form(gated=False)
        known = {path.rpartition(".")[2], *SHARED, *ROUTERS}
        others = [name for name, child in parent.named_children() if name not in known and list(child.parameters())]
        if others or form.biased or form.sorted or not form.gated:
            raise InputError(
                f"{path} of {mixture.source.name} is not built of plain gated experts, so no dense layer can stand for "
                f"it; prune or replace its experts instead"
            )


def candidates(mixture: ExpertMixture, asked: Iterable[int] | None, count: int | None) -> tuple[int, ...]:
    """Return the blocks that may be condensed: those that are `asked` for, else all, or the first `count` where only
    the first blocks can be dense. Raises RecipeError for blocks that cannot."""
    there = sorted(mixture.layers)
    if (asked is None) == (count is None):
        raise RecipeError("give either the blocks to condense or how many, exactly one of them")
    first_only = not isinstance(getattr(mixture.settings, LISTED, None), list)
    if count is not None:
        if not 0 < count <= len(there):
            raise RecipeError(f"{count} of the {len(there)} blocks with experts cannot be condensed; name at least one")
        return tuple(there[:count] if first_only else there)
    wanted = sorted(set(asked or ()))
    absent = [number for number in wanted if number not in mixture.layers]
    if absent or not wanted:
        raise RecipeError(
            f"block {list_names(map(str, absent))} of {mixture.source.name} has no experts; those with some are "
            f"{list_names(map(str, there), 100)}"
        )
    if first_only and wanted != there[: len(wanted)]:
        raise RecipeError(
            f"only the first blocks of model type {mixture.source.config.model_type!r} can be dense ({FIRST}); "
            f"condense {', '.join(map(str, there[: len(wanted)]))} instead, or fewer"
        )
    return tuple(wanted)


def dense_changes(mixture: ExpertMixture, blocks: Iterable[int], width: int) -> dict[str, Any]:
    """Return the entries of a config in which `blocks` are dense too, with layers `width` wide or, where dense ones are
    wider already, as wide as these."""
    settings, found = mixture.settings, sorted(blocks)
    wide = max(width, getattr(settings, WIDTH) if has_dense(mixture) else 0)
    before = getattr(settings, LISTED, None)
    if isinstance(before, list):
        return {LISTED: sorted({*before, *found}), WIDTH: wide}
    return {FIRST: found[-1] + 1, WIDTH: wide}


def has_dense(mixture: ExpertMixture) -> bool:
    """True if some blocks of a mixture have a dense layer already."""
    leaf = next(iter(mixture.layers.values())).rpartition(".")[0].rpartition(".")[2]
    return any(
        f"{block.path}.{leaf}.{GATE}.weight" in mixture.source.tensors
        for number, block in enumerate(mixture.arch.blocks)
        if number not in mixture.layers
    )


def shared_of(parent: nn.Module) -> dict[str, nn.Module]:
    """Return the shared experts beside the routed ones, by name."""
    return {name: child for name, child in parent.named_children() if name in SHARED}
