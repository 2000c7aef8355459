"""Answers by the teacher: the same whatever shares their batch, checked, and as ordinary chats in a file."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn
from transformers import AddedToken, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from typer.testing import CliRunner

from llmcompress.cli.app import app
from llmcompress.data import generate, self_data
from llmcompress.data.calibration import calibration_tokens
from llmcompress.data.generate import Answer, Answerer, AnswerSampling, repetitive, turn_end
from llmcompress.data.self_data import Answering, answer, prompts
from llmcompress.errors import (
    DiskError,
    InputError,
    LLMCompressError,
    LockedError,
    MemoryLimitError,
    NumericsError,
    RecipeError,
    Termination,
)
from llmcompress.recipe.calibration import Calibration
from tests.tiers import tiered
from tests.tiny import save_tiny, tiny, tiny_tokenizer

END = 257  # </s>
PROMPTS = ["Why?", "Name a river and a hill.", "x", "How many sacks of corn?", "Who is there?"]


def ending(family: str = "llama", bias: float = 4.0, **changes: Any) -> PreTrainedModel:
    """A model that ends its answers now and then, in printable letters."""
    model = tiny(family, initializer_range=0.3, **changes)
    head = nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.weight = model.get_output_embeddings().weight
    with torch.no_grad():
        head.bias.fill_(-30)
        head.bias[:94] = 0  # letters and signs
        head.bias[END] = bias
    model.set_output_embeddings(head)
    return model


def asked(prompts: list[str]) -> list[tuple[int, list[dict[str, str]]]]:
    return [(number, [{"role": "user", "content": text}]) for number, text in enumerate(prompts)]


def answerer(model: PreTrainedModel | None = None, **sampling: Any) -> Answerer:
    given = {"longest": 12, "top_p": 0.9, **sampling}
    return Answerer(ending() if model is None else model, tiny_tokenizer(), AnswerSampling(**given))


@pytest.mark.parametrize("family", tiered(["llama", "gpt2", "gemma2"], "llama".__eq__))
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_an_answer_does_not_depend_on_its_batch(family: str, temperature: float) -> None:
    writer = answerer(ending(family), temperature=temperature)
    prompts = asked(PROMPTS)
    together = writer.answers(prompts)
    assert together == [writer.answers([prompt])[0] for prompt in prompts]
    assert together[1:3] == writer.answers(prompts[1:3])
    assert temperature == 0 or len({found.content for found in together}) > 3


def test_the_seed_decides() -> None:
    first, same, other = (answerer(seed=seed).answers(asked(PROMPTS)) for seed in (0, 0, 1))
    assert first == same != other
    again = answerer().answers([(7, asked(PROMPTS)[0][1])])
    assert again[0] != first[0]  # another number of the same prompt


def test_chances_are_those_of_the_temperature_of_the_likeliest_tokens() -> None:
    chances = torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.7, 0.1, 0.1, 0.1]])
    of_both = partial(generate.token_chances, chances.log())
    torch.testing.assert_close(of_both(1.0, 1.0), chances)
    torch.testing.assert_close(of_both(2.0, 1.0), chances.sqrt() / chances.sqrt().sum(1, keepdim=True))
    torch.testing.assert_close(of_both(1.0, 0.6), torch.tensor([[0, 0.5, 0, 0.3], [0.7, 0, 0, 0]]))
    cooler = chances**2 / (chances**2).sum(1, keepdim=True)  # the first row has 0.68 and 0.25 then
    torch.testing.assert_close(of_both(0.5, 0.9), cooler * torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]))


def test_chances_of_a_large_vocabulary_are_those_of_sorting_all(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [3.0], [8.0]])
    for rows in (logits, logits[1:]):  # some hold their share in the likeliest tokens, or all do
        few = generate.token_chances(rows, 1.0, 0.95)
        with monkeypatch.context() as patched:
            patched.setattr(generate, "LIKELIEST", 5000)
            assert torch.equal(few, generate.token_chances(rows, 1.0, 0.95))
        assert bool((few.sum(-1) >= 0.95).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_a_loop_that_reads_everything_again(temperature: float) -> None:
    """No cache, no padding: the model reads the whole text for every token."""
    model = ending()
    model.generation_config.repetition_penalty = 5.0  # its own settings must not bend what it says
    writer = answerer(model, temperature=temperature)
    for number, messages in asked(PROMPTS[:3]):
        ids, draw = writer.prompt_tokens(messages), generate.generator(0, "answer", number)
        start = len(ids)
        while len(ids) < start + 12 and (len(ids) == start or ids[-1] != END):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            if temperature == 0:
                ids.append(int(logits.argmax()))
                continue
            chances = generate.token_chances(logits[None], temperature, 0.9)[0]
            ids.append(int(torch.multinomial(chances, 1, generator=draw)))
        [wrote] = writer._generate([ids[:start]], [number])
        assert wrote == ids[start:]
    assert model.generation_config.repetition_penalty == 5.0


def test_every_token_that_ends_a_text_ends_an_answer() -> None:
    assert turn_end(tiny_tokenizer()) == {END}
    model, [letter] = ending(bias=-30), tiny_tokenizer()("A", add_special_tokens=False).input_ids
    with torch.no_grad():
        model.get_output_embeddings().bias[letter] = 100.0  # and nothing else
    assert answerer(model).answers(asked(["x"])) == [Answer("A" * 12, "no end")]
    model.generation_config.eos_token_id = [258, letter]
    assert answerer(model).ends == {letter, 258, END}
    assert answerer(model).answers(asked(["x"])) == [Answer("", "empty")]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(AddedToken("<end>", special=True))  # without a name
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<end>\n{% endfor %}"
    assert turn_end(tokenizer) == set(tokenizer.convert_tokens_to_ids(["<end>"]))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    assert turn_end(tokenizer) == set()


@pytest.mark.parametrize(
    "text, end, fault",
    [
        ("Yes.", True, None),
        ("Yes.", False, "no end"),
        (" \n", True, "empty"),
        ("", True, "empty"),
        ("Yes.<s>assistant\nNo.", True, "parts of the template"),
        ("no, " * 30, True, "repetition"),
        ("Forty farms bring their corn to the mill by the river, and the miller counts every sack.", True, None),
    ],
)
def test_answers_are_checked(text: str, end: bool, fault: str | None) -> None:
    ids = tiny_tokenizer()(text, add_special_tokens=False).input_ids
    assert answerer().judge(ids + [END] * end) == Answer(text, fault)


def test_repetition_needs_length() -> None:
    assert not repetitive([1] * 39) and repetitive([1] * 40) and repetitive([1, 2, 3, 4, 5] * 10)
    assert not repetitive(list(range(40))) and not repetitive([])


# --- files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `model`, and prompts: chats with and without a reference, and one without a question."""
    save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(self_data, "load_model", lambda *_: ending(max_position_embeddings=128))
    chats: list[list[dict[str, str]]] = []
    for number, text in enumerate(PROMPTS * 2):
        chats.append([{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}])
        if number % 2:
            chats[-1].append({"role": "assistant", "content": f"reference {number}"})
    chats.insert(3, [{"role": "assistant", "content": "Hello."}])
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return tmp_path


