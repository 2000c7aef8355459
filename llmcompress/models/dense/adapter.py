"""A LoRA adapter of PEFT as a dense model: its base, with the adapter merged into one matrix at a time when it is read.

PEFT merges, so every kind of LoRA counts by its own formula: rsLoRA, DoRA (arXiv 2402.09353), ranks by layer. Other
adapters, and what PEFT would have to untie or to resize, are refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.models.dense.config import config_errors
from llmcompress.models.dense.headers import FLOATS, Header, Packing, has_model, open_weights
from llmcompress.models.files.reading import error_text, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
BEFORE = "base_model.model."  # names in its file
PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?")
BEYOND = ("layer_replication", "target_parameters", "megatron_config", "alora_invocation_tokens", "arrow_config")
OTHER = "correct base_model_name_or_path in its config"
MERGE = "merge it with PEFT (merge_and_unload) and give the folder that you save"

UNTIE = (  # else PEFT adds both terms to the one matrix, or saves but one of two
    "give the base a head of its own first (config.tie_word_embeddings = False, lm_head.weight a copy of the table), "
    "merge the adapter there with PEFT (merge_and_unload), and give the folder that you save"
)


def is_adapter(folder: Path) -> bool:
    """True for a folder with an adapter and no model of its own."""
    return (folder / ADAPTER).is_file() and not has_model(folder)


def check_alone(folder: Path) -> None:
    """Raise InputError for a model with an adapter beside its weights, which may be in them already."""
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder} has an {ADAPTER} beside its weights, so transformers would load the model that it names; "
            f"remove that file, or merge the adapter into the model"
        )


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """Return the files of an adapter: its config and its weights. Raises InputError without weights."""
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder} has an {ADAPTER} and no {FILES[0]}; download it again")
    return folder / ADAPTER, path


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return the name and the revision of the model that an adapter belongs to. Raises InputError if it names none."""
    entries = read_json(folder / ADAPTER, "download it again")
    name, revision = entries.get("base_model_name_or_path"), entries.get("revision")
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise InputError(f"{folder / ADAPTER} names no model as base_model_name_or_path; add the one that it is for")
    return name, revision


def merge_headers(
    model: PreTrainedModel, tensors: Mapping[str, Header], tied: Mapping[str, str], folder: Path, base_folder: Path
) -> dict[str, Header]:
    """Return the headers of a dense `model` of `base_folder` with the LoRA adapter in `folder`.

    Raises InputError for an adapter that is damaged, of another model, or of a kind that is not merged here.
    """
    if find_spec("peft") is None:
        raise InputError(f"reading the adapter {folder} needs the package peft; run `pip install peft`")
    config, merged = _read_config(folder), dict(tensors)
    layers: dict[str, dict[str, Header]] = {}  # parts by PEFT's names, by module path
    stored = _read_parts(folder)
    if not stored:
        raise InputError(f"the adapter {folder} holds no weights; save it again where they are whole")
    for key, header in stored.items():
        part = key.removeprefix(BEFORE).replace(".base_layer.", ".")  # of a table that goes along with its adapter
        match = PART.fullmatch(part)
        name = f"{match[1]}.weight" if match else part
        if {name} & {*tied, *tied.values()}:
            raise InputError(f"{key} of the adapter {folder} is for a table that is the head too in its base; {UNTIE}")
        if match and name not in tensors:
            raise InputError(f"{key} of the adapter {folder} is for what {base_folder} lacks; {OTHER}")
        if name not in tensors or header.dtype not in FLOATS:
            raise InputError(f"{key} of the adapter {folder} is nothing that is merged into {name} here; {MERGE}")
        if match:
            layers.setdefault(match[1], {})[part] = header
        elif header.shape == tensors[name].shape:  # trained whole
            merged[name] = replace(header, key=tensors[name].key, wrapped=key)
        else:
            raise InputError(_describe_misfit(f"{key} of the adapter {folder}", header.shape, tensors[name].shape))
    for path, parts in layers.items():
        base, module = merged[f"{path}.weight"], model.get_submodule(path)
        if not _fit(parts, module, base.shape):
            raise InputError(f"the adapter {folder} does not fit {path} of {base_folder}; {OTHER}")
        unpack = partial(_merge, path=path, module=module, config=config)
        packing = Packing(f"the base of {folder.name}", base.shape, {"weight": base} | parts, unpack)
        merged[f"{path}.weight"] = Header(base.shape, base.dtype, base.file, base.key, packing=packing)
    return merged


