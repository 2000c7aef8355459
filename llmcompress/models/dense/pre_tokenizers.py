"""Ways to cut text before the tokens of byte-level tokenizers merge, by their names in llama.cpp and GGUF files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

Steps = tuple[str, ...]  # a pre-tokenizer: "digits", "words" (GPT-2's expression), or an expression
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r"\p{Lm}\p{Lo}\p{M}]"
_LOWER = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARKS}*[\p{{Ll}}{_MARKS}+"  # words that end in small letters
_UPPER = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARKS}+[\p{{Ll}}{_MARKS}*"
_LATER_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PRE_TOKENIZERS: dict[tuple[Steps, bool], str] = {  # with: whole words that are tokens are not merged
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_ENDINGS + r"\p{N}{1,3}" + _SPACES,), True): "llama-bpe",
    ((_ENDINGS + r"\p{N}{1,3}" + _SPACES,), False): "smaug-bpe",
    ((_ENDINGS + r"\p{N}" + _SPACES,), False): "qwen2",
    ((f"{_LOWER}{_SUFFIX}|{_UPPER}{_SUFFIX}|" + r"\p{N}{1,3}" + _LATER_SPACES,), False): "gpt-4o",
    ((f"{_LOWER}|{_UPPER}|" + r"\p{N}" + _LATER_SPACES,), True): "tekken",
}
BY_NAME: dict[str, tuple[Steps, bool]] = {name: steps for steps, name in PRE_TOKENIZERS.items()}


def build_pre_tokenizer(steps: Steps) -> PreTokenizer:
    """Return the pre-tokenizer that is called `steps` in short."""
    from tokenizers import Regex, pre_tokenizers

    parts: list[PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if "digits" in steps else []
    parts += [pre_tokenizers.Split(Regex(step), "isolated") for step in steps if step not in ("digits", "words")]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="words" in steps))
    return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
