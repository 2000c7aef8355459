"""A dense model to compress: its config, the headers of its tensors, and one tensor at a time when it is read.

Nothing here holds weights. `resolve` reads the config and the safetensors headers and refuses a model that cannot
be compressed before any work is done; `DenseModel.read` opens one file, copies one tensor and closes the file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from yaml import YAMLError

from llmcompress.errors import InputError, list_names
from llmcompress.models.dense.adapter import ADAPTER, check_alone, merge_headers
from llmcompress.models.dense.companions import read_generation_config
from llmcompress.models.dense.config import (
    AUTO_MAP,
    MODEL,
    check_entries,
    code_files,
    is_known_type,
    model_code,
    needs_code,
    packing_entry,
    public_entries,
    read_entries,
    valid_config,
)
from llmcompress.models.dense.headers import BUFFERS, FLOATS, Header, read_headers, read_tensor
from llmcompress.models.dense.locate import SAME_NAME, Place, locate, public_name
from llmcompress.models.dense.packed import READERS, describe_few_bits, packing_method, unpack_headers
from llmcompress.models.dense.sizes import own_sizes, sized_outline, with_sizes
from llmcompress.models.dense.skeleton import architectures, class_names, dense_skeleton, is_causal
from llmcompress.models.dense.stored_names import rename_headers
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.checkpoint import Writer
from llmcompress.models.files.file_names import ORIGIN
from llmcompress.models.files.identity import content_digest, tokenizer_digest
from llmcompress.models.files.reading import read_json
from llmcompress.runtime.json_values import JsonRecord

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKINGS = ("quantization_config", "quantization")  # entries on weights in few bits
TIES = "tie_word_embeddings"
RENAMED = {"lm_head.weight": "embed_out.weight"}  # model's name -> name on disk; GPT-NeoX


@dataclass(frozen=True)
class ModelOrigin(JsonRecord):
    """The Hub model that a dense model is, or was made from. `notes`: on where its weights are from, and its terms."""

    base_model: str | None = None
    revision: str | None = None
    license: str | None = None
    notes: tuple[str, ...] = ()

    def write(self, writer: Writer) -> None:
        """Write it beside the weights of what was made from the model, if anything is known."""
        if self != ModelOrigin():
            writer.write(ORIGIN, json.dumps(self.to_json(), indent=1))


@dataclass(frozen=True, eq=False)
class DenseModel:
    """A dense model on disk.

    `tensors`: headers by the model's own names, whatever the file calls them. `tied`: names to the ones they are stored
    under (mostly the output head). `revision`: the Hub commit. `notes`: for the report. `trust_remote_code`,
    `adapter`, `file`: as in `Place`. `sizes`: `[out, in]` by name of linears whose size the rest of the config does not
    give. `origin`: for what is made from it.
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
    adapter: Path | None = None
    file: Path | None = None
    origin: ModelOrigin = field(default_factory=ModelOrigin)

    @property
    def place(self) -> Place:
        """The place that it was opened at, without the entries for its report."""
        code = self.trust_remote_code
        return Place(self.name, self.folder, trust_remote_code=code, adapter=self.adapter, file=self.file)

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
        """Return a copy of the tensor `name` in its stored dtype. Raises InputError for a damaged file."""
        return read_tensor(self.tensors[self.tied.get(name, name)])

    def content(self) -> dict[str, str]:
        """Return digests of the files that decide the result of a run: weights, config, tokenizer, own code."""
        files = {source.file for header in self.tensors.values() for source in header.sources}
        weights = sorted(files, key=lambda file: (file.parent != self.folder, file.name))  # wherever an adapter lies
        configs = [self.folder / MODEL, *([] if self.adapter is None else [self.adapter / ADAPTER])]
        code = {"the model's code": content_digest([self.folder / name for name in self.code])} if self.code else {}
        return {
            "the model's weights": content_digest(weights),
            "the model's config.json": content_digest(configs),
            "the model's tokenizer": tokenizer_digest(self.folder),
        } | code

    def config_entries(self) -> dict[str, Any]:
        """Return the entries of the model's config.json that an output may have."""
        entries = public_entries(read_entries(self.folder / MODEL, self.folder), needs_code(self.folder, MODEL))
        if packing_method(entries) is not None:  # outputs hold numbers
            entries = {key: value for key, value in entries.items() if key not in PACKINGS}
        ties = getattr(valid_config(self.folder, self.trust_remote_code), TIES, False)
        return _without_ties(entries) if ties and not getattr(self.config, TIES, False) else entries

    def skeleton(self) -> PreTrainedModel:
        """Return a new model in eval mode, with parameters on meta and real buffers."""
        model = dense_skeleton(self.config, self.folder, trust_remote_code=self.trust_remote_code)
        return with_sizes(model, self.sizes)

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Return the whole model in a `dtype`, its linears as `skeleton` has them. Raises what `read` raises."""
        model, values = self.skeleton(), dict[str, Tensor]()
        if model.can_generate() and (generation := read_generation_config(self.folder)) is not None:
            model.generation_config = generation
        for name, held in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            owner, _, leaf = name.rpartition(".")
            origin = self.tied.get(name, name)
            if origin not in values:
                is_weight = isinstance(held, nn.Parameter)
                value = self.read(origin) if is_weight or origin in self.tensors else held
                value = value.to(device, dtype if is_weight else held.dtype)
                values[origin] = nn.Parameter(value) if is_weight else value
            setattr(model.get_submodule(owner), leaf, values[origin])
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer. Raises InputError if transformers can read none."""
        return load_tokenizer(self.folder, self.trust_remote_code)