def _describe_misfit(part: str, shape: tuple[int, ...], base: tuple[int, ...]) -> str:
    """Return the sentence on a tensor that was trained whole, in another shape than its base has."""
    if len(shape) == 2 and shape[1:] == base[1:]:  # of a table for more tokens, which PEFT saves whole
        return (
            f"{part} has {shape[0]} rows, and its base has {base[0]}; give the base as many (resize_token_embeddings), "
            f"save it, and name that folder as base_model_name_or_path in the adapter's config"
        )
    return f"{part} has another shape than in its base; {MERGE}"


def _read_config(folder: Path) -> Any:
    """Return PEFT's config of the adapter in a folder. Raises InputError for one that is no LoRA of linears."""
    from peft import PeftConfig

    kind = read_json(folder / ADAPTER, "download it again").get("peft_type")
    if kind != "LORA":
        raise InputError(f"{folder / ADAPTER} describes an adapter of the kind {str(kind)[:50]!r}, no LoRA; {MERGE}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except config_errors() as error:
        raise InputError(f"{folder / ADAPTER} is no config of PEFT ({error_text(error)}); correct it") from error
    if others := [name for name in BEYOND if getattr(config, name, None)]:
        raise InputError(f"the adapter {folder} has {others[0]}, which is more than a term of linears; {MERGE}")
    config.modules_to_save = None  # which are put in place as they are
    return config


def _read_parts(folder: Path) -> dict[str, Header]:
    """Return the header of every tensor of the adapter in a folder."""
    _, path = adapter_files(folder)
    with open_weights(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - an open file is not a mapping
        return {key: Header(tuple(one.get_shape()), one.get_dtype(), path, key) for key, one in slices.items()}


def _fit(parts: Mapping[str, Header], module: nn.Module, shape: tuple[int, ...]) -> bool:
    """True if the `parts` of a LoRA are those of a linear or a table with a weight of this shape."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        return False
    inputs, outputs = reversed(shape) if isinstance(module, nn.Linear) else shape
    shapes = {name.removesuffix(".weight").rpartition(".")[2]: part.shape for name, part in parts.items()}
    names = ("lora_embedding_A", "lora_embedding_B") if isinstance(module, nn.Embedding) else ("lora_A", "lora_B")
    if not shapes.keys() >= set(names) or not shapes.keys() <= {*names, "lora_magnitude_vector"}:
        return False
    down, up = (shapes[name] for name in names)
    fits = len(down) == len(up) == 2 and down[0] == up[1] > 0
    return fits and (down[1], up[0]) == (inputs, outputs)


def _merge(parts: dict[str, Tensor], path: str, module: nn.Module, config: Any) -> Tensor:
    """Return the weight of a linear or a table with the parts of its adapter, alone in a model of its name."""
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    leaf, root = copy.copy(module), nn.Module()
    leaf.__dict__["_parameters"] = dict(leaf._parameters) | {"weight": nn.Parameter(parts.pop("weight").float(), False)}
    *owners, last = path.split(".")
    owner = root
    for name in owners:
        owner.add_module(name, nn.Module())
        owner = owner.get_submodule(name)
    owner.add_module(last, leaf)
    inject_adapter_in_model(copy.deepcopy(config), root)
    loaded: Any = set_peft_model_state_dict(root, parts)
    layer: Any = root.get_submodule(path)
    if loaded.unexpected_keys or layer is leaf:
        raise ValueError(f"{ADAPTER} does not describe its part for {path}")
    layer.merge()
    merged: Tensor = layer.get_base_layer().weight
    return merged.detach()
