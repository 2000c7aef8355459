"""The same model in other shapes: its config, and its tensors as they are made of the old ones when they are read.

The walk, the damage of a change and the checkpoint all read it like any dense model, so what is judged is what is
written. A tensor that is not made anew is the old one of that name.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.models.dense.experts import experts_of
from llmcompress.models.dense.families import Architecture
from llmcompress.models.dense.headers import Header
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.dense.skeleton import config_errors, dense_skeleton, reason
from llmcompress.models.dense.stored_names import hub_names
from llmcompress.models.files.checkpoint import PART, Writer
from llmcompress.models.files.shard_writer import shards
from llmcompress.models.transformers.hf_quantizer import resize, table_entry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKING = "quantization_config"  # of gpt-oss, whose experts are written as bfloat16; of ours, sizes of linears


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that is computed. `like`: an old tensor of its dtype; `value`: what computes it, in that dtype."""

    like: str
    value: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class EditedModel(DenseModel):
    """A dense model some of whose tensors are `made` of those of another; `entries`: of its config.json."""

    dense: DenseModel = field(kw_only=True)
    entries: dict[str, Any] = field(kw_only=True)
    made: Mapping[str, Made] = field(kw_only=True)

    def read(self, name: str) -> Tensor:
        """Return the tensor `name` in its stored dtype. Raises what `DenseModel.read` raises."""
        made = self.made.get(name)
        return self.dense.read(name) if made is None else made.value()

    def config_entries(self) -> dict[str, Any]:
        """Return the entries of the changed config.json."""
        return copy.deepcopy(self.entries)


def _changed_entries(source: DenseModel, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a model's config.json with `changes` to those of the part that reads text.

    An entry that the config has under several names is changed under all of them.
    """
    entries = copy.deepcopy(source.config_entries())
    entries.pop(PACKING, None)
    settings = source.config.get_text_config(decoder=True)
    inside = entries
    if settings is not source.config:
        key = next((key for key in ("text_config", "llm_config") if isinstance(entries.get(key), dict)), None)
        if key is None:
            raise InputError(f"{source.folder / 'config.json'} has no text_config to change; choose another model")
        inside = entries[key]
    aliases: dict[str, str] = settings.attribute_map
    for name, value in changes.items():
        own = aliases.get(name, name)
        same = {name, own, *(alias for alias, target in aliases.items() if target == own)}
        inside |= dict.fromkeys(same & inside.keys() or {own}, value)
    return entries


def _config_of(source: DenseModel, entries: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config of changed entries, read as a loader reads it. Raises InputError where that refuses them."""
    from transformers import AutoConfig

    try:
        with tempfile.TemporaryDirectory(prefix="llmcompress-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(entries), encoding="utf-8")
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except config_errors() as error:
        raise InputError(
            f"model type {source.config.model_type!r} does not allow this change of its config ({reason(error)}); "
            f"choose another model"
        ) from error
    return config


@dataclass(frozen=True, eq=False)
class ChangedConfig:
    """A change of a model's config. `entries`: of the new config.json; `skeleton`: the new model, on meta."""

    source: DenseModel
    entries: dict[str, Any]
    skeleton: PreTrainedModel

    def model(self, made: Mapping[str, Made]) -> EditedModel:
        """Return the new model with tensors `made` anew, which may be those of some blocks only."""
        source, tensors = self.source, {}
        for name, value in self.skeleton.state_dict().items():
            old = source.tensors.get(made[name].like if name in made else name)
            if name not in source.tied and old is not None:
                tensors[name] = Header(tuple(value.shape), old.dtype, old.file, old.key)
        config: PreTrainedConfig = self.skeleton.config
        about = (source.name, source.folder, source.revision, config, tensors, source.tied, source.notes)
        return EditedModel(*about, source.hub_id, source.license, dense=source, entries=self.entries, made=made)

    def complete(self, made: Mapping[str, Made]) -> EditedModel:
        """Return `model(made)`. Raises InputError unless every tensor is made anew, or an old one of the same shape."""
        source, weights = self.source, {name for name, _ in self.skeleton.named_parameters()}
        for name, value in self.skeleton.state_dict().items():
            old = source.tensors.get(name)
            is_kept = name not in weights if old is None else old.shape == tuple(value.shape)
            if not (is_kept or name in made or name in source.tied):
                raise InputError(
                    f"{name} of {source.name} would have to become {list(value.shape)}, and it is not known how for "
                    f"model type {source.config.model_type!r}; choose another model"
                )
        return self.model(made)


def changed(
    source: DenseModel, changes: Mapping[str, Any], sizes: Mapping[str, list[int]] | None = None
) -> ChangedConfig:
    """Return the model with `changes` to its config, and linears of `sizes [out, in]` that it does not tell.

    Raises InputError where its type does not allow them, and for a model that has such linears already.
    """
    check_equal(source)
    entries = _changed_entries(source, changes)
    skeleton = dense_skeleton(_config_of(source, entries), source.folder)
    if sizes:
        try:
            resize(skeleton, sizes)
        except InputError as error:
            kind = source.config.model_type
            raise InputError(
                f"blocks of model type {kind!r} cannot have widths of their own; narrow all blocks alike"
            ) from error
        entries[PACKING] = table_entry({}, sizes)
    return ChangedConfig(source, entries, skeleton)


def check_equal(source: DenseModel) -> None:
    """Raise InputError for a model whose blocks have widths of their own."""
    if source.sizes:
        raise InputError(
            f"blocks of {source.name} have widths of their own, which the change would not keep; change the model that "
            f"it was made from"
        )


def write(model: EditedModel, skeleton: PreTrainedModel, arch: Architecture, writer: Writer) -> int:
    """Write the changed model as transformers names its tensors, one block at a time; return the weights' bytes.

    `skeleton`: of the changed model; `arch`: of the old one, whose blocks have the same paths.
    """
    files = EditedFiles(model, skeleton, writer)
    for block in arch.blocks:
        files.add_block(model, block.path)
    return files.finish()


class EditedFiles:
    """The files of a changed model while it is written, as transformers names its tensors.

    `model`: whose tensors have the shapes of the new ones; `skeleton`: of the changed model.
    """

    def __init__(self, model: EditedModel, skeleton: PreTrainedModel, writer: Writer) -> None:
        self._model, self._writer = model, writer
        self._plain: PreTrainedModel = dense_skeleton(model.config, model.folder, unfused=False)
        self._experts = experts_of(skeleton)
        self._left = {name: header.bytes for name, header in model.tensors.items()}

    def add_block(self, model: EditedModel, path: str) -> None:
        """Write the tensors that the block at `path` has in `model`, where those of other blocks may not be made."""
        names = [name for name in self._left if name.startswith(f"{path}.")]
        self._add(model, names)
        for name in names:
            del self._left[name]

    def finish(self) -> int:
        """Write what is in no block that was added, and the config; return the weights' bytes."""
        for names in shards(self._left, PART):
            self._add(self._model, names)
        size = self._writer.close()
        self._writer.write("config.json", json.dumps(self._model.config_entries(), indent=1))
        return size

    def _add(self, model: EditedModel, names: Iterable[str]) -> None:
        self._writer.add(hub_names(self._plain, self._experts, {name: model.read(name) for name in names}))
