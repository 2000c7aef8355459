"""Wherever a model reads text, contexts begin with BOS if the tokenizer puts it there, and BOS is not predicted."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.allocation.sensitivity import probe_windows
from llmcompress.cli.app import app
from llmcompress.data.calibration import CalibrationTokens
from llmcompress.evaluation.adapter_transfer import passport
from llmcompress.evaluation.perplexity import describe_protocol, evaluation_windows, text_windows
from llmcompress.evaluation.protocol import Protocol
from llmcompress.models.dense.tokenizer import load_tokenizer
from llmcompress.pipeline.frontier import frontier
from llmcompress.pipeline.frontier_inputs import budgets
from llmcompress.recipe.read import read_recipe
from scripts.demo import written
from tests.tiers import tiered
from tests.tiny import save_tiny, tiny_tokenizer

BOS = 256
TEXT = "The mill by the river grinds corn, and the miller sleeps. " * 60
PROTOCOL = Protocol(TEXT, windows=2, length=32)
CALIBRATION = {"samples": 4, "length": 48, "held_out": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and one that was compressed from it."""
    place = tmp_path_factory.mktemp("bos")
    save_tiny("llama", place / "dense", hidden_size=64, intermediate_size=96, num_key_value_heads=4)
    (place / "text.txt").write_text(TEXT)
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 4, "group_size": 32}]}]
    recipe = {"version": 1, "calibration": None, "rules": rules, "gates": {"kl": None, "perplexity_ratio": None}}
    lc.compress(place / "dense", recipe, place / "small")
    return place


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The texts that any model reads, as tokens; without what no text is: random tokens, and one at a time."""
    seen: list[Tensor] = []
    printable = torch.tensor(tiny_tokenizer()(string.printable, add_special_tokens=False).input_ids)
    lookup = functional.embedding

    def record(ids: Tensor, *given: Any, **named: Any) -> Tensor:
        if ids.dim() == 2 and ids.shape[1] > 1 and not ids.is_meta and torch.isin(ids[:, 1:], printable).all():
            seen.append(ids.detach().cpu())
        return lookup(ids, *given, **named)

    monkeypatch.setattr(functional, "embedding", record)
    yield seen


def score(place: Path, output: Path) -> None:
    found = lc.score(place / "small", PROTOCOL, against=place / "dense")
    assert found["protocol"]["bos"] is True and found["tokens"] == 2 * 31


def compare(place: Path, output: Path) -> None:
    assert lc.compare([place / "dense", place / "small"], PROTOCOL)["protocol"]["bos"] is True


def score_pairs(place: Path, output: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = Protocol(TEXT, windows=1, length=8, tasks=("llmcompress_pairs",), limit=4)
    lc.score(place / "dense", tasks)


def drift(place: Path, output: Path) -> None:
    found = lc.drift(place / "small", place / "dense", PROTOCOL)
    assert found.tokens == 2 * 31


def verify(place: Path, output: Path) -> None:
    lc.verify(place / "small", against=place / "dense", text=place / "text.txt", windows=1, length=16)


def compress_to_a_size(place: Path, output: Path) -> None:
    """Calibration, prices by predictions, gradients, and gates."""
    recipe = {
        "version": 1,
        "calibration": {"dataset": str(place / "text.txt"), **CALIBRATION},
        "token_weights": {"by": "gradient"},
        "target": {"bpw": 3.6},
        "options": [[{"method": "rtn", "bits": bits, "group_size": 32}] for bits in (2, 4)],
        "damage": "kl",
    }
    lc.compress(place / "dense", recipe, output)


def distill(place: Path, output: Path) -> None:
    data = [{"name": "mill", "dataset": str(place / "text.txt"), "samples": 4, "length": 48, "held_out": 2}]
    recipe = {"version": 1, "data": data, "steps": 1, "batch": 2, "micro_batch": 2, "rates": {"scales": 1e-3}}
    lc.distill(place / "small", place / "dense", recipe, output)


def sweep(place: Path, output: Path) -> None:
    options = [[{"method": "rtn", "bits": bits, "group_size": 32}] for bits in (2, 4)]
    text = {"dataset": str(place / "text.txt"), **CALIBRATION}
    recipe = {"version": 1, "name": "mill", "calibration": text, "target": {"bpw": 3.6}, "options": options}
    frontier(place / "dense", [read_recipe(recipe)], budgets("3.6", None), output, PROTOCOL)


def hand_over(place: Path, output: Path) -> None:
    """An adapter, from the dense model to the compressed one."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(place / "dense"), lora).save_pretrained(output)
    passport(place / "small", [output], place / "dense", PROTOCOL)


