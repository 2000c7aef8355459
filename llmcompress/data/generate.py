"""Text that a model writes: calibration text without any data, continuations of sequences, and answers to prompts.

Calibration text is sampled at temperature 1, so that it follows the model's own distribution, which a compressed model
has to keep (LLM-QAT, arXiv 2305.17888, section 3.1). A row of its batch is a stream of documents: when the model ends
one, the start of the next is fed in while the other rows go on sampling. So rows never pad and one cache serves all.

A continued sequence, and an answer, has random numbers of its own, so its neighbours change nothing but the rounding of
sums. Prompts of answers are padded on the left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import count
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llmcompress.data.chat import render_chat, special_tokens
from llmcompress.data.columns import Message
from llmcompress.errors import NumericsError, RecipeError
from llmcompress.models.dense.config import context_length
from llmcompress.runtime.progress import count_steps
from llmcompress.runtime.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOTHING = -1  # behind the end of a sequence that a model went on with
ROWS = 16  # sequences written side by side; part of what the seed means
LIKELIEST = 1024  # tokens that mostly hold `top_p`: sorting a whole vocabulary takes ten times as long
MARK = "llmcompress"  # an answer whose end is looked for in the chat template
GRAM, SHORT, VARIED = 4, 40, 0.25  # tokens; below so many nothing is called repetition; the least share of new grams
PROMPTS = (
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "What are the main causes of inflation?",
    "Give me a recipe for vegetable soup.",
    "Write a Python function that counts the words in a text.",
    "Summarize the life of a honey bee.",
    "How do I prepare for a job interview?",
    "Describe the water cycle to a ten-year-old.",
    "Compare trains and airplanes for a trip of 500 kilometres.",
    "Write a polite letter that asks a landlord to repair a window.",
    "Who were the Vikings, and how did they live?",
    "Solve step by step: a shop sells 3 pens for 4 dollars. What do 12 pens cost?",
    "What should I know before I adopt a dog?",
    "Write a poem about the first snow.",
    "How does a computer store a photograph?",
    "Plan a weekend in a city by the sea.",
    "What is the difference between a virus and a bacterium?",
    "Tell me about an important invention of the nineteenth century.",
    "How can I save energy at home?",
    "Write a dialogue between a teacher and a curious student about the moon.",
)


@dataclass(frozen=True)
class TextSampling:
    """The text to write: `sequences` of `length` tokens each."""

    sequences: int
    length: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, eq=False)
class TeacherText:
    """sequences: int64 [n, length]. bos: each starts with the BOS token. eos: documents in them end with EOS."""

    sequences: Tensor
    documents: int
    kind: str
    bos: bool
    eos: bool


def teacher_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: TextSampling,
    chat: Literal["auto"] | bool = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> TeacherText:
    """Return sequences that `model` writes: free text after BOS (chat false), answers to prompts (true), or in turn.

    The same seed gives the same text on one machine and library version; the global random state is left alone.
    Raises RecipeError for a tokenizer without a token to start from, NumericsError for NaN in the model's output.
    """
    if chat is True and not tokenizer.chat_template:
        raise RecipeError("calibration.chat_template is true, but the tokenizer has no chat template; set it to false")
    kinds = ["free text"] if chat is not True else []
    kinds += ["answers to prompts"] if tokenizer.chat_template and chat is not False else []
    starts = [
        _starts(tokenizer, row, prompted=kinds[row % len(kinds)] != "free text") for row in range(sampling.sequences)
    ]
    generator = torch.Generator().manual_seed(sampling.seed)
    total = sampling.sequences * sampling.length
    batches, documents = [], 0
    step = count_steps("position written", -(-sampling.sequences // ROWS) * sampling.length)
    for first in range(0, sampling.sequences, ROWS):
        rows = starts[first : first + ROWS]

        def report(position: int, before: int = first * sampling.length, width: int = len(rows)) -> None:
            step()
            if progress is not None:
                progress(before + position * width, total)

        tokens, begun = _write_rows(model, tokenizer, rows, sampling, generator, report)
        batches.append(tokens)
        documents += begun
    sequences = torch.cat(batches)
    bos = tokenizer.bos_token_id is not None and bool((sequences[:, 0] == tokenizer.bos_token_id).all())
    return TeacherText(sequences, documents, " and ".join(kinds), bos, eos=tokenizer.eos_token_id is not None)


def _starts(tokenizer: PreTrainedTokenizerBase, row: int, prompted: bool) -> Iterator[list[int]]:
    """Yield the starts of the documents of one row, without end."""
    for document in count(row):
        if prompted:
            message = [{"role": "user", "content": PROMPTS[document % len(PROMPTS)]}]
            yield tokenizer(render_chat(message, tokenizer, prompt=True), add_special_tokens=False).input_ids
            continue
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise RecipeError(
                "the model cannot write calibration text: its tokenizer has neither a BOS nor an EOS token to start "
                "from; calibrate on dataset 'builtin' or on a file"
            )
        yield [start]


@torch.no_grad()
def _write_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    starts: list[Iterator[list[int]]],
    sampling: TextSampling,
    generator: torch.Generator,
    report: Callable[[int], None],
) -> tuple[Tensor, int]:
    """Return int64 [len(starts), length], and the number of documents that were begun."""
    ends = end_tokens(model, tokenizer)
    forced = [deque(next(start)) for start in starts]  # tokens that are fed in rather than sampled
    documents = len(starts)
    rows: list[list[int]] = [[] for _ in starts]
    sampled = [0] * len(starts)
    cache = None
    name = _cache_name(model)
    for position in range(sampling.length):
        for row, queue in enumerate(forced):
            if queue:
                rows[row].append(queue.popleft())
                continue
            rows[row].append(sampled[row])
            if sampled[row] in ends and position + 1 < sampling.length:
                start = next(starts[row])
                queue.extend(start if start != [sampled[row]] else [])  # EOS may be what a document starts with, too
                documents += 1
        report(position + 1)
        if position + 1 < sampling.length:
            read = torch.tensor([row if cache is None else row[-1:] for row in rows], device=model.device)
            output = model(input_ids=read, use_cache=True, **{name: cache})
            cache = getattr(output, name, None)
            chances = token_chances(output.logits[:, -1], sampling.temperature, sampling.top_p)
            sampled = torch.multinomial(chances, 1, generator=generator).squeeze(-1).tolist()
    return torch.tensor(rows, dtype=torch.int64), documents


def _cache_name(model: PreTrainedModel) -> str:
    """Return the name of the cache in a model's arguments and outputs; state space models have another.

    A model whose outputs have none reads all its text again for every token.
    """
    return "cache_params" if "cache_params" in signature(model.forward).parameters else "past_key_values"


def token_chances(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return the chances of the next token, [rows, vocabulary], up to a factor; 0 beyond those that hold `top_p`.

    On the CPU in float32, so that a generator's draw means the same on every device. Raises NumericsError for NaN.
    """
    logits = logits_BV.to("cpu", torch.float32)
    if not bool(logits.isfinite().all()):
        raise NumericsError("the model's logits are NaN or infinite while it writes text; check its weights")
    chances = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = chances.topk(min(LIKELIEST, chances.shape[-1]))
        if bool((ordered.sum(-1) < top_p).any()):
            ordered, index = chances.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        chances = torch.zeros_like(chances).scatter_(-1, index, ordered)
    return chances


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> set[int]:
    """Return every token that ends a document: those of the generation config, and a tokenizer's EOS."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    own = None if tokenizer is None else tokenizer.eos_token_id
    ends = [*(configured if isinstance(configured, list) else [configured]), own]
    return {token for token in ends if token is not None}


@torch.no_grad()
def continue_sequences(
    model: PreTrainedModel, ids: Tensor, lengths: Tensor, ends: set[int], temperature: float, seeds: Sequence[str]
) -> Tensor:
    """Let `model` go on with sequences `ids` -> int64 [sequences, length], NOTHING behind a token that ends one.

    `lengths`: tokens of each that stay, [sequences]; `seeds`: the name that seeds the random numbers of each.
    """
    ids, length = ids.clone(), ids.shape[1]
    drawing, ended = [generator(seed) for seed in seeds], torch.zeros(len(ids), dtype=torch.bool)
    cache, begin, name = None, 0, _cache_name(model)
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    for place in range(int(lengths.min()), length):
        output = model(input_ids=ids[:, begin:place].to(model.device), use_cache=True, **{name: cache}, **last)
        cache = getattr(output, name, None)
        begin = 0 if cache is None else place
        chances = token_chances(output.logits[:, -1], temperature, 1.0)
        own = (lengths <= place) & ~ended
        for row in own.nonzero().flatten().tolist():
            ids[row, place] = torch.multinomial(chances[row], 1, generator=drawing[row])
        ended |= own & torch.tensor([int(token) in ends for token in ids[:, place]])
        if bool(ended.all()):
            break
    closing = torch.isin(ids, torch.tensor(sorted(ends), dtype=torch.int64))
    closing &= torch.arange(length) >= lengths[:, None]
    return ids.masked_fill(closing.int().cumsum(1) - closing.int() > 0, NOTHING)


@dataclass(frozen=True)
class AnswerSampling:
    """The drawing of an answer: `longest` tokens at most, its end included; at temperature 0 the likeliest ones."""

    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0
    longest: int = 512


@dataclass(frozen=True)
class Answer:
    """An answer without the token that ends it; `fault`: the reason not to use it, None for a good one."""

    content: str
    fault: str | None = None


class Answerer:
    """A model and its tokenizer that answer prompts. Raises RecipeError for those without a chat template."""

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
        ids = [self.prompt_tokens(messages) for _, messages in prompts]
        has_room = [self.context is None or len(row) + self.sampling.longest <= self.context for row in ids]
        fitting = [index for index, fits in enumerate(has_room) if fits]
        wrote = self._generate([ids[index] for index in fitting], [prompts[index][0] for index in fitting])
        answers = [Answer("", "prompt too long")] * len(ids)
        for index, answer in zip(fitting, wrote, strict=True):
            answers[index] = self.judge(answer)
        return answers

    def prompt_tokens(self, messages: list[Message]) -> list[int]:
        """Return the tokens of a chat up to where its next answer starts."""
        text = render_chat(messages, self.tokenizer, prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def judge(self, answer: list[int]) -> Answer:
        """Return the text of an answer's tokens, and its fault."""
        is_ended = bool(answer) and answer[-1] in self.ends
        inside = answer[:-1] if is_ended else answer
        content = str(self.tokenizer.decode(inside, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if not content.strip():
            return Answer(content, "empty")
        if any(token in content for token in special_tokens(self.tokenizer).values()):
            return Answer(content, "parts of the template")
        if repetitive(inside):
            return Answer(content, "repetition")
        return Answer(content, None if is_ended else "no end")

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], numbers: list[int]) -> list[list[int]]:
        """Return the tokens of each answer, up to the token that ends it."""
        if not prompts:
            return []
        from transformers import GenerationConfig, LogitsProcessorList

        width, padding = max(map(len, prompts)), min(self.ends)
        ids = torch.tensor([[padding] * (width - len(row)) + row for row in prompts])
        is_read = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
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
                attention_mask=is_read.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([_Draw(self.sampling, numbers)]),
            )
        finally:
            self.model.generation_config = before
        rows = wrote[:, width:].tolist()
        ends = [next((place for place, token in enumerate(row) if token in self.ends), len(row)) for row in rows]
        return [row[: end + 1] for row, end in zip(rows, ends)]