def request(place: Path, **more: Any) -> Answering:
    given = {"sampling": AnswerSampling(longest=12), "batch": 3}
    return Answering(**({"dataset": str(place / "prompts.jsonl"), **given} | more))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_chats_with_their_origin(place: Path) -> None:
    done = answer(str(place / "model"), request(place), place / "out.jsonl")
    found = lines(place / "out.jsonl")
    assert done.prompts == 10 and done.answers == len(found) > 3 and done.references == 0
    assert done.dropped == 10 - len(found) == sum(done.faults.values()) > 0
    for line in found:
        assert list(line) == ["id", "messages", "source", "checked", "generation"]
        assert [turn["role"] for turn in line["messages"]] == ["system", "user", "assistant"]
        assert line["source"] == "teacher" and line["checked"] and line["generation"] == done.generation
    assert {"model", "revision", "temperature", "top_p", "seed", "versions"} <= done.generation.keys()
    assert {path.name for path in place.iterdir()} == {"model", "prompts.jsonl", "out.jsonl"}
    tokenizer = tiny_tokenizer()
    data = Calibration(dataset=str(place / "out.jsonl"), samples=1, length=150, held_out=0, shuffle=False)
    rendered = "".join(str(tokenizer.apply_chat_template(line["messages"], tokenize=False)) for line in found)
    expected = tokenizer(rendered, add_special_tokens=False).input_ids[:150]
    assert calibration_tokens(data, tokenizer).sequences.tolist() == [expected]


