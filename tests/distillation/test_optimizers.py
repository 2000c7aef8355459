"""8-bit optimizers: near AdamW while they run, exact when they resume; and running out of memory, in one sentence."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llmcompress as lc
from llmcompress.distillation import requirements, train
from llmcompress.distillation.optimizers import moments, optimizer_of, put_moments
from llmcompress.distillation.requirements import advise_on_memory, check_requirements
from llmcompress.distillation.run import distill
from llmcompress.errors import InputError, MemoryLimitError, RecipeError
from llmcompress.recipe.distillation import Distillation
from tests.distillation import miniature
from tests.tiny import save_tiny

EIGHT_BIT = Distillation(optimizer="adamw_8bit")
PAGED = Distillation(optimizer="paged_adamw_8bit")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="an extra")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` model with a matrix of 4096 numbers and more, a `small` one made from it, and a text."""
    place = tmp_path_factory.mktemp("optimizers")
    save_tiny("llama", place / "dense", num_hidden_layers=1, intermediate_size=160)
    (place / "text.txt").write_text("".join(f"{i}. {miniature.TEXT}" for i in range(80)))
    rules = [{"match": "*", "steps": [{"method": "rtn", "bits": 2, "group_size": 16}]}]
    lc.compress(place / "dense", {"version": 1, "rules": rules}, place / "small")
    return place


def recipe(folders: Path, **more: Any) -> dict[str, Any]:
    return miniature.recipe(
        folders, **{"rates": {"codes": 1e-2, "scales": 5e-3}, "evaluate_every": 3, "steps": 6} | more
    )


def parameters() -> list[nn.Parameter]:
    """One that is kept in 8 bits, one that is too small for it."""
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=random)) for size in (5000, 10)]


def steps(optimizer: torch.optim.Optimizer, given: list[nn.Parameter], count: int, seed: int = 1) -> None:
    random = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(count):
        for value in given:
            value.grad = value.detach() + 0.1 * torch.randn(value.shape, generator=random)
        optimizer.step()


@needs_bitsandbytes
def test_eight_bit_steps_stay_near_adamw() -> None:
    start, exact, coarse = parameters(), parameters(), parameters()
    for given, asked in ((exact, Distillation()), (coarse, EIGHT_BIT)):
        steps(optimizer_of(asked, [{"params": [value]} for value in given]), given, 20)
    for before, one, other in zip(start, exact, coarse, strict=True):
        assert (one - other).norm() < 0.05 * (one - before).norm()
    assert torch.allclose(exact[1], coarse[1], atol=1e-5), "moments of few numbers stay in 32 bits"


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("asked", [Distillation(), EIGHT_BIT, PAGED], ids=lambda asked: asked.optimizer)
def test_restored_moments_continue_to_the_bit(asked: Distillation) -> None:
    whole = parameters()
    optimizer = optimizer_of(asked, [{"params": [value]} for value in whole])
    steps(optimizer, whole, 3)
    saved = [{key: value.clone() for key, value in moments(optimizer, one).items()} for one in whole]
    again = [nn.Parameter(value.detach().clone()) for value in whole]
    other = optimizer_of(asked, [{"params": [value]} for value in again])
    for value, found in zip(again, saved, strict=True):
        put_moments(other, value, found)
    steps(optimizer, whole, 3, seed=2)
    steps(other, again, 3, seed=2)
    assert all(map(torch.equal, whole, again))
    for one, two in zip(whole, again, strict=True):
        state, same = optimizer.state[one], other.state[two]
        assert state.keys() == same.keys() and all(torch.as_tensor(state[key] == same[key]).all() for key in state)


@pytest.mark.slow
@needs_bitsandbytes
def test_an_interrupted_eight_bit_run_resumes_exactly(folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, optimizer="adamw_8bit", save_every=3)
    whole = distill(folders / "small", folders / "dense", asked, tmp_path / "whole")
    assert whole.history[-1]["kl"] < whole.history[0]["kl"]

    miniature.cut_short(folders, asked, tmp_path / "cut", calls=4)
    again = distill(folders / "small", folders / "dense", asked, tmp_path / "cut")
    assert [row["kl"] for row in again.history] == [row["kl"] for row in whole.history]
    assert miniature.weight_files(tmp_path / "whole") == miniature.weight_files(tmp_path / "cut")


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paging_changes_no_number() -> None:
    """Paging does nothing without a GPU, so the steps and what is remembered are those of `adamw_8bit`."""
    asked = (EIGHT_BIT, PAGED)
    whole, paged = parameters(), parameters()
    built: list[Any] = [optimizer_of(one, [{"params": given}]) for one, given in zip(asked, (whole, paged))]
    first, other = built
    assert other.is_paged and not first.is_paged
    for optimizer, given in ((first, whole), (other, paged)):
        steps(optimizer, given, 5)
    for one, two in zip(whole, paged, strict=True):
        assert torch.equal(one, two)
        ours, theirs = moments(first, one), moments(other, two)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_missing_requirements_of_an_optimizer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: object())
    with pytest.raises(RecipeError, match="paged_adamw_8bit requires a GPU to page memory from.*use adamw_8bit"):
        check_requirements(PAGED, "cpu")
    check_requirements(PAGED, "cuda:1")
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r'adamw_8bit requires bitsandbytes; run pip install "llmcompress\[distill\]"'
    ):
        check_requirements(EIGHT_BIT, "cpu")
    check_requirements(Distillation(), "cpu")


