"""A dense model to compress: its config, the headers of its tensors, and one tensor at a time when asked.

Nothing here holds weights. `resolve` reads the config and the safetensors headers and refuses what cannot be
compressed before any work is done; `DenseModel.read` opens one file, copies one tensor and lets the file go.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llmcompress.errors import InputError, listed
from llmcompress.models.families import refuse_experts
from llmcompress.models.integrity import INDEX
from llmcompress.models.locate import Place, locate, public_name
from llmcompress.models.public_entries import public_entries
from llmcompress.runtime.devices import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' names of dense dtypes, bytes per value
RENAMED = {"lm_head.weight": "embed_out.weight"}  # model's name -> name on disk; GPT-NeoX
PACKED = {"I8": 1, "I16": 2, "U16": 2, "U32": 4, "F8_E4M3": 1, "F8_E5M2": 1}  # dtypes that other tools pack weights in
BUFFERS = {"I64": 8, "I32": 4, "U8": 1, "BOOL": 1}  # further dtypes of persistent buffers


@dataclass(frozen=True)
class Header:
    """One stored tensor: its shape, its dtype by safetensors' name, its file, and its key there."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    key: str

    @property
    def bytes(self) -> int:
        """Size of the values on disk."""
        return prod(self.shape) * {**FLOATS, **BUFFERS, **PACKED}[self.dtype]


@dataclass(frozen=True, eq=False)
class DenseModel:
    """A dense causal language model on disk.

    `tensors` are keyed by the model's own names, whatever the file calls them. `tied` maps names to the ones they are
    stored under (mostly the output head). `revision` is the Hub commit; `notes` are for the report.
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
        return _read(self.tensors[self.tied.get(name, name)])

    def config_entries(self) -> dict[str, Any]:
        """Return the entries of the model's config.json that an output may have."""
        return public_entries(_read_json(self.folder / "config.json", self.folder))

    def skeleton(self) -> PreTrainedModel:
        """Return a new model in eval mode, with parameters on meta and real buffers."""
        return dense_skeleton(self.config, self.folder)

    def load(self, device: str = "cpu") -> PreTrainedModel:
        """Return the whole model as it lies on disk, in float32. Raises what `load_model` raises."""
        return load_model(Place(self.name, self.folder), device)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer. Raises InputError if the folder has none that transformers can read."""
        return load_tokenizer(self.folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder. Raises InputError if it has none that transformers can read."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder} has no tokenizer that can be read ({_reason(error)}); "
            f"put the model's tokenizer files beside its weights"
        ) from error
    return tokenizer


def load_model(
    place: Place,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """Return a model in eval mode: dense, or compressed by llmcompress or a tool that transformers knows.

    `quantization` says how to quantize a dense one while it is loaded. Raises InputError if the model cannot be
    loaded, RecipeError if the device is missing.
    """
    from transformers import AutoModelForCausalLM

    there = device_of(device)
    quantized = {} if quantization is None else {"quantization_config": quantization, "device_map": device}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            place.folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **quantized
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(f"{place.name} cannot be loaded ({_reason(error)}); download or write it again") from error
    placed: nn.Module = model
    if not quantized and model.device != there:  # what other tools quantized refuses to be moved
        placed.to(there)
    return model.eval()


def resolve(model: str, revision: str | None = None) -> DenseModel:
    """Return the dense model that `model` names (see `locate`), checked by its config and tensor headers alone.

    Raises InputError for a missing, empty or damaged folder, for anything but a causal language model with plain
    floating-point safetensors, and for weights that are missing or have other shapes than the config requires.
    """
    return open_source(locate(model, revision))


def open_source(place: Place) -> DenseModel:
    """Return the dense model of a place that `locate` found; raises what `resolve` raises."""
    config = read_config(place.folder)
    skeleton = dense_skeleton(config, place.folder)
    refuse_experts(config, skeleton)  # before matching: their tensors have other names on disk
    stored = read_headers(place.folder)
    tensors, tied, unused = _match(skeleton, stored, place.folder)
    note = f"{len(unused)} stored tensors are not part of the model, {unused[0]} for one" if unused else ""
    notes = (*place.notes, note) if note else place.notes
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
    )


def _license(folder: Path) -> str | None:
    """Return the licence in the metadata of the folder's model card; None if there is none."""
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the config of the dense causal language model in `folder`. Raises InputError for any other folder."""
    from transformers import AutoConfig

    entries = _read_json(folder / "config.json", folder)
    kind = entries.get("model_type")
    if method := (entries.get("quantization_config") or {}).get("quant_method"):
        raise InputError(
            f"{folder} is already compressed (quant_method {str(method)!r}); start from the dense checkpoint"
        )
    if "auto_map" in entries and not _known_type(kind):
        raise InputError(
            f"{folder} needs its own Python code to load, which is never run; choose a model type of transformers"
        )
    if not isinstance(kind, str) or not _known_type(kind):
        raise InputError(
            f"{folder / 'config.json'} names model_type {kind!r}, which the installed transformers does not know; "
            f"install a newer transformers or choose another model"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _config_errors() as error:
        raise InputError(f"{folder / 'config.json'} is not a valid config ({_reason(error)}); correct it") from error
    _refuse_other_tasks(config, folder)
    return config


def _config_errors() -> tuple[type[Exception], ...]:
    """Return the errors that transformers and torch raise for impossible values and missing requirements."""
    from huggingface_hub.errors import StrictDataclassError

    values = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
    return (*values, OSError, ImportError, StrictDataclassError)


def _known_type(kind: object) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(kind, str) and kind in CONFIG_MAPPING


def _refuse_other_tasks(config: PreTrainedConfig, folder: Path) -> None:
    """Raise InputError unless the config's type has a causal language model and the checkpoint is one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    names = [causal] if isinstance(causal, str) else list(causal or ())
    given = list(getattr(config, "architectures", None) or ())
    if not names or getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{folder} is a {config.model_type} model, not a causal language model; choose one that is")
    if given and not any(name in names for name in given):
        raise InputError(
            f"{folder} holds a {given[0]}, not a causal language model ({names[0]}); choose a checkpoint that is one"
        )


