"""Turns: who is asked when, what a worker answers, how its death is told, and what is made of the seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import llmcompress.benchmark.runners
from llmcompress.benchmark.candidate import Candidate
from llmcompress.benchmark.measure import TurnTaker, take_turns
from llmcompress.benchmark.protocol import WARM_UP, SpeedProtocol, parse_threads
from llmcompress.benchmark.runners import generate, llama_times
from llmcompress.benchmark.summary import NO_PEAK, summary
from llmcompress.benchmark.worker import Worker, answers
from llmcompress.errors import InputError, LLMCompressError, MemoryLimitError, RecipeError
from tests.tiny import save_tiny, tiny

PROMPT = [5, 250, 7, 3, 99, 140, 8]


@pytest.fixture
def same_threads() -> Iterator[None]:
    """The number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_the_loop_chooses_what_transformers_chooses(family: str) -> None:
    model = tiny(family)
    found, times = generate(model, PROMPT, 12)
    asked = GenerationConfig(max_new_tokens=13, min_new_tokens=13, do_sample=False, pad_token_id=0, eos_token_id=None)
    [expected] = model.generate(torch.tensor([PROMPT]), generation_config=asked)[:, len(PROMPT) :].tolist()
    assert found == expected
    assert (times.prompt, times.tokens, times.threads) == (7, 12, torch.get_num_threads())


def test_seconds_are_those_between_the_parts() -> None:
    ticks = iter([10.0, 11.0, 13.0, 17.0])
    times = generate(tiny("llama"), PROMPT, 3, lambda: next(ticks))[1]
    assert (times.prefill, times.first_token, times.decode) == (1.0, 3.0, 4.0)
    assert not list(ticks), "the clock is not read between tokens"


def test_seconds_of_llama_cpp_leave_out_the_first_token() -> None:
    timings = {"prompt_n": 512, "prompt_ms": 8000.0, "predicted_n": 9, "predicted_ms": 400.0}
    times = llama_times(timings, 2)
    assert times.tokens / times.decode == 20.0 and times.prompt / times.prefill == 64.0
    assert (times.threads, times.first_token) == (2, 8.0)


# --- the order ------------------------------------------------------------------------------------------------------


def turn_takers(log: list[tuple[str, int, int]], threads: int | None = None) -> list[TurnTaker]:
    """Memory, two models, and a GGUF file with a process for each number of threads; `threads`: all they ever use."""

    def taker(name: str, model: int | None, *counts: int) -> TurnTaker:
        def ask(request: dict[str, Any]) -> dict[str, Any]:
            assert request["ask"] == "turn" and request["prompt"] == PROMPT
            log.append((name, request["threads"], request["tokens"]))
            return {"threads": threads or request["threads"]}

        return TurnTaker(model, counts, ask, {})

    return [
        taker("memory", None, 1, 2),
        taker("a", 0, 1, 2),
        taker("b", 1, 1, 2),
        taker("one", 2, 1),
        taker("two", 2, 2),
    ]


def test_models_are_asked_in_turn_and_every_other_round_backwards() -> None:
    log: list[tuple[str, int, int]] = []
    done: list[tuple[str, int, int]] = []
    protocol = SpeedProtocol(threads=(1, 2), prompt=7, tokens=20, rounds=2)
    found = list(take_turns(turn_takers(log), protocol, PROMPT, lambda *given: done.append(given)))
    forth = [["memory", "a", "b", "one"], ["memory", "a", "b", "two"]]
    back = [names[::-1] for names in forth]
    expected = [
        (name, threads, tokens)
        for order, tokens in ((back, WARM_UP), (forth, 20), (back, 20))
        for threads, names in zip((1, 2), order)
        for name in names
    ]
    assert log == expected
    assert [(turn["round"], turn["threads"]) for turn in found] == [
        (number, threads) for number in range(3) for threads in (1, 2) for _ in range(4)
    ]
    assert {turn["model"] for turn in found} == {None, 0, 1, 2}
    assert done == [("round", 0, 2), ("round", 1, 2), ("round", 2, 2)]


def test_other_threads_than_asked_for_are_not_passed_over() -> None:
    protocol = SpeedProtocol(threads=(2,), prompt=7)
    with pytest.raises(RecipeError, match="2 threads were asked for, and 1 computed"):
        list(take_turns(turn_takers([], threads=1), protocol, PROMPT))