def test_a_model_of_bitsandbytes_answers(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain, folder = save_tiny("llama", tmp_path / "plain", hidden_size=64), tmp_path / "nf4"
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=asked).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": PROMPTS[0]}) + "\n")
    assert answer(str(folder), request(tmp_path), tmp_path / "out.jsonl").prompts == 1


def test_what_was_asked_for_is_answered(place: Path) -> None:
    done = answer(str(place / "model"), request(place, prompts=4, keep_reference=True), place / "out.jsonl")
    assert done.prompts == 4
    for line in lines(place / "out.jsonl"):
        assert line["id"] in (0, 1, 2, 4)  # the third row has no question
        assert line["checked"] == (line["source"] == "teacher") == (line["generation"] is not None)


def test_prompts_of_several_files_are_taken_in_turn(place: Path) -> None:
    for name in "ab":
        rows = [{"text": f"{name}{number}"} for number in range(3)]
        (place / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    asked = request(place, dataset=f"{place}/a.jsonl,{place}/b.jsonl", prompts=3)
    assert [prompt.messages[0]["content"] for prompt in prompts(asked)] == ["a0", "b0", "a1"]


def test_the_reference_takes_the_place_of_what_failed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answerer, "judge", lambda self, ids: Answer("?", "empty"))
    done = answer(str(place / "model"), request(place, keep_reference=True), place / "out.jsonl")
    assert (done.answers, done.references, done.dropped, done.faults) == (0, 5, 5, {"empty": 10})
    found = [line["messages"][-1]["content"] for line in lines(place / "out.jsonl")]
    assert found == [f"reference {number}" for number in (1, 3, 5, 7, 9)]