def write_sentences(place: Path, output: Path) -> None:
    """The demo's."""
    model = AutoModelForCausalLM.from_pretrained(place / "small")
    assert all(ids[0] == BOS for ids in written(model, load_tokenizer(place / "small")))


READERS = [score, compare, score_pairs, drift, verify, compress_to_a_size, distill, sweep, hand_over, write_sentences]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "reads", tiered(READERS, lambda each: each not in (compress_to_a_size, sweep), lambda each: each.__name__)
)
def test_every_context_begins_with_bos(
    reads: Callable[[Path, Path], None], folders: Path, contexts: list[Tensor], tmp_path: Path
) -> None:
    reads(folders, tmp_path / "out")
    assert contexts, "a model has read"
    for ids in contexts:
        assert (ids[:, 0] == BOS).all(), ids[:, :3].tolist()


def test_windows_have_the_text_behind_bos(folders: Path) -> None:
    tokenizer = load_tokenizer(folders / "dense")
    ids = text_windows(tokenizer, TEXT, 3, 20)
    whole = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert ids.shape == (3, 20) and (ids[:, 0] == BOS).all()
    assert ids[:, 1:].flatten().tolist() == whole[: 3 * 19]
    assert describe_protocol(tokenizer, PROTOCOL)["bos"] is True


def test_the_bos_of_a_chat_template_is_no_text(tmp_path: Path) -> None:
    tokenizer, path = tiny_tokenizer(), tmp_path / "chats.jsonl"
    tokenizer.chat_template = "<s>{% for message in messages %}{{ message['content'] }}.{% endfor %}"
    chats = [{"messages": [{"role": "user", "content": f"The mill {number}"}]} for number in range(9)]
    path.write_text("\n".join(map(json.dumps, chats)))
    ids = evaluation_windows(tokenizer, Protocol(path, windows=2, length=34))
    assert tokenizer.batch_decode(ids) == [
        "<s>The mill 0.The mill 1.The mill 2.",
        "<s>The mill 3.The mill 4.The mill 5.",
    ]


def test_a_tokenizer_that_puts_none_reads_plain_windows() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    ids = text_windows(tokenizer, TEXT, 3, 20)
    assert ids.flatten().tolist() == tokenizer(TEXT, add_special_tokens=False).input_ids[:60]
    assert "bos" not in json.dumps(describe_protocol(tokenizer, PROTOCOL))


@pytest.mark.parametrize("bos", [True, False])
def test_windows_of_calibration_begin_as_its_sequences(bos: bool) -> None:
    text = torch.arange(3 * 300).reshape(3, 300)
    text[:, 0] = BOS if bos else text[:, 0]
    tokens = CalibrationTokens(text, 2, "text", 3, bos=bos)
    windows = tokens.held_out_windows(100)
    assert windows.shape == (2, 3, 100)
    for sequence, parts in zip(text[1:], windows):
        behind = parts[:, 1:] if bos else parts
        assert (parts[:, 0] == BOS).all() or not bos
        assert torch.equal(behind.flatten(), sequence[int(bos) :][: behind.numel()])
    assert tokens.held_out_windows(10**6).shape == (2, 1, 300)
    assert (probe_windows(tokens)[:, 0] == BOS).all() or not bos


def test_the_command_line_and_the_page_say_so(folders: Path, tmp_path: Path) -> None:
    words = ["eval", str(folders / "small"), "--against", str(folders / "dense"), "--text", str(folders / "text.txt")]
    shown = CliRunner().invoke(app, [*words, "--windows", "2", "--length", "32", "--save"])
    assert "over 62 tokens, each window behind BOS" in " ".join(shown.output.split())
    page = CliRunner().invoke(app, ["report", str(folders / "small"), "-o", str(tmp_path / "page.html")])
    assert page.exit_code == 0
    assert "each window behind BOS" in (tmp_path / "page.html").read_text(encoding="utf-8")
