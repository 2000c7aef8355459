"""A mixture of experts on disk: its blocks with experts, how many there are, and how many a token gets.

Nothing here reads weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.calibration.dry_run import rehearsed
from llmcompress.errors import InputError, RecipeError, list_names
from llmcompress.models.dense.experts import Experts, experts_of
from llmcompress.models.dense.families import Architecture, architecture
from llmcompress.models.dense.locate import locate
from llmcompress.models.dense.model import DenseModel, open_source
from llmcompress.models.dense.remote_code import MODEL, TOKENIZER, needs_code

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # entries of configs
CHOSEN = ("num_experts_per_tok", "moe_k")  # experts of a token
GROUPS = "n_group"  # of experts: a token first chooses some of the groups


@dataclass(frozen=True, eq=False)
class ExpertMixture:
    """A model with experts. `layers`: the module path of each block's experts, by the block's number; `experts`: in
    each of them; `chosen`: experts of a token; `groups`: equal runs of experts, of which a token chooses some."""

    source: DenseModel
    arch: Architecture
    layers: dict[int, str]
    experts: int
    chosen: int
    groups: int

    @property
    def settings(self) -> Any:
        """The config of the part of the model that reads text."""
        return self.source.config.get_text_config(decoder=True)


def open_mixture(model: str | Path, revision: str | None = None) -> ExpertMixture:
    """Return the mixture that `model` names, checked by its config and tensor headers alone.

    Raises InputError for a model that cannot be opened or walked, that needs Python code of its own, that has no
    experts, or whose blocks do not all have the same number of them.
    """
    place = locate(model, revision)
    if needs_code(place.folder, MODEL) or needs_code(place.folder, TOKENIZER):
        raise InputError(
            f"{place.folder} needs Python code of its own, trusted or not, and what that does with experts is not "
            f"known; choose a mixture that transformers itself has a class for"
        )
    source = open_source(place)
    skeleton = source.skeleton()
    arch = architecture(source.config, skeleton)
    found = experts_of(skeleton)
    layers = _by_block(found, arch, source.name)
    if not layers:
        raise InputError(
            f"{source.name} is no mixture of experts (model type {source.config.model_type!r}), so it has none to "
            f"take away; choose a mixture, or `llmcompress drop` for its blocks"
        )
    counts = sorted({found[path].num_experts for path in layers.values()})
    settings = source.config.get_text_config(decoder=True)
    chosen = next((getattr(settings, key) for key in CHOSEN if isinstance(getattr(settings, key, None), int)), None)
    if len(counts) != 1 or chosen is None:
        what = (
            f"blocks of {list_names(map(str, counts))} experts" if len(counts) != 1 else f"none of {', '.join(CHOSEN)}"
        )
        raise InputError(f"{source.folder / 'config.json'} describes {what}, which is not known; choose another model")
    if arch.family is None:
        arch = rehearsed(source, arch, True)
    return ExpertMixture(source, arch, layers, counts[0], chosen, getattr(settings, GROUPS, None) or 1)


def _by_block(found: dict[str, Experts], arch: Architecture, name: str) -> dict[int, str]:
    """Return the module path of the experts of each block. Raises InputError for a block with two lists of them."""
    layers: dict[int, str] = {}
    for path in found:
        number = next((i for i, block in enumerate(arch.blocks) if path.startswith(f"{block.path}.")), None)
        if number is None or number in layers:
            raise InputError(
                f"{path} of {name} is not the only list of experts in a decoder block, so it is not known what its "
                f"router chooses from; choose another model"
            )
        layers[number] = path
    return layers


def number_of(asked: float, total: int, option: str) -> int:
    """Return the number of experts that a share below 1, or a count, stands for. Raises RecipeError for neither."""
    if not 0 < asked < total or (asked >= 1 and asked != int(asked)):
        raise RecipeError(
            f"{option} is {asked:g}, where a block has {total} experts; give a share below 1, or a whole number from 1 "
            f"to {total - 1}"
        )
    return max(1, round(asked * total)) if asked < 1 else int(asked)
