"""A dense model to compress: its config, the headers of its tensors, and one tensor at a time when asked.

Nothing here holds weights. `resolve` reads the config and the safetensors headers and refuses what cannot be
compressed before any work is done; `DenseModel.read` opens one file, copies one tensor and lets the file go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from yaml import YAMLError

from llmcompress.errors import InputError, list_names
from llmcompress.models.dense.config import (
    AUTO_MAP,
    MODEL,
    check_numbers,
    code_files,
    model_code,
    needs_code,
    public_entries,
    read_entries,
    valid_config,
)
from llmcompress.models.dense.experts import unfuse
from llmcompress.models.dense.headers import BUFFERS, FLOATS, Header, read_headers, read_tensor
from llmcompress.models.dense.load import _disk, _lacking, load_model, own_sizes, with_sizes
from llmcompress.models.dense.locate import Place, locate, public_name
from llmcompress.models.dense.skeleton import architectures, class_names, dense_skeleton, is_causal, outline
from llmcompress.models.dense.stored_names import rename_headers
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.identity import content_digest, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

RELEASED = "mxfp4"  # the quantization that gpt-oss was trained and released with: experts are read from it
RENAMED = {"lm_head.weight": "embed_out.weight"}  # model's name -> name on disk; GPT-NeoX


@dataclass(frozen=True, eq=False)
class DenseModel:
    """A dense causal language model on disk.

    `tensors` are keyed by the model's own names, whatever the file calls them. `tied` maps names to the ones they are
    stored under (mostly the output head). `revision` is the Hub commit; `notes` are for the report.
    `trust_remote_code`: as in `locate.Place`. `sizes`: of linears that the config does not tell, `[out, in]` by name.
    """

    name: str
    folder: Path
    revision: str | None
    config: PreTrainedConfig
    tensors: dict[str, Header]
    tied: dict[str, str]
    notes: tuple[str, ...] = ()
    hub_id: str | None = None
    license: str | None = None
    trust_remote_code: bool = False
    sizes: Mapping[str, list[int]] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        """The place that it was opened at, without what only its report says."""
        return Place(self.name, self.folder, trust_remote_code=self.trust_remote_code)

    @property
    def code(self) -> tuple[str, ...]:
        """The names of the files with the model's own code, which it runs; mostly none."""
        return code_files(self.folder) if self.trust_remote_code else ()

    @property
    def public_name(self) -> str:
        """The name for files that others will read: see `locate.public_name`."""
        return public_name(self.name, self.hub_id)

    @property
    def parameters(self) -> int:
        """Number of weights; tied ones count once."""
        return sum(prod(header.shape) for header in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Size of the weights on disk; tied ones count once."""
        return sum(header.bytes for header in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Return a copy of the tensor `name` in its stored dtype. Raises InputError if its file is damaged."""
        return read_tensor(self.tensors[self.tied.get(name, name)])

    def content(self) -> dict[str, str]:
        """Return digests of the files that decide what becomes of the model: weights, config, tokenizer, own code."""
        weights = sorted({part.file for header in self.tensors.values() for part in (header, *header.parts)})
        code = {"the model's code": content_digest([self.folder / name for name in self.code])} if self.code else {}
        return {
            "the model's weights": content_digest(weights),
            "the model's config.json": content_digest([self.folder / "config.json"]),
            "the model's tokenizer": tokenizer_digest(self.folder),
        } | code

    def config_entries(self) -> dict[str, Any]:
        """Return the entries of the model's config.json that an output may have."""
        entries = read_entries(self.folder / "config.json", self.folder)
        return public_entries(entries, needs_code(self.folder, MODEL))

    def skeleton(self) -> PreTrainedModel:
        """Return a new model in eval mode, with parameters on meta and real buffers."""
        model = dense_skeleton(self.config, self.folder, trust_remote_code=self.trust_remote_code)
        return with_sizes(model, self.sizes)

    def load(self, device: str = "cpu") -> PreTrainedModel:
        """Return the whole model as it lies on disk, in float32, its linears as `skeleton` has them.

        Raises what `load_model` raises.
        """
        model = load_model(self.place, device)
        unfuse(model)
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer. Raises InputError if the folder has none that transformers can read."""
        return load_tokenizer(self.folder, self.trust_remote_code)


def resolve(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> DenseModel:
    """Return the dense model that `model` names (see `locate`), checked by its config and tensor headers alone.

    Raises InputError for a missing, empty or damaged folder, for anything but a causal language model with plain
    floating-point safetensors, for weights that are missing or have other shapes than the config requires, and for code
    that is needed and not trusted.
    """
    return open_source(locate(model, revision, trust_remote_code))


def open_source(place: Place) -> DenseModel:
    """Return the dense model of a place that `locate` found; raises what `resolve` raises."""
    config = read_config(place.folder, place.trust_remote_code)
    stored = read_headers(place.folder)
    sizes = own_sizes(read_entries(place.folder / MODEL, place.folder))
    skeleton = outline(config, place.folder, len(stored), _disk(stored), place.trust_remote_code)
    with_sizes(skeleton, sizes)
    tensors, tied, unused = _match(skeleton, stored, place.folder)
    note = f"{len(unused)} stored tensors are not part of the model, {unused[0]} for one" if unused else ""
    notes = tuple(one for one in (*place.notes, note, _unused_code(place)) if one)
    return DenseModel(
        place.name,
        place.folder,
        place.revision,
        config,
        tensors,
        tied,
        notes,
        hub_id=place.hub_id,
        license=place.license or _license(place.folder),
        trust_remote_code=place.trust_remote_code,
        sizes=sizes,
    )


def _unused_code(place: Place) -> str:
    """Return a sentence on code that is trusted and has no use; empty for any other model."""
    entries = read_entries(place.folder / MODEL, place.folder)
    if not place.trust_remote_code or not entries.get(AUTO_MAP) or needs_code(place.folder, MODEL):
        return ""
    return f"transformers knows {entries['model_type']} itself, so the model's own code is not run, nor taken along"


def _license(folder: Path) -> str | None:
    """Return the licence in the metadata of the folder's model card; None if there is none."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, YAMLError):
        return None
    return found if isinstance(found, str) else None


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config of the dense causal language model in `folder`. Raises InputError for any other folder."""
    entries = read_entries(folder / "config.json", folder)
    kind = entries.get("model_type")
    quantization = entries.get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    sizes = own_sizes(entries)
    if method and method != RELEASED and not sizes:
        raise InputError(
            f"{folder} is already compressed (quant_method {str(method)!r}); start from the dense checkpoint"
        )
    if not model_code(folder, trust_remote_code) and not _known_type(kind):
        raise InputError(
            f"{folder / 'config.json'} names model_type {kind!r}, which the installed transformers does not know; "
            f"install a newer transformers or choose another model"
        )
    check_numbers(entries.get, str(folder / "config.json"))
    config = valid_config(folder, trust_remote_code)
    _refuse_other_tasks(config, folder)
    if sizes:
        del config.quantization_config  # which says no more than the sizes
    return config


def _known_type(kind: object) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(kind, str) and kind in CONFIG_MAPPING


def _refuse_other_tasks(config: PreTrainedConfig, folder: Path) -> None:
    """Raise InputError unless the config's type is one of text, perhaps with images, and this is a class of it."""
    known, classes = class_names(config), architectures(config)
    if not isinstance(classes, list) or not all(isinstance(one, str) and one.isidentifier() for one in classes):
        raise InputError(f"{folder / 'config.json'} names architectures that are no classes; correct it")
    names = [name for each in known.values() for name in each]
    if not names or getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{folder} is a {config.model_type} model, not a causal language model or an encoder of text; choose one "
            f"that is"
        )
    if not any(name in names for name in classes) and (classes or not is_causal(config)):
        found = f"holds a {classes[0]}" if classes else "names no architectures"
        raise InputError(
            f"{folder} {found}, not a causal language model, an encoder or a classifier of text ({list_names(names)}); "
            f"choose a checkpoint that is one"
        )