def resolve(model: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> DenseModel:
    """Return the dense model that `model` names (see `locate`), checked by its config and tensor headers alone.

    Raises InputError for a missing, empty or damaged folder, for anything but a dense model of text in plain
    floating-point safetensors, for weights that are missing or have other shapes than the config requires, and for
    needed code that is not trusted.
    """
    return open_source(locate(model, revision, trust_remote_code))


def open_source(place: Place) -> DenseModel:
    """Return the dense model of a place that `locate` found; raises what `resolve` raises."""
    check_alone(place.folder)
    config = read_config(place.folder, place.trust_remote_code)
    entries = read_entries(place.folder / MODEL, place.folder)
    named = read_headers(place.folder)
    stored, forms = unpack_headers(named, entries, place.folder)
    sizes = own_sizes(entries)
    model = sized_outline(config, place, stored, sizes)
    tensors, tied, unused = _match(model, stored, place.folder)
    if place.adapter is not None:
        tensors = merge_headers(model, tensors, tied, place.adapter, place.folder)
    before, here = _read_origin(place.folder), [*place.notes, *([describe_few_bits(forms)] if forms else [])]
    told = (*before.notes, *(note for note in here if SAME_NAME not in note))
    hub = (place.hub_id, place.revision) if place.hub_id else (before.base_model, before.revision)
    origin = ModelOrigin(*hub, place.license or _license(place.folder) or before.license, told)
    notes = [*before.notes, *here]
    if before.base_model is not None:
        notes.append(f"the dense model was made by llmcompress from {before.base_model}")
    if model.all_tied_weights_keys and not tied:
        config = untie_config(config)
        notes.append("config.json ties the output head to the token table, but the files hold two: they stay apart")
    if wrapped := [name for name, header in named.items() if header.wrapped]:
        notes.append(f"names of a wrapper are taken off: {named[wrapped[0]].wrapped} is read as {wrapped[0]}")
    if unused:
        notes.append(f"{len(unused)} stored tensors are not part of the model, {unused[0]} for one")
    if place.trust_remote_code and entries.get(AUTO_MAP) and not needs_code(place.folder, MODEL):
        kind = entries["model_type"]
        notes.append(f"transformers knows {kind} itself, so the model's own code is not run, nor taken along")
    return DenseModel(
        place.name,
        place.folder,
        place.revision,
        config,
        tensors,
        tied,
        tuple(notes),
        hub_id=place.hub_id,
        license=origin.license,
        trust_remote_code=place.trust_remote_code,
        sizes=sizes,
        adapter=place.adapter,
        file=place.file,
        origin=origin,
    )


def _read_origin(folder: Path) -> ModelOrigin:
    """Return the origin that the file in `folder` tells, an empty one without it. Raises InputError for damage."""
    if not (path := folder / ORIGIN).is_file():
        return ModelOrigin()
    entries = read_json(path, way_out := "write the model again, or remove that file")
    base, revision, terms = (entries.get(name) for name in ("base_model", "revision", "license"))
    texts, notes = [*filter(None, (base, revision, terms))], entries.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(text, str) for text in texts + notes):
        raise InputError(f"{path} tells no origin of a model; {way_out}")
    return ModelOrigin(base, revision, terms, tuple(notes))


def untie_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config whose output head is a matrix of its own."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False
    return config


def _without_ties(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config.json by which no loader ties the head to the token table."""
    inside = {key: value | {TIES: False} for key, value in entries.items() if isinstance(value, dict) and TIES in value}
    return entries | inside | {TIES: False}


def _license(folder: Path) -> str | None:
    """Return the licence in the metadata of the folder's model card, if any."""
    from huggingface_hub import ModelCard

    try:
        name = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, YAMLError):
        return None
    return name if isinstance(name, str) else None


