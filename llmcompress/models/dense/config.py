"""The configs in a model's folder, and the Python code that they name: read, checked, loaded, made public.

transformers runs the classes that `auto_map` names once it is told to trust them. Here code is needed only if
transformers lacks the class: an unknown `model_type`, other `architectures`, another `tokenizer_class`. Other code is
not run, trusted or not, and stays behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError, first_line, list_names
from llmcompress.models.files.reading import error_text, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL, TOKENIZER = "config.json", "tokenizer_config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
AUTO_MAP = "auto_map"
REFERENCE = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)")  # a module beside the config, and a class in it
# Entries that no output has: code in the folder or in another repository, and paths that older releases of transformers
# left there; it sets or looks up all of them anew.
PRIVATE = {AUTO_MAP, "custom_pipelines", "_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"}
WEIGHTS = "transformers_weights"  # a file that transformers would load in place of model.safetensors
PRIVATE |= {WEIGHTS}
FUSED = "llmcompress_fused"  # an entry: what was fused into the model before it was compressed
DEEPER = ("*/config.json", "snapshots/*/config.json", "*/adapter_config.json")
MOST_LAYERS = 1024
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIZES = (
    *("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    "max_position_embeddings",
)
AFTER_PADDING = {  # types whose first token has the position after that of padding, which counts in their number
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "mpnet"),
    *("xmod", "ibert", "esm", "longformer", "luke", "lilt", "markuplm"),
}


def read_entries(path: Path, folder: Path) -> dict[str, Any]:
    """Return the entries of a JSON file of the model in `folder`. Raises InputError if it is missing or unreadable."""
    if not path.is_file():
        empty = not any(folder.iterdir())
        raise InputError(
            f"the folder {folder} is empty; give a model folder"
            if empty
            else f"{folder} has no {path.name}; {_inside(folder)}give a folder with a Hugging Face model"
        )
    return read_json(path, "download it again")


def _inside(folder: Path) -> str:
    """Return a clause on models one level deeper, where the Hub's cache and trainers have them."""
    names = sorted({str(path.parent.relative_to(folder)) for each in DEEPER for path in folder.glob(each)})
    return f"did you mean its folder {list_names(names)}? If not, " if names else ""


def public_entries(entries: Mapping[str, Any], code: bool = False) -> dict[str, Any]:
    """Return the entries of a config without `PRIVATE` ones; `code`: True if the code that it names goes along."""
    return {name: value for name, value in entries.items() if name not in PRIVATE or (code and name == AUTO_MAP)}


def packing_entry(entries: Mapping[str, Any]) -> Any:
    """Return what a config.json says about weights in few bits; nothing, or what is false, for a dense model.

    MLX has an entry of its own for it.
    """
    own = entries.get("quantization")
    if isinstance(own, dict) and {"group_size", "bits"} <= own.keys():
        return {"quant_method": "mlx"} | own
    return entries.get("quantization_config")


def load_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Return the config of the model in `folder`. Raises what `model_code` and `AutoConfig` raise."""
    from transformers import AutoConfig

    trusted = model_code(folder, trust_remote_code)
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    return config


def valid_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config of the model in `folder`. Raises InputError for one that transformers cannot read."""
    try:
        return load_config(folder, trust_remote_code)
    except config_errors() as error:
        raise InputError(f"{folder / MODEL} is not a valid config ({error_text(error)}); correct it") from error


def config_errors() -> tuple[type[Exception], ...]:
    """Return the errors that transformers and torch raise for impossible values and missing requirements."""
    from huggingface_hub.errors import StrictDataclassError

    values = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
    code = (NameError, SyntaxError)  # of a model's own
    return (*values, *code, OSError, ImportError, MemoryError, StrictDataclassError)


def check_entries(entries: Mapping[str, Any], place: str) -> None:
    """Raise InputError for sizes that no model has, in a config.json or a config in it, and for weights elsewhere.

    `place`: the config's name in the message.
    """
    if (named := entries.get(WEIGHTS)) not in (None, "model.safetensors"):
        raise InputError(
            f"{place} has transformers load the weights in {str(named)[:50]!r}; rename them to model.safetensors, and "
            f"remove {WEIGHTS}"
        )
    found = [entries]
    for each in found:  # which grows
        check_numbers(each.get, place)
        inner = (value for key, value in each.items() if key.endswith("_config") and key != "quantization_config")
        found += [value for value in inner if isinstance(value, dict)]


def check_numbers(number_of: Callable[[str], Any], place: str) -> None:
    """Raise InputError for sizes that no model has, before a config or a model is made of them.

    `number_of`: the value of an entry by name, None without one; `place`: the config's name in the message.
    """
    for key in (*LAYERS, *SIZES):
        value, most = number_of(key), MOST_LAYERS if key in LAYERS else 2**31
        numbers = value if isinstance(value, list) and len(value) <= MOST_LAYERS else [value]
        least = 0 if isinstance(value, list) else 1  # a list has a number for each block
        if not all(number is None or (type(number) is int and least <= number <= most) for number in numbers):
            raise InputError(
                f"{place} gives {key} as {str(value)[:50]!r}, which is no number from 1 to {most}; correct it"
            )


