"""The Python code that a model brings along: who needs it, whether it may run, and which files it is in.

transformers runs the classes that `auto_map` names in the configs of a folder once it is told to trust them. Here code
is needed where transformers has no class of its own: for an unknown `model_type`, for `architectures` of another name,
for another `tokenizer_class`. Code that nothing needs is not run, trusted or not, and stays behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError, first_line
from llmcompress.models.files.files import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL, TOKENIZER = "config.json", "tokenizer_config.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
AUTO_MAP = "auto_map"
REFERENCE = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)")  # a module beside the config, and a class in it


def load_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Return the config of the model in `folder`. Raises what `model_code` and `AutoConfig` raise."""
    from transformers import AutoConfig

    trusted = model_code(folder, trust_remote_code)
    found: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    return found


def model_code(folder: Path, trust_remote_code: bool) -> bool:
    """True if the model in `folder` is to be loaded with its own code.

    Raises InputError if it needs code and that is not trusted, not there, or in another repository.
    """
    return _checked(folder, MODEL, "model", trust_remote_code)


def tokenizer_code(folder: Path, trust_remote_code: bool) -> bool:
    """True if the tokenizer in `folder` is to be loaded with its own code. Raises what `model_code` raises."""
    return _checked(folder, TOKENIZER, "tokenizer", trust_remote_code)


def needs_code(folder: Path, config: str) -> bool:
    """True if what a config file of `folder` describes has a class in code beside it, and none in transformers.

    False for a file that is missing or cannot be read: others report that.
    """
    entries = _entries(folder / config)
    if not entries.get(AUTO_MAP):
        return False
    if config == MODEL:
        return not _known_model(entries)
    if config == TOKENIZER:
        return not _known_tokenizer(entries, _entries(folder / MODEL))
    return needs_code(folder, MODEL)


def code_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files with the code that the model in `folder` needs, sorted; empty if it needs none.

    Modules that these import from their own folder are among them. Raises InputError for code that is not there, or in
    another repository.
    """
    found: set[str] = set()
    for config in (MODEL, TOKENIZER, *PROCESSORS):
        if needs_code(folder, config):
            for module in _modules(_entries(folder / config)[AUTO_MAP], folder / config):
                found |= _imported(folder, f"{module}.py", config)
    return tuple(sorted(found))


def _checked(folder: Path, config: str, what: str, trust_remote_code: bool) -> bool:
    if not needs_code(folder, config):
        return False
    if not trust_remote_code:
        raise InputError(
            f"the {what} in {folder} needs Python code of its own, which runs only if you trust it; read it, then pass "
            f"--trust-remote-code (in Python: trust_remote_code=True)"
        )
    code_files(folder)
    return True


def _entries(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def _known_model(entries: dict[str, Any]) -> bool:
    """True if transformers has the model type of a config, and all its architectures."""
    from transformers import CONFIG_MAPPING

    kind, classes = entries.get("model_type"), entries.get("architectures") or []
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    return known and (not isinstance(classes, list) or all(name in _names() for name in classes))


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    """Return what transformers has, by name; nothing is imported for that."""
    import transformers

    return frozenset(dir(transformers))


def _known_tokenizer(entries: dict[str, Any], model: dict[str, Any]) -> bool:
    """True if transformers has the class of a tokenizer's config, or where that names none, one for the `model`."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    name = entries.get("tokenizer_class")
    if not isinstance(name, str):
        return model.get("model_type") in TOKENIZER_MAPPING_NAMES
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


def _imported(folder: Path, name: str, config: str) -> set[str]:
    """Return a file of code, and those that it imports from its folder."""
    from transformers.dynamic_module_utils import get_relative_import_files

    try:
        paths = [folder / name, *map(Path, get_relative_import_files(folder / name))]
        found = {path.relative_to(folder).as_posix() for path in paths}
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} lacks code that its {config} names, or it cannot be read ({first_line(error)}); download the "
            f"model again"
        ) from error
    if outside := [each for each in found if "/" in each]:
        raise InputError(f"{folder / name} imports {outside[0]}, which is not beside it; put all code into one folder")
    return found