def dense_skeleton(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Return the model that a config describes, parameters on meta. Raises InputError if it cannot be built."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    except _config_errors() as error:
        raise InputError(
            f"{folder / 'config.json'} does not describe a {config.model_type} model that can be built "
            f"({_reason(error)}); correct it"
        ) from error
    return model.eval()


def transposed_linears(folder: Path, entries: dict[str, Any]) -> set[str]:
    """Return the module paths of linears whose weight is `[in, out]` in a model with the config `entries`."""
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.for_model(**entries)
    return {name for name, child in dense_skeleton(config, folder).named_modules() if isinstance(child, Conv1D)}


def read_headers(folder: Path) -> dict[str, Header]:
    """Return the header of every tensor in the folder's safetensors files, by the names in the files."""
    stored: dict[str, Header] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - an open file is not a mapping
                    piece = file.get_slice(key)
                    if key in stored:
                        raise InputError(
                            f"tensor {key} is stored twice, in {stored[key].file.name} and {path.name} of {folder}; "
                            f"remove the file that is not part of the model"
                        )
                    stored[key] = Header(tuple(piece.get_shape()), piece.get_dtype(), path, key)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    return stored


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the model, chosen as transformers chooses them."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if (folder / INDEX).is_file():
        names = _read_json(folder / INDEX, folder).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{folder / INDEX} has no weight_map; download the model again")
        files = sorted({str(name) for name in names.values()})
        outside = [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]
        if outside:
            raise InputError(
                f"{folder / INDEX} names {outside[0]!r}, which is no safetensors file of the folder; correct it"
            )
        absent = [name for name in files if not (folder / name).is_file()]
        if absent:
            raise InputError(f"{folder} lacks {listed(absent)}, which {INDEX} names; download the model again")
        return [folder / name for name in files]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise InputError(
            f"{folder} has its weights only as pickle files, which can run code; save them as safetensors first"
        )
    raise InputError(f"{folder} has no model.safetensors and no {INDEX}; give a folder with the model's weights")


def _match(
    skeleton: PreTrainedModel, stored: dict[str, Header], folder: Path
) -> tuple[dict[str, Header], dict[str, str], list[str]]:
    """Return the stored headers by model names, the tied names, and the stored names that the model does not use.

    A checkpoint of the bare model lacks the prefix of the model with a head (`transformer.` in GPT-2), or vice versa.
    """
    prefix = f"{skeleton.base_model_prefix}."
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    found: dict[str, Header] = {}
    for name, value in {**skeleton.state_dict(), **parameters}.items():
        candidates = (name, name.removeprefix(prefix), prefix + name, RENAMED.get(name, name))
        key = next((key for key in candidates if key in stored), None)
        if key is not None:
            found[name] = _checked(stored[key], tuple(value.shape), name in parameters)
    used = {header.key for header in found.values()}
    tied = _tie(dict(getattr(skeleton, "all_tied_weights_keys", None) or {}), found)
    missing = [name for name in parameters if tied.get(name, name) not in found]
    if missing:
        raise InputError(
            f"{folder} lacks weights that its config requires: {listed(missing)}; download the model again or correct "
            f"config.json"
        )
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
    return header


def _tie(declared: dict[str, str], found: dict[str, Header]) -> dict[str, str]:
    """Return the `declared` ties (alias to origin) that hold by the rules of transformers; move `found` to the origins.

    A file may store the shared tensor under either name or both. Two tensors that differ are not tied.
    """
    tied = {}
    for alias, origin in declared.items():
        if alias in found and origin in found and not torch.equal(_read(found[alias]), _read(found[origin])):
            continue
        header = found.pop(alias, None)
        if header is not None:
            found.setdefault(origin, header)
        tied[alias] = origin
    return tied


def _read(header: Header) -> Tensor:
    """Return a copy of one tensor; its file is closed again."""
    try:
        with safe_open(header.file, framework="pt") as file:
            return file.get_tensor(header.key).clone()  # the original is a window into the mapped file
    except (SafetensorError, OSError) as error:
        raise _damaged(header.file, error) from error


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    if not path.is_file():
        empty = not any(folder.iterdir())
        raise InputError(
            f"the folder {folder} is empty; give a model folder"
            if empty
            else f"{folder} has no {path.name}; give a folder with a Hugging Face model"
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not readable JSON ({_reason(error)}); download it again") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path} holds no JSON object; download it again")
    return entries


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged ({_reason(error)}); download or copy it again")


def _reason(error: Exception, most: int = 200) -> str:
    """Return the message of a library's error on one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= most else f"{text[:most]}...").rstrip(".")
