"""The same model in other shapes: its config, and tensors that are computed from the old ones when they are read.

The walk, the damage of a change and the checkpoint read it like any dense model, so the judged model is written.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.models.dense.companions import companions
from llmcompress.models.dense.config import config_errors
from llmcompress.models.dense.experts import experts_of
from llmcompress.models.dense.headers import Header
from llmcompress.models.dense.model import DenseModel
from llmcompress.models.dense.skeleton import dense_skeleton
from llmcompress.models.dense.stored_names import hub_names
from llmcompress.models.files.checkpoint import PART, Writer, write_checkpoint
from llmcompress.models.files.reading import error_text
from llmcompress.models.files.tensor_files import shards
from llmcompress.models.transformers.hf_quantizer import table_entry
from llmcompress.models.transformers.resize import resize
from llmcompress.runtime.progress import count_each

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PACKING = "quantization_config"  # of gpt-oss, whose experts are written as bfloat16; of ours, sizes of linears


@dataclass(frozen=True, eq=False)
class NewTensor:
    """A tensor that `value` computes. `like`: the name of an old tensor of its dtype."""

    like: str
    value: Callable[[], Tensor]


def select_entries(source: DenseModel, name: str, axis: int, numbers: Tensor) -> Tensor:
    """Return some entries of a stored tensor along an axis."""
    return source.read(name).index_select(axis, numbers)


@dataclass(frozen=True, eq=False)
class EditedModel(DenseModel):
    """A `dense` model with `new` tensors, the old ones under all other names; `entries`: of its config.json."""

    dense: DenseModel = field(kw_only=True)
    entries: dict[str, Any] = field(kw_only=True)
    new: Mapping[str, NewTensor] = field(kw_only=True)

    def read(self, name: str) -> Tensor:
        """Return the tensor `name` in its stored dtype. Raises what `DenseModel.read` raises."""
        return self.new[name].value() if name in self.new else self.dense.read(name)

    def config_entries(self) -> dict[str, Any]:
        """Return the entries of the changed config.json."""
        return copy.deepcopy(self.entries)


@dataclass(frozen=True, eq=False)
class ChangedConfig:
    """A change of a model's config. `entries`: of the new config.json; `skeleton`: the new model, on meta."""

    source: DenseModel
    entries: dict[str, Any]
    skeleton: PreTrainedModel

    def model(self, new: Mapping[str, NewTensor]) -> EditedModel:
        """Return the model with `new` tensors, of all blocks or some."""
        source, tensors = self.source, {}
        for name, value in self.skeleton.state_dict().items():
            old = source.tensors.get(new[name].like if name in new else name)
            if name not in source.tied and old is not None:
                tensors[name] = Header(tuple(value.shape), old.dtype, old.file, old.key)
        config: PreTrainedConfig = self.skeleton.config
        about = (source.name, source.folder, source.revision, config, tensors, source.tied, source.notes)
        return EditedModel(*about, source.hub_id, source.license, dense=source, entries=self.entries, new=new)

    def complete(self, new: Mapping[str, NewTensor]) -> EditedModel:
        """Return `model(new)`. Raises InputError unless every tensor is new, or an old one of the same shape."""
        source, weights = self.source, {name for name, _ in self.skeleton.named_parameters()}
        for name, value in self.skeleton.state_dict().items():
            old = source.tensors.get(name)
            stays = name not in weights if old is None else old.shape == tuple(value.shape)
            if not (stays or name in new or name in source.tied):
                raise InputError(
                    f"{name} of {source.name} would have to become {list(value.shape)}, and it is not known how for "
                    f"model type {source.config.model_type!r}; choose another model"
                )
        return self.model(new)


def change_config(
    source: DenseModel, changes: Mapping[str, Any], sizes: Mapping[str, list[int]] | None = None
) -> ChangedConfig:
    """Return the model with `changes` to its config. `sizes`: `[out, in]` of linears that the config cannot tell.

    Raises InputError where the model type allows neither, and for a model that has such linears already.
    """
    check_equal_widths(source)
    entries = _change_entries(source, changes)
    skeleton = dense_skeleton(_read_config(source, entries), source.folder)
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


def check_equal_widths(source: DenseModel) -> None:
    """Raise InputError for a model whose blocks have widths of their own."""
    if source.sizes:
        raise InputError(
            f"blocks of {source.name} have widths of their own, which the change would not keep; change the model that "
            f"it was made from"
        )


def _change_entries(source: DenseModel, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json's entries with `changes` to the part for text, under all aliases of each entry."""
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


def _read_config(source: DenseModel, entries: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config of changed entries as a loader reads it. Raises InputError where transformers refuses them."""
    from transformers import AutoConfig

    try:
        with tempfile.TemporaryDirectory(prefix="llmcompress-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(entries), encoding="utf-8")
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    except config_errors() as error:
        raise InputError(
            f"model type {source.config.model_type!r} does not allow this change of its config ({error_text(error)}); "
            f"choose another model"
        ) from error
    return config


@contextmanager
def writing_model(
    model: EditedModel, skeleton: PreTrainedModel, output: Path, trust_remote_code: bool = False
) -> Iterator[EditedFiles]:
    """Give the files of an edited model in the new folder `output`, with its tokenizer; `skeleton`: of that model.

    Raises DiskError for an output that cannot be written; then nothing is left behind.
    """
    beside = companions(model.folder, trust_remote_code)
    with write_checkpoint(output, model.bytes) as writer:
        beside.copy(writer.folder)
        model.dense.origin.write(writer)
        yield EditedFiles(model, skeleton, writer)


class EditedFiles:
    """The files of an edited model while they are written, with the names that transformers gives to its tensors."""

    def __init__(self, model: EditedModel, skeleton: PreTrainedModel, writer: Writer) -> None:
        self._model, self._writer = model, writer
        self._plain: PreTrainedModel = dense_skeleton(model.config, model.folder, unfused=False)
        self._experts = experts_of(skeleton)
        self._left = {name: header.bytes for name, header in model.tensors.items()}

    def add_block(self, model: EditedModel, path: str) -> None:
        """Write the tensors of the block at `path` from `model`, which may have new tensors of this block alone."""
        names = [name for name in self._left if name.startswith(f"{path}.")]
        self._add(model, names)
        for name in names:
            del self._left[name]

    def finish(self) -> None:
        """Write the tensors of no added block, and the config."""
        for names in count_each([*shards(self._left, PART)], "part written"):
            self._add(self._model, names)
        self._writer.close()
        self._writer.write("config.json", json.dumps(self._model.config_entries(), indent=1))

    def add_report(self, name: str, entries: dict[str, Any]) -> None:
        """Write a report under a file's name, without the place of the output."""
        self._writer.write(name, json.dumps(entries | {"output": None}, indent=1))

    def _add(self, model: EditedModel, names: Iterable[str]) -> None:
        self._writer.add(hub_names(self._plain, self._experts, {name: model.read(name) for name in names}))
