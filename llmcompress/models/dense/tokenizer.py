"""The tokenizer of a model folder, tried out when it is loaded: damage is found here, not in the middle of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmcompress.errors import InputError
from llmcompress.models.dense.remote_code import MODEL, load_config, needs_code, tokenizer_code
from llmcompress.models.files.checkpoint_identity import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIAL = "A word.\n"
MOST = 200  # characters of a library's reason
PANIC = "PanicException"  # of the tokenizers library, which makes it no Exception


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder. Raises InputError if it has none that transformers can read, or another
    than the weights were written with, or one in code that is not trusted."""
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    trusted = tokenizer_code(folder, trust_remote_code)
    own = trust_remote_code and needs_code(folder, MODEL)  # else transformers looks up what it needs of the config
    how = {"config": load_config(folder, trust_remote_code)} if own else {}
    with _Reading(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trusted, **how
        )
        _check(tokenizer)
        return tokenizer


class _Reading:
    """Makes an InputError of what the tokenizers library raises: a plain Exception, or a panic, which is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> Literal[False]:
        if (isinstance(error, Exception) and not isinstance(error, MemoryError)) or type(error).__name__ == PANIC:
            reason = " ".join(str(error).split())[:MOST].rstrip(".") or type(error).__name__
            raise InputError(
                f"{self.folder} has no tokenizer that can be read ({reason}); put the model's tokenizer files beside "
                f"its weights"
            ) from error
        return False


def _check(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TypeError unless a text becomes numbers, and the chat template and the special tokens are text."""
    if not all(isinstance(token, int) for token in tokenizer(TRIAL).input_ids):
        raise TypeError("its tokens are no numbers")
    templates = tokenizer.chat_template
    named = templates.values() if isinstance(templates, dict) else [templates]
    if not all(isinstance(template, str | None) for template in named):
        raise TypeError("its chat template is no text")
    tokenizer.get_vocab()
    if not all(isinstance(token, str | list) for token in tokenizer.special_tokens_map.values()):
        raise TypeError("one of its special tokens is no text")
