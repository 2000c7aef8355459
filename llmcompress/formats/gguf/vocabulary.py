"""A tokenizer as the entries of a GGUF file, so that llama.cpp cuts text into the same tokens.

llama.cpp has its own tokenizers. For byte-level BPE it knows the cuts before merging by a name only, and a wrong name
goes unnoticed; so the definition in tokenizer.json must be a known one. That file counts, even where the class of
transformers cuts otherwise (GPT2Tokenizer, the class of SmolLM2's tokenizer).

llama.cpp's SentencePiece has no list of merges: any two neighbours that together are a token may merge, the best score
first. So tokenizer.json must list all of those merges, those that make the same token together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.models.dense.companions import GENERATION
from llmcompress.models.dense.gguf_model import PRE_TOKENIZERS, Steps
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.models.files.gguf_header import ENDS
from llmcompress.models.files.reading import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types
FILE = "tokenizer.json"
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))  # tokens for what has no other, in SentencePiece
SPACE = "▁"  # in SentencePiece
SPECIAL = ("bos", *ENDS, "unk", "pad")

SPACE_NOTES = {  # on llama.cpp, by the place of a pre-tokenizer's space; "late": before special tokens are looked for
    "never": (),
    "late": ("llama.cpp puts a space after special tokens, too",),
    "always": ("llama.cpp puts a space before text that begins with one, too",),
    "first": ("llama.cpp puts a space before text that begins with one, and after special tokens, too",),
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokenizer entries of a GGUF file. `special`: ids by the names of `SPECIAL`; `notes`: on losses."""

    model: str  # "gpt2" (byte-level BPE) or "llama" (SentencePiece's BPE)
    pre: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False
    chat_templates: dict[str, str] = field(default_factory=dict)  # by name; "default" is the one of every chat
    notes: tuple[str, ...] = ()

    def describe(self, writer: GGUFWriter) -> None:
        """Write the entries."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_token_scores(self.scores)
        for key in SPECIAL:
            if key in self.special:
                getattr(writer, f"add_{key}_token_id")(self.special[key])
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if default := self.chat_templates.get("default"):
            writer.add_chat_template(default)
        if named := sorted(self.chat_templates.keys() - {"default"}):
            writer.add_array("tokenizer.chat_templates", named)
        for name in named:
            writer.add_string(f"tokenizer.chat_template.{name}", self.chat_templates[name])


def read_vocabulary(folder: Path, size: int, config: dict[str, Any]) -> Vocabulary:
    """Read the tokenizer in `folder` for a model of `size` tokens; `config` names special tokens if it does not.

    Raises InputError for one that llama.cpp would read otherwise, as far as can be known.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {FILE}, which a GGUF file needs; save the tokenizer with transformers first")
    tokenizer, entries = load_tokenizer(folder), _definition(path)
    model = entries["model"]
    if model.get("type") != "BPE":
        raise InputError(f"{path} holds a {model.get('type')} tokenizer, of which only BPE can go to GGUF")
    tokens, types = _tokens(path, entries, size)
    ids = {key: _special_id(tokenizer, config, key, size) for key in ("bos", "eos", "unk", "pad")}
    special = {key: number for key, number in ids.items() if number is not None}
    if "eos" not in special:
        raise InputError(f"{folder} names no token that ends a text; name one (eos_token) in tokenizer_config.json")
    add_bos, add_eos = _tokens_around(path, tokenizer, special)
    ends = list(dict.fromkeys([special["eos"], *_ends(folder, config, size)]))
    special |= zip(ENDS, ends, strict=False)
    template = tokenizer.chat_template or {}
    templates = {"default": template} if isinstance(template, str) else template  # some have several, by name
    notes = _notes(entries, tokenizer)
    if left := [tokens[end] for end in ends[len(ENDS) :]]:
        notes = (*notes, f"llama.cpp does not stop after {', '.join(left)}, as transformers does")
    about = (tokens, types, special, add_bos, add_eos)
    if not model.get("byte_fallback"):
        merges = [" ".join(pair) for pair in model["merges"]]
        if not merges:
            raise InputError(f"{path} merges nothing, which llama.cpp does not load; export to another format")
        name = _pre_tokenizer_name(path, entries)
        return Vocabulary("gpt2", name, *about, merges, chat_templates=templates, notes=notes)
    prefix, more = _space_prefix(path, entries)
    scores = _scores(path, model, tokens, types)
    return Vocabulary(
        "llama", "default", *about, [], scores, add_space_prefix=prefix, chat_templates=templates, notes=(*notes, *more)
    )


def _definition(path: Path) -> dict[str, Any]:
    """Return the content of tokenizer.json in today's notation."""
    from transformers import PreTrainedTokenizerFast

    entries: dict[str, Any] = json.loads(PreTrainedTokenizerFast(tokenizer_file=str(path)).backend_tokenizer.to_str())
    return entries