class _Draw:
    """A logits processor that leaves one token of each row possible: drawn by the row's generator, or the likeliest."""

    def __init__(self, sampling: AnswerSampling, numbers: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = [generator(sampling.seed, "answer", number) for number in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [rows, vocabulary] with -inf for all but one token of each row."""
        sampling = self.sampling
        if sampling.temperature == 0:
            tokens = token_chances(scores, 1.0, 1.0).argmax(-1, keepdim=True)
        else:
            chances = token_chances(scores, sampling.temperature, sampling.top_p)
            tokens = torch.stack([torch.multinomial(row, 1, generator=g) for row, g in zip(chances, self.generators)])
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens.to(scores.device), 0.0)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special token that the chat template puts behind an answer, if any."""
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    text = render_chat(chat, tokenizer)
    behind = tokenizer(text.rpartition(MARK)[2], add_special_tokens=False).input_ids
    return set(behind[:1]) & special_tokens(tokenizer).keys()


def repetitive(tokens: Sequence[int]) -> bool:
    """True if hardly any run of GRAM tokens in an answer is new."""
    grams = [tuple(tokens[start : start + GRAM]) for start in range(len(tokens) - GRAM + 1)]
    return len(tokens) >= SHORT and len(set(grams)) < VARIED * len(grams)