# --- a worker -------------------------------------------------------------------------------------------------------


def test_a_worker_loads_sets_its_threads_and_tells_its_memory(tmp_path: Path, same_threads: None) -> None:
    folder = save_tiny("llama", tmp_path / "dense")
    load = {"ask": "load", "engine": "transformers", "name": "dense", "path": str(folder), "dtype": "bfloat16"}
    turns = [{"ask": "turn", "threads": threads, "prompt": PROMPT, "tokens": 3} for threads in (2, 1)]
    loaded, two, one, memory = answers([load, *turns, {"ask": "memory"}])
    assert (two["threads"], one["threads"], torch.get_num_threads()) == (2, 1, 1)
    assert (one["prompt"], one["tokens"]) == (7, 3) and 0 < one["prefill"] <= one["first_token"]
    assert loaded["dtype"] == "bfloat16" and loaded["load_seconds"] > 0
    assert loaded["empty"] > 0 and loaded["resident"] <= 1.05 * loaded["peak_loading"]
    assert memory["peak"] >= 0.95 * loaded["resident"]
    json.dumps([loaded, two, one, memory])


@pytest.mark.slow
def test_a_compressed_model_keeps_its_own_dtype(tmp_path: Path, same_threads: None) -> None:
    folder = save_tiny("llama", tmp_path / "dense")  # in float32, as a config says
    load = {"ask": "load", "engine": "transformers", "name": "dense", "path": str(folder), "dtype": None}
    assert next(answers([load]))["dtype"] == "float32"


@pytest.mark.slow
def test_memory_is_a_model_too(same_threads: None) -> None:
    _, turn = answers([{"engine": "memory", "name": "m", "bytes": 2**20}, {"ask": "turn", "threads": 1} | EMPTY])
    assert turn["threads"] == 1 and turn["bandwidth"] > 0


EMPTY: dict[str, Any] = {"prompt": [], "tokens": 0}