def test_a_reference_is_shown_and_written_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model reads prompt and reference; the chat that is written has the prompt alone, as students see it."""
    seen: list[list[dict[str, str]]] = []

    def answers(self: Answerer, asked: Sequence[tuple[int, list[dict[str, str]]]]) -> list[Answer]:
        seen.extend(messages for _, messages in asked)
        return [Answer(f"anew {number}") for number, _ in asked]

    monkeypatch.setattr(Answerer, "answers", answers)
    done = answer(str(place / "model"), request(place, rewrite=True), place / "out.jsonl")
    assert (done.answers, done.dropped, done.faults) == (5, 5, {"no reference": 5})
    found = lines(place / "out.jsonl")
    for line, messages in zip(found, seen, strict=True):
        system, prompt, wrote = line["messages"]
        assert messages[0] == system and wrote["content"] == f"anew {line['id']}"
        request_read = messages[1]["content"]
        assert prompt["content"] in request_read and "reference" in request_read and "anew" not in prompt["content"]
    assert {line["source"] for line in found} == {"teacher"}


def test_prompts_may_be_texts_and_too_long(place: Path) -> None:
    texts = [{"prompt": text} for text in (*PROMPTS, "long " * 30)]
    (place / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    done = answer(str(place / "model"), request(place, dataset=str(place / "texts.jsonl")), place / "out.jsonl")
    assert done.prompts == 6 and done.faults["prompt too long"] == 1
    assert all(len(line["messages"]) == 2 for line in lines(place / "out.jsonl"))


class Cut(Exception):
    """An interruption of a run."""


def stop_at(prompts: int, act: Callable[[], None]) -> Callable[[int], None]:
    def report(done: int) -> None:
        if done >= prompts:
            act()

    return report


def cut() -> None:
    raise Cut


def test_a_cut_run_goes_on_and_ends_with_the_same_bytes(place: Path) -> None:
    model, whole, part = str(place / "model"), place / "whole.jsonl", place / "part.jsonl"
    expected = answer(model, request(place), whole)
    with pytest.raises(Cut):
        answer(model, request(place), part, progress=stop_at(6, cut))
    assert not part.exists()
    with (place / "part.jsonl.partial").open("ab") as file:
        file.write(b'{"id": ')  # a line that was under way
    seen: list[int] = []
    again = answer(model, request(place), part, progress=seen.append)
    assert seen == [9, 10] and part.read_bytes() == whole.read_bytes()
    assert again == replace(expected, output=str(part))
    assert not list(place.glob("part.jsonl.*"))


def test_what_a_cut_behind_the_end_leaves_is_in_nobodys_way(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = str(place / "model"), place / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr("llmcompress.models.files.store.Store.remove", lambda *_: cut() if out.exists() else None)
        answer(model, request(place), out)
    written = out.read_bytes()
    out.rename(place / "kept.jsonl")
    answer(model, request(place), out)
    assert out.read_bytes() == written and not list(place.glob("out.jsonl.*"))


def test_a_file_that_appears_meanwhile_stays(place: Path) -> None:
    out = place / "out.jsonl"
    with pytest.raises(DiskError, match="exists already"):
        answer(str(place / "model"), request(place), out, progress=lambda _: None if out.exists() else out.touch())
    assert out.read_bytes() == b""


def test_a_signal_keeps_the_batches_that_are_done(place: Path) -> None:
    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Termination, match=r"answers to 3 prompts are kept in .*, from where the same command resumes"):
        answer(str(place / "model"), request(place), place / "out.jsonl", progress=stop_at(3, terminate))


def test_what_does_not_continue_is_refused(place: Path) -> None:
    model, out = str(place / "model"), place / "out.jsonl"
    with pytest.raises(Cut):
        answer(model, request(place), out, progress=stop_at(6, cut))
    with pytest.raises(InputError, match="out.jsonl.partial.json was left by a different run .settings changed"):
        answer(model, request(place, sampling=AnswerSampling(longest=12, seed=1)), out)
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        path = place / "model" / name
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        with pytest.raises(InputError, match="was left by a different run .model changed"):
            answer(model, request(place), out)
        path.write_bytes(content)
    text = (place / "prompts.jsonl").read_text()
    (place / "prompts.jsonl").write_text(text.replace("Name a river", "Name a brook"))
    with pytest.raises(InputError, match="was left by a different run .prompts changed"):
        answer(model, request(place), out)
    (place / "out.jsonl.partial.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        answer(model, request(place), out)


def test_the_command_says_what_became_of_the_prompts(place: Path) -> None:
    words = ["answer", str(place / "model"), str(place / "prompts.jsonl"), "-o", str(place / "out.jsonl")]
    words += ["--longest", "12", "--batch-size", "4", "--limit", "8", "--seed", "3", "--keep-reference"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    found = lines(place / "out.jsonl")
    teacher = [line for line in found if line["source"] == "teacher"]
    assert f"answers {len(teacher)} to 8 prompts" in shown.stdout and "8 prompts\n" in shown.stderr
    assert teacher[0]["generation"]["seed"] == 3 and {path.name for path in place.glob("out*")} == {"out.jsonl"}


def test_what_cannot_be_answered_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: type[LLMCompressError], words: str, **more: Any) -> None:
        with pytest.raises(kind, match=words):
            answer(str(place / "model"), request(place, **more), place / "out.jsonl")
        assert not (place / "out.jsonl").exists()

    refused(InputError, "there is no file", dataset=str(place / "none.jsonl"))
    (place / "empty.jsonl").write_text('{"messages": [{"role": "system", "content": "Be brief."}]}\n')
    refused(InputError, "empty.jsonl has no prompt", dataset=str(place / "empty.jsonl"))
    refused(RecipeError, "batch is 0", batch=0)
    refused(RecipeError, "temperature -1 and top_p 0.95", sampling=AnswerSampling(temperature=-1))
    with FileLock(place / "out.jsonl.partial.lock"):
        refused(LockedError, "is being written by another process")
    with monkeypatch.context() as patch:
        patch.setattr("llmcompress.models.dense.load.total_memory", lambda: 1)
        refused(MemoryLimitError, "answering holds .*model .* and this machine has 0.0 GB")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        refused(DiskError, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(self_data, "load_model", lambda *_: ending(bias=float("nan")))
        refused(NumericsError, "logits are NaN or infinite while it writes text")
    with monkeypatch.context() as patch:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None
        patch.setattr(self_data, "load_tokenizer", lambda *_: tokenizer)
        refused(RecipeError, "the model has no chat template")
    (place / "there.jsonl").write_text("")
    with pytest.raises(DiskError, match="there.jsonl exists already"):
        answer(str(place / "model"), request(place), place / "there.jsonl")