def _tokens(path: Path, entries: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return every token by its id, and its type; ids without a token, up to the model's size, are unused."""
    model = entries["model"]
    texts = {number: text for text, number in model["vocab"].items()}
    fallback = bool(model.get("byte_fallback"))
    types = {number: BYTE if fallback and text in BYTES else NORMAL for number, text in texts.items()}
    if fallback and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    for token in entries.get("added_tokens") or ():
        spaced = (
            fallback and not token["special"]
        )  # llama.cpp prints a user's token as it is, and matches it in raw text
        texts[token["id"]] = token["content"].replace(SPACE, " ") if spaced else token["content"]
        if types.get(token["id"]) != UNKNOWN:
            types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if max(texts) >= size:
        raise InputError(f"{path} has tokens up to {max(texts)}, but the model has {size}; they do not belong together")
    names = set(texts.values())
    for number in range(size):
        if not texts.get(number):  # with a name that no token has: llama.cpp loads no file with a name twice
            name = f"[PAD{number}]"
            while name in names:
                name = f"[{name}]"
            texts[number] = name
    return [texts[number] for number in range(size)], [types.get(number, UNUSED) for number in range(size)]


def _special_id(tokenizer: Any, config: dict[str, Any], key: str, size: int) -> int | None:
    """Return the id of a special token, the first if a config lists several; None for one not below `size`."""
    number = getattr(tokenizer, f"{key}_token_id")
    number = config.get(f"{key}_token_id") if number is None else number
    number = number[0] if isinstance(number, list) else number
    return number if isinstance(number, int) and 0 <= number < size else None  # some configs say -1 for none


def _ends(folder: Path, config: dict[str, Any], size: int) -> list[int]:
    """Return the ids, below `size`, of the tokens after which transformers stops."""
    path = folder / GENERATION
    told = (read_json(path) if path.is_file() else {}).get("eos_token_id", config.get("eos_token_id"))
    listed = told if isinstance(told, list) else [told]
    return [end for end in listed if isinstance(end, int) and 0 <= end < size]


def _tokens_around(path: Path, tokenizer: Any, special: dict[str, int]) -> tuple[bool, bool]:
    """Return (true if every text begins with the BOS token, true if it ends with the EOS token)."""
    plain, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for before in ([], [special.get("bos")]):
        for after in ([], [special["eos"]]):
            if before + plain + after == whole:
                return bool(before), bool(after)
    raise InputError(f"{path} puts tokens around a text that are not its BOS and EOS, which GGUF cannot say")


def _notes(entries: dict[str, Any], tokenizer: Any) -> tuple[str, ...]:
    """Return sentences on losses in llama.cpp, and in transformers' reading of tokenizer.json."""
    greedy = [t["content"] for t in entries.get("added_tokens") or () if t["lstrip"] or t["rstrip"] or t["single_word"]]
    notes = [f"the token {greedy[0]} no longer takes the spaces beside it"] if greedy else []
    if (entries.get("normalizer") or {}).get("type") == "NFC":
        notes.append("text is no longer brought into Unicode's form NFC before it is cut into tokens")
    backend = getattr(tokenizer, "backend_tokenizer", None)  # few are not made from tokenizer.json
    loaded = json.loads(backend.to_str()) if backend else {}
    if any(loaded.get(part) != entries.get(part) for part in ("normalizer", "pre_tokenizer")):
        notes.append(f"text is cut as {FILE} says, which transformers' {type(tokenizer).__name__} does not follow")
    return tuple(notes)


# --- byte-level BPE -------------------------------------------------------------------------------------------------


def _pre_tokenizer_name(path: Path, entries: dict[str, Any]) -> str:
    """Return llama.cpp's name of a pre-tokenizer. Raises InputError for a definition that is not known."""
    model, normalizer = entries["model"], entries.get("normalizer")
    steps = _steps(entries.get("pre_tokenizer") or {})
    name = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges")))) if steps else None
    parts = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"), model.get("dropout")]
    if name is None or any(parts) or (normalizer or {"type": "NFC"})["type"] != "NFC":
        raise InputError(
            f"{path} cuts text in a way for which no name in llama.cpp is known here, and a wrong one would go "
            f"unnoticed; export to another format"
        )
    return name


def _steps(definition: dict[str, Any]) -> Steps | None:
    """Return the steps of a pre-tokenizer; None for one of another kind."""
    match definition:
        case {"type": "Sequence", "pretokenizers": parts}:
            short = [_steps(part) for part in parts]
            return None if None in short else tuple(step for part in short for step in part or ())
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use}:
            return ("words",) if use else ()
        case {"type": "Digits", "individual_digits": True}:
            return ("digits",)
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
            return (expression,)
    return None


# --- SentencePiece's BPE --------------------------------------------------------------------------------------------


def _space_prefix(path: Path, entries: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Return (true if a space is put before a text, notes on llama.cpp)."""
    match entries.get("normalizer"), entries.get("pre_tokenizer"):
        case {"type": "Sequence", "normalizers": [first, second]}, None:
            replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
            if first == {"type": "Prepend", "prepend": SPACE} and second == replaces:
                late = any(token["normalized"] for token in entries.get("added_tokens") or ())
                return True, SPACE_NOTES["late"] if late else ()
        case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, before:
            if before is None or (before["type"] == "Split" and before["pattern"] == {"String": " "}):  # finds none
                return False, ()
        case None, {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}:
            return scheme != "never", SPACE_NOTES[scheme]
    raise InputError(f"{path} prepares text in a way that llama.cpp's SentencePiece does not; export to another format")


def _scores(path: Path, model: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """Return scores that fall with the place of a token's merge. Raises InputError if they give other merges."""
    vocabulary = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merges = [(left, right) for left, right in model["merges"]]
    made = [token for token, _ in groupby(left + right for left, right in merges)]
    possible = {
        (text[:cut], text[cut:])
        for text in vocabulary
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    }
    if len(made) > len(set(made)) or not possible <= set(merges) or not set(BYTES) <= set(tokens):
        raise InputError(
            f"{path} merges tokens in an order that cannot be told by one score for each, which is all that llama.cpp "
            f"reads; export to another format"
        )
    scores = {token: -float(place) for place, token in enumerate(made)}
    return [scores.get(token.replace(" ", SPACE), -float(len(made))) for token in tokens]