def _match(
    skeleton: PreTrainedModel, stored: dict[str, Header], folder: Path
) -> tuple[dict[str, Header], dict[str, str], list[str]]:
    """Return the stored headers by model names, the tied names, and the stored names that the model does not use.

    A checkpoint of the bare model lacks the prefix of the model with a head (`transformer.` in GPT-2), or vice versa.
    """
    prefix = f"{skeleton.base_model_prefix}."
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    known = rename_headers(skeleton, stored, folder) | stored
    found: dict[str, Header] = {}
    for name, value in {**skeleton.state_dict(), **parameters}.items():
        candidates = (name, name.removeprefix(prefix), prefix + name, RENAMED.get(name, name))
        key = next((key for key in candidates if key in known), None)
        if key is not None:
            found[name] = _checked(known[key], tuple(value.shape), name in parameters)
    used = {key for header in found.values() for key in header.keys}
    tied = _tie(dict(getattr(skeleton, "all_tied_weights_keys", None) or {}), found)
    missing = [name for name in parameters if tied.get(name, name) not in found]
    if missing:
        raise _lacking(folder, missing)
    return found, tied, [key for key in stored if key not in used]


def _checked(header: Header, shape: tuple[int, ...], is_weight: bool) -> Header:
    if header.shape != shape:
        raise InputError(
            f"{header.key} in {header.file} has shape {list(header.shape)} where the config requires {list(shape)}; "
            f"config.json and the weights do not belong together"
        )
    if is_weight and header.dtype not in FLOATS:
        raise InputError(
            f"{header.key} in {header.file} is stored as {header.dtype}, so it is already compressed; "
            f"start from a checkpoint in bfloat16, float16 or float32"
        )
    if header.dtype not in FLOATS | BUFFERS:
        raise InputError(f"{header.key} in {header.file} is stored as {header.dtype}; start from the dense checkpoint")
    return header


def _tie(declared: dict[str, str], found: dict[str, Header]) -> dict[str, str]:
    """Return the `declared` ties (alias to origin) that hold by the rules of transformers; move `found` to the origins.

    A file may store the shared tensor under either name or both. Two tensors that differ are not tied.
    """
    tied = {}
    for alias, origin in declared.items():
        if (
            alias in found
            and origin in found
            and not torch.equal(read_tensor(found[alias]), read_tensor(found[origin]))
        ):
            continue
        header = found.pop(alias, None)
        if header is not None:
            found.setdefault(origin, header)
        tied[alias] = origin
    return tied