# --- memory, text, teachers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "Python"],
)
def test_out_of_memory_errors_name_settings_that_help(
    error: Exception, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise error

    monkeypatch.setattr(train, "take_step", exhausted)
    sentence = (
        "there is not enough memory for this training; set a micro_batch below 2 or checkpointing: true or a lower "
        "data.length, and rerun"
    )
    with pytest.raises(MemoryLimitError) as found:
        distill(folders / "small", folders / "dense", recipe(folders), tmp_path / "out")
    assert str(found.value) == sentence and found.value.exit_code == 7
    tried = Distillation(checkpointing=True, micro_batch=1)
    with pytest.raises(MemoryLimitError, match="training; set a lower data.length, and"), advise_on_memory(tried):
        raise error


def test_other_errors_keep_their_names() -> None:
    with pytest.raises(RuntimeError, match="sizes"), advise_on_memory(Distillation()):
        raise RuntimeError("The sizes of tensors must match")


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("empty.txt", b"", "is empty; give a file or data set with text"),
        ("blank.txt", b" \n\n \n", "is empty; give a file or data set with text"),
        ("bytes.txt", b"\xff\xfe\x00\x01", "is not UTF-8 text"),
        ("rows.jsonl", b'{"text": "a farm"}\nno json\n', "line 2 is not JSON"),
        ("rows.jsonl", b'{"count": 3}\n', "name the one with the text as `column`"),
        ("short.txt", b"Forty farms. " * 40, "gives 16 of 28 sequences of 32 tokens"),
    ],
    ids=["empty", "blank", "binary", "not json", "no text", "more than there is"],
)
def test_text_that_cannot_serve_is_refused(
    name: str, content: bytes, sentence: str, folders: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    asked = recipe(folders)
    asked["data"]["dataset"] = str(tmp_path / name)
    with pytest.raises(InputError, match=sentence) as found:
        distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    assert found.value.exit_code == 5 and "\n" not in str(found.value)


@pytest.mark.slow
def test_a_compressed_teacher_teaches_with_a_warning(folders: Path, tmp_path: Path) -> None:
    asked = recipe(folders, steps=1, latents="teacher")
    done = distill(folders / "small", folders / "small", asked, tmp_path / "out")
    assert done.history[0]["kl"] < 1e-6 and "the teacher is compressed too" in done.warnings[0]


@pytest.mark.slow
def test_missing_kinds_are_warned_of_at_once_and_in_the_report(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []

    def progress(*_: object) -> None:
        said.extend(caplog.messages)

    rates = {"scales": 1e-3, "factors": 1e-3, "weights": 1e-3}
    asked = recipe(folders, steps=1, rates=rates, controls=["no_teacher"])
    done = distill(folders / "small", folders / "dense", asked, tmp_path / "out", progress=progress)
    wanted = "rates: the student has no factors and no weights to train; the rest learns alone"
    assert done.warnings == (wanted,) and wanted in said
    assert caplog.messages.count(wanted) == 1, "a control repeats nothing"
    assert done.trained["scales"] > 0


def test_missing_kinds_are_warned_of_where_blocks_train_alone(
    folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = recipe(folders, steps=1, rates={"scales": 1e-3, "factors": 1e-3}, phases=[{"kind": "blockwise"}])
    done = distill(folders / "small", folders / "dense", asked, tmp_path / "out")
    wanted = "rates: the student has no factors to train; the rest learns alone"
    assert done.warnings == (wanted,) and wanted in caplog.messages


def test_another_tokenizer_is_refused(folders: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = save_tiny("llama", tmp_path / "other", num_hidden_layers=1, intermediate_size=160)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["farm"])
    tokenizer.save_pretrained(other)
    with pytest.raises(
        InputError, match="have different vocabularies: token 258 is missing in .* and 'farm' in .*other"
    ):
        distill(folders / "small", other, recipe(folders), tmp_path / "out")