def read_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config of the dense model of text in `folder`. Raises InputError for any other folder."""
    entries = read_entries(folder / MODEL, folder)
    kind = entries.get("model_type")
    quantization = packing_entry(entries) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    sizes, is_packed = own_sizes(entries), packing_method(entries) is not None
    if method and not is_packed and not sizes:
        raise InputError(
            f"{folder} is already compressed (quant_method {str(method)[:50]!r}); start from the dense checkpoint, or "
            f"from one that is stored by {' or '.join(READERS)}"
        )
    if not model_code(folder, trust_remote_code) and not is_known_type(kind):
        raise InputError(
            f"{folder / MODEL} names model_type {kind!r}, which the installed transformers does not know; install a "
            f"newer transformers or choose another model"
        )
    check_entries(entries, str(folder / MODEL))
    config = valid_config(folder, trust_remote_code)
    _check_task(config, folder)
    if sizes or is_packed:
        for key in PACKINGS:  # which say no more than the sizes, or how numbers are stored
            vars(config).pop(key, None)
    return config


def _check_task(config: PreTrainedConfig, folder: Path) -> None:
    """Raise InputError unless the config's type is one of text, perhaps with images, and this is a class of it."""
    known, classes = class_names(config), architectures(config)
    if not isinstance(classes, list) or not all(isinstance(name, str) and name.isidentifier() for name in classes):
        raise InputError(f"{folder / MODEL} names architectures that are no classes; correct it")
    names = [name for each in known.values() for name in each]
    if not names or getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{folder} is a {config.model_type} model, not a causal language model or an encoder of text; choose one "
            f"that is"
        )
    if not any(name in names for name in classes) and (classes or not is_causal(config)):
        fault = f"holds a {classes[0]}" if classes else "names no architectures"
        raise InputError(
            f"{folder} {fault}, not a causal language model, an encoder or a classifier of text ({list_names(names)}); "
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
    headers: dict[str, Header] = {}
    for name, value in {**skeleton.state_dict(), **parameters}.items():
        candidates = (name, name.removeprefix(prefix), prefix + name, RENAMED.get(name, name))
        key = next((key for key in candidates if key in known), None)
        if key is not None:
            _check_header(known[key], tuple(value.shape), name in parameters)
            headers[name] = known[key]
    used = {source.key for header in headers.values() for source in header.sources}
    tied = _tie(dict(getattr(skeleton, "all_tied_weights_keys", None) or {}), headers)
    missing = [name for name in parameters if tied.get(name, name) not in headers]
    unused = [key for key, header in stored.items() if used.isdisjoint(source.key for source in header.sources)]
    if missing:
        raise missing_weights(folder, missing, unused)
    return headers, tied, unused


def missing_weights(folder: Path, names: Sequence[str], unused: Sequence[str] = ()) -> InputError:
    """Return the error of a folder without these weights; `unused`: what it stores beside the model."""
    longer = next((key for key in unused if key.replace(".base_layer.", ".").endswith(names[0])), None)
    advice = "download the model again or correct config.json" if longer is None else "give tensors the model's names"
    stored = "" if longer is None else f", and stores {longer}"
    return InputError(f"{folder} lacks weights that its config requires: {list_names(names)}{stored}; {advice}")


def _check_header(header: Header, shape: tuple[int, ...], is_weight: bool) -> None:
    place = f"{header.key} in {header.file}"
    if header.shape != shape:
        raise InputError(
            f"{place} has shape {list(header.shape)} where the config requires {list(shape)}; config.json and the "
            f"weights do not belong together"
        )
    if is_weight and header.dtype not in FLOATS:
        raise InputError(
            f"{place} is stored as {header.dtype}, so it is already compressed; start from a checkpoint in bfloat16, "
            f"float16 or float32"
        )
    if header.dtype not in FLOATS | BUFFERS:
        raise InputError(f"{place} is stored as {header.dtype}; start from the dense checkpoint")


def _tie(declared: dict[str, str], headers: dict[str, Header]) -> dict[str, str]:
    """Return the `declared` ties (alias to origin) that hold by the rules of transformers; leave origins in `headers`.

    A file may store the shared tensor under either name or both. Two tensors that differ are not tied.
    """
    tied = {}
    for alias, origin in declared.items():
        is_double = alias in headers and origin in headers
        if is_double and not torch.equal(read_tensor(headers[alias]), read_tensor(headers[origin])):
            continue
        header = headers.pop(alias, None)
        if header is not None:
            headers.setdefault(origin, header)
        tied[alias] = origin
    return tied