@pytest.mark.slow
def test_an_error_is_the_last_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path / "dense")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    load = {"engine": "transformers", "name": "dense", "path": str(folder), "dtype": "bfloat16"}
    [answer] = answers([load, {"ask": "memory"}])
    assert answer["error"] == "InputError" and "model.safetensors is damaged" in answer["message"]

    def full(size: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(llmcompress.benchmark.runners, "BandwidthMeter", full)
    [answer] = answers([{"engine": "memory", "name": "the buffer", "bytes": 1}])
    assert (answer["error"], answer["message"]) == ("MemoryLimitError", "there is not enough memory for the buffer")


ECHO = "import sys\nfor line in sys.stdin:\n    sys.stdout.write(line); sys.stdout.flush()"


def test_a_worker_answers_until_it_is_let_go() -> None:
    with Worker("a", program=ECHO) as worker:
        for number in range(3):
            assert worker.ask({"number": number}) == {"number": number}
        process = worker._process
    assert process.returncode == 0


def test_a_worker_that_is_stuck_is_ended_with_what_asked_it() -> None:
    program = "import signal, time; print('{}', flush=True); time.sleep(600)"
    with pytest.raises(ZeroDivisionError), Worker("a", program=program) as worker:
        worker.ask({})
        process = worker._process
        raise ZeroDivisionError
    assert process.returncode == -9


@pytest.mark.parametrize(
    ("program", "kind", "message"),
    [
        ("import sys; sys.exit('first\\nof all: a reason')", LLMCompressError, "exit code 1 .of all: a reason.;"),
        ("import os; input(); os.kill(os.getpid(), 9)", MemoryLimitError, "the system killed the process .* tiny"),
        ("import os; input(); os.abort()", LLMCompressError, "that measured tiny ended by SIGABRT; measure it alone"),
        ("input(); print('{\"half', end='')", LLMCompressError, "ended with exit code 0"),
        ('print(\'{"error": "InputError", "message": "it is gone"}\')', InputError, "^it is gone$"),
    ],
)
def test_the_death_of_a_worker_is_one_sentence(program: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), Worker("tiny", program=program) as worker:
        worker.ask({"ask": "load"})
    assert worker._process.returncode is not None


def test_a_worker_has_the_environment_of_its_parent_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMETHING", "else")
    program = "import json, os; input(); print(json.dumps([os.environ.get(n) for n in ('SOMETHING', 'MORE')]))"
    with Worker("a", {"MORE": "0"}, program) as worker:
        worker._process.stdin.write("\n")
        assert json.loads(worker._process.communicate()[0]) == ["else", "0"]


# --- sums -----------------------------------------------------------------------------------------------------------


def candidate(name: str, token_bytes: int) -> Candidate:
    return Candidate(name, "dense", Path(name), 2 * token_bytes, 16.0, 16.0, token_bytes, 264, 64, "bfloat16")


def held(resident: int, peak: int, restarted: bool = True) -> dict[str, Any]:
    own = {"empty": 100, "resident": resident, "peak": peak, "peak_loading": resident, "peak_of_generation": restarted}
    return own | {"load_seconds": 1.5, "dtype": "bfloat16"}


def turns(model: int | None, decode: Sequence[float], threads: int = 1) -> list[dict[str, Any]]:
    """Turns of 10 tokens each, the first one in round 0."""
    rest = {"threads": threads, "prompt": 6, "tokens": 10}
    return [
        {"round": number, "model": model, "decode": seconds, "prefill": 2.0, "first_token": 3.0 + number, **rest}
        for number, seconds in enumerate(decode)
    ]


def test_medians_ratios_and_shares_are_taken_round_by_round() -> None:
    mine, other = [9.0, 1.0, 2.0, 10.0], [9.0, 5.0, 4.0, 10.0]
    read = [1.0, 100.0, 400.0, 200.0]
    memory = [{"round": number, "model": None, "threads": 1, "bandwidth": value} for number, value in enumerate(read)]
    found = summary(
        [candidate("dense", 40), candidate("small", 20)],
        [*memory, *turns(0, other), *turns(1, mine)],
        [held(1100, 2100), held(600, 500, restarted=False)],
        "dense",
        30,
        4096,
    )
    dense, small = found["models"]
    speed = small["threads"]["1"]
    assert speed["decode"] == {"median": 5.0, "lowest": 1.0, "highest": 10.0}, "round 0 does not count"
    ratios = [5.0 / 1.0, 4.0 / 2.0, 10.0 / 10.0]
    assert speed["ratios"]["decode"] == {"median": 2.0, "lowest": 1.0, "highest": 5.0}
    assert median(ratios) != speed["decode"]["median"] / dense["threads"]["1"]["decode"]["median"]
    shares = [20 * 10.0 / 100, 20 * 5.0 / 400, 20 * 1.0 / 200]
    assert speed["bandwidth_share"] == {"median": shares[1], "lowest": shares[2], "highest": shares[0]}
    assert dense["threads"]["1"]["ratios"]["decode"]["median"] == 1.0
    assert speed["prefill"]["median"] == 3.0 and speed["first_token_seconds"]["median"] == 5.0
    assert small["first_ever_seconds"] == 3.0
    assert small["ratios"] == {"bytes": 0.5, "resident": 0.5, "peak": 0.2}
    assert found["bandwidth"]["threads"]["1"] == {"median": 200.0, "lowest": 100.0, "highest": 400.0}
    assert [note for note in found["notes"] if NO_PEAK in note] == [f"small: {NO_PEAK}"]
    assert [note.partition(":")[0] for note in found["notes"] if "fits into" in note] == ["small"]


def test_without_a_reference_there_are_no_ratios() -> None:
    memory = [{"round": number, "model": None, "threads": 1, "bandwidth": 1.0} for number in range(2)]
    found = summary([candidate("a", 1)], [*memory, *turns(0, [1.0, 1.0])], [held(1, 1)], None, None, 1)
    assert found["against"] is found["models"][0]["ratios"] is found["models"][0]["threads"]["1"]["ratios"] is None
    assert found["notes"] == []


# --- what is asked for ----------------------------------------------------------------------------------------------


def test_threads() -> None:
    assert parse_threads(None, 1) == (1,) and parse_threads(None, 6) == (1, 6)
    assert parse_threads("2, 1,2", 8) == (2, 1)
    for text, message in (("0", "cannot be measured"), ("1,-2", "cannot be"), ("two", "not whole"), ("", "not whole")):
        with pytest.raises(RecipeError, match=message):
            parse_threads(text, 2)


@pytest.mark.parametrize("changes", [{"threads": ()}, {"rounds": 0}, {"prompt": 0}, {"tokens": 0}, {"dtype": "int8"}])
def test_protocols_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        SpeedProtocol(**({"threads": (1,)} | changes))
