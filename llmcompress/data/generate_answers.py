"""A chat model answers prompts, several side by side, each with its own random numbers.

Prompts are padded on the left; an answer ends with the token that ends a turn in the chat template, or with another
that ends a text. The numbers of a prompt are drawn from a generator of its own, so its answer does not depend on which
prompts it shares a batch with, but for the rounding of sums in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.data.calibration import context_length
from llmcompress.data.chat_template import rendered
from llmcompress.data.generate_text import end_tokens, token_chances
from llmcompress.data.text import Message
from llmcompress.errors import RecipeError
from llmcompress.runtime.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARK = "llmcompress"  # an answer whose end is looked for in the chat template
GRAM, SHORT, VARIED = 4, 40, 0.25  # tokens; below so many nothing is called repetition; the least share of grams once


@dataclass(frozen=True)
class AnswerSampling:
    """The drawing of an answer: `longest` tokens at most, its end included; at temperature 0 the likeliest one."""

    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0
    longest: int = 512


@dataclass(frozen=True)
class Answer:
    """An answer without the token that ends it; `fault`: why it cannot be used, None for one that can."""

    content: str
    fault: str | None = None


class Answerer:
    """A model and its tokenizer as something that answers. Raises RecipeError for one without a chat template."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: AnswerSampling) -> None:
        if not tokenizer.chat_template:
            raise RecipeError("the model has no chat template, so it does not answer; choose a model made for chats")
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.ends = end_tokens(model, tokenizer) | turn_end(tokenizer)
        if not self.ends:
            raise RecipeError("the model has no token that ends an answer; choose a model made for chats")
        self.context = context_length(model.config)

    def answers(self, prompts: Sequence[tuple[int, list[Message]]]) -> list[Answer]:
        """Answer numbered prompts; the number is part of the seed. A prompt that leaves no room is not answered."""
        ids = [self.rendered(messages) for _, messages in prompts]
        room = [self.context is None or len(row) + self.sampling.longest <= self.context for row in ids]
        fitting = [index for index, fits in enumerate(room) if fits]
        wrote = self._written([ids[index] for index in fitting], [prompts[index][0] for index in fitting])
        found = [Answer("", "prompt too long")] * len(ids)
        for index, answer in zip(fitting, wrote, strict=True):
            found[index] = self.checked(answer)
        return found

    def rendered(self, messages: list[Message]) -> list[int]:
        """The tokens of a chat up to where its next answer starts."""
        text = rendered(messages, self.tokenizer, prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def checked(self, answer: list[int]) -> Answer:
        """The text of an answer's tokens, and what is wrong with it."""
        ended = bool(answer) and answer[-1] in self.ends
        inside = answer[:-1] if ended else answer
        content = str(self.tokenizer.decode(inside, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if not content.strip():
            return Answer(content, "empty")
        if any(token in content for token in special_tokens(self.tokenizer).values()):
            return Answer(content, "parts of the template")
        if repetitive(inside):
            return Answer(content, "repetition")
        return Answer(content, None if ended else "no end")

    @torch.no_grad()
    def _written(self, prompts: list[list[int]], numbers: list[int]) -> list[list[int]]:
        """The tokens of each answer, the one that ends it included."""
        if not prompts:
            return []
        from transformers import GenerationConfig, LogitsProcessorList

        width, padding = max(map(len, prompts)), min(self.ends)
        ids = torch.tensor([[padding] * (width - len(row)) + row for row in prompts])
        keep = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])  # 1 = is read
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=self.sampling.longest, eos_token_id=sorted(self.ends), pad_token_id=padding
        )
        device, before = self.model.device, self.model.generation_config
        # without the model's own settings, which fill in for what is not set: penalties would bend its distribution
        self.model.generation_config = settings
        generate: Any = self.model.generate
        try:
            wrote = generate(
                ids.to(device),
                attention_mask=keep.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_Draw(self.sampling, numbers)]),
            )
        finally:
            self.model.generation_config = before
        return [self._ended(row) for row in wrote[:, width:].tolist()]

    def _ended(self, row: list[int]) -> list[int]:
        first = next((place for place, token in enumerate(row) if token in self.ends), len(row))
        return row[: first + 1]


class _Draw:
    """Leave one token of each row possible: drawn by the row's own generator, or the likeliest."""

    def __init__(self, sampling: AnswerSampling, numbers: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = [generator(sampling.seed, "answer", number) for number in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [rows, vocabulary] -> the same with -inf for all but one of each row."""
        sampling = self.sampling
        chances = token_chances(scores, sampling.temperature or 1.0, sampling.top_p)
        if sampling.temperature == 0:
            tokens = chances.argmax(-1, keepdim=True)
        else:
            tokens = torch.stack([torch.multinomial(row, 1, generator=g) for row, g in zip(chances, self.generators)])
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens.to(scores.device), 0.0)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token that the chat template puts behind an answer; nothing where it puts none."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    text = rendered(chat, tokenizer)
    behind = tokenizer(text.rpartition(MARK)[2], add_special_tokens=False).input_ids
    return set(behind[:1]) & special_tokens(tokenizer).keys()


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that stand for no text, by id: those with a name such as EOS, and others of templates."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))


def repetitive(tokens: Sequence[int]) -> bool:
    """True if hardly any run of GRAM tokens in an answer is new."""
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return len(tokens) >= SHORT and len(set(grams)) < VARIED * len(grams)