def context_length(config: PreTrainedConfig | None) -> int | None:
    """Return the longest sequence that a model is made for, None if its config does not say."""
    text = config.get_text_config() if config else None
    context = getattr(text, "max_position_embeddings", None)
    if text is not None and isinstance(context, int) and text.model_type in AFTER_PADDING:
        context -= 1 + (1 if text.model_type == "mpnet" else getattr(text, "pad_token_id", None) or 0)
    return context if isinstance(context, int) and context > 0 else None


def model_code(folder: Path, trust_remote_code: bool) -> bool:
    """True if the model in `folder` is to be loaded with its own code.

    Raises InputError for needed code that is not trusted, missing, or in another repository.
    """
    return _runs_code(folder, MODEL, "model", trust_remote_code)


def tokenizer_code(folder: Path, trust_remote_code: bool) -> bool:
    """True if the tokenizer in `folder` is to be loaded with its own code. Raises what `model_code` raises."""
    return _runs_code(folder, TOKENIZER, "tokenizer", trust_remote_code)


def _runs_code(folder: Path, config: str, what: str, trust_remote_code: bool) -> bool:
    if not needs_code(folder, config):
        return False
    if not trust_remote_code:
        raise InputError(
            f"the {what} in {folder} needs Python code of its own, which runs only if you trust it; read it, then pass "
            f"--trust-remote-code (in Python: trust_remote_code=True)"
        )
    code_files(folder)
    return True


def needs_code(folder: Path, config: str) -> bool:
    """True if the class for a config file of `folder` is in code beside it, and not in transformers.

    False for a file that is missing or unreadable: others report that.
    """
    entries = _entries_if_any(folder / config)
    if not entries.get(AUTO_MAP):
        return False
    if config == MODEL:
        return not _is_known_model(entries)
    if config == TOKENIZER:
        return not _is_known_tokenizer(entries, _entries_if_any(folder / MODEL))
    return needs_code(folder, MODEL)


def code_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files with the code that the model in `folder` needs, sorted.

    Modules that these import from their own folder are among them. Raises InputError for code that is missing, or in
    another repository.
    """
    names: set[str] = set()
    for config in (MODEL, TOKENIZER, *PROCESSORS):
        if needs_code(folder, config):
            for module in _modules(_entries_if_any(folder / config)[AUTO_MAP], folder / config):
                names |= _with_imports(folder, f"{module}.py", config)
    return tuple(sorted(names))


def _entries_if_any(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def is_known_type(model_type: object) -> bool:
    """True if the installed transformers has a config for a model type."""
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _is_known_model(entries: dict[str, Any]) -> bool:
    """True if transformers has the model type of a config, and all its architectures."""
    classes = entries.get("architectures") or []
    is_known = is_known_type(entries.get("model_type"))
    names = _transformers_names()
    return is_known and (not isinstance(classes, list) or all(isinstance(x, str) and x in names for x in classes))


@lru_cache(maxsize=1)
def _transformers_names() -> frozenset[str]:
    """Return the names in transformers; nothing is imported for that."""
    import transformers

    return frozenset(dir(transformers))


def _is_known_tokenizer(entries: dict[str, Any], model: dict[str, Any]) -> bool:
    """True if transformers has the class of a tokenizer's config; without one there, a tokenizer for the `model`."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    name = entries.get("tokenizer_class")
    if not isinstance(name, str):
        kind = model.get("model_type")
        return isinstance(kind, str) and kind in TOKENIZER_MAPPING_NAMES
    slow = name.removesuffix("Fast")
    return any(tokenizer_class_from_name(each) is not None for each in (slow, f"{slow}Fast"))


def _modules(auto_map: Any, place: Path) -> Iterator[str]:
    """Yield the modules that an `auto_map` names; its values are references, or for tokenizers lists of them."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for value in values:
        for reference in value if isinstance(value, list) else [value]:
            if reference is None:
                continue
            named = REFERENCE.fullmatch(str(reference))
            if named is None:
                raise InputError(
                    f"{place} names code as {str(reference)[:80]!r}, which is no class in a file beside it; put the "
                    f"code into the model's folder and correct {AUTO_MAP}"
                )
            yield named[1]


def _with_imports(folder: Path, name: str, config: str) -> set[str]:
    """Return a file of code, and those that it imports from its folder."""
    from transformers.dynamic_module_utils import get_relative_import_files

    try:
        paths = [folder / name, *map(Path, get_relative_import_files(folder / name))]
        names = {path.relative_to(folder).as_posix() for path in paths}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} lacks code that its {config} names, or it cannot be read ({first_line(error)}); download the "
            f"model again"
        ) from error
    if outside := [each for each in names if "/" in each]:
        raise InputError(f"{folder / name} imports {outside[0]}, which is not beside it; put all code into one folder")
    return names
